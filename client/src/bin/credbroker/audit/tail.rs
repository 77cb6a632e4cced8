//! `credbroker audit tail`: records as they are written.

use std::process::ExitCode;

use clap::Args;
use serde_json::{Map, Value};

use crate::args::Global;
use crate::failure::Failure;

/// What the line begins with, and what only a program can use.
const NOT_REPEATED: [&str; 8] = ["v", "seq", "time", "broker", "event", "outcome", "prev", "hash"];

/// Print audit records as they are written, until you end it (operators)
///
/// With `--output json` each line is the record as it stands in the log.
#[derive(Args, Debug)]
pub(crate) struct Tail {
    /// Begin with so many records that are already written
    #[arg(long, value_name = "N", default_value_t = 10,
          value_parser = clap::value_parser!(u32).range(0..=1000))]
    last: u32,
}

pub(crate) fn run(command: &Tail, global: &Global) -> Result<ExitCode, Failure> {
    global.with_admin(async |admin| {
        let mut records = admin.tail_audit(command.last).await?;
        while let Some(record) = records.next().await {
            let record = record?;
            if record.skipped > 0 {
                let skipped = record.skipped;
                global.output.warn(&format!("{skipped} records came too fast and are left out"));
            }
            global.output.print_line(&record.line, || text(&record.line))?;
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// `81 2026-11-24T05:38:09.123Z access.denied denied connection=main_db peer.uid=1000`
fn text(line: &str) -> String {
    let Ok(record) = serde_json::from_str::<Map<String, Value>>(line) else {
        return line.to_owned();
    };
    let head = ["seq", "time", "event", "outcome"].map(|key| record.get(key).map(word));
    let mut words: Vec<String> =
        head.into_iter().map(|value| value.unwrap_or_else(|| "-".into())).collect();
    let rest = record.iter().filter(|(key, _)| !NOT_REPEATED.contains(&key.as_str()));
    for (key, value) in rest {
        match value {
            Value::Object(inner) => {
                words.extend(
                    inner.iter().map(|(name, value)| format!("{key}.{name}={}", word(value))),
                );
            }
            Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::String(_)
            | Value::Array(_) => words.push(format!("{key}={}", word(value))),
        }
    }
    words.join(" ")
}

/// Quoted when it is not one word.
fn word(value: &Value) -> String {
    match value {
        Value::String(text) if !text.is_empty() && !text.contains([' ', '"', '=']) => text.clone(),
        Value::Null
        | Value::Bool(_)
        | Value::Number(_)
        | Value::String(_)
        | Value::Array(_)
        | Value::Object(_) => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_one_readable_line() {
        let line = r#"{"v":1,"seq":81,"time":"2026-11-24T05:38:09.123Z","broker":"b","event":
            "access.denied","outcome":"denied","reason":"no_grant","peer":{"uid":1000,"gid":7},
            "purpose":"a report","prev":"aa","hash":"bb"}"#;
        assert_eq!(
            text(line),
            "81 2026-11-24T05:38:09.123Z access.denied denied peer.gid=7 peer.uid=1000 \
             purpose=\"a report\" reason=no_grant"
        );
    }

    #[test]
    fn what_is_no_record_is_shown_as_it_is() {
        assert_eq!(text("not json"), "not json");
        assert_eq!(text("{}"), "- - - -");
    }
}
