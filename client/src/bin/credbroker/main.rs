//! `credbroker`: the command line of users, and of programs that take a database login from
//! their environment.
//!
//! What it is not: privileged. It speaks to the broker's socket like any other client, and
//! sees no credential.
//!
//! | module | what it has |
//! | --- | --- |
//! | `args` | the options that all commands share, and what a command line must not hold |
//! | `exec`, `handle`, `whoami`, `list`, `audit`, `completions` | one command each |
//! | `output` | tables for people, one JSON document for programs |
//! | `failure` | every way to fail, with its exit code |
//! | `sys` | the unsafe code |

mod args;
mod audit;
mod completions;
mod exec;
mod failure;
mod handle;
mod list;
mod output;
mod sys;
mod whoami;

use std::env;
use std::process::ExitCode;

use clap::Parser as _;

use crate::args::{Cli, Command};
use crate::failure::Exit;
use crate::output::Output;

fn main() -> ExitCode {
    if let Err(failure) = args::refuse_tokens(env::args_os().skip(1)) {
        return failure.report(Output::Text);
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let output = cli.global.output;
    let outcome = match cli.command {
        Command::Exec(command) => exec::run(&command, &cli.global),
        Command::Handle(command) => handle::run(command, &cli.global),
        Command::Whoami => whoami::run(&cli.global),
        Command::Audit(command) => audit::run(&command, &cli.global),
        Command::List => list::run(&cli.global),
        Command::Completions(command) => completions::run(&command),
    };
    outcome.unwrap_or_else(|failure| failure.report(output))
}

/// Help and version are answers; everything else that clap says is a usage error.
fn usage(error: &clap::Error) -> ExitCode {
    // A closed stdout or stderr leaves nobody to tell.
    let _unheard = error.print();
    if error.use_stderr() { Exit::Usage.into() } else { ExitCode::SUCCESS }
}
