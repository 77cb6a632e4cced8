//! Logging in to a PostgreSQL server with a credential of the arena: the login machine, and the
//! reader that feeds it.
//!
//! The machine takes messages and gives messages. It believes nothing before the server has
//! proved itself: by SCRAM, that it knows the password, or by TLS, that it has the configured
//! name. A server that asks for the password itself, or that lets us in without being asked for
//! a proof, is an impostor or a misconfiguration, and gets nothing.

#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

use super::codec;
use super::scram::{Challenge, ClientFirst, MECHANISM, ScramFault, ServerSignature};
use crate::credential::Credential;
use crate::door::wire::{Reader, Writer};
use crate::upstream::{DialError, Link, NameProof, Remote, Stream};

/// From the startup message to ReadyForQuery.
const LOGIN_WITHIN: Duration = Duration::from_secs(15);
/// Longest message of a login; ParameterStatus and notices are far shorter.
const MAX_MESSAGE: usize = 32 * 1024;
/// A type byte and a length.
const HEADER: usize = 5;
/// All that a server may say between AuthenticationOk and ReadyForQuery.
const MAX_PRELUDE: usize = 128 * 1024;

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
    /// The server refuses the credential.
    #[error("the server refuses the credential ({0})")]
    Refused(String),
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
}

/// What the server said from AuthenticationOk to ReadyForQuery.
#[derive(Debug, Default)]
pub(crate) struct Prelude {
    /// The messages as they came, but for BackendKeyData.
    before_key: Vec<u8>,
    after_key: Vec<u8>,
    key: Option<ServerKey>,
}

/// What a query of this session is cancelled with. Never leaves the broker.
#[derive(Debug)]
pub(crate) struct ServerKey {
    pub(crate) pid: u32,
    pub(crate) secret: Vec<u8>,
}

/// Whom and how to log in.
#[derive(Debug)]
pub(crate) struct LoginRequest<'a> {
    pub(crate) credential: &'a Arc<Credential>,
    pub(crate) database: &'a str,
    pub(crate) parameters: &'a [(String, String)],
}

#[derive(Debug)]
enum State {
    Auth,
    Continue(ClientFirst),
    Final(ServerSignature),
    /// The server has proved that it knows the password.
    Ok,
    Prelude(Prelude),
}

/// What to do after a message.
#[derive(Debug)]
enum Step {
    Wait(State),
    Send(State, Vec<u8>),
    Prove(Challenge),
    Done(Prelude),
}

impl Prelude {
    /// The bytes for the client, with its own key in place of the server's.
    pub(crate) fn for_client(&self, key: &crate::session::ClientKey) -> Vec<u8> {
        let mut bytes = codec::authentication_ok();
        bytes.extend_from_slice(&self.before_key);
        if self.key.is_some() {
            bytes.extend_from_slice(&codec::backend_key_data(key));
        }
        bytes.extend_from_slice(&self.after_key);
        bytes
    }

    /// Adds whole messages that came after it.
    pub(crate) fn said_meanwhile(&mut self, messages: &[u8]) {
        self.after_key.extend_from_slice(messages);
    }

    pub(crate) fn take_key(&mut self) -> Option<ServerKey> {
        self.key.take()
    }

    fn push(&mut self, tag: u8, body: &[u8]) -> Result<(), LoginFault> {
        let bytes = if self.key.is_some() { &mut self.after_key } else { &mut self.before_key };
        if bytes.len() + body.len() > MAX_PRELUDE {
            return Err(LoginFault::Untrusted("it goes on and on before it is ready"));
        }
        bytes.extend_from_slice(&Writer::tagged(tag).bytes(body).finish());
        Ok(())
    }
}

