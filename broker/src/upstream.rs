//! Dialling a connection's server: the socket, and TLS where it is configured.
//!
//! Nothing secret is sent here. What a caller gets is a link to a server that has proved its
//! name, or a plain link where the operator asked for one.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::net::getpeername;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use self::distrust::Distrust;
pub(crate) use self::plan::Route;
use crate::connection::{Check, Negotiation};
use crate::peer::Uid;
use crate::socket::Socket;

mod distrust;
pub(crate) mod end_point;
mod plan;
pub(crate) mod tls;

/// PostgreSQL protocol 55.7, SSLRequest: length 8 and the code 80877103.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// A link that could not be made.
#[derive(Debug, Error)]
pub(crate) enum DialError {
    /// No answer, or none in time.
    #[error("the server cannot be reached")]
    Unreachable(#[source] io::Error),
    /// The server has no TLS, its certificate is not the one that was asked for, or its socket is
    /// somebody else's.
    #[error("the server did not prove its name")]
    Untrusted(#[source] Distrust),
}

/// A link to a server.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) stream: Stream,
    /// Whether the server has proved who it is.
    pub(crate) name: NameProof,
    pub(crate) remote: Remote,
    /// Where the TLS mode leaves a choice: the same server in the other way, for a login that is
    /// refused because of this one.
    pub(crate) otherwise: Option<Remote>,
}

/// What is known of the server's name before anybody logs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NameProof {
    /// A certificate for the configured name, by a configured root; or, of a Unix socket, the
    /// kernel's word that it is `peer_user`'s.
    Verified,
    /// Nothing.
    None,
}

/// Where a link leads, resolved: a cancel request must reach the same server.
#[derive(Clone, Debug)]
pub(crate) struct Remote {
    address: Address,
    tls: Option<Secured>,
    /// For the socket and TLS together.
    timeout: Duration,
}

/// How TLS is spoken there.
#[derive(Clone, Debug)]
struct Secured {
    check: Check,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    negotiation: Negotiation,
}

#[derive(Clone, Debug)]
enum Address {
    Tcp(SocketAddr),
    Unix { path: PathBuf, server: Option<Uid> },
}

#[cfg(test)]
impl Remote {
    /// Where a Unix socket is, or is not.
    pub(crate) fn unix_for_test(path: &std::path::Path) -> Self {
        let address = Address::Unix { path: path.to_owned(), server: None };
        Self { address, tls: None, timeout: Duration::from_secs(10) }
    }

    pub(crate) fn tcp_for_test(address: SocketAddr) -> Self {
        Self { address: Address::Tcp(address), tls: None, timeout: Duration::from_secs(10) }
    }
}

impl Remote {
    pub(crate) const fn is_unix_socket(&self) -> bool {
        matches!(self.address, Address::Unix { .. })
    }
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Tcp(address) => address.fmt(f),
            Address::Unix { path, .. } => path.display().fmt(f),
        }
    }
}

/// The bytes of a link.
#[derive(Debug)]
pub(crate) enum Stream {
    Plain(Socket),
    Tls(Box<TlsStream<Socket>>),
}

impl Remote {
    async fn connect(&self) -> Result<Link, DialError> {
        let plain = |socket, name| Link {
            stream: Stream::Plain(socket),
            name,
            remote: self.clone(),
            otherwise: None,
        };
        match &self.address {
            Address::Unix { path, server } => {
                let stream = UnixStream::connect(path).await.map_err(DialError::Unreachable)?;
                let name = match server {
                    None => NameProof::None,
                    Some(wanted) => is_of(&stream, *wanted)?,
                };
                Ok(plain(adopt(stream.into_std())?, name))
            }
            Address::Tcp(address) => {
                let stream = TcpStream::connect(address).await.map_err(DialError::Unreachable)?;
                stream.set_nodelay(true).map_err(DialError::Unreachable)?;
                let socket = adopt(stream.into_std())?;
                match &self.tls {
                    None => Ok(plain(socket, NameProof::None)),
                    Some(Secured { check, config, name, negotiation }) => {
                        let stream = start_tls(socket, config, name, *negotiation).await?;
                        let name = match check {
                            Check::ChainAndName => NameProof::Verified,
                            Check::Nothing | Check::Chain => NameProof::None,
                        };
                        let stream = Stream::Tls(Box::new(stream));
                        Ok(Link { stream, name, remote: self.clone(), otherwise: None })
                    }
                }
            }
        }
    }
}

