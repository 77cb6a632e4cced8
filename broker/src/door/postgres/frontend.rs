//! The client's side of a Postgres login: its first messages, the password that is a handle's
//! token, and the answers.

#![forbid(unsafe_code)]

use std::io;
use std::time::Instant;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use zeroize::Zeroizing;

use super::attempt::log_in_for;
use super::backend::{Authenticated, LoginFault};
use super::codec::{self, BadStartup, First, Startup};
use super::spares::Spares;
use super::{fault, sqlstate};
use crate::connection::Connection;
use crate::core::{Opening, Permit, Refusal, Session, Why};
use crate::door::login::{Asked, Protocol, UpstreamFault};
use crate::door::relay::gone;
use crate::handle::TokenHash;
use crate::session::{ClientKey, KeyLength, Lifeline};
use crate::socket::Socket;

/// SSLRequest and GSSENCRequest, and each only once by an honest client.
const MAX_ENCRYPTION_REQUESTS: usize = 2;

/// A client that has said what it wants.
#[derive(Debug)]
pub(super) struct Frontend {
    pub(super) socket: Socket,
    startup: Startup,
    spares: Spares,
}

/// What a client turned out to be.
#[derive(Debug)]
pub(super) enum Opened {
    Client(Box<Frontend>),
    /// The socket is to be closed when the request has been acted on: until then the client waits,
    /// so that its next query is not the one that is hit.
    Cancel(ClientKey, Socket),
}

