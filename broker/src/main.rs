//! credbrokerd: a thin shell around the library.

use std::process::ExitCode;

use clap::Parser as _;
use credbroker_broker::arena::zeroing::ZeroOnFree;
use credbroker_broker::cli::Cli;

#[global_allocator]
static ALLOCATOR: ZeroOnFree = ZeroOnFree;

fn main() -> ExitCode {
    credbroker_broker::main(&Cli::parse().command).into()
}
