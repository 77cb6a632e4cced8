//! `credbroker entry`: a page on loopback, for one secret that a person types into a browser.
//!
//! Invariants: whoever may `put` starts it, and nobody else can; the page is opened by one uid,
//! which the kernel names; it works once, with a code that only the terminal shows; what is typed
//! goes into a memfd and from there to the broker.
//!
//! No browser is started: the address would stand on a command line that every user can read.

mod desk;
mod form;
mod harden;
mod office;
mod page;
mod ticket;
mod visitor;

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use clap::Args;
use credbroker_client::{AdminPacketClient, Error, PutRequest, Stored};
use nix::unistd::User;
use rustix::process::getuid;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::timeout;

use self::desk::{Closed, Deposit, Desk, Outcome};
use self::office::Office;
use self::page::About;
use self::visitor::Tables;
use crate::args::{self, Global};
use crate::failure::{Exit, Failure};
use crate::output::{from_now, plain, rfc3339};
use crate::put;

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
/// How long the outcome is kept for a browser that has not asked for it.
const LINGER: Duration = Duration::from_secs(5);

/// Store the credential of a connection, typed into a page of a browser (operators)
///
/// Shows the address of a page and a code. The page is served on loopback by this command alone,
/// once, to browsers of one user; it takes the code and the secret, which goes to the broker by
/// memfd. Nothing is opened by itself: follow the address. From another machine, forward the port
/// under the same number with ssh -L.
#[derive(Args, Debug)]
pub(crate) struct Entry {
    /// Name of the connection
    name: String,
    /// The database role
    #[arg(long)]
    username: Option<String>,
    /// Address on loopback to serve the page at; port 0 is a free one
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0", value_parser = parse_listen)]
    listen: SocketAddr,
    /// How long the page is good: 1m to 60m
    #[arg(long, value_name = "SPAN", default_value = "5m", value_parser = parse_expires)]
    expires: Duration,
    /// User whose browser may open the page, by name or uid [default: who logged in to this
    /// session, else who runs the command]
    #[arg(long, value_name = "USER", value_parser = parse_user)]
    opened_by: Option<u32>,
    /// What people try first, taken in order to be refused: clap would repeat it
    #[arg(hide = true, num_args = 0..)]
    surplus: Vec<OsString>,
    #[arg(long, hide = true, num_args = 0..=1, allow_hyphen_values = true)]
    password: Option<Option<OsString>>,
    #[arg(long, hide = true, num_args = 0..=1, allow_hyphen_values = true)]
    secret: Option<Option<OsString>>,
}

pub(crate) fn run(command: &Entry, global: &Global) -> Result<ExitCode, Failure> {
    if !command.surplus.is_empty() || command.password.is_some() || command.secret.is_some() {
        return Err(Failure::usage(
            "a secret does not belong on a command line, which every user can read: leave it out \
             and type it into the page",
        ));
    }
    // As the kernel has it, so before it is hidden from us.
    let opened_by = command.opened_by.or_else(login_uid).unwrap_or_else(|| getuid().as_raw());
    harden::early()?;
    args::block_on(command.run(global, opened_by))?;
    Ok(ExitCode::SUCCESS)
}

impl Entry {
    async fn run(&self, global: &Global, opened_by: u32) -> Result<(), Failure> {
        // First, so that nobody types a secret for nothing.
        let broker = global.connect_admin_packet().await?;
        let connection = global.connect_admin().await?.connection(&self.name).await?;
        let tables = Tables::open()
            .map_err(|error| Failure::system("cannot see who opens the page", &error))?;
        let bound = async {
            let listener = TcpListener::bind(self.listen).await?;
            let address = listener.local_addr()?;
            Ok((listener, address))
        };
        let (listener, address) = bound.await.map_err(|error: io::Error| {
            Failure::new(Exit::Unavailable, "LISTEN", format!("{}: {error}", self.listen))
        })?;
        harden::late()?;
        let about = About {
            connection: self.name.clone(),
            target: connection.target,
            username: self.username.clone(),
            started_by: getuid().as_raw(),
            opened_by,
            expires: SystemTime::now() + self.expires,
        };
        let (desk, closed) = Desk::open(about, address)?;
        announce(&desk, address).map_err(|error| Failure::output(&error))?;
        let office = Office::new(desk, tables, opened_by);
        tokio::select! {
            never = office.serve(&listener) => match never {},
            result = self.wait(&broker, closed, &office, global) => result,
        }
    }

