//! `credbroker completions`: a script that teaches a shell this command line.

use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use crate::args::Cli;
use crate::failure::Failure;

/// Print the completion script of a shell
#[derive(Args, Debug)]
pub(crate) struct Completions {
    /// Which shell
    #[arg(value_enum)]
    shell: Shell,
}

pub(crate) fn run(command: &Completions) -> Result<ExitCode, Failure> {
    // `generate` panics when it cannot write, so it writes to memory.
    let mut script = Vec::new();
    clap_complete::generate(command.shell, &mut Cli::command(), "credbroker", &mut script);
    io::stdout().lock().write_all(&script).map_err(|error| Failure::output(&error))?;
    Ok(ExitCode::SUCCESS)
}
