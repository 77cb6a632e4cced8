//! `credbroker`: the command line of users, of operators, and of programs that take a database
//! login from their environment.
//!
//! What it is not: privileged. It speaks to the broker's sockets like any other client, and
//! sees no credential but one that an operator types into `put` or `entry`.
//!
//! | module | what it has |
//! | --- | --- |
//! | `args` | the options that all commands share, and what a command line must not hold |
//! | `exec`, `handle`, `whoami`, `list`, `completions` | one command each, for everybody |
//! | `put`, `entry`, `show`, `delete`, `validate` | one command each, for operators: a connection |
//! | `status`, `sessions`, `suspend`, `resume`, `explain`, `audit`, `reload` | and the broker |
//! | `prompt` | asks for a secret on the terminal, without echo |
//! | `output` | tables for people, one JSON document for programs |
//! | `failure` | every way to fail, with its exit code |
//! | `sys` | the unsafe code |

mod args;
mod audit;
mod completions;
mod delete;
mod entry;
mod exec;
mod explain;
mod failure;
mod handle;
mod list;
mod output;
mod prompt;
mod put;
mod reload;
mod resume;
mod sessions;
mod show;
mod status;
mod suspend;
mod sys;
mod validate;
mod whoami;

use std::env;
use std::process::ExitCode;

use clap::Parser as _;
use credbroker_zeroing::ZeroOnFree;

use crate::args::{Cli, Command};
use crate::failure::Exit;
use crate::output::Output;

#[global_allocator]
static ALLOCATOR: ZeroOnFree = ZeroOnFree;

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
        Command::List => list::run(&cli.global),
        Command::Status => status::run(&cli.global),
        Command::Show(command) => show::run(&command, &cli.global),
        Command::Put(command) => put::run(&command, &cli.global),
        Command::Entry(command) => entry::run(&command, &cli.global),
        Command::Delete(command) => delete::run(&command, &cli.global),
        Command::Validate(command) => validate::run(&command, &cli.global),
        Command::Suspend(command) => suspend::run(command, &cli.global),
        Command::Resume(command) => resume::run(command, &cli.global),
        Command::Sessions(command) => sessions::run(command, &cli.global),
        Command::Explain(command) => explain::run(command, &cli.global),
        Command::Audit(command) => audit::run(&command, &cli.global),
        Command::Reload => reload::run(&cli.global),
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
