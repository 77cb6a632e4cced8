//! What is measured: ratios to something that does the same with less, taken in turns in one run
//! on one machine.
//!
//! A round measures each contender once, one after the other, so that what slows the machine
//! slows them all, and each round begins with another; a ratio is that of one round, and the median of all rounds counts. Pinned,
//! everything runs on one core: server, proxy and client. Then nothing waits for an idle core to
//! wake, and the figures are the work itself. Unpinned is what users see.
//!
//! Nothing here is a test: a goal that is missed is shown, with the floor under it.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::time::Duration;

use clap::ValueEnum;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::{Deserialize, Serialize};

pub use self::echo::{serve as serve_echo, serve_by_task as serve_echo_by_task};
pub use self::issue::serve_empty;
pub use self::machine::Machine;
pub use self::relay::serve as serve_relay;
pub use self::report::{Measurement, write as write_report};
use self::stats::Sample;

mod chart;
mod connect;
mod copy;
mod cut;
mod describe;
mod echo;
mod group;
mod idle;
mod issue;
mod machine;
mod many;
mod mcp;
mod open;
mod pgbench;
mod relay;
mod report;
mod rig;
mod statements;
mod stats;

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[value(rename_all = "verbatim")]
pub enum Subject {
    /// `IssueHandle` by gRPC.
    P1,
    /// `describe` by packet.
    P2,
    /// `open` by packet.
    P3,
    /// Connecting, up to the first row.
    P4,
    /// Small transactions through the door.
    P5,
    /// Statements on a socket that was handed over.
    P6,
    /// A gigabyte through the door.
    P7,
    /// From a revoke to the end of 1 000 sessions.
    P8,
    /// 100 000 live handles.
    P9,
    /// What an idle broker takes, and how fast it starts.
    P10,
    /// A statement through the SQL worker, by MCP.
    P11,
}

impl Subject {
    /// All of them, in order.
    pub const ALL: [Self; 11] = [
        Self::P1,
        Self::P2,
        Self::P3,
        Self::P4,
        Self::P5,
        Self::P6,
        Self::P7,
        Self::P8,
        Self::P9,
        Self::P10,
        Self::P11,
    ];

    /// What it is and what it is compared with.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::P1 => {
                "`IssueHandle` over gRPC with the audit log on, against an empty unary call to a \
                 server with the same settings"
            }
            Self::P2 => {
                "`describe` on packet.sock, one connection, against a bare SEQPACKET echo of the \
                 same sizes"
            }
            Self::P3 => {
                "`open` on packet.sock (an authenticated socket is handed over), against a bare \
                 echo that passes a descriptor"
            }
            Self::P4 => {
                "connect to first row (libpq: connect, `SELECT 1`, finish) through the door, \
                 against direct libpq with SCRAM"
            }
            Self::P5 => {
                "`pgbench -S -M prepared` through the door, against pgbouncer (session pooling), \
                 Unix sockets on both sides of both"
            }
            Self::P6 => {
                "prepared statements on a handed-off socket, against a direct connection \
                 (tokio-postgres)"
            }
            Self::P7 => {
                "`COPY … TO STDOUT` of 1 GiB through the door, against direct and pgbouncer"
            }
            Self::P8 => "from a revoke to the end of 1 000 sessions",
            Self::P9 => "100 000 live handles, against 1 000",
            Self::P10 => "what an idle broker takes, and how fast it starts",
            Self::P11 => {
                "MCP `execute_sql` of one row, warm, against the same statement by sqlx without MCP"
            }
        }
    }

    /// Whether it is measured on one core too.
    #[must_use]
    pub fn is_pinned_too(self) -> bool {
        match self {
            Self::P1
            | Self::P2
            | Self::P3
            | Self::P4
            | Self::P5
            | Self::P6
            | Self::P7
            | Self::P11 => true,
            Self::P8 | Self::P9 | Self::P10 => false,
        }
    }

    /// Measures it in this process.
    ///
    /// # Panics
    /// When something does not work: a measurement that fails, fails loudly.
    #[must_use]
    pub fn measure(self, mode: Mode) -> Outcome {
        if mode.pinned {
            mode.pin();
        }
        let mut outcome = Outcome::of(mode);
        match self {
            Self::P1 => issue::measure(&mut outcome),
            Self::P2 => describe::measure(&mut outcome),
            Self::P3 => open::measure(&mut outcome),
            Self::P4 => connect::measure(&mut outcome),
            Self::P5 => pgbench::measure(&mut outcome),
            Self::P6 => statements::measure(&mut outcome),
            Self::P7 => copy::measure(&mut outcome),
            Self::P8 => cut::measure(&mut outcome),
            Self::P9 => many::measure(&mut outcome),
            Self::P10 => idle::measure(&mut outcome),
            Self::P11 => mcp::measure(&mut outcome),
        }
        outcome
    }
}

