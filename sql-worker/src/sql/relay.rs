//! Between sqlx and a door: no message that is too long comes through.
//!
//! sqlx takes a message whole before anybody sees any of it, and PostgreSQL sends up to a gigabyte
//! in one: a row, an error, a notice. So the lengths are read here (PostgreSQL 15, 55.7: a byte for
//! the type, then 32 bits that count themselves), and both ends are closed where one is too long,
//! before it is taken in. sqlx connects by name only: it gets one in the abstract namespace (man
//! unix(7)), random, for one connection, and this process alone is let in by it.

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener as StdListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

use crate::random;

/// Bytes that are read at once.
const BUFFER: usize = 32 << 10;
/// Bytes of a length, which counts itself.
const LENGTH: usize = 4;
/// Type and length.
const HEAD: usize = 1 + LENGTH;

/// Whether a session was closed because the server had begun a message that was too long.
#[derive(Debug, Clone, Default)]
pub(super) struct Overlong(Arc<AtomicBool>);

impl Overlong {
    pub(super) fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// A name by which sqlx reaches a door.
#[derive(Debug)]
pub(super) struct Relay {
    listener: UnixListener,
    directory: PathBuf,
}

impl Relay {
    /// Listens under a name that nobody has. `port` is that of the door's socket.
    pub(super) fn listen(port: u16) -> io::Result<Self> {
        let name = random::name("credbroker-").map_err(io::Error::other)?;
        // As sqlx makes it of a directory.
        let address = SocketAddr::from_abstract_name(format!("{name}/.s.PGSQL.{port}"))?;
        let listener = StdListener::bind_addr(&address)?;
        listener.set_nonblocking(true)?;
        let directory = PathBuf::from(format!("\0{name}"));
        Ok(Self { listener: UnixListener::from_std(listener)?, directory })
    }

    /// What sqlx is to take for the directory of the door's socket.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The end of the one who connects, which is this process.
    pub(super) async fn accept(self) -> io::Result<UnixStream> {
        let own = rustix::process::getpid().as_raw_pid();
        loop {
            let (stream, _) = self.listener.accept().await?;
            if stream.peer_cred()?.pid() == Some(own) {
                return Ok(stream);
            }
        }
    }
}

/// Passes everything on until either end is closed, or the door begins a message of more than
/// `longest` bytes.
pub(super) async fn pass(
    door: UnixStream,
    own: UnixStream,
    longest: usize,
    overlong: Overlong,
) -> io::Result<()> {
    let (mut from_door, mut to_door) = door.into_split();
    let (mut from_own, mut to_own) = own.into_split();
    tokio::select! {
        sent = tokio::io::copy(&mut from_own, &mut to_door) => sent.map(|_bytes| ()),
        received = receive(&mut from_door, &mut to_own, longest) => {
            overlong.0.store(received? == Received::TooLong, Ordering::Release);
            Ok(())
        }
    }
}

/// How a server's side ended.
#[derive(Debug, PartialEq, Eq)]
enum Received {
    All,
    TooLong,
}

async fn receive(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    longest: usize,
) -> io::Result<Received> {
    let (mut frames, mut buffer) = (Frames::default(), vec![0; BUFFER]);
    loop {
        let read = from.read(&mut buffer).await?;
        let bytes = buffer.get(..read).unwrap_or_default();
        if bytes.is_empty() {
            return Ok(Received::All);
        }
        if !frames.follow(bytes, longest) {
            return Ok(Received::TooLong);
        }
        to.write_all(bytes).await?;
    }
}

/// Where in a stream of messages one stands.
#[derive(Debug, Default)]
struct Frames {
    head: Vec<u8>,
    /// Bytes of the message that are still to come.
    body: usize,
}

impl Frames {
    /// Whether every message that begins in `bytes` has at most `longest`.
    fn follow(&mut self, mut bytes: &[u8], longest: usize) -> bool {
        while !bytes.is_empty() {
            let (wanted, of_body) = match self.body {
                0 => (HEAD - self.head.len(), false),
                left => (left, true),
            };
            let (taken, rest) = bytes.split_at_checked(wanted).unwrap_or((bytes, &[]));
            bytes = rest;
            if of_body {
                self.body -= taken.len();
                continue;
            }
            self.head.extend_from_slice(taken);
            if let [_type, length @ ..] = self.head.as_slice()
                && let Ok(length) = <[u8; LENGTH]>::try_from(length)
            {
                let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
                match length.checked_sub(LENGTH) {
                    Some(body) if length <= longest => self.body = body,
                    Some(_) | None => return false,
                }
                self.head.clear();
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(length: usize) -> Vec<u8> {
        let mut bytes = vec![b'D'];
        bytes.extend(u32::try_from(length + 4).unwrap().to_be_bytes());
        bytes.resize(HEAD + length, b'x');
        bytes
    }

    #[test]
    fn what_is_no_length_is_refused() {
        for head in [b"D\0\0\0\0", b"D\0\0\0\x03", b"D\xff\xff\xff\xff", b"D\0\0\0\x0b"] {
            assert!(!Frames::default().follow(head, 10), "{head:?}");
        }
        assert!(Frames::default().follow(b"D\0\0\0\x0a", 10));
    }

    proptest! {
        #[test]
        fn lengths_are_found_however_the_stream_is_cut(
            lengths in proptest::collection::vec(0_usize..40, 0..20),
            cuts in proptest::collection::vec(1_usize..30, 1..40),
            longest in 4_usize..50,
        ) {
            let stream: Vec<u8> = lengths.iter().flat_map(|length| message(*length)).collect();
            let (mut frames, mut fits) = (Frames::default(), true);
            let (mut rest, mut cuts) = (stream.as_slice(), cuts.iter().cycle());
            while !rest.is_empty() {
                let (piece, tail) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
                fits = fits && frames.follow(piece, longest);
                rest = tail;
            }
            prop_assert_eq!(fits, lengths.iter().all(|length| length + 4 <= longest));
        }
    }

    #[tokio::test]
    async fn nothing_of_a_message_that_is_too_long_comes_through() {
        let (door, mut server) = UnixStream::pair().unwrap();
        let (own, mut client) = UnixStream::pair().unwrap();
        let overlong = Overlong::default();
        let passing = pass(door, own, 100, overlong.clone());
        let talking = async {
            client.write_all(b"question").await.unwrap();
            let mut asked = [0; 8];
            server.read_exact(&mut asked).await.unwrap();
            server.write_all(&message(96)).await.unwrap();
            let mut answer = vec![0; HEAD + 96];
            client.read_exact(&mut answer).await.unwrap();
            assert!(!overlong.is_set());
            server.write_all(&message(97)).await.unwrap();
            assert_eq!(client.read(&mut answer).await.unwrap(), 0);
            assert_eq!(server.read(&mut asked).await.unwrap(), 0);
        };
        let (passed, ()) = tokio::join!(passing, talking);
        passed.unwrap();
        assert!(overlong.is_set());
    }

    #[tokio::test]
    async fn the_one_process_that_is_let_in_is_this_one() {
        let relay = Relay::listen(5432).unwrap();
        let path = relay.directory().join(".s.PGSQL.5432");
        let (accepted, connected) = tokio::join!(relay.accept(), UnixStream::connect(&path));
        drop(connected.unwrap());
        let mut rest = Vec::new();
        assert_eq!(accepted.unwrap().read_to_end(&mut rest).await.unwrap(), 0);
        // And once.
        UnixStream::connect(&path).await.unwrap_err();
    }
}