/// One message further. `name` is what TLS proved before.
fn advance(state: State, name: NameProof, tag: u8, body: &[u8]) -> Result<Step, LoginFault> {
    use LoginFault::Untrusted;
    match (tag, state) {
        (b'E', state) => Err(server_error(&state, name, body)),
        // Before the login is through a notice is noise, and nobody's to read.
        (b'N', state @ (State::Auth | State::Continue(_) | State::Final(_) | State::Ok)) => {
            Ok(Step::Wait(state))
        }
        (b'R', state) => authentication(state, body),
        (b'Z', State::Prelude(mut prelude)) => {
            prelude.push(tag, body)?;
            Ok(Step::Done(prelude))
        }
        (b'K', State::Prelude(mut prelude)) if prelude.key.is_none() => {
            let mut reader = Reader::new(body);
            let pid = reader
                .u32()
                .map_err(|_malformed| Untrusted("it sent a malformed BackendKeyData"))?;
            let secret = reader.rest();
            if !(4..=256).contains(&secret.len()) {
                return Err(Untrusted("it sent a malformed BackendKeyData"));
            }
            prelude.key = Some(ServerKey { pid, secret: secret.to_vec() });
            Ok(Step::Wait(State::Prelude(prelude)))
        }
        (b'S' | b'N', State::Prelude(mut prelude)) => {
            prelude.push(tag, body)?;
            Ok(Step::Wait(State::Prelude(prelude)))
        }
        (_, State::Auth | State::Continue(_) | State::Final(_) | State::Ok | State::Prelude(_)) => {
            Err(Untrusted("it sent a message that has no place in a login"))
        }
    }
}

/// Runs the machine over a server's messages for the fuzzer: from the beginning (0), from where it
/// has asked for a challenge (1), or from where the server has proved itself (2). Whether it went
/// on to the end, or to where only the password leads further.
#[cfg(any(test, fuzzing))]
pub(super) fn lets_in(from: u8, mut stream: &[u8]) -> bool {
    let mut state = match from {
        0 => State::Auth,
        1 => State::Continue(ClientFirst::with_nonce("fuzz".to_owned())),
        _ => State::Prelude(Prelude::default()),
    };
    while let Some(([tag, length @ ..], rest)) = stream.split_first_chunk::<HEADER>() {
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        let Some(length) = length.checked_sub(4).filter(|length| *length <= MAX_MESSAGE) else {
            return false;
        };
        let Some((body, rest)) = rest.split_at_checked(length) else { return false };
        stream = rest;
        state = match advance(state, NameProof::None, *tag, body) {
            Ok(Step::Wait(next) | Step::Send(next, _)) => next,
            // Only who knows the password comes by.
            Ok(Step::Prove(_)) => return true,
            Ok(Step::Done(prelude)) => {
                assert_eq!(from, 2, "it let a server in that has proved nothing");
                let key = crate::session::ClientKey { pid: 9, secret: [9; 4].into() };
                let told = prelude.for_client(&key);
                assert!(told.len() <= 2 * (MAX_PRELUDE + HEADER) + 64, "{} bytes", told.len());
                return true;
            }
            Err(fault) => {
                let proven = matches!(fault, LoginFault::Server { .. });
                assert!(from == 2 || !proven, "it believed an error: {fault}");
                return false;
            }
        };
        let proven = matches!(state, State::Ok | State::Prelude(_));
        assert!(from == 2 || !proven, "it believed a server that has proved nothing");
    }
    false
}

/// An Authentication message (55.7), whose body begins with its kind.
fn authentication(state: State, body: &[u8]) -> Result<Step, LoginFault> {
    use LoginFault::Untrusted;
    let mut reader = Reader::new(body);
    let kind = reader
        .u32()
        .map_err(|_malformed| Untrusted("it sent a malformed Authentication message"))?;
    match (kind, state) {
        (10, State::Auth) => {
            if !mechanisms(reader).any(|mechanism| mechanism == MECHANISM.as_bytes()) {
                return Err(Untrusted("it does not offer SCRAM-SHA-256"));
            }
            let first = ClientFirst::random()?;
            let message = codec::sasl_initial_response(MECHANISM, &first.message());
            Ok(Step::Send(State::Continue(first), message))
        }
        (11, State::Continue(first)) => Ok(Step::Prove(first.challenged(reader.rest())?)),
        (12, State::Final(expected)) => {
            let _proven = expected.check(reader.rest())?;
            Ok(Step::Wait(State::Ok))
        }
        (0, State::Ok) => {
            reader
                .end()
                .map_err(|_malformed| Untrusted("it sent a malformed Authentication message"))?;
            Ok(Step::Wait(State::Prelude(Prelude::default())))
        }
        (0, _) => Err(Untrusted("it let us in without proving that it knows the password")),
        (3, _) => Err(Untrusted("it asks for the password itself")),
        (5, _) => Err(Untrusted("it asks for an MD5 of the password")),
        _ => Err(Untrusted("it asks for a kind of authentication that is not configured")),
    }
}

