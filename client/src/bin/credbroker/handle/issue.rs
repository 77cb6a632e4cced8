//! `credbroker handle issue`: a handle for whoever is told its token.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use credbroker_client::{Bind, EndpointInfo, Handle, HandleInfo, IssueRequest, Reason};
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::args::Global;
use crate::failure::Failure;
use crate::output::{EndpointView, HandleView, Output, from_now, pairs, rfc3339};

/// Issue a handle and print its token
///
/// The handle outlives this command, until it expires or is revoked. With `--bind lifetime` or
/// `process` it cannot: then this command stays, renews the handle, and revokes it when it is
/// ended.
#[derive(Args, Debug)]
pub(crate) struct Issue {
    /// Name of the connection
    name: String,
    /// How long it lives, such as 90s or 30m
    #[arg(long, value_parser = humantime::parse_duration)]
    ttl: Option<Duration>,
    /// What it is for, for people and the audit log
    #[arg(long)]
    purpose: Option<String>,
    /// What its life is tied to
    #[arg(long, value_enum, default_value_t = BindTo::None)]
    bind: BindTo,
    /// The uid that alone may use it
    #[arg(long, value_name = "UID")]
    redeemer: Option<u32>,
    /// An opaque name of whom it is for
    #[arg(long)]
    subject: Option<String>,
    /// How many sessions may be opened in all
    #[arg(long, value_name = "N")]
    max_uses: Option<u32>,
    /// How many sessions may be open at once
    #[arg(long, value_name = "N")]
    max_sessions: Option<u32>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum BindTo {
    /// Its expiry alone
    None,
    /// The life of this command
    Lifetime,
    /// The life of this command, and no other process can use it: to see what that does
    Process,
}

#[derive(Serialize)]
struct View<'a> {
    handle: HandleView<'a>,
    token: &'a str,
    endpoint: EndpointView<'a>,
    url: &'a str,
}

pub(crate) fn run(command: Issue, global: &Global) -> Result<ExitCode, Failure> {
    global.with_client(async |client| {
        // Before there is a handle, so that no signal can come between.
        let told_to_end = match command.bind {
            BindTo::None => None,
            BindTo::Lifetime | BindTo::Process => Some(Endings::listen()?),
        };
        let handle = client.issue(command.into_request()).await?;
        // A handle whose token nobody got is revoked by its drop.
        print(&handle, global.output)?;
        match told_to_end {
            None => drop(handle.into_token()),
            Some(endings) => hold(handle, endings, global.output).await?,
        }
        Ok(ExitCode::SUCCESS)
    })
}

impl Issue {
    fn into_request(self) -> IssueRequest {
        let mut request = IssueRequest::new(self.name).bind(match self.bind {
            BindTo::None => Bind::None,
            BindTo::Lifetime => Bind::Lifetime,
            BindTo::Process => Bind::Process,
        });
        if let Some(ttl) = self.ttl {
            request = request.ttl(ttl);
        }
        if let Some(purpose) = self.purpose {
            request = request.purpose(purpose);
        }
        if let Some(uid) = self.redeemer {
            request = request.redeemer(uid);
        }
        if let Some(subject) = self.subject {
            request = request.subject(subject);
        }
        if let Some(uses) = self.max_uses {
            request = request.max_uses(uses);
        }
        if let Some(sessions) = self.max_sessions {
            request = request.max_sessions(sessions);
        }
        request
    }
}

/// The signals that ask a program to end.
struct Endings {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

impl Endings {
    fn listen() -> Result<Self, Failure> {
        let listen =
            |kind| signal(kind).map_err(|error| Failure::system("cannot receive signals", &error));
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hang_up: listen(SignalKind::hangup())?,
        })
    }

    async fn any(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {},
            _ = self.terminate.recv() => {},
            _ = self.hang_up.recv() => {},
        }
    }
}

/// Keeps the handle alive until this process is told to end.
async fn hold(handle: Handle, mut endings: Endings, output: Output) -> Result<(), Failure> {
    output.warn("the handle lives as long as this command; end it with Ctrl-C");
    let renewal = handle.keep_alive().ended();
    tokio::select! {
        () = endings.any() => {},
        end = renewal => {
            output.warn(&format!("the handle is not renewed any more: {end}"));
            endings.any().await;
        },
    }
    match handle.revoke().await {
        // It was revoked elsewhere, which has been told.
        Err(error) if error.reason() == Some(Reason::HandleInvalid) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(_sessions_cut) => Ok(()),
    }
}

fn print(handle: &Handle, output: Output) -> Result<(), Failure> {
    let (info, url) = (handle.info(), handle.url());
    let token = handle.token().expose();
    let view = View {
        handle: HandleView::from(&info),
        token,
        endpoint: EndpointView::from(handle.endpoint()),
        url: &url,
    };
    output.print(&view, || text(&info, token, handle.endpoint(), &url))
}

fn text(info: &HandleInfo, token: &str, endpoint: &EndpointInfo, url: &str) -> String {
    pairs(&[
        ("id", info.id.clone()),
        ("connection", info.connection.clone()),
        ("expires", format!("{} ({})", rfc3339(info.expires), from_now(info.expires))),
        ("token", token.to_owned()),
        ("url", url.to_owned()),
        ("psql", psql(token, endpoint)),
    ])
}

/// A line for a POSIX shell that keeps the token out of psql's command line.
fn psql(token: &str, endpoint: &EndpointInfo) -> String {
    format!(
        "PGPASSWORD={token} psql -h {} -U {} -d {}",
        shell_word(&endpoint.door.display().to_string()),
        shell_word(&endpoint.user),
        shell_word(&endpoint.database),
    )
}

fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/_.-".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_for_a_shell_when_they_must_be() {
        assert_eq!(shell_word("/run/credbroker/postgres"), "/run/credbroker/postgres");
        assert_eq!(shell_word("my db"), "'my db'");
        assert_eq!(shell_word("it's"), r"'it'\''s'");
        assert_eq!(shell_word("$(id)"), "'$(id)'");
        assert_eq!(shell_word(""), "''");
    }
}
