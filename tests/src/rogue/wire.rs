//! One connection of a rogue, from its side.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::sockopt::set_socket_linger;
use rustls::{ServerConnection, StreamOwned};

use super::scram::Verifier;
use super::{ServerTls, Shared};
use crate::frontend::message;

/// Longer than any clock of the broker's, and the end of every script.
const PLAY_FOR: Duration = Duration::from_secs(40);
const DRIP: Duration = Duration::from_millis(100);
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];
const CANCEL_CODE: [u8; 4] = [0x04, 0xd2, 0x16, 0x2e];
/// Longest message that an honest broker sends in a login.
const LONGEST: usize = 64 << 10;

/// What the broker came for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Greeting {
    /// A session; the body of the startup message.
    Startup(Vec<u8>),
    /// To cancel a query.
    Cancel,
}

/// A connection.
pub struct Wire {
    stream: Stream,
    tls: Option<ServerTls>,
    shared: Arc<Shared>,
    number: usize,
    until: Instant,
}

#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Writes down what is read from a socket.
struct Tapped {
    socket: Socket,
    shared: Arc<Shared>,
}

enum Stream {
    Plain(Tapped),
    Tls(Box<StreamOwned<ServerConnection, Tapped>>),
    /// While TLS is being put around it.
    Gone,
}

impl Wire {
    pub(super) fn new(
        socket: Socket,
        tls: Option<ServerTls>,
        shared: Arc<Shared>,
        number: usize,
    ) -> io::Result<Self> {
        socket.set_timeouts(Some(PLAY_FOR))?;
        if let Socket::Tcp(socket) = &socket {
            socket.set_nodelay(true)?;
        }
        let stream = Stream::Plain(Tapped { socket, shared: Arc::clone(&shared) });
        Ok(Self { stream, tls, shared, number, until: Instant::now() + PLAY_FOR })
    }

    /// Which of the rogue's connections it is, from 1.
    #[must_use]
    pub fn number(&self) -> usize {
        self.number
    }

    /// What an honest server does first: TLS if it is asked for and there is any, and the
    /// startup message.
    pub fn greet(&mut self) -> io::Result<Greeting> {
        let first = self.packet()?;
        if first == SSL_REQUEST[4..] {
            if self.tls.is_none() {
                self.send(b"N")?;
            } else {
                self.send(b"S")?;
                self.start_tls()?;
            }
            return self.started();
        }
        Ok(greeting(first))
    }

    /// Reads SSLRequest, if TLS is what the broker asks for.
    pub fn tls_asked(&mut self) -> io::Result<()> {
        self.packet().map(|_request| ())
    }

    /// The server's half of a TLS handshake.
    pub fn start_tls(&mut self) -> io::Result<()> {
        let Some(tls) = &self.tls else { return Err(io::ErrorKind::Unsupported.into()) };
        let session = ServerConnection::new(tls.config()).map_err(io::Error::other)?;
        let Stream::Plain(socket) = std::mem::replace(&mut self.stream, Stream::Gone) else {
            return Err(io::Error::other("TLS in TLS"));
        };
        let mut stream = StreamOwned::new(session, socket);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        self.stream = Stream::Tls(Box::new(stream));
        Ok(())
    }

    /// Reads the startup message.
    pub fn started(&mut self) -> io::Result<Greeting> {
        self.packet().map(greeting)
    }

    fn packet(&mut self) -> io::Result<Vec<u8>> {
        let mut length = [0; 4];
        self.read_exact(&mut length)?;
        self.body(length)
    }

    fn body(&mut self, length: [u8; 4]) -> io::Result<Vec<u8>> {
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if !(4..=LONGEST).contains(&length) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut body = vec![0; length - 4];
        self.read_exact(&mut body)?;
        Ok(body)
    }

