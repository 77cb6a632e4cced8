//! `credbroker reload`: the broker reads its configuration again.

use std::process::ExitCode;

use serde::Serialize;

use crate::args::Global;
use crate::failure::Failure;
use crate::output::plain;

#[derive(Serialize)]
struct View<'a> {
    reloaded: bool,
    handles_revoked: u32,
    sessions_cut: u32,
    changes: &'a [String],
}

pub(crate) fn run(global: &Global) -> Result<ExitCode, Failure> {
    let done = global.with_admin(async |admin| Ok(admin.reload().await?))?;
    let (handles, sessions) = (done.cut.handles, done.cut.sessions);
    let view = View {
        reloaded: true,
        handles_revoked: handles,
        sessions_cut: sessions,
        changes: &done.changes,
    };
    global.output.print(&view, || {
        let head = format!("reloaded, handles revoked: {handles}, sessions cut: {sessions}");
        let changes = done.changes.iter().map(|change| format!("  {}", plain(change)));
        [head].into_iter().chain(changes).collect::<Vec<_>>().join("\n")
    })?;
    Ok(ExitCode::SUCCESS)
}
