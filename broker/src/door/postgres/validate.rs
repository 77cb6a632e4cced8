//! Trying a connection for an operator: logging in, looking at the role, logging out.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::attempt::{conclude, dial_and_log_in};
use super::backend::{Bound, How, LoginFault, LoginRequest, Messages};
use super::{codec, fault};
use crate::core::{Core, Probe, Refusal};
use crate::door::wire::Reader;

/// For the questions, once logged in.
const ANSWERED_WITHIN: Duration = Duration::from_secs(5);
/// What makes a role more than a user of a database (PostgreSQL documentation, 22.2 and 22.5).
const QUESTIONS: &str = "SELECT pg_catalog.current_setting('server_version'), rolsuper, \
    rolcreaterole, rolreplication, rolbypassrls, \
    (SELECT pg_catalog.count(*) OPERATOR(pg_catalog.>) 0 FROM pg_catalog.pg_roles AS strong \
     WHERE strong.rolname OPERATOR(pg_catalog.=) ANY (ARRAY['pg_execute_server_program'::pg_catalog.name, \
     'pg_read_server_files'::pg_catalog.name, 'pg_write_server_files'::pg_catalog.name]) \
     AND pg_catalog.pg_has_role(strong.oid, 'MEMBER')) \
    FROM pg_catalog.pg_roles WHERE rolname OPERATOR(pg_catalog.=) CURRENT_USER";

/// What an operator should know.
#[derive(Debug)]
pub(crate) struct Validated {
    pub(crate) server_version: String,
    pub(crate) warnings: Vec<String>,
    pub(crate) took: Duration,
    /// How the broker was let in.
    pub(crate) method: &'static str,
}

/// Logs in with the connection's credential and looks around.
pub(crate) async fn validate(core: &Core, probe: Probe) -> Result<Validated, Refusal> {
    match try_out(core, &probe).await {
        Ok(Tried { how, took, row }) => Ok(Validated {
            server_version: version(&row),
            warnings: warnings(&row),
            took,
            method: method(how),
        }),
        Err(error) => {
            let (_reason, why) = fault::explain(&error, &probe.connection().name);
            Err(core.probe_failed(&probe, why))
        }
    }
}

/// A server's own words, for a terminal.
fn version(row: &[Option<String>]) -> String {
    let text = row.first().and_then(Option::as_deref).unwrap_or_default();
    text.chars().filter(|letter| !letter.is_control()).take(64).collect()
}

fn warnings(row: &[Option<String>]) -> Vec<String> {
    const TELL: [(usize, &str); 5] = [
        (
            1,
            "the role is a superuser: a session of it can read the server's files and run programs there",
        ),
        (2, "the role can create and change other roles"),
        (3, "the role may replicate, and so read everything in every database"),
        (4, "the role bypasses row-level security"),
        (5, "the role can read or write the server's files, or run programs there"),
    ];
    let is = |column: usize| row.get(column).and_then(Option::as_deref) == Some("t");
    let mut warnings: Vec<String> =
        TELL.iter().filter(|(column, _)| is(*column)).map(|(_, text)| (*text).to_owned()).collect();
    warnings.push(
        "a read-write session can change the role's own password, and log in with it from elsewhere"
            .to_owned(),
    );
    warnings
}

/// A login that came through.
struct Tried {
    how: How,
    took: Duration,
    row: Vec<Option<String>>,
}

/// How the broker was let in, in the words of the configuration and of PostgreSQL's log.
fn method(how: How) -> &'static str {
    match how {
        How::Scram(Bound::ToChannel) => "scram-sha-256-plus",
        How::Scram(Bound::No) => "scram-sha-256",
        How::Md5 => "md5",
        How::Password => "password",
        How::Nothing => "none",
    }
}

async fn try_out(core: &Core, probe: &Probe) -> Result<Tried, LoginFault> {
    let since = Instant::now();
    // Whatever came of it before: an operator wants to know now.
    let attempt = probe.credential().breaker().enter_regardless();
    let request = LoginRequest {
        connection: probe.connection(),
        attempt: &attempt,
        credential: probe.credential(),
        database: &probe.connection().database,
        parameters: &[("application_name".to_owned(), b"credbroker".to_vec())],
    };
    let login = dial_and_log_in(request).await;
    let took = since.elapsed();
    if let Some(meaning) = conclude(attempt, &login) {
        core.refused_by_server(&probe.connection().name, probe.credential(), meaning);
    }
    let login = login?;
    let how = login.how;
    let mut messages = Messages::new(login.stream);
    let asked = timeout(ANSWERED_WITHIN, ask(&mut messages)).await;
    let row = asked.map_err(|_elapsed| LoginFault::Link(std::io::ErrorKind::TimedOut.into()))??;
    Ok(Tried { how, took, row })
}

async fn ask(messages: &mut Messages) -> Result<Vec<Option<String>>, LoginFault> {
    messages.send(&codec::query(QUESTIONS)).await?;
    let mut row = Vec::new();
    loop {
        match messages.next().await? {
            (b'D', body) => row = columns(&body).unwrap_or_default(),
            (b'Z', _) => return Ok(row),
            // That it may not look is no reason to say that it cannot log in.
            (_, _) => {}
        }
    }
}

/// DataRow (protocol 55.7), text format.
fn columns(body: &[u8]) -> Option<Vec<Option<String>>> {
    let mut reader = Reader::new(body);
    let count = u16::from_be_bytes(reader.array().ok()?);
    let mut row = Vec::new();
    for _ in 0..count {
        let length = reader.u32().ok()?;
        row.push(if length == u32::MAX {
            None
        } else {
            let bytes = reader.take(usize::try_from(length).ok()?).ok()?;
            Some(String::from_utf8_lossy(bytes).into_owned())
        });
    }
    Some(row)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_read_and_a_short_one_is_none() {
        let body = [0, 2, 0, 0, 0, 1, b't', 0xff, 0xff, 0xff, 0xff];
        assert_eq!(columns(&body), Some(vec![Some("t".to_owned()), None]));
        assert_eq!(columns(&body[..8]), None);
        assert_eq!(columns(&[]), None);
    }

    #[test]
    fn a_superuser_is_told_of() {
        let row = |text: &str| Some(text.to_owned());
        let plain = [row("15.1"), row("f"), row("f"), row("f"), row("f"), row("f")];
        assert_eq!(warnings(&plain).len(), 1);
        let mighty = [row("15.1"), row("t"), row("t"), row("t"), row("t"), row("t")];
        assert_eq!(warnings(&mighty).len(), 6);
    }
}
