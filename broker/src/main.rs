//! credbrokerd: a thin shell around the library.

use std::process::ExitCode;

use clap::Parser as _;
use credbroker_broker::cli::Cli;
use credbroker_broker::exit::Exit;
use credbroker_zeroing::ZeroOnFree;

#[global_allocator]
static ALLOCATOR: ZeroOnFree = ZeroOnFree;

fn main() -> ExitCode {
    match Cli::try_parse() {
        Ok(cli) => credbroker_broker::main(&cli.command).into(),
        Err(answer) => {
            // --help and --version come this way too, and go to standard output.
            let exit = if answer.use_stderr() { Exit::Usage } else { Exit::Ok };
            let _ = answer.print();
            exit.into()
        }
    }
}
