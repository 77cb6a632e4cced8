//! `credbroker exec`: runs a command that finds a login in its environment.
//!
//! Invariants: the token reaches the command by its environment alone; this process stays
//! the command's parent and keeps the handles alive for as long as the command lives; when
//! it ends, in whatever way, so do the handles and the command.
//!
//! | module | what it has |
//! | --- | --- |
//! | `environment` | what the command finds, and what it must not find |
//! | `template` | `--env KEY=…{url}…` |
//! | `login` | the handles: issued, renewed, revoked |
//! | `signals` | every signal as a value, with who sent it |
//! | `supervise` | the command's life: its start, its signals, its stops, its end |

mod environment;
mod login;
mod signals;
mod supervise;
mod template;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use self::environment::Plan;
use self::login::{Logins, Wanted};
use self::signals::{Blocked, Signals};
use self::supervise::Child;
use crate::args::{self, Global};
use crate::failure::Failure;

/// The broker takes no longer purpose.
const MAX_PURPOSE: usize = 64;

/// Run a command that logs in through the broker
///
/// The command finds PGHOST, PGPORT, PGUSER, PGPASSWORD, PGDATABASE, DATABASE_URL and
/// DATABASE_URI for the first NAME, and for each its name in upper case with _URL behind it,
/// such as MAIN_DB_URL. The password is a handle that ends with the command.
#[derive(Args, Debug)]
pub(crate) struct Exec {
    /// Names of the connections
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
    /// Set KEY as well; {url} {user} {token} {host} {port} {database} stand for those of the
    /// first NAME, {NAME.url} and so on for those of another, {{ and }} for braces
    #[arg(long, value_name = "KEY=TEXT")]
    env: Vec<String>,
    /// How long a handle lives without renewal, such as 90s or 30m
    #[arg(long, value_parser = humantime::parse_duration)]
    ttl: Option<Duration>,
    /// What it is for, for people and the audit log [default: exec and the command's name]
    #[arg(long)]
    purpose: Option<String>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

pub(crate) fn run(exec: &Exec, global: &Global) -> Result<ExitCode, Failure> {
    let plan = Plan::parse(&exec.names, &exec.env)?;
    // Before there is a runtime, whose threads would not have them blocked.
    let blocked = Blocked::block()?;
    args::block_on(async {
        let mut signals = blocked.listen()?;
        let client = tokio::select! {
            connected = global.connect() => connected?,
            ended = signals.told_to_end() => return ended,
        };
        let purpose = exec.purpose.clone().unwrap_or_else(|| default_purpose(&exec.command));
        let wanted = Wanted { ttl: exec.ttl, purpose };
        let issued = tokio::select! {
            issued = Logins::issue(&client, plan.names(), &wanted, global.output) => issued,
            ended = signals.told_to_end() => {
                // What is being issued is revoked once it is known; who cannot wait for a
                // broker that does not answer says so once more.
                tokio::select! {
                    () = client.close() => {},
                    _ = signals.told_to_end() => {},
                }
                return ended;
            },
        };
        let outcome = match issued {
            Ok(logins) => {
                run_command(&exec.command, &plan, logins, &mut signals, &blocked, global).await
            }
            Err(failure) => Err(failure),
        };
        // Waits for what was dropped on the way here.
        client.close().await;
        outcome
    })
}

async fn run_command(
    command: &[OsString],
    plan: &Plan,
    logins: Logins,
    signals: &mut Signals,
    blocked: &Blocked,
    global: &Global,
) -> Result<ExitCode, Failure> {
    let child = Child::spawn(command, plan.variables(&logins.views()), blocked)?;
    let code = child.supervise(signals, logins.renewals(), global.output).await?;
    logins.revoke(global.output).await;
    Ok(code)
}

/// `exec psql`, of characters that the broker takes.
fn default_purpose(command: &[OsString]) -> String {
    let program =
        command.first().map(Path::new).and_then(Path::file_name).unwrap_or(OsStr::new(""));
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    let name = program.to_string_lossy().replace(|c| !allowed(c), "_");
    format!("exec {name}").chars().take(MAX_PURPOSE).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_purpose_names_the_program_in_allowed_characters() {
        let purpose = |program: &str| default_purpose(&[program.into(), "arg".into()]);
        assert_eq!(purpose("/usr/bin/psql"), "exec psql");
        assert_eq!(purpose("./my tool(é)"), "exec my_tool___");
        assert_eq!(purpose(&"x".repeat(100)).len(), MAX_PURPOSE);
    }
}
