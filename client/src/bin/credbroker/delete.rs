//! `credbroker delete`: forgets a credential that was put.

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use crate::args::Global;
use crate::failure::Failure;

/// Forget the credential that was put for a connection, and cut what is open on it (operators)
#[derive(Args, Debug)]
pub(crate) struct Delete {
    /// Name of the connection
    name: String,
}

#[derive(Serialize)]
struct View {
    deleted: bool,
    sessions_cut: u32,
}

pub(crate) fn run(command: &Delete, global: &Global) -> Result<ExitCode, Failure> {
    let sessions_cut =
        global.with_admin(async |admin| Ok(admin.delete_credential(&command.name).await?))?;
    let view = View { deleted: true, sessions_cut };
    global.output.print(&view, || format!("deleted, sessions cut: {sessions_cut}"))?;
    Ok(ExitCode::SUCCESS)
}