/// The names in AuthenticationSASL; an empty one ends them.
fn mechanisms(mut reader: Reader<'_>) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || reader.c_bytes().ok().filter(|name| !name.is_empty()))
}

fn server_error(state: &State, name: NameProof, body: &[u8]) -> LoginFault {
    let sqlstate = codec::sqlstate(body).filter(|code| code.iter().all(u8::is_ascii_alphanumeric));
    let sqlstate = sqlstate
        .map_or_else(|| "none".to_owned(), |code| String::from_utf8_lossy(&code).into_owned());
    let proven = match state {
        State::Ok | State::Prelude(_) => true,
        State::Auth | State::Continue(_) | State::Final(_) => name == NameProof::Verified,
    };
    // Class 28: the credential, not the request, is at fault, and that is the operator's matter.
    if sqlstate.starts_with("28") && !matches!(state, State::Prelude(_)) {
        return LoginFault::Refused(sqlstate);
    }
    if proven {
        let message = Writer::tagged(b'E').bytes(body).finish();
        LoginFault::Server { sqlstate, message }
    } else {
        LoginFault::Unproven(sqlstate)
    }
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
            ScramFault::Refused => Self::Refused("SCRAM".to_owned()),
            ScramFault::NoRandomness => {
                Self::Link(io::Error::other("the kernel gave no random bytes"))
            }
        }
    }
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
    let Link { stream, name, remote } = link;
    let mut messages = Messages::new(stream);
    let parameters = request.parameters.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let startup =
        codec::startup_message(request.credential.username(), request.database, parameters);
    messages.send(&startup).await?;
    let mut state = State::Auth;
    loop {
        let (tag, body) = messages.next().await?;
        state = match advance(state, name, tag, &body)? {
            Step::Wait(next) => next,
            Step::Send(next, message) => {
                messages.send(&message).await?;
                next
            }
            Step::Prove(challenge) => {
                let credential = Arc::clone(request.credential);
                let proof = tokio::task::spawn_blocking(move || challenge.prove(&credential)).await;
                let proof = proof.map_err(|_cancelled| {
                    LoginFault::Link(io::Error::other("the broker is shutting down"))
                })?;
                let (message, expected) = proof.into_parts();
                messages.send(&codec::sasl_response(&message)).await?;
                State::Final(expected)
            }
            Step::Done(prelude) => {
                if !messages.buffer.is_empty() {
                    return Err(LoginFault::Untrusted("it talks on after it is ready"));
                }
                return Ok(Authenticated { stream: messages.stream, remote, prelude });
            }
        };
    }
}

/// Reads whole messages, and no more memory than one of them needs.
#[derive(Debug)]
pub(super) struct Messages {
    pub(super) stream: Stream,
    buffer: Vec<u8>,
}

impl Messages {
    pub(super) fn new(stream: Stream) -> Self {
        Self { stream, buffer: Vec::new() }
    }

    pub(super) async fn send(&mut self, message: &[u8]) -> Result<(), LoginFault> {
        self.stream.write_all(message).await.map_err(LoginFault::Link)?;
        self.stream.flush().await.map_err(LoginFault::Link)
    }

