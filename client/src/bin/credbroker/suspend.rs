//! `credbroker suspend`: cuts everything on a connection, and lets nothing new be opened.

use std::process::ExitCode;

use clap::Args;
use credbroker_client::Scope;
use serde::Serialize;

use crate::args::Global;
use crate::failure::Failure;

/// Cut everything on a connection, and open nothing new until `resume` (operators)
///
/// When this returns, the sessions are dead.
#[derive(Args, Debug)]
pub(crate) struct Suspend {
    #[command(flatten)]
    scope: ScopeArgs,
}

/// One connection, or all.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub(crate) struct ScopeArgs {
    /// Name of the connection
    name: Option<String>,
    /// All that there are and will be
    #[arg(long)]
    all: bool,
}

impl ScopeArgs {
    pub(crate) fn into_scope(self) -> Scope {
        self.name.map_or(Scope::All, Scope::Connection)
    }
}

#[derive(Serialize)]
struct View<'a> {
    handles_revoked: u32,
    sessions_cut: u32,
    persistent: bool,
    problem: Option<&'a str>,
}

pub(crate) fn run(command: Suspend, global: &Global) -> Result<ExitCode, Failure> {
    let scope = command.scope.into_scope();
    let done = global.with_admin(async |admin| Ok(admin.suspend(scope).await?))?;
    let problem = Some(done.problem.as_str()).filter(|problem| !problem.is_empty());
    let view = View {
        handles_revoked: done.cut.handles,
        sessions_cut: done.cut.sessions,
        persistent: done.persistent,
        problem,
    };
    global.output.print(&view, || {
        let (handles, sessions) = (done.cut.handles, done.cut.sessions);
        format!("suspended, handles revoked: {handles}, sessions cut: {sessions}")
    })?;
    if !done.persistent {
        let why = problem.map(|problem| format!(": {problem}")).unwrap_or_default();
        global.output.warn(&format!("this will not hold when the broker starts again{why}"));
    } else if let Some(problem) = problem {
        global.output.warn(problem);
    }
    Ok(ExitCode::SUCCESS)
}
