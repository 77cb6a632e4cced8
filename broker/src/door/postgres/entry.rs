//! What coming in has in common, whichever way it is: through the door, or for the socket itself.

#![forbid(unsafe_code)]

use std::time::Instant;

use super::attempt;
use super::backend::{Authenticated, LoginFault};
use super::codec::{Parameter, Startup};
use super::fault;
use super::spares::Spares;
use crate::connection::Connection;
use crate::core::{Opening, SettingName, Why};
use crate::door::login::UpstreamFault;

/// What of a startup message the connection's configuration does not allow.
pub(super) fn objection(startup: &Startup, connection: &Connection) -> Option<Why> {
    if let Some(replication) = &startup.replication
        && !connection.replication
        && !is_false(replication)
    {
        return Some(Why::Unsupported("replication (set replication = true for the connection)"));
    }
    let mut names = startup.parameters.iter().map(|(name, _)| name);
    let refused = names.find(|name| !connection.startup.allows(name))?;
    Some(Why::SettingRefused(SettingName::parse(refused)))
}

/// What the server is told: all that the client set, but not who it is.
pub(super) fn parameters(startup: &Startup) -> Vec<Parameter> {
    let mut parameters = startup.parameters.clone();
    if let Some(replication) = startup.replication.as_ref().filter(|value| !is_false(value)) {
        parameters.push(("replication".to_owned(), replication.clone().into_bytes()));
    }
    parameters
}

/// A link that waits for just this client, or else a login with the opening's credential, unless
/// the client is `gone` first.
pub(super) async fn log_in_for(
    startup: &Startup,
    opening: &Opening,
    spares: &Spares,
    gone: impl Future<Output = ()>,
) -> Result<Authenticated, UpstreamFault> {
    let parameters = parameters(startup);
    if let Some(spare) = spares.take(opening, &parameters).await {
        return Ok(spare);
    }
    let began = Instant::now();
    let answer = tokio::select! {
        answer = attempt::log_in_for(opening, &parameters) => answer,
        () = gone => return Err(UpstreamFault::Abandoned),
    };
    if answer.is_ok() {
        opening.metrics().upstream_connect(&opening.connection().name, began.elapsed());
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
        | LoginFault::Refused { .. }
        | LoginFault::Held { .. }
        | LoginFault::Unproven(_) => UpstreamFault::Ours { reason, why },
    }
}

/// As the server reads a boolean setting.
fn is_false(value: &str) -> bool {
    ["0", "off", "no", "false", "f", "n"].iter().any(|word| word.eq_ignore_ascii_case(value))
}
