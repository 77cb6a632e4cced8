//! The audit file, read as a consumer would: JSON Lines, a sequence without gaps, a chain; and
//! verified as an operator would, by the command line.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::binaries;
use crate::process::{output, transcript};
use crate::wait::PATIENCE;

pub mod disk;

/// The file and what can be asked of it.
#[derive(Debug, Clone)]
pub struct AuditLog {
    path: PathBuf,
}

/// One record.
#[derive(Debug, Clone)]
pub struct Record(Value);

impl AuditLog {
    /// The log at `path`, which need not exist yet.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// It and its rotated files, oldest first.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        let rotated = |number: u32| PathBuf::from(format!("{}.{number}", self.path.display()));
        let mut files: Vec<_> = (1..).map(rotated).take_while(|path| path.exists()).collect();
        files.reverse();
        files.push(self.path.clone());
        files
    }

    /// All complete records, in the order of the file. A last line that is being written is
    /// left out.
    ///
    /// # Panics
    /// When a complete line is not a JSON object.
    #[must_use]
    pub fn records(&self) -> Vec<Record> {
        let text = fs::read_to_string(&self.path).unwrap_or_default();
        let complete = text.rfind('\n').map_or("", |end| text.get(..end).unwrap_or_default());
        complete.lines().map(Record::parse).collect()
    }

    /// The records of one event.
    #[must_use]
    pub fn of(&self, event: &str) -> Vec<Record> {
        self.records().into_iter().filter(|record| record.event() == event).collect()
    }

    /// Asserts what every reader may rely on: version 1, sequence numbers without a gap, and
    /// `prev` being the `hash` of the line before.
    ///
    /// # Panics
    /// When it is not so.
    pub fn assert_chained(&self) {
        let records = self.records();
        assert!(!records.is_empty(), "{} is empty", self.path.display());
        for record in &records {
            assert_eq!(record.number("v"), Some(1), "{record:?}");
        }
        for pair in records.windows(2) {
            let (before, after) = (&pair[0], &pair[1]);
            assert_eq!(after.number("seq"), before.number("seq").map(|seq| seq + 1), "{after:?}");
            assert_eq!(after.text("prev"), before.text("hash"), "{after:?}");
        }
    }
}

/// What `credbroker audit verify` said.
#[derive(Debug, Clone)]
pub struct Verified {
    /// Its exit status: 0, or 65 for a broken log.
    pub code: i32,
    /// Its JSON document.
    pub report: Value,
}

impl Verified {
    /// Where and how the log is broken.
    #[must_use]
    pub fn message(&self) -> &str {
        self.report["broken"]["message"].as_str().unwrap_or_default()
    }

    /// A number of the report.
    ///
    /// # Panics
    /// When there is none of that name.
    #[must_use]
    pub fn number(&self, name: &str) -> u64 {
        self.report[name].as_u64().unwrap_or_else(|| panic!("no {name} in {}", self.report))
    }
}

/// Runs `credbroker audit verify` with `options` on `files`.
///
/// # Panics
/// When it ends in another way than with a report.
#[must_use]
pub fn verify(options: &[&str], files: &[impl AsRef<Path>]) -> Verified {
    let mut command = Command::new(binaries::credbroker());
    command.args(["--output", "json", "audit", "verify"]).args(options);
    command.args(files.iter().map(AsRef::as_ref));
    let done = output(&mut command, PATIENCE);
    let code = done.status.code().unwrap_or_default();
    let report: Value = serde_json::from_slice(&done.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", transcript(&done)));
    assert_eq!(code, if report["whole"] == true { 0 } else { 65 }, "{report}");
    Verified { code, report }
}

impl Record {
    fn parse(line: &str) -> Self {
        let value: Value = serde_json::from_str(line)
            .unwrap_or_else(|error| panic!("audit line is not JSON ({error}): {line}"));
        assert!(value.is_object(), "audit line is not an object: {line}");
        Self(value)
    }

    /// What happened: `session.opened`.
    #[must_use]
    pub fn event(&self) -> &str {
        self.text("event").unwrap_or_default()
    }

    /// A text field; dots go down: `peer.exe`.
    #[must_use]
    pub fn text(&self, path: &str) -> Option<&str> {
        self.at(path)?.as_str()
    }

    /// A number field; dots go down: `peer.uid`.
    #[must_use]
    pub fn number(&self, path: &str) -> Option<u64> {
        self.at(path)?.as_u64()
    }

    /// The record as one line of JSON.
    #[must_use]
    pub fn line(&self) -> String {
        self.0.to_string()
    }

    fn at(&self, path: &str) -> Option<&Value> {
        path.split('.').try_fold(&self.0, |value, key| value.get(key))
    }
}
