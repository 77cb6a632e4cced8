//! `credbroker audit verify`: whether a log is what was written. It needs files, and no broker.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use credbroker_client::audit::{self, Broken, Head, Keys, ReadError, Report};
use serde::Serialize;

use crate::args::Global;
use crate::failure::{Exit, Failure};

/// Find any edit, cut, reorder or insertion in an audit log, offline
///
/// Exits with 0 when the log is whole and with 65 when it is broken. What was cut off at its end
/// shows only with --head; a log that somebody made anew shows only with --key.
#[derive(Args, Debug)]
pub(crate) struct Verify {
    /// A file of keys to trust: a copy of audit.pub that was kept elsewhere, or the public half of
    /// audit.signing_key, in hexadecimal
    #[arg(long, value_name = "FILE")]
    key: Vec<PathBuf>,
    /// Where the log stood at some time, as `credbroker status` showed it
    #[arg(long, value_name = "SEQ:HASH")]
    head: Vec<Head>,
    /// The log and its rotated files, in any order
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

#[derive(Serialize)]
struct View {
    whole: bool,
    records: u64,
    first: Option<u64>,
    head: Option<String>,
    signed_to: Option<u64>,
    unsigned: u64,
    checkpoints: u64,
    trusted: bool,
    broken: Option<BrokenView>,
}

#[derive(Serialize)]
struct BrokenView {
    file: Option<String>,
    line: u64,
    message: String,
}

pub(crate) fn run(command: &Verify, global: &Global) -> Result<ExitCode, Failure> {
    let mut keys = Keys::none();
    for path in &command.key {
        keys.extend(Keys::load(path).map_err(unreadable)?);
    }
    let heads = command.head.iter().copied();
    let report = audit::verify(&command.files, keys, heads).map_err(unreadable)?;
    global.output.print(&View::from(&report), || text(&report))?;
    Ok(if report.broken.is_none() { ExitCode::SUCCESS } else { Exit::Data.into() })
}

#[expect(clippy::needless_pass_by_value, reason = "shaped for map_err")]
fn unreadable(error: ReadError) -> Failure {
    match error {
        ReadError::NoKeys { .. } => Failure::new(Exit::Usage, "KEY", error.to_string()),
        // The enum may grow.
        ReadError::Io { .. } | _ => Failure::new(Exit::NoInput, "INPUT", error.to_string()),
    }
}

fn text(report: &Report) -> String {
    let signed = report.signed_to.map_or("not signed".into(), |seq| format!("signed to {seq}"));
    let by = match (report.signed_to, report.trusted) {
        (None, _) => "",
        (Some(_), true) => " by a trusted key",
        (Some(_), false) => " by keys that the log itself names (compare them with --key)",
    };
    let mut text = match (&report.broken, report.first.zip(report.head)) {
        (Some(broken), _) => format!("BROKEN {broken}\nbefore it: {} records", report.records),
        (None, Some((first, head))) => {
            format!("whole: {} records, {first} to {}", report.records, head.seq)
        }
        (None, None) => "whole: 0 records".into(),
    };
    text.push_str(&format!(", {signed}{by}, unsigned {}", report.unsigned));
    if let Some(head) = report.head {
        text.push_str(&format!("\nhead: {head}"));
    }
    text
}

impl From<&Report> for View {
    fn from(report: &Report) -> Self {
        Self {
            whole: report.broken.is_none(),
            records: report.records,
            first: report.first,
            head: report.head.map(|head| head.to_string()),
            signed_to: report.signed_to,
            unsigned: report.unsigned,
            checkpoints: report.checkpoints,
            trusted: report.trusted,
            broken: report.broken.as_ref().map(BrokenView::from),
        }
    }
}

impl From<&Broken> for BrokenView {
    fn from(broken: &Broken) -> Self {
        Self {
            file: broken.file.as_ref().map(|file| file.display().to_string()),
            line: broken.line,
            message: broken.fault.to_string(),
        }
    }
}