/// Reads until the client has said what it wants. The caller bounds the time.
pub(super) async fn greet(mut socket: Socket, spares: &Spares) -> io::Result<Opened> {
    for _ in 0..=MAX_ENCRYPTION_REQUESTS {
        let mut announced = [0; 4];
        socket.read_exact(&mut announced).await?;
        let first = match codec::startup_len(announced) {
            Ok(len) => {
                let mut body = vec![0; len - announced.len()];
                socket.read_exact(&mut body).await?;
                codec::first(&body)
            }
            Err(bad) => Err(bad),
        };
        match first {
            // Exactly the request was read, so nothing that follows can pass for protected.
            Ok(First::Encryption) => socket.write_all(b"N").await?,
            Ok(First::Cancel(key)) => return Ok(Opened::Cancel(key, socket)),
            Ok(First::Startup(startup)) => {
                if startup.must_negotiate() {
                    let version = startup.version();
                    socket.write_all(&codec::negotiate(version, &startup.options)).await?;
                }
                return Ok(Opened::Client(Box::new(Frontend {
                    socket,
                    startup,
                    spares: spares.clone(),
                })));
            }
            Err(bad) => {
                let (message, hint) = bad_startup(bad);
                socket
                    .write_all(&codec::fatal("08P01", message, "INVALID_REQUEST", Some(hint)))
                    .await?;
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "asks for encryption again and again"))
}

fn bad_startup(bad: BadStartup) -> (&'static str, &'static str) {
    match bad {
        BadStartup::Length => (
            "invalid length of startup packet",
            "It must have 8 to 10000 bytes, and no TLS of its own.",
        ),
        BadStartup::Version => ("unsupported frontend protocol", "Speak protocol 3.0."),
        BadStartup::Malformed => (
            "invalid startup packet layout",
            "Names and values end in a NUL; an empty name ends them.",
        ),
        BadStartup::NoUser => {
            ("no user name in the startup packet", "Give the name of a connection as the user.")
        }
    }
}

impl Frontend {
    /// What the server is told: all that the client set, but not who it is.
    fn parameters(&self) -> Vec<(String, String)> {
        let mut parameters = self.startup.parameters.clone();
        if let Some(replication) =
            self.startup.replication.as_ref().filter(|value| !is_false(value))
        {
            parameters.push(("replication".to_owned(), replication.clone()));
        }
        parameters
    }

    async fn password(&mut self) -> io::Result<Option<TokenHash>> {
        self.socket.write_all(&codec::ask_cleartext_password()).await?;
        let mut header = [0; 5];
        self.socket.read_exact(&mut header).await?;
        let [tag, length @ ..] = header;
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if tag == b'X' {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        if tag != b'p' || !(4..=codec::MAX_PASSWORD).contains(&length) {
            return Ok(None);
        }
        let mut body = Zeroizing::new(vec![0; length - 4]);
        self.socket.read_exact(&mut body).await?;
        let hash = codec::password(&body).ok().and_then(TokenHash::of);
        Ok(hash)
    }
}

impl Protocol for Frontend {
    type Upstream = Authenticated;

    fn asked(&self) -> Asked<'_> {
        Asked { connection: &self.startup.user, database: self.startup.database.as_deref() }
    }

    fn objection(&self, connection: &Connection) -> Option<Why> {
        if let Some(replication) = &self.startup.replication
            && !connection.replication
            && !is_false(replication)
        {
            return Some(Why::Unsupported(
                "replication (set replication = true for the connection)",
            ));
        }
        let refused =
            self.startup.parameters.iter().any(|(name, _)| !connection.startup.allows(name));
        refused.then_some(Why::InvalidRequest {
            field: "startup parameters",
            must: "be among those that the connection's `startup` key allows",
        })
    }

    async fn ask_token(&mut self) -> io::Result<Option<TokenHash>> {
        // The whole of what a client does before it is let in is timed, and this is part of it.
        match tokio::time::timeout(super::STARTUP_WITHIN, self.password()).await {
            Ok(answer) => answer,
            Err(_elapsed) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    async fn log_in(&mut self, opening: &Opening) -> Result<Authenticated, UpstreamFault> {
        let connection = opening.connection();
        let parameters = self.parameters();
        if let Some(spare) = self.spares.take(opening, &parameters).await {
            return Ok(spare);
        }
        let began = Instant::now();
        let login = log_in_for(opening, &parameters);
        let answer = tokio::select! {
            answer = login => answer,
            () = gone(&self.socket) => return Err(UpstreamFault::Abandoned),
        };
        if answer.is_ok() {
            opening.metrics().upstream_connect(&connection.name, began.elapsed());
        }
        answer.map_err(|fault| upstream_fault(fault, opening))
    }

    fn lifeline(upstream: &Authenticated) -> io::Result<Lifeline> {
        upstream.stream.duplicate().map(Lifeline::Relayed)
    }

    fn key_length(&self) -> KeyLength {
        self.startup.version().key_length()
    }

    async fn welcome(
        &mut self,
        _permit: Permit,
        session: &Session,
        upstream: &mut Authenticated,
    ) -> io::Result<()> {
        self.socket.write_all(&upstream.prelude.for_client(session.client_key())).await?;
        self.spares.came_in(session, &self.parameters());
        Ok(())
    }

    async fn refuse(&mut self, refusal: &Refusal) {
        // A client that does not read the answer loses it.
        let _ = self.socket.try_write(&sqlstate::refusal(refusal));
        let _ = self.socket.shutdown().await;
    }

    async fn pass_on(&mut self, error: &[u8]) {
        let _ = self.socket.try_write(error);
        let _ = self.socket.shutdown().await;
    }
}

/// A proven server's own words are the client's to read; everything else is told in ours.
fn upstream_fault(fault: LoginFault, opening: &Opening) -> UpstreamFault {
    let connection = &opening.connection().name;
    let (reason, why) = fault::explain(&fault, connection);
    opening.metrics().upstream_error(connection, reason);
    match fault {
        LoginFault::Server { message, .. } => UpstreamFault::Theirs(message),
        LoginFault::Dial(_)
        | LoginFault::Link(_)
        | LoginFault::Untrusted(_)
        | LoginFault::Refused(_)
        | LoginFault::Held { .. }
        | LoginFault::Unproven(_) => UpstreamFault::Ours { reason, why },
    }
}

/// As the server reads a boolean setting.
fn is_false(value: &str) -> bool {
    ["0", "off", "no", "false", "f", "n"].iter().any(|word| word.eq_ignore_ascii_case(value))
}