    /// Waits for the desk to close, passes on what it closed with, and lets browsers have their
    /// answers.
    async fn wait(
        &self,
        broker: &AdminPacketClient,
        closed: oneshot::Receiver<Closed>,
        office: &Office,
        global: &Global,
    ) -> Result<(), Failure> {
        // An error: the desk has looked at the clock itself.
        let closed = timeout(self.expires, closed).await.ok().and_then(Result::ok);
        let desk = office.desk();
        desk.close();
        let result = match closed {
            Some(Closed::With(Deposit { username, secret })) => {
                let told = desk.told();
                let stored = broker.put(self.request(username), secret).await;
                desk.settle(self.outcome(&stored));
                let result = match stored {
                    Ok(stored) => put::report(&self.name, None, &stored, global.output),
                    Err(error) => Err(error.into()),
                };
                let _nobody_asked = timeout(LINGER, told).await;
                result
            }
            Some(Closed::TooManyCodes) => Err(Failure::new(
                Exit::NoPermission,
                "CODE",
                "the code was wrong too often; nothing was stored",
            )),
            Some(Closed::TooManyStrays) => Err(Failure::new(
                Exit::NoPermission,
                "STRAYS",
                "too many requests were not for the page; nothing was stored",
            )),
            None => Err(Failure::new(
                Exit::Unavailable,
                "EXPIRED",
                "nobody used the page in time; nothing was stored",
            )),
        };
        office.drain().await;
        result
    }

    fn request(&self, typed: Option<String>) -> PutRequest {
        let request = PutRequest::new(&self.name);
        match self.username.clone().or(typed) {
            Some(username) => request.username(username),
            None => request,
        }
    }

    fn outcome(&self, stored: &Result<Stored, Error>) -> Outcome {
        match stored {
            Ok(stored) if stored.persistent => Outcome::Stored(format!(
                "The broker has version {} for {}. You can close this tab.",
                stored.version, self.name
            )),
            Ok(stored) => Outcome::Stored(format!(
                "The broker has version {} for {}, in memory until it ends. You can close this tab.",
                stored.version, self.name
            )),
            Err(error) => Outcome::Failed(format!("{error}. The page is closed.")),
        }
    }
}

/// For the person, beside the result of the command.
fn announce(desk: &Desk, address: SocketAddr) -> io::Result<()> {
    let about = desk.about();
    let port = address.port();
    let mut stderr = io::stderr().lock();
    writeln!(stderr, "The page for the credential of {}:\n", plain(&about.connection))?;
    writeln!(stderr, "    {}\n", desk.url())?;
    writeln!(stderr, "    code        {}   (type it into the page)", desk.code())?;
    writeln!(stderr, "    opened by   uid {}, and nobody else", about.opened_by)?;
    let (at, span) = (rfc3339(about.expires), from_now(about.expires));
    writeln!(stderr, "    good until  {at} ({span}), for one use\n")?;
    writeln!(
        stderr,
        "It is on this machine only. From another: ssh -L {port}:{address} THIS-HOST"
    )?;
    stderr.flush()
}

/// Who logged in to the session that this command belongs to, whatever they became since (man
/// proc_pid_loginuid(5)); unset in most containers.
fn login_uid() -> Option<u32> {
    let text = fs::read_to_string("/proc/self/loginuid").ok()?;
    text.trim().parse().ok().filter(|uid| *uid != u32::MAX)
}

fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr =
        text.parse().map_err(|_other| "not ADDRESS:PORT, such as 127.0.0.1:8123")?;
    if !address.ip().is_loopback() {
        return Err("the page is served on loopback only: 127.0.0.1 or [::1]".into());
    }
    Ok(address)
}

fn parse_expires(text: &str) -> Result<Duration, String> {
    let span = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if (MINUTE..=HOUR).contains(&span) {
        Ok(span)
    } else {
        Err("it must be between 1m and 60m".into())
    }
}

fn parse_user(text: &str) -> Result<u32, String> {
    if let Ok(uid) = text.parse() {
        return Ok(uid);
    }
    match User::from_name(text) {
        Ok(Some(user)) => Ok(user.uid.as_raw()),
        Ok(None) | Err(_) => Err("there is no such user".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_on_loopback_only() {
        for good in ["127.0.0.1:0", "127.1.2.3:80", "[::1]:8123"] {
            parse_listen(good).unwrap();
        }
        for wrong in ["0.0.0.0:0", "[::]:80", "10.0.0.1:80", "localhost:80", "127.0.0.1"] {
            parse_listen(wrong).unwrap_err();
        }
    }

    #[test]
    fn the_time_is_bounded() {
        assert_eq!(parse_expires("60s"), Ok(MINUTE));
        assert_eq!(parse_expires("1h"), Ok(HOUR));
        for wrong in ["59s", "61m", "soon", ""] {
            parse_expires(wrong).unwrap_err();
        }
    }

    #[test]
    fn a_user_is_a_uid_or_a_name() {
        assert_eq!(parse_user("1000"), Ok(1000));
        assert_eq!(parse_user("root"), Ok(0));
        parse_user("nobody-of-that-name").unwrap_err();
        parse_user("-1").unwrap_err();
    }
}
