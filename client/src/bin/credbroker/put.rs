//! `credbroker put`: stores a credential.
//!
//! Invariant: the secret comes from the terminal, a file or standard input, never from the
//! command line or the environment, which others can read; it goes into a memfd, and from there
//! to the broker.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IsTerminal as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use clap::Args;
use credbroker_client::{PutRequest, Secret, SecretError, Stored};
use rustix::process::{Resource, Rlimit, setrlimit};
use serde::Serialize;

use crate::args::{self, Global};
use crate::failure::{Exit, Failure};
use crate::output::{Output, pairs};
use crate::{prompt, show};

const STANDARD_INPUT: &str = "-";

/// Store the credential of a connection, as it is or in place of the one before (operators)
///
/// Asks for the secret on the terminal, twice and without echo, unless --secret-file is given.
/// Without a user name here or in the configuration, the secret is `username:password`.
#[derive(Args, Debug)]
pub(crate) struct Put {
    /// Name of the connection
    name: String,
    /// The database role
    #[arg(long)]
    username: Option<String>,
    /// Read the secret from this file, or with `-` from standard input
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
    /// When it will be of no use any more: a time such as 2027-01-31T00:00:00Z, or a span such
    /// as 90days
    #[arg(long, value_name = "WHEN", value_parser = parse_when)]
    expires_at: Option<SystemTime>,
    /// Something to remember with it, for people
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_label)]
    label: Vec<(String, String)>,
    /// How long sessions of the version before may go on, such as 30s; 0s cuts them at once
    #[arg(long, value_parser = humantime::parse_duration)]
    grace: Option<Duration>,
    /// What people try first, taken in order to be refused: clap would repeat it
    #[arg(hide = true, num_args = 0..)]
    surplus: Vec<OsString>,
    #[arg(long, hide = true, num_args = 0..=1, allow_hyphen_values = true)]
    password: Option<Option<OsString>>,
    #[arg(long, hide = true, num_args = 0..=1, allow_hyphen_values = true)]
    secret: Option<Option<OsString>>,
}

#[derive(Serialize)]
struct View<'a> {
    connection: &'a str,
    version: u64,
    persistent: bool,
    sessions_to_cut: u32,
}

pub(crate) fn run(command: &Put, global: &Global) -> Result<ExitCode, Failure> {
    if !command.surplus.is_empty() || command.password.is_some() || command.secret.is_some() {
        return Err(Failure::usage(
            "a secret does not belong on a command line, which every user can read: leave it out \
             to be asked for it, or give it with --secret-file",
        ));
    }
    // A core would hold what passes through this process. It is no reason to stop if the limit
    // cannot be lowered.
    let _unlimited = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    let stored = args::block_on(async {
        // First, so that nobody types a secret for nothing.
        let client = global.connect_admin_packet().await?;
        let secret = command.secret()?;
        Ok(client.put(command.request(), secret).await?)
    })?;
    report(&command.name, command.grace, &stored, global.output)?;
    Ok(ExitCode::SUCCESS)
}

/// Tells what was stored, and what became of the version before.
pub(crate) fn report(
    connection: &str,
    grace: Option<Duration>,
    stored: &Stored,
    output: Output,
) -> Result<(), Failure> {
    let view = View {
        connection,
        version: stored.version,
        persistent: stored.persistent,
        sessions_to_cut: stored.sessions_to_cut,
    };
    output.print(&view, || text(connection, grace, stored))?;
    if !stored.persistent {
        output.warn("kept in the broker's memory only: put it again when it has restarted");
    }
    Ok(())
}

impl Put {
    fn request(&self) -> PutRequest {
        let mut request = PutRequest::new(&self.name);
        if let Some(username) = &self.username {
            request = request.username(username);
        }
        if let Some(at) = self.expires_at {
            request = request.expires_at(at);
        }
        for (key, value) in &self.label {
            request = request.label(key, value);
        }
        if let Some(grace) = self.grace {
            request = request.grace(grace);
        }
        request
    }

    fn secret(&self) -> Result<Secret, Failure> {
        match &self.secret_file {
            None => prompt::secret_twice(&self.name, self.username.as_deref()),
            Some(path) if path.as_os_str() == STANDARD_INPUT => {
                let stdin = io::stdin();
                if stdin.is_terminal() {
                    return Err(Failure::usage(
                        "standard input is a terminal: leave --secret-file out, and what you \
                         type will not be shown",
                    ));
                }
                Ok(Secret::read(stdin)?)
            }
            Some(path) => {
                let unreadable = |error: &io::Error| {
                    Failure::new(Exit::Io, "SECRET", format!("{}: {error}", path.display()))
                };
                let file = File::open(path).map_err(|error| unreadable(&error))?;
                Secret::read(file).map_err(|error| {
                    if let SecretError::Io(cause) = &error {
                        unreadable(cause)
                    } else {
                        error.into()
                    }
                })
            }
        }
    }
}

fn text(connection: &str, grace: Option<Duration>, stored: &Stored) -> String {
    let cut = stored.sessions_to_cut;
    let when = match grace {
        Some(grace) if grace.is_zero() => "now".into(),
        Some(grace) => format!("within {}", humantime::format_duration(grace)),
        None => "after the grace of the connection".into(),
    };
    pairs(&[
        ("stored", connection.to_owned()),
        ("version", stored.version.to_string()),
        ("kept", show::kept(stored.persistent).into()),
        ("sessions cut", if cut == 0 { "0".into() } else { format!("{cut}, {when}") }),
    ])
}

fn parse_when(text: &str) -> Result<SystemTime, String> {
    if let Ok(at) = humantime::parse_rfc3339(text) {
        return Ok(at);
    }
    let span = humantime::parse_duration(text)
        .map_err(|_neither| "neither a time (2027-01-31T00:00:00Z) nor a span (90days)")?;
    SystemTime::now().checked_add(span).ok_or_else(|| "too far away".into())
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err("a label is KEY=VALUE".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_is_a_time_or_a_span() {
        let epoch = SystemTime::UNIX_EPOCH;
        assert_eq!(parse_when("1970-01-01T00:01:40Z"), Ok(epoch + Duration::from_secs(100)));
        let ahead = parse_when("90days").unwrap().duration_since(SystemTime::now()).unwrap();
        assert_eq!(ahead.as_secs() / 86_400, 89);
        for wrong in ["", "tomorrow", "1970-13-01T00:00:00Z"] {
            parse_when(wrong).unwrap_err();
        }
        parse_when("99999999999999y").unwrap_err();
    }

    #[test]
    fn labels_have_a_key_and_a_value() {
        assert_eq!(parse_label("team=a=b"), Ok(("team".into(), "a=b".into())));
        assert_eq!(parse_label("team="), Ok(("team".into(), String::new())));
        parse_label("team").unwrap_err();
        parse_label("=a").unwrap_err();
    }
}
