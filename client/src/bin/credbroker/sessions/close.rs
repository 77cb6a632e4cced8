//! `credbroker sessions close`: ends a session.

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use crate::args::Global;
use crate::failure::Failure;

const ID_PREFIX: &str = "ses_";

/// End a session; when this returns, it is dead
#[derive(Args, Debug)]
pub(crate) struct Close {
    /// The session's id (ses_…)
    id: String,
}

#[derive(Serialize)]
struct View {
    closed: bool,
}

pub(crate) fn run(command: &Close, global: &Global) -> Result<ExitCode, Failure> {
    if !command.id.starts_with(ID_PREFIX) {
        return Err(Failure::usage(
            "a session's id begins with ses_; `credbroker sessions` shows them",
        ));
    }
    global.with_admin(async |admin| Ok(admin.close_session(&command.id).await?))?;
    global.output.print(&View { closed: true }, || "closed".into())?;
    Ok(ExitCode::SUCCESS)
}
