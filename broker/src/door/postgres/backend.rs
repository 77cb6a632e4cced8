//! Logging in to a PostgreSQL server with a credential of the arena: the login [`machine`], and
//! what feeds it.
//!
//! The machine believes nothing before the server has proved itself: by SCRAM, that it knows the
//! password, or by its link, that it is the configured one. A server that asks for what the
//! configuration does not name, or lets us in without being asked for a proof, is an impostor or a
//! misconfiguration, and gets nothing.

#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::time::timeout;

#[cfg(any(test, fuzzing))]
pub(super) use self::machine::lets_in;
pub(crate) use self::machine::{Bound, How};
use self::machine::{State, Step, Terms, advance};
pub(super) use self::messages::Messages;
pub(crate) use self::prelude::{Prelude, ServerKey};
use super::codec::Parameter;
use super::scram::{self, Challenge, Proof, ScramFault};
use super::{codec, secret_messages};
use crate::connection::Connection;
use crate::credential::{Attempt, Credential, Verdict};
use crate::upstream::{DialError, Link, NameProof, Remote, Stream};

#[cfg(test)]
mod differential;
mod machine;
mod messages;
mod prelude;

/// From the startup message to ReadyForQuery.
const LOGIN_WITHIN: Duration = Duration::from_secs(15);

/// How a login can fail.
#[derive(Debug, Error)]
pub(crate) enum LoginFault {
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The link broke, or the server was silent for too long.
    #[error("the link broke during the login")]
    Link(#[source] io::Error),
    /// The server did something that no honest one does.
    #[error("the server cannot be trusted: {0}")]
    Untrusted(&'static str),
    /// The server refuses the credential. `sqlstate` is [`SCRAM`] when it says so in SCRAM's words.
    #[error("the server refuses the credential ({sqlstate})")]
    Refused { sqlstate: String, verdict: Verdict },
    /// The server has refused the credential a moment ago, and is not asked again so soon.
    #[error("the server refused the credential, and is asked again in {} s", retry.as_secs())]
    Held { retry: Duration },
    /// An error of a server that has proved itself: its own words, for the client.
    #[error("the server ended the login ({sqlstate})")]
    Server { sqlstate: String, message: Vec<u8> },
    /// An error of a server that has proved nothing.
    #[error("the server ended the login before it proved itself ({0})")]
    Unproven(String),
}

/// An authenticated link.
#[derive(Debug)]
pub(crate) struct Authenticated {
    pub(crate) stream: Stream,
    pub(crate) remote: Remote,
    pub(crate) prelude: Prelude,
    pub(crate) how: How,
}

/// Whom and how to log in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoginRequest<'a> {
    pub(crate) connection: &'a Connection,
    pub(crate) credential: &'a Arc<Credential>,
    /// Leave to try it.
    pub(crate) attempt: &'a Attempt<'a>,
    pub(crate) database: &'a str,
    pub(crate) parameters: &'a [Parameter],
}

impl From<ScramFault> for LoginFault {
    fn from(fault: ScramFault) -> Self {
        match fault {
            ScramFault::Malformed => Self::Untrusted("it sent a malformed SCRAM message"),
            ScramFault::Nonce => Self::Untrusted("its SCRAM nonce is not an extension of ours"),
            ScramFault::Iterations => {
                Self::Untrusted("it asks for fewer than 4096 or more than 100000 SCRAM iterations")
            }
            ScramFault::Signature => {
                Self::Untrusted("its SCRAM signature is wrong: it does not know the password")
            }
            ScramFault::Channel => {
                Self::Untrusted("it sees another TLS channel than we do: somebody stands between")
            }
            // Of a server that may be anybody's; [`machine`] knows better where it is not.
            ScramFault::Refused => refusal(SCRAM.to_owned(), Voice::Anybodys),
            ScramFault::NoRandomness => {
                Self::Link(io::Error::other("the kernel gave no random bytes"))
            }
            ScramFault::NoKeys => Self::Link(io::Error::other("the secret is no SCRAM keys")),
        }
    }
}

/// What stands in the place of the SQLSTATE when a server refuses by SCRAM's own words.
const SCRAM: &str = "SCRAM";

/// Whose word it is that comes over a link before SCRAM has proved anything. PostgreSQL refuses a
/// wrong proof (28P01) without showing one of its own, so only the link can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Voice {
    /// The configured server's: TLS verified its name, or it is at its Unix socket, which nobody
    /// replaces whom its directory does not belong to.
    Servers,
    /// Whoever answered: on a network, and on a loopback address too, where any process may
    /// listen on a port that the server does not.
    Anybodys,
}

