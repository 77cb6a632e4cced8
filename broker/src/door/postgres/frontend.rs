//! The client's side of a Postgres login: its first messages, the password that is a handle's
//! token, and the answers.

#![forbid(unsafe_code)]

use std::io;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use zeroize::Zeroizing;

use super::backend::Authenticated;
use super::codec::{self, BadStartup, First, Startup};
use super::spares::Spares;
use super::{entry, sqlstate};
use crate::connection::Connection;
use crate::core::{Opening, Permit, Refusal, Session, Why};
use crate::door::login::{Asked, Protocol, UpstreamFault, Wanted};
use crate::door::relay::gone;
use crate::handle::TokenHash;
use crate::session::{Client, ClientKey, KeyLength, Lifeline};
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
        Asked {
            connection: Wanted::Named(&self.startup.user),
            database: self.startup.database.as_deref(),
        }
    }

    fn objection(&self, connection: &Connection) -> Option<Why> {
        entry::objection(&self.startup, connection)
    }

    async fn ask_token(&mut self) -> io::Result<Option<TokenHash>> {
        // The whole of what a client does before it is let in is timed, and this is part of it.
        match tokio::time::timeout(super::STARTUP_WITHIN, self.password()).await {
            Ok(answer) => answer,
            Err(_elapsed) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    async fn log_in(&mut self, opening: &Opening) -> Result<Authenticated, UpstreamFault> {
        entry::log_in_for(&self.startup, opening, &self.spares, gone(&self.socket)).await
    }

    fn lifeline(&self, upstream: &Authenticated) -> io::Result<Lifeline> {
        let client = Client { socket: self.socket.share(), last_words: sqlstate::cut };
        Ok(Lifeline::Relayed(upstream.stream.duplicate()?, Some(client)))
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
        self.spares.came_in(session, &entry::parameters(&self.startup));
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
