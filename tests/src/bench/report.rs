//! The report: what was reached of the goals, and the figures behind it.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Check, Machine, Outcome, Subject, chart};

/// A subject that was measured.
#[derive(Debug, Serialize, Deserialize)]
pub struct Measurement {
    /// What.
    pub subject: Subject,
    /// When, in UTC.
    pub date: String,
    /// The commit that was measured.
    pub commit: String,
    /// The load of the machine before (the first field of /proc/loadavg).
    pub load: String,
    /// Whether it was quick.
    pub quick: bool,
    /// Where.
    pub machine: Machine,
    /// What came of it.
    pub outcome: Outcome,
}

const INTRODUCTION: &str = "\
Everything is a ratio in one run on one machine: the contenders take turns, a ratio is that of one
round, and what counts is the median of the rounds. *Pinned* is server, proxy and client on one core,
where nothing waits for an idle core to wake; *unpinned* is what users see. Figures are the median ± what
half of the rounds are within; ratios are the median and, in parentheses, the least and the most. A
*floor* is what somebody reaches who does less: no goal can be met beyond it.

PostgreSQL, its clients and all contenders run on the same machine, with `fsync` off and 256 MB of
shared buffers; the broker is the release build with its audit log on. PostgreSQL is reached over its
Unix socket unless it says TCP.
";

/// Writes the report to `path`, and the chart beside it.
///
/// # Errors
/// When a file cannot be written.
///
/// # Panics
/// When `path` has no name.
pub fn write(path: &Path, measurements: &[Measurement]) -> io::Result<()> {
    let chart = path.with_extension("svg");
    let checks = measurements.iter().flat_map(|measurement| {
        let subject = measurement.subject;
        measurement.outcome.checks.iter().map(move |check| (subject, check))
    });
    fs::write(&chart, chart::draw(&checks.clone().collect::<Vec<_>>()))?;
    let chart = chart.file_name().and_then(|name| name.to_str()).expect("a file name of ASCII");

    let mut text = String::from("# Benchmarks\n\n");
    let mut line = |words: &str| {
        text.push_str(words);
        text.push('\n');
    };
    line(
        "Written by `tests/bench.sh`; do not edit. It runs on Debian as root, best on a machine that has",
    );
    line("nothing else to do: `tests/bench.sh [--quick] [P1 P2 …]`.\n");
    if let Some(newest) = measurements.iter().max_by_key(|measured| &measured.date) {
        line("| | |\n| --- | --- |");
        for (name, value) in newest.machine.lines() {
            line(&format!("| {name} | {value} |"));
        }
        line(&format!("| measured | {} UTC, commit {} |", newest.date, newest.commit));
        line("");
    }
    if measurements.iter().any(|measured| measured.quick) {
        line(
            "**A quick run: few and short rounds. It shows that everything works; the figures mean",
        );
        line("little.**\n");
    }
    line(INTRODUCTION);
    line("## Goals\n");
    line(&format!("![what was reached, as a share of each goal]({chart})\n"));
    line("| | | reached | goal | | floor |\n| --- | --- | --- | --- | --- | --- |");
    for (subject, check) in checks {
        line(&goal(subject, check));
    }
    for measured in measurements {
        line(&format!("\n## {:?}: {}\n", measured.subject, measured.subject.title()));
        line(&figures(&measured.outcome));
        for note in &measured.outcome.notes {
            line(&format!("{note}\n"));
        }
        line(&format!(
            "Measured {} UTC at commit {}, load before {}: `tests/bench.sh{} {:?}`.",
            measured.date,
            measured.commit,
            measured.load,
            if measured.quick { " --quick" } else { "" },
            measured.subject,
        ));
    }
    fs::write(path, text)
}

fn goal(subject: Subject, check: &Check) -> String {
    let floor = check.floor.as_ref().map_or_else(String::new, |floor| {
        format!("{}: {}", floor.of, floor.reached.range(check.unit))
    });
    format!(
        "| {subject:?} | {} | {} | {} | {} | {floor} |",
        check.what,
        check.reached.range(check.unit),
        check.goal.show(check.unit),
        if check.is_met() { "met" } else { "**missed**" },
    )
}

fn figures(outcome: &Outcome) -> String {
    let mut text = String::new();
    if outcome.rows.is_empty() {
        return text;
    }
    let _written = write!(text, "| | {} |\n|", outcome.columns.join(" | "));
    text.push_str(&" --- |".repeat(outcome.columns.len() + 1));
    text.push('\n');
    for row in &outcome.rows {
        let cells = outcome.columns.iter().map(|column| {
            let text = outcome.figures.get(row).and_then(|row| row.get(column));
            text.map_or("", String::as_str)
        });
        let _written = writeln!(text, "| {row} | {} |", cells.collect::<Vec<_>>().join(" | "));
    }
    text
}