impl Voice {
    fn over(name: NameProof, remote: &Remote) -> Self {
        match name {
            NameProof::Verified => Self::Servers,
            NameProof::None if remote.is_unix_socket() => Self::Servers,
            NameProof::None => Self::Anybodys,
        }
    }
}

impl LoginFault {
    /// Whether the server does not take this role in this way, as when `pg_hba.conf` has no entry.
    pub(super) fn is_no_entry(&self) -> bool {
        matches!(self, Self::Refused { sqlstate, .. } if sqlstate == "28000")
    }

    /// Whether the server takes nobody now (`cannot_connect_now`): it starts, stops or recovers.
    pub(super) fn is_for_now(&self) -> bool {
        match self {
            Self::Server { sqlstate, .. } | Self::Unproven(sqlstate) => sqlstate == "57P03",
            Self::Dial(_)
            | Self::Link(_)
            | Self::Untrusted(_)
            | Self::Refused { .. }
            | Self::Held { .. } => false,
        }
    }
}

/// A refusal of the credential. That the secret is wrong is something else than that this role,
/// database or address may not come in (`28000`).
fn refusal(sqlstate: String, voice: Voice) -> LoginFault {
    let verdict = match (sqlstate == "28P01" || sqlstate == SCRAM, voice) {
        (true, Voice::Servers) => Verdict::Wrong,
        (true, Voice::Anybodys) => Verdict::Hearsay,
        (false, _) => Verdict::Elsewhere,
    };
    LoginFault::Refused { sqlstate, verdict }
}

/// Logs in over a fresh link.
pub(crate) async fn log_in(
    link: Link,
    request: LoginRequest<'_>,
) -> Result<Authenticated, LoginFault> {
    match timeout(LOGIN_WITHIN, run(link, request)).await {
        Ok(answer) => answer,
        Err(_elapsed) => Err(LoginFault::Link(io::ErrorKind::TimedOut.into())),
    }
}

async fn run(link: Link, request: LoginRequest<'_>) -> Result<Authenticated, LoginFault> {
    let Link { stream, name, remote, otherwise: _ } = link;
    let LoginRequest { connection, credential, attempt, database, parameters } = request;
    let voice = Voice::over(name, &remote);
    let terms = Terms { rules: &connection.login, name, voice, channel: stream.channel() };
    let mut messages = Messages::new(stream);
    let parameters = parameters.iter().map(|(name, value)| (name.as_str(), value.as_slice()));
    messages.send(&codec::startup_message(credential.username(), database, parameters)).await?;
    let mut state = State::Auth;
    let mut derived = None;
    loop {
        let (tag, body) = messages.next().await?;
        let step = advance(state, &terms, tag, &body)?;
        // Others may have learned meanwhile that it is wrong: what is not shown is not counted.
        if matches!(step, Step::Prove(..) | Step::Password | Step::Md5(_)) && attempt.is_overtaken()
        {
            let retry = credential.breaker().is_open().map(|open| open.retry).unwrap_or_default();
            return Err(LoginFault::Held { retry });
        }
        state = match step {
            Step::Wait(State::Ok(proven, bound)) => {
                if let Some(derived) = derived.take() {
                    scram::keep(credential, derived, &proven);
                }
                State::Ok(proven, bound)
            }
            Step::Wait(next) => next,
            Step::Send(next, message) => {
                messages.send(&message).await?;
                next
            }
            Step::Prove(challenge, bound) => {
                let proof = prove(challenge, credential).await?;
                messages.send(&codec::sasl_response(&proof.message)).await?;
                derived = proof.derived;
                State::Final(proof.expected, bound)
            }
            Step::Password => {
                messages.send(&secret_messages::password(credential)?).await?;
                State::Sent(How::Password)
            }
            Step::Md5(salt) => {
                messages.send(&secret_messages::md5(credential, salt)?).await?;
                State::Sent(How::Md5)
            }
            Step::Done(prelude, how) => {
                if messages.has_more() {
                    return Err(LoginFault::Untrusted("it talks on after it is ready"));
                }
                return Ok(Authenticated { stream: messages.stream, remote, prelude, how });
            }
        };
    }
}

/// Where it holds nobody up: at once when it takes microseconds.
async fn prove(challenge: Challenge, credential: &Arc<Credential>) -> Result<Proof, LoginFault> {
    if challenge.is_cheap(credential) {
        return Ok(challenge.prove(credential)?);
    }
    let credential = Arc::clone(credential);
    let proof = tokio::task::spawn_blocking(move || challenge.prove(&credential)).await;
    let proof = proof
        .map_err(|_cancelled| LoginFault::Link(io::Error::other("the broker is shutting down")))?;
    Ok(proof?)
}
