//! Tests that need a process of their own: because it ends, or because of what it must not be.
//!
//! Such a test starts its own program again with its own name and a role, and the second process,
//! which has the role, does what is tested.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

const ROLE: &str = "CREDBROKER_TEST_ROLE";

/// How the second process ended.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) signal: Option<i32>,
    pub(crate) success: bool,
    /// Both streams.
    pub(crate) said: String,
}

/// What this process is to do; `None` in the one that the test runner started.
pub(crate) fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// Runs the test `name` (its path in the crate) again, in a process with `role`.
pub(crate) fn again(name: &str, role: &str) -> Done {
    again_by(&mut Command::new(std::env::current_exe().unwrap()), name, role)
}

/// The same through another program, which is given the command.
pub(crate) fn again_by(program: &mut Command, name: &str, role: &str) -> Done {
    program.args([name, "--exact", "--nocapture", "--test-threads=1"]).env(ROLE, role);
    let output = program.output().unwrap();
    let said = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    // A name that matches nothing would be a test that cannot fail.
    assert!(!said.contains("running 0 tests"), "there is no test {name}");
    Done { signal: output.status.signal(), success: output.status.success(), said }
}

/// Where in the writable memory of this process something stands, as index of the pattern and
/// name of the mapping. The patterns are given with every bit turned round, or the search would
/// find itself.
pub(crate) fn copies(patterns: &[Vec<u8>]) -> Vec<(usize, String)> {
    const CHUNK: usize = 64 * 1024;
    let overlap = patterns.iter().map(Vec::len).max().unwrap_or(0);
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let memory = File::open("/proc/self/mem").unwrap();
    let mut buffer = vec![0_u8; CHUNK + overlap];
    let mut found = Vec::new();
    for line in maps.lines().filter(|line| line.split(' ').nth(1).unwrap().starts_with("rw")) {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next().unwrap().split_once('-').unwrap();
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        let name = fields.nth(4).unwrap_or("anonymous").to_owned();
        let mut at = number(start);
        while at < number(end) {
            // Zero before each read: the buffer is itself in what is read.
            buffer.fill(0);
            let rest = usize::try_from(number(end) - at).unwrap();
            let wanted = rest.min(buffer.len());
            let count = memory.read_at(&mut buffer[..wanted], at).unwrap_or(0);
            let window = &buffer[..count];
            if window.iter().any(|byte| *byte != 0) {
                for (index, pattern) in patterns.iter().enumerate() {
                    let is_here = |place: &[u8]| place.iter().zip(pattern).all(|(a, b)| *a == !b);
                    let first = !pattern[0];
                    let places = window.windows(pattern.len()).take(CHUNK);
                    let hits = places.filter(|place| place[0] == first && is_here(place)).count();
                    found.extend((0..hits).map(|_| (index, name.clone())));
                }
            }
            at += CHUNK as u64;
        }
    }
    found
}

/// Prints each event, and what else there is to say at that moment.
pub(crate) struct SaysAnd(pub(crate) Box<dyn Fn() -> String + Send + Sync>);

impl Subscriber for SaysAnd {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        println!("{}; {}", line.0, (self.0)());
    }

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}
}

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        write!(self.0, "{field}={value:?} ").unwrap();
    }
}
