//! Tables for people, one JSON document for programs.
//!
//! Invariant: what others wrote (purposes, subjects) cannot move the cursor of a terminal.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::time::{Duration, SystemTime};

use clap::ValueEnum;
use credbroker_client::{Bind, ConnectionInfo, EndpointInfo, HandleInfo};
use serde::Serialize;

use crate::failure::Failure;

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// Aligned columns
    Text,
    /// One JSON document
    Json,
}

impl Output {
    /// Prints `document` or, for people, what `text` makes.
    pub(crate) fn print(
        self,
        document: &impl Serialize,
        text: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        let text = match self {
            Self::Text => text(),
            Self::Json => serde_json::to_string_pretty(document)
                .map_err(|error| Failure::output(&error.into()))?,
        };
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "{}", text.trim_end())
            .and_then(|()| stdout.flush())
            .map_err(|error| Failure::output(&error))
    }

    /// Prints one of many results, each on a line of its own and at once.
    pub(crate) fn print_line(
        self,
        json: &str,
        text: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        let line = match self {
            Self::Text => plain(&text()),
            Self::Json => plain(json),
        };
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "{line}")
            .and_then(|()| stdout.flush())
            .map_err(|error| Failure::output(&error))
    }

    /// Tells people something that is no failure.
    pub(crate) fn warn(self, message: &str) {
        // When stderr is gone, there is nobody to warn.
        let mut stderr = io::stderr().lock();
        let _unheard = match self {
            Self::Text => writeln!(stderr, "credbroker: {}", plain(message)),
            Self::Json => {
                writeln!(stderr, "{}", serde_json::json!({ "warning": { "message": message } }))
            }
        };
    }
}

/// A handle, as JSON shows it.
#[derive(Serialize)]
pub(crate) struct HandleView<'a> {
    id: &'a str,
    connection: &'a str,
    holder: u32,
    redeemer: Option<u32>,
    issued: String,
    expires: String,
    never_after: Option<String>,
    uses_left: Option<u32>,
    subject: &'a str,
    purpose: &'a str,
    sessions: u32,
    bind: &'static str,
}

impl<'a> From<&'a HandleInfo> for HandleView<'a> {
    fn from(info: &'a HandleInfo) -> Self {
        Self {
            id: &info.id,
            connection: &info.connection,
            holder: info.holder,
            redeemer: info.redeemer,
            issued: rfc3339(info.issued),
            expires: rfc3339(info.expires),
            never_after: info.never_after.map(rfc3339),
            uses_left: info.uses_left,
            subject: &info.subject,
            purpose: &info.purpose,
            sessions: info.sessions,
            bind: bind_name(info.bind),
        }
    }
}

/// Where to use a handle, as JSON shows it.
#[derive(Serialize)]
pub(crate) struct EndpointView<'a> {
    door: String,
    database: &'a str,
    user: &'a str,
}

impl<'a> From<&'a EndpointInfo> for EndpointView<'a> {
    fn from(endpoint: &'a EndpointInfo) -> Self {
        Self {
            door: endpoint.door.display().to_string(),
            database: &endpoint.database,
            user: &endpoint.user,
        }
    }
}

/// A connection, as JSON shows it.
#[derive(Serialize)]
pub(crate) struct ConnectionView<'a> {
    name: &'a str,
    r#type: &'a str,
    target: &'a str,
    may: &'a [String],
    has_credential: bool,
    endpoint: Option<EndpointView<'a>>,
}

impl<'a> From<&'a ConnectionInfo> for ConnectionView<'a> {
    fn from(connection: &'a ConnectionInfo) -> Self {
        Self {
            name: &connection.name,
            r#type: &connection.kind,
            target: &connection.target,
            may: &connection.may,
            has_credential: connection.has_credential,
            endpoint: connection.endpoint.as_ref().map(EndpointView::from),
        }
    }
}

pub(crate) fn bind_name(bind: Bind) -> &'static str {
    match bind {
        Bind::None => "none",
        Bind::Lifetime => "lifetime",
        Bind::Process => "process",
        // The library may learn of more before this program does.
        _ => "other",
    }
}

/// The time in UTC, RFC 3339, to the millisecond.
pub(crate) fn rfc3339(at: SystemTime) -> String {
    let mut text = String::new();
    match write!(text, "{}", humantime::format_rfc3339_millis(at)) {
        Ok(()) => text,
        Err(_beyond_year_9999) => "after 9999-12-31".into(),
    }
}

/// How far away a time is, to the second: `in 29m 58s`, `past`.
pub(crate) fn from_now(at: SystemTime) -> String {
    match at.duration_since(SystemTime::now()) {
        Ok(ahead) => {
            format!("in {}", humantime::format_duration(Duration::from_secs(ahead.as_secs())))
        }
        Err(_past) => "past".into(),
    }
}

/// How long ago a time was, to the second: `29m 58s`.
pub(crate) fn age(at: SystemTime) -> String {
    let past = SystemTime::now().duration_since(at).unwrap_or_default();
    humantime::format_duration(Duration::from_secs(past.as_secs())).to_string()
}

/// `yes` or `no`.
pub(crate) fn yes_or_no(value: bool) -> String {
    if value { "yes" } else { "no" }.into()
}

/// Rows of cells, each column as wide as its widest cell.
pub(crate) fn table<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let header = header.map(str::to_owned);
    let rows: Vec<[String; N]> = [&header]
        .into_iter()
        .chain(rows)
        .map(|row| row.each_ref().map(|cell| plain(cell)))
        .collect();
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let lines = rows.iter().map(|row| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Names and their values, one pair on a line; pairs without a value are left out.
pub(crate) fn pairs(pairs: &[(&str, String)]) -> String {
    let given: Vec<_> = pairs.iter().filter(|(_, value)| !value.is_empty()).collect();
    let width = given.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    let lines = given.iter().map(|(name, value)| format!("{name:width$}  {}", plain(value)));
    lines.collect::<Vec<_>>().join("\n")
}

/// `-` for what is not there, so that columns can be told apart.
pub(crate) fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map(|value| value.to_string()).filter(|text| !text.is_empty()).unwrap_or("-".into())
}

/// `text` on one line, without what moves a cursor.
pub(crate) fn plain(text: &str) -> String {
    text.replace(char::is_control, "?")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_not_padded() {
        let rows = [["a".into(), "long cell".into()], ["bcdé".into(), String::new()]];
        assert_eq!(table(["X", "Y"], &rows), "X     Y\na     long cell\nbcdé");
    }

    #[test]
    fn pairs_are_aligned_and_empty_ones_left_out() {
        let text =
            pairs(&[("id", "hdl_a".into()), ("subject", String::new()), ("door", "/x".into())]);
        assert_eq!(text, "id    hdl_a\ndoor  /x");
    }

    #[test]
    fn others_cannot_write_control_sequences() {
        let rows = [["\u{1b}[2Jx\ny".into()]];
        assert_eq!(table(["X"], &rows), "X\n?[2Jx?y");
    }

    #[test]
    fn times_are_utc_and_never_a_panic() {
        let second = SystemTime::UNIX_EPOCH + Duration::from_millis(1500);
        assert_eq!(rfc3339(second), "1970-01-01T00:00:01.500Z");
        let far = SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 40);
        assert_eq!(rfc3339(far), "after 9999-12-31");
        assert_eq!(from_now(second), "past");
    }
}
