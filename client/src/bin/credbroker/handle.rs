//! `credbroker handle`: handles by hand.

mod issue;
mod list;
mod revoke;

use std::process::ExitCode;

use clap::{Args, Subcommand};

use crate::args::Global;
use crate::failure::Failure;

/// Issue, list and revoke handles
#[derive(Args, Debug)]
pub(crate) struct Handle {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Issue(issue::Issue),
    /// List the live handles that you hold or may redeem
    List,
    Revoke(revoke::Revoke),
}

pub(crate) fn run(command: Handle, global: &Global) -> Result<ExitCode, Failure> {
    match command.command {
        Command::Issue(command) => issue::run(command, global),
        Command::List => list::run(global),
        Command::Revoke(command) => revoke::run(command, global),
    }
}