    /// The next message's type and body.
    pub(super) async fn next(&mut self) -> Result<(u8, Vec<u8>), LoginFault> {
        loop {
            if let Some((tag, length)) = self.header()? {
                let whole = length + 1;
                if self.buffer.len() >= whole {
                    let body = self.buffer.get(HEADER..whole).unwrap_or_default().to_vec();
                    self.buffer.drain(..whole);
                    return Ok((tag, body));
                }
            }
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk).await.map_err(LoginFault::Link)? {
                0 => return Err(LoginFault::Link(io::ErrorKind::UnexpectedEof.into())),
                count => self.buffer.extend_from_slice(chunk.get(..count).unwrap_or_default()),
            }
        }
    }

    fn header(&self) -> Result<Option<(u8, usize)>, LoginFault> {
        let Some([tag, length @ ..]) = self.buffer.first_chunk::<HEADER>() else { return Ok(None) };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if !(4..=MAX_MESSAGE).contains(&length) {
            return Err(LoginFault::Untrusted(
                "it announces a message of a length that no login has",
            ));
        }
        Ok(Some((*tag, length)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auth(kind: u32, rest: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes(), rest].concat()
    }

    fn untrusted(state: State, tag: u8, body: &[u8]) -> &'static str {
        match advance(state, NameProof::None, tag, body) {
            Err(LoginFault::Untrusted(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_password_is_never_sent_because_a_server_asks() {
        assert!(untrusted(State::Auth, b'R', &auth(3, b"")).contains("the password itself"));
        assert!(untrusted(State::Auth, b'R', &auth(5, b"salt")).contains("MD5"));
        for kind in [2, 6, 7, 8, 9, 13] {
            let _ = untrusted(State::Auth, b'R', &auth(kind, b""));
        }
    }

    #[test]
    fn a_server_must_prove_itself_before_it_lets_us_in() {
        let first = || ClientFirst::random().unwrap();
        assert!(untrusted(State::Auth, b'R', &auth(0, b"")).contains("without proving"));
        assert!(
            untrusted(State::Continue(first()), b'R', &auth(0, b"")).contains("without proving")
        );
        let _ = untrusted(State::Auth, b'R', &auth(10, b"PLAIN\0\0"));
        let _ = untrusted(State::Auth, b'R', &auth(12, b"v="));
        let _ = untrusted(State::Ok, b'R', &auth(10, b"SCRAM-SHA-256\0\0"));
    }

    #[test]
    fn messages_out_of_place_end_the_login() {
        for tag in [b'Z', b'K', b'S', b'T', b'D', b'C', b'v', 0] {
            let _ = untrusted(State::Auth, tag, b"");
            let _ = untrusted(State::Ok, tag, b"");
        }
        let _ = untrusted(State::Prelude(Prelude::default()), b'T', b"");
        let _ = untrusted(State::Prelude(Prelude::default()), b'K', b"\0\0\0\x01abc");
    }

    #[test]
    fn errors_are_relayed_only_from_a_proven_server() {
        let error = codec::fatal("3D000", "database \"x\" does not exist", "", None);
        let body = &error[5..];
        let fault = |state, name| advance(state, name, b'E', body).unwrap_err();
        assert!(matches!(fault(State::Auth, NameProof::None), LoginFault::Unproven(_)));
        assert!(matches!(fault(State::Auth, NameProof::Verified), LoginFault::Server { .. }));
        let LoginFault::Server { message, sqlstate } =
            fault(State::Prelude(Prelude::default()), NameProof::None)
        else {
            panic!("it has proved itself by SCRAM")
        };
        assert_eq!((message, sqlstate.as_str()), (error, "3D000"));
        let refused =
            codec::fatal("28P01", "password authentication failed for user \"app\"", "", None);
        let fault = advance(State::Auth, NameProof::Verified, b'E', &refused[5..]).unwrap_err();
        assert!(matches!(fault, LoginFault::Refused(_)), "{fault}");
    }

    #[test]
    fn the_prelude_is_bounded_and_carries_our_key() {
        let mut prelude = Prelude::default();
        prelude.push(b'S', b"a\0b\0").unwrap();
        let Ok(Step::Wait(State::Prelude(prelude))) =
            advance(State::Prelude(prelude), NameProof::None, b'K', b"\0\0\0\x07\x01\x02\x03\x04")
        else {
            panic!()
        };
        let Ok(Step::Done(prelude)) = advance(State::Prelude(prelude), NameProof::None, b'Z', b"I")
        else {
            panic!()
        };
        let ours = crate::session::ClientKey { pid: 9, secret: [9; 4].into() };
        let bytes = prelude.for_client(&ours);
        assert_eq!(bytes, b"R\0\0\0\x08\0\0\0\0S\0\0\0\x08a\0b\0K\0\0\0\x0c\0\0\0\x09\x09\x09\x09\x09Z\0\0\0\x05I");

        let mut endless = Prelude::default();
        let notice = vec![b'x'; MAX_MESSAGE];
        let pushed = (0..100).map_while(|_| endless.push(b'N', &notice).ok()).count();
        assert!(pushed < 100);
    }
}