/// Whether the server is this user's: SO_PEERCRED (unix(7)) names who called listen(2), which is
/// the service manager where it passed the socket on.
fn is_of(stream: &UnixStream, wanted: Uid) -> Result<NameProof, DialError> {
    let found = stream.peer_cred().map_err(DialError::Unreachable)?.uid();
    let found = Uid::from_raw(found);
    if found == wanted {
        Ok(NameProof::Verified)
    } else {
        Err(DialError::Untrusted(Distrust::User { found, wanted }))
    }
}

/// Takes a connected socket out of tokio's register and into ours.
fn adopt<S: Into<OwnedFd>>(connected: io::Result<S>) -> Result<Socket, DialError> {
    connected.and_then(|socket| Socket::adopt(socket.into())).map_err(DialError::Unreachable)
}

/// PostgreSQL protocol 55.2.10: asks where it is to be asked, and begins the handshake.
async fn start_tls(
    mut stream: Socket,
    config: &Arc<ClientConfig>,
    name: &ServerName<'static>,
    negotiation: Negotiation,
) -> Result<TlsStream<Socket>, DialError> {
    match negotiation {
        Negotiation::Postgres => ask_for_tls(&mut stream).await?,
        Negotiation::Direct => {}
    }
    let connector = TlsConnector::from(Arc::clone(config));
    let stream = connector.connect(name.clone(), stream).await.map_err(|error| {
        // What rustls finds wrong comes as InvalidData; the rest is the socket's.
        if error.kind() == io::ErrorKind::InvalidData {
            DialError::Untrusted(Distrust::by_tls(error, name))
        } else {
            DialError::Unreachable(error)
        }
    })?;
    let selected = stream.get_ref().1.alpn_protocol();
    match negotiation {
        Negotiation::Postgres => Ok(stream),
        Negotiation::Direct if selected == Some(tls::ALPN) => Ok(stream),
        // What follows would be spoken to a server of whatever protocol shares the certificate.
        Negotiation::Direct => Err(DialError::Untrusted(Distrust::NoProtocol)),
    }
}

/// Asks and reads exactly one byte. Nothing is read ahead, so no plaintext can pass for a part of
/// the protected stream (CVE-2021-23222).
async fn ask_for_tls(stream: &mut Socket) -> Result<(), DialError> {
    stream.write_all(&SSL_REQUEST).await.map_err(DialError::Unreachable)?;
    let mut answer = [0];
    stream.read_exact(&mut answer).await.map_err(DialError::Unreachable)?;
    if answer == *b"S" {
        return Ok(());
    }
    Err(DialError::Untrusted(Distrust::NoTls))
}

impl Stream {
    /// Moves the link to the current runtime.
    ///
    /// # Errors
    /// When it cannot be registered there; it is of no use then.
    pub(crate) fn move_here(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.move_here(),
            Self::Tls(stream) => stream.get_mut().0.move_here(),
        }
    }

    /// What its bytes go through.
    pub(crate) fn socket(&self) -> &Socket {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => stream.get_ref().0,
        }
    }

    /// A duplicate of the socket, to shut the link down from anywhere.
    pub(crate) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.socket().duplicate()
    }

    /// The socket itself, no longer known to the runtime, if nobody needs more than it to
    /// speak: it is in non-blocking mode.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] when its bytes are TLS, and what the runtime says.
    pub(crate) fn into_plain_socket(self) -> io::Result<OwnedFd> {
        match self {
            Self::Plain(socket) => socket.into_descriptor(),
            Self::Tls(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Whether it leads to another machine.
    pub(crate) fn leaves_the_machine(&self) -> bool {
        match getpeername(self.socket()) {
            Ok(Some(peer)) => {
                SocketAddr::try_from(peer).is_ok_and(|address| !address.ip().is_loopback())
            }
            // A Unix socket that was never bound.
            Ok(None) => false,
            Err(_unknown) => true,
        }
    }
}

macro_rules! each {
    ($this:expr, $stream:ident => $do:expr) => {
        match $this.get_mut() {
            Stream::Plain($stream) => $do,
            Stream::Tls($stream) => $do,
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match each!(self, stream => Pin::new(stream).poll_read(cx, buf)) {
            // TLS that ends without close_notify, as most servers end it. It is an end like that of
            // a plain socket: PostgreSQL's messages have lengths, so one that was cut short shows.
            Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Poll::Ready(Ok(()))
            }
            read @ (Poll::Ready(_) | Poll::Pending) => read,
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        each!(self, stream => Pin::new(stream).poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}
