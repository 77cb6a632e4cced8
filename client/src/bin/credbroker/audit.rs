//! `credbroker audit`: the audit log.

mod tail;
mod verify;

use std::process::ExitCode;

use clap::{Args, Subcommand};

use crate::args::Global;
use crate::failure::Failure;

/// Follow or verify the audit log
#[derive(Args, Debug)]
pub(crate) struct Audit {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Tail(tail::Tail),
    Verify(verify::Verify),
}

pub(crate) fn run(command: &Audit, global: &Global) -> Result<ExitCode, Failure> {
    match &command.command {
        Command::Tail(command) => tail::run(command, global),
        Command::Verify(command) => verify::run(command, global),
    }
}
