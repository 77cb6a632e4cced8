//! `credbroker show`: a connection as an operator sees it, and what else shows one.

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::Args;
use credbroker_client::{AdminConnection, CredentialInfo, OpenBreaker};
use serde::Serialize;

use crate::args::Global;
use crate::failure::Failure;
use crate::output::{age, from_now, pairs, rfc3339, yes_or_no};

/// Show a connection, masked (operators)
#[derive(Args, Debug)]
pub(crate) struct Show {
    /// Name of the connection
    name: String,
}

#[derive(Serialize)]
struct View<'a> {
    name: &'a str,
    r#type: &'a str,
    target: &'a str,
    source: &'a str,
    credential: Option<CredentialView<'a>>,
    suspended: bool,
    sessions: u32,
    handles: u32,
}

#[derive(Serialize)]
struct CredentialView<'a> {
    version: u64,
    since: String,
    expires_at: Option<String>,
    labels: &'a BTreeMap<String, String>,
    persistent: bool,
    breaker: Option<BreakerView>,
}

#[derive(Serialize)]
struct BreakerView {
    open_until: String,
    refusals: u32,
}

pub(crate) fn run(command: &Show, global: &Global) -> Result<ExitCode, Failure> {
    let connection =
        global.with_admin(async |admin| Ok(admin.connection(&command.name).await?))?;
    let view = View {
        name: &connection.name,
        r#type: &connection.kind,
        target: &connection.target,
        source: &connection.source,
        credential: connection.credential.as_ref().map(credential_view),
        suspended: connection.suspended,
        sessions: connection.sessions,
        handles: connection.handles,
    };
    global.output.print(&view, || text(&connection))?;
    Ok(ExitCode::SUCCESS)
}

fn credential_view(credential: &CredentialInfo) -> CredentialView<'_> {
    CredentialView {
        version: credential.version,
        since: rfc3339(credential.since),
        expires_at: credential.expires_at.map(rfc3339),
        labels: &credential.labels,
        persistent: credential.persistent,
        breaker: credential.breaker.map(|open| BreakerView {
            open_until: rfc3339(open.open_until),
            refusals: open.refusals,
        }),
    }
}

fn text(connection: &AdminConnection) -> String {
    let mut rows = vec![
        ("name", connection.name.clone()),
        ("type", connection.kind.clone()),
        ("target", connection.target.clone()),
        ("source", connection.source.clone()),
    ];
    match &connection.credential {
        None => rows.push(("credential", "missing".into())),
        Some(credential) => {
            let since = credential.since;
            let version = credential.version;
            let age = age(since);
            rows.push(("credential", format!("version {version}, {} ({age} ago)", rfc3339(since))));
            rows.push(("kept", kept(credential.persistent).into()));
            if let Some(at) = credential.expires_at {
                rows.push(("expires", format!("{} ({})", rfc3339(at), from_now(at))));
            }
            if let Some(open) = credential.breaker {
                rows.push(("breaker", breaker(open)));
            }
            let labels = credential.labels.iter();
            rows.extend(labels.map(|(key, value)| ("label", format!("{key}={value}"))));
        }
    }
    rows.extend([
        ("suspended", yes_or_no(connection.suspended)),
        ("sessions", connection.sessions.to_string()),
        ("handles", connection.handles.to_string()),
    ]);
    pairs(&rows)
}

/// What keeps a credential from being tried.
fn breaker(open: OpenBreaker) -> String {
    let until = match from_now(open.open_until) {
        past if past == "past" => "the next login tries it".to_owned(),
        ahead => format!("not tried until {} ({ahead})", rfc3339(open.open_until)),
    };
    let times = if open.refusals == 1 { "once".into() } else { format!("{} times", open.refusals) };
    format!("open: the server has refused it {times}; {until}")
}

/// Where a credential is kept.
pub(crate) fn kept(persistent: bool) -> &'static str {
    if persistent { "beyond the broker's end" } else { "in memory, until the broker ends" }
}
