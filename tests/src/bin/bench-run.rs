//! Runs the measurements, each in a process of its own, and writes the report. `tests/bench.sh`
//! builds what it needs and calls it.
#![allow(clippy::panic, reason = "a measurement that fails, fails loudly")]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use clap::{Parser, Subcommand};
use credbroker_e2e::bench::{
    Machine, Measurement, Mode, Outcome, Subject, serve_echo, serve_echo_by_task, serve_empty,
    serve_relay, write_report,
};

#[derive(Parser)]
struct Arguments {
    /// What to measure; everything when nothing is named.
    subjects: Vec<Subject>,
    /// Few and short rounds.
    #[arg(long)]
    quick: bool,
    /// Where results are kept: what is not measured now is told from there.
    #[arg(long, default_value = "target/bench")]
    results: PathBuf,
    /// The report; the chart is written beside it.
    #[arg(long, default_value = "tests/BENCHMARKS.md")]
    report: PathBuf,
    /// The commit that is measured.
    #[arg(long, default_value = "unknown")]
    commit: String,
    #[command(subcommand)]
    role: Option<Role>,
}

/// What this program is as a process of its own.
#[derive(Subcommand)]
#[command(disable_help_subcommand = true)]
enum Role {
    /// Measures one subject and prints the outcome.
    #[command(hide = true)]
    Measure {
        subject: Subject,
        #[arg(long)]
        quick: bool,
        #[arg(long)]
        pinned: bool,
    },
    #[command(hide = true)]
    ServeEcho { path: PathBuf, reply: usize, kind: String },
    #[command(hide = true)]
    ServeRelay { listen: PathBuf, upstream: PathBuf },
    #[command(hide = true)]
    ServeEmpty { path: PathBuf, log: Option<PathBuf> },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match &arguments.role {
        None => return run(&arguments),
        Some(Role::Measure { subject, quick, pinned }) => {
            let outcome = subject.measure(Mode { quick: *quick, pinned: *pinned });
            let json = serde_json::to_vec(&outcome).expect("an outcome can be written");
            std::io::stdout().write_all(&json).expect("somebody reads");
        }
        Some(Role::ServeEcho { path, reply, kind }) => match kind.as_str() {
            "task" => serve_echo_by_task(path, *reply),
            kind => serve_echo(path, *reply, kind == "descriptor"),
        },
        Some(Role::ServeRelay { listen, upstream }) => serve_relay(listen, upstream),
        Some(Role::ServeEmpty { path, log }) => serve_empty(path, log.as_deref()),
    }
    ExitCode::SUCCESS
}

fn run(arguments: &Arguments) -> ExitCode {
    let subjects: &[Subject] =
        if arguments.subjects.is_empty() { &Subject::ALL } else { &arguments.subjects };
    fs::create_dir_all(&arguments.results).expect("a directory for the results");
    let machine = Machine::here();
    let mut failed = false;
    for subject in subjects {
        say(&format!("== {subject:?} {}", subject.title()));
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let mode = Mode { quick: arguments.quick, pinned: false };
        let mut outcome = measure(*subject, mode);
        if subject.is_pinned_too() {
            outcome.extend(measure(*subject, Mode { pinned: true, ..mode }));
        }
        failed |= outcome.has_failed();
        let measurement = Measurement {
            subject: *subject,
            date: now(),
            commit: arguments.commit.clone(),
            load: load.split(' ').next().unwrap_or_default().to_owned(),
            quick: arguments.quick,
            machine: machine.clone(),
            outcome,
        };
        let json = serde_json::to_vec_pretty(&measurement).expect("a measurement can be written");
        fs::write(kept(&arguments.results, *subject), json).expect("the results can be kept");
    }
    let measured: Vec<Measurement> = Subject::ALL
        .into_iter()
        .filter_map(|subject| fs::read(kept(&arguments.results, subject)).ok())
        .filter_map(|json| serde_json::from_slice(&json).ok())
        .collect();
    write_report(&arguments.report, &measured).expect("the report can be written");
    say(&format!("written to {}", arguments.report.display()));
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// In a process of its own, which is all that is pinned, and all that can fail.
fn measure(subject: Subject, mode: Mode) -> Outcome {
    let program = std::env::current_exe().expect("this program");
    let mut command = Command::new(program);
    command.arg("measure").arg(format!("{subject:?}"));
    command.args(mode.quick.then_some("--quick")).args(mode.pinned.then_some("--pinned"));
    let done = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let done = done.expect("this program starts again");
    if !done.status.success() {
        return Outcome::failed(mode, &format!("it ended with {}", done.status));
    }
    serde_json::from_slice(&done.stdout).expect("an outcome")
}

fn kept(results: &Path, subject: Subject) -> PathBuf {
    results.join(format!("{subject:?}.json"))
}

fn now() -> String {
    let date = Command::new("date").args(["-u", "+%F %H:%M"]).output().expect("date(1)");
    String::from_utf8_lossy(&date.stdout).trim().to_owned()
}

fn say(text: &str) {
    let _unheard = writeln!(std::io::stderr(), "{text}");
}
