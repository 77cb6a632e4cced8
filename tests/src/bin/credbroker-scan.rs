//! Looks for a secret in running processes: memory, environment, command line, open files.
//!
//! The secret comes from standard input, so that the search does not itself put it on a command
//! line. Exit status: 0 nothing found, 1 found, 2 could not look.
#![allow(clippy::print_stdout, reason = "a report for people")]

use std::io::{self, Read as _};
use std::process::ExitCode;

use clap::Parser;
use credbroker_e2e::canary::Canary;
use credbroker_e2e::memory;

/// Search processes for a secret that is given on standard input.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The processes to search.
    #[arg(required = true)]
    pids: Vec<u32>,
    /// Count copies in the arena too, where it can be read at all.
    #[arg(long)]
    arena: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(1),
        Err(error) => {
            println!("cannot look: {error}");
            ExitCode::from(2)
        }
    }
}

/// Gives the number of copies.
fn run(arguments: &Arguments) -> io::Result<usize> {
    let mut secret = String::new();
    io::stdin().read_to_string(&mut secret)?;
    let patterns = Canary::known(secret.trim_end_matches('\n')).patterns();
    let mut copies = 0;
    for pid in &arguments.pids {
        let found = memory::scan(*pid, &patterns)?;
        let around = memory::scan_surroundings(*pid, &patterns)?;
        let counted = found.hits.iter().filter(|hit| arguments.arena || !hit.in_arena());
        copies += counted.clone().count() + around.len();
        for hit in counted {
            println!("{pid}: {} at {:#x} in {}", hit.form, hit.address, hit.mapping);
        }
        for place in around {
            println!("{pid}: {place}");
        }
        println!("{pid}: {} bytes of memory searched", found.bytes_read);
    }
    Ok(copies)
}
