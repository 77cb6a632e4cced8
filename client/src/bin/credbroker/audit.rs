//! `credbroker audit`: the audit log.

mod verify;

use std::process::ExitCode;

use clap::{Args, Subcommand};

use crate::args::Global;
use crate::failure::Failure;

/// Verify the audit log
#[derive(Args, Debug)]
pub(crate) struct Audit {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Verify(verify::Verify),
}

pub(crate) fn run(command: &Audit, global: &Global) -> Result<ExitCode, Failure> {
    match &command.command {
        Command::Verify(command) => verify::run(command, global),
    }
}
