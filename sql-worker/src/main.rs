//! The binary: see the library's documentation.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use credbroker_zeroing::ZeroOnFree;

/// What a caller sends may be a password, and no library leaves it behind.
#[global_allocator]
static ALLOCATOR: ZeroOnFree = ZeroOnFree;

fn main() -> ExitCode {
    credbroker_sql_worker::cli::main()
}
