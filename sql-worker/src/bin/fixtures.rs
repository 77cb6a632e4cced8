//! The worker with what a conformance suite calls: for tests, and named so that nobody ships it.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    credbroker_sql_worker::cli::main()
}
