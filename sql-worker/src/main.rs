//! The binary: see the library's documentation.

/// What a caller sends may be a password, and no library leaves it behind. The command line has it
/// for the same reason.
#[path = "../../client/src/bin/credbroker/zeroing.rs"]
mod zeroing;

use std::process::ExitCode;

use crate::zeroing::ZeroOnFree;

#[global_allocator]
static ALLOCATOR: ZeroOnFree = ZeroOnFree;

fn main() -> ExitCode {
    credbroker_sql_worker::cli::main()
}