/// How it is measured.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Mode {
    /// A third of the rounds, each shorter: to see that it works.
    pub quick: bool,
    /// On one core.
    pub pinned: bool,
}

impl Mode {
    fn rounds(self) -> usize {
        if self.quick { 3 } else { 9 }
    }

    /// How long a part of a round takes that would take `full`.
    fn span(self, full: Duration) -> Duration {
        if self.quick { full / 2 } else { full }
    }

    /// How many of something that would be `full`.
    fn count(self, full: usize) -> usize {
        if self.quick { full / 4 } else { full }
    }

    fn name(self) -> &'static str {
        if self.pinned { "pinned" } else { "unpinned" }
    }

    /// Whatever this thread starts from here on, processes too, stays on one core.
    fn pin(self) {
        let all = sched_getaffinity(None).expect("the cores of this process");
        let last = (0..CpuSet::MAX_CPU).rev().find(|core| all.is_set(*core)).expect("a core");
        let mut one = CpuSet::new();
        one.set(last);
        sched_setaffinity(None, &one).expect("a core");
    }
}

const NOT_MEASURED: &str = "NOT MEASURED";

/// What was measured.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    mode: Mode,
    /// Rows in order of their first figure.
    rows: Vec<String>,
    columns: Vec<String>,
    figures: BTreeMap<String, BTreeMap<String, String>>,
    checks: Vec<Check>,
    notes: Vec<String>,
}

/// A goal, and what was reached.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Check {
    what: String,
    reached: Sample,
    unit: Unit,
    goal: Goal,
    floor: Option<Floor>,
}

/// What somebody reaches who does less, in the unit of the check.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Floor {
    of: String,
    reached: Sample,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Unit {
    Ratio,
    Micros,
    Millis,
    Bytes,
    Mebibytes,
    PerSecond,
    MebibytesPerSecond,
}

impl Outcome {
    /// That it could not be measured.
    #[must_use]
    pub fn failed(mode: Mode, why: &str) -> Self {
        let mut outcome = Self::of(mode);
        outcome.note(format!("{}: {NOT_MEASURED}: {why}", mode.name()));
        outcome
    }

    /// Whether something could not be measured.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.notes.iter().any(|note| note.contains(NOT_MEASURED))
    }

    fn of(mode: Mode) -> Self {
        Self { mode, ..Self::default() }
    }

    fn figure(&mut self, row: &str, column: &str, sample: &Sample, unit: Unit) {
        self.text(row, column, sample.show(unit));
    }

    fn text(&mut self, row: &str, column: &str, text: String) {
        for (all, one) in [(&mut self.rows, row), (&mut self.columns, column)] {
            if all.iter().all(|known| known != one) {
                all.push(one.to_owned());
            }
        }
        self.figures.entry(row.to_owned()).or_default().insert(column.to_owned(), text);
    }

    fn check(
        &mut self,
        what: impl Into<String>,
        reached: Sample,
        unit: Unit,
        goal: Goal,
    ) -> &mut Check {
        self.checks.push(Check { what: what.into(), reached, unit, goal, floor: None });
        let last = self.checks.len() - 1;
        &mut self.checks[last]
    }

    fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// Adds what another process measured of the same subject.
    pub fn extend(&mut self, other: Self) {
        for row in &other.rows {
            for column in &other.columns {
                if let Some(text) = other.figures.get(row).and_then(|row| row.get(column)) {
                    self.text(row, column, text.clone());
                }
            }
        }
        self.checks.extend(other.checks);
        for note in other.notes {
            if !self.notes.contains(&note) {
                self.notes.push(note);
            }
        }
    }
}

impl Check {
    fn under(&mut self, of: &str, reached: Sample) {
        self.floor = Some(Floor { of: of.to_owned(), reached });
    }

    fn is_met(&self) -> bool {
        let reached = self.reached.median();
        match self.goal {
            Goal::AtLeast(goal) => reached >= goal,
            Goal::AtMost(goal) => reached <= goal,
        }
    }

    /// How good something is: 1 is the goal, more is better.
    fn share(&self, reached: f64) -> f64 {
        match self.goal {
            Goal::AtLeast(goal) => reached / goal,
            Goal::AtMost(goal) => goal / reached.max(f64::MIN_POSITIVE),
        }
    }
}

/// The contenders of a round, each by its number: every round begins with another, for who comes
/// first may find it harder.
fn turns(round: usize, contenders: usize) -> impl Iterator<Item = usize> {
    (0..contenders).map(move |turn| (turn + round) % contenders)
}

fn several(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// Says how far it is.
fn progress(text: &str) {
    let _unheard = writeln!(std::io::stderr(), "   {text}");
}
