//! `credbroker sessions`: live sessions, and their ends.

mod close;
mod list;

use std::process::ExitCode;

use clap::{Args, Subcommand};

use crate::args::Global;
use crate::failure::Failure;

/// List live sessions, or close one (operators)
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Sessions {
    #[command(flatten)]
    list: list::List,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    Close(close::Close),
}

pub(crate) fn run(command: Sessions, global: &Global) -> Result<ExitCode, Failure> {
    match command.command {
        None => list::run(&command.list, global),
        Some(Command::Close(command)) => close::run(&command, global),
    }
}
