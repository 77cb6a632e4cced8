//! `credbroker resume`: ends a suspension.

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use crate::args::Global;
use crate::failure::Failure;
use crate::suspend::ScopeArgs;

/// Let new sessions be opened on a suspended connection again (operators)
#[derive(Args, Debug)]
pub(crate) struct Resume {
    #[command(flatten)]
    scope: ScopeArgs,
}

#[derive(Serialize)]
struct View<'a> {
    resumed: bool,
    still_suspended: &'a [String],
}

pub(crate) fn run(command: Resume, global: &Global) -> Result<ExitCode, Failure> {
    let scope = command.scope.into_scope();
    let still_suspended = global.with_admin(async |admin| Ok(admin.resume(scope).await?))?;
    let view = View { resumed: true, still_suspended: &still_suspended };
    global.output.print(&view, || "resumed".into())?;
    if !still_suspended.is_empty() {
        global.output.warn(&format!("still suspended: {}", still_suspended.join(" ")));
    }
    Ok(ExitCode::SUCCESS)
}
