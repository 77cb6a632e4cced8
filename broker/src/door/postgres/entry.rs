//! What coming in has in common, whichever way it is: through the door, or for the socket itself.

#![forbid(unsafe_code)]

use std::time::Instant;

use super::backend::{Authenticated, LoginFault, LoginRequest, log_in};
use super::codec::Startup;
use super::fault;
use crate::connection::Connection;
use crate::core::{Opening, Why};
use crate::door::login::UpstreamFault;
use crate::upstream::Link;

/// What of a startup message the connection's configuration does not allow.
pub(super) fn objection(startup: &Startup, connection: &Connection) -> Option<Why> {
    if let Some(replication) = &startup.replication
        && !connection.replication
        && !is_false(replication)
    {
        return Some(Why::Unsupported("replication (set replication = true for the connection)"));
    }
    let refused = startup.parameters.iter().any(|(name, _)| !connection.startup.allows(name));
    refused.then_some(Why::InvalidRequest {
        field: "startup parameters",
        must: "be among those that the connection's `startup` key allows",
    })
}

/// What the server is told: all that the client set, but not who it is.
fn parameters(startup: &Startup) -> Vec<(String, String)> {
    let mut parameters = startup.parameters.clone();
    if let Some(replication) = startup.replication.as_ref().filter(|value| !is_false(value)) {
        parameters.push(("replication".to_owned(), replication.clone()));
    }
    parameters
}

/// Logs in to the server with the opening's credential, unless the client is `gone` first.
pub(super) async fn log_in_for(
    startup: &Startup,
    opening: &Opening,
    gone: impl Future<Output = ()>,
) -> Result<Authenticated, UpstreamFault> {
    let connection = opening.connection();
    let parameters = parameters(startup);
    let request = LoginRequest {
        credential: opening.credential(),
        database: opening.database().as_str(),
        parameters: &parameters,
    };
    let began = Instant::now();
    let login = async { log_in(Link::dial(connection).await?, request).await };
    let answer = tokio::select! {
        answer = login => answer,
        () = gone => return Err(UpstreamFault::Abandoned),
    };
    if answer.is_ok() {
        opening.metrics().upstream_connect(&connection.name, began.elapsed());
    }
    answer.map_err(|fault| upstream_fault(fault, opening))
}

/// A proven server's own words are the client's to read; everything else is told in ours.
fn upstream_fault(fault: LoginFault, opening: &Opening) -> UpstreamFault {
    let connection = &opening.connection().name;
    let (reason, why) = fault::explain(&fault, connection);
    opening.metrics().upstream_error(connection, reason);
    match fault {
        LoginFault::Server { message, .. } => UpstreamFault::Theirs(message),
        LoginFault::Dial(_)
        | LoginFault::Link(_)
        | LoginFault::Untrusted(_)
        | LoginFault::Refused(_)
        | LoginFault::Unproven(_) => UpstreamFault::Ours { reason, why },
    }
}

/// As the server reads a boolean setting.
fn is_false(value: &str) -> bool {
    ["0", "off", "no", "false", "f", "n"].iter().any(|word| word.eq_ignore_ascii_case(value))
}
