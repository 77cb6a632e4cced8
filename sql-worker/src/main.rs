//! The binary: see the library's documentation.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    credbroker_sql_worker::cli::main()
}
