//! `credbroker sessions`: live sessions, and those that are being opened.

use std::process::ExitCode;

use clap::Args;
use credbroker_client::SessionInfo;
use serde::Serialize;

use crate::args::Global;
use crate::failure::Failure;
use crate::output::{age, or_dash, rfc3339, table};

#[derive(Args, Debug)]
pub(crate) struct List {
    /// Those of this connection
    #[arg(long, value_name = "NAME")]
    connection: Option<String>,
    /// At most so many, the oldest first
    #[arg(long, value_name = "N", default_value_t = 100,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
}

#[derive(Serialize)]
struct View<'a> {
    sessions: Vec<SessionView<'a>>,
    total: u32,
}

#[derive(Serialize)]
struct SessionView<'a> {
    id: &'a str,
    connection: &'a str,
    handle: Option<&'a str>,
    uid: u32,
    pid: Option<u32>,
    since: String,
    live: bool,
    credential_version: u64,
    database: &'a str,
    subject: &'a str,
    mode: &'a str,
}

pub(crate) fn run(command: &List, global: &Global) -> Result<ExitCode, Failure> {
    let connection = command.connection.as_deref();
    let list = global
        .with_admin(async |admin| Ok(admin.list_sessions(connection, command.limit).await?))?;
    let view = View { sessions: list.sessions.iter().map(view).collect(), total: list.total };
    global.output.print(&view, || text(&list.sessions))?;
    if list.sessions.len() < usize::try_from(list.total).unwrap_or(usize::MAX) {
        global.output.warn(&format!("there are {}; --limit shows more", list.total));
    }
    Ok(ExitCode::SUCCESS)
}

fn view(session: &SessionInfo) -> SessionView<'_> {
    SessionView {
        id: &session.id,
        connection: &session.connection,
        handle: session.handle.as_deref(),
        uid: session.uid,
        pid: session.pid,
        since: rfc3339(session.since),
        live: session.live,
        credential_version: session.credential_version,
        database: &session.database,
        subject: &session.subject,
        mode: &session.mode,
    }
}

fn text(sessions: &[SessionInfo]) -> String {
    let rows: Vec<_> = sessions.iter().map(row).collect();
    let header = [
        "ID",
        "CONNECTION",
        "DATABASE",
        "UID",
        "PID",
        "AGE",
        "STATE",
        "MODE",
        "CREDENTIAL",
        "HANDLE",
        "SUBJECT",
    ];
    table(header, &rows)
}

fn row(session: &SessionInfo) -> [String; 11] {
    [
        session.id.clone(),
        session.connection.clone(),
        or_dash(Some(&session.database)),
        session.uid.to_string(),
        or_dash(session.pid),
        age(session.since),
        if session.live { "live" } else { "opening" }.to_owned(),
        or_dash(Some(&session.mode)),
        format!("v{}", session.credential_version),
        or_dash(session.handle.as_deref()),
        or_dash(Some(&session.subject)),
    ]
}