    /// The next message of the broker, or of the client behind it.
    pub fn receive(&mut self) -> io::Result<(u8, Vec<u8>)> {
        let mut header = [0; 5];
        self.read_exact(&mut header)?;
        let [tag, length @ ..] = header;
        Ok((tag, self.body(length)?))
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)?;
        self.flush()
    }

    /// A whole login of a server that knows the password, up to ReadyForQuery.
    pub fn let_in(&mut self, verifier: &Verifier) -> io::Result<()> {
        let first = verifier.ask(self, &["SCRAM-SHA-256"])?;
        let last = verifier.challenge(self, &first, &verifier.server_first(&first.nonce))?;
        self.send(&super::scram::sasl_final(&verifier.signature(&last)))?;
        self.send(&prelude())
    }

    /// Reads until the broker hangs up.
    pub fn hold(&mut self) -> io::Result<()> {
        let mut sink = [0; 16 << 10];
        while Instant::now() < self.until && self.read(&mut sink)? > 0 {}
        Ok(())
    }

    /// Says nothing and reads nothing until the broker hangs up, or the time is over.
    pub fn ignore(&mut self) -> io::Result<()> {
        while Instant::now() < self.until && !self.socket()?.has_hung_up()? {}
        Ok(())
    }

    /// Sends a byte every 100 ms, until the broker hangs up.
    pub fn drip(&mut self, bytes: impl Iterator<Item = u8>) -> io::Result<()> {
        for byte in bytes {
            self.send(&[byte])?;
            // The slowness is what is tested.
            std::thread::sleep(DRIP);
            if Instant::now() >= self.until {
                break;
            }
        }
        self.hold()
    }

    /// Sends the same bytes again and again, until the broker hangs up.
    pub fn flood(&mut self, bytes: &[u8]) -> io::Result<()> {
        while Instant::now() < self.until {
            self.send(bytes)?;
        }
        Ok(())
    }

    /// Closes the connection with a reset; over a Unix socket without a word.
    pub fn reset(&mut self) -> io::Result<()> {
        match self.socket()? {
            Socket::Tcp(socket) => set_socket_linger(socket, Some(Duration::ZERO))?,
            Socket::Unix(socket) => socket.shutdown(Shutdown::Both)?,
        }
        self.stream = Stream::Gone;
        Ok(())
    }

    fn socket(&self) -> io::Result<&Socket> {
        match &self.stream {
            Stream::Plain(tapped) => Ok(&tapped.socket),
            Stream::Tls(stream) => Ok(&stream.sock.socket),
            Stream::Gone => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

/// AuthenticationOk and what follows it, as short as it can be.
#[must_use]
pub fn prelude() -> Vec<u8> {
    [
        message(b'R', &[0; 4]),
        message(b'S', b"server_version\x0015.0 (rogue)\0"),
        message(b'K', b"\0\0\0\x07key!"),
        message(b'Z', b"I"),
    ]
    .concat()
}

fn greeting(body: Vec<u8>) -> Greeting {
    if body.starts_with(&CANCEL_CODE) { Greeting::Cancel } else { Greeting::Startup(body) }
}

impl Socket {
    fn set_timeouts(&self, limit: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(socket) => {
                socket.set_read_timeout(limit)?;
                socket.set_write_timeout(limit)
            }
            Self::Unix(socket) => {
                socket.set_read_timeout(limit)?;
                socket.set_write_timeout(limit)
            }
        }
    }

    /// Whether the other end is gone; waits a moment for that, and reads nothing.
    fn has_hung_up(&self) -> io::Result<bool> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let wanted = PollFlags::RDHUP;
        let mut fds = match self {
            Self::Tcp(socket) => [PollFd::new(socket, wanted)],
            Self::Unix(socket) => [PollFd::new(socket, wanted)],
        };
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 100_000_000 }))?;
        Ok(!fds[0].revents().is_empty())
    }
}

impl Read for Tapped {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = match &mut self.socket {
            Socket::Tcp(socket) => socket.read(buf)?,
            Socket::Unix(socket) => socket.read(buf)?,
        };
        let mut record = self.shared.record.lock().unwrap_or_else(PoisonError::into_inner);
        record.keep(true, &buf[..count]);
        Ok(count)
    }
}

impl Write for Tapped {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match &mut self.socket {
            Socket::Tcp(socket) => socket.write(buf),
            Socket::Unix(socket) => socket.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Wire {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = match &mut self.stream {
            Stream::Plain(stream) => stream.read(buf)?,
            Stream::Tls(stream) => stream.read(buf)?,
            Stream::Gone => return Err(io::ErrorKind::NotConnected.into()),
        };
        let mut record = self.shared.record.lock().unwrap_or_else(PoisonError::into_inner);
        record.keep(false, &buf[..count]);
        Ok(count)
    }
}

impl Write for Wire {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match &mut self.stream {
            Stream::Plain(stream) => stream.write(buf),
            Stream::Tls(stream) => stream.write(buf),
            Stream::Gone => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.stream {
            Stream::Plain(stream) => stream.flush(),
            Stream::Tls(stream) => stream.flush(),
            Stream::Gone => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").finish_non_exhaustive()
    }
}
