//! Between sqlx and a door: nothing that is too long comes through, and how the server describes a
//! statement is kept.
//!
//! sqlx takes a message whole before anybody sees any of it, and PostgreSQL sends up to a gigabyte
//! in one: a row, an error, a notice. What the worker asks for itself, sqlx takes whole too, rows
//! and all. So both are measured here, and both ends are closed where one is too long, before it is
//! taken in. And sqlx shows a description only if it knows the kind of every type in it.
//!
//! sqlx connects by name only: it gets one in the abstract namespace (man unix(7)), random, for one
//! connection, and this process alone is let in by it.

mod description;
mod frames;

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener as StdListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

use self::description::Last;
pub(super) use self::description::{Description, Field};
use self::frames::Frames;
use crate::random;

/// Bytes that are read at once.
const BUFFER: usize = 32 << 10;
/// Bytes of an answer that is taken in whole, beyond the longest message.
const LONGEST_ANSWER: usize = 16 << 20;
/// Bytes that a message takes in memory besides its own.
const OVERHEAD: usize = 128;

/// What was overheard of a session; clones are of the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Overheard(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    overlong: AtomicBool,
    /// Bytes that the server has sent since it was last asked something.
    answered: AtomicUsize,
    streams: AtomicBool,
    last: Mutex<Last>,
}

/// While it is there, rows are taken one at a time.
#[derive(Debug)]
pub(super) struct Streaming(Overheard);

impl Drop for Streaming {
    fn drop(&mut self) {
        // What was taken counts no more: a notice may come before anything else is asked.
        self.0.asked();
        self.0.0.streams.store(false, Ordering::Release);
    }
}

impl Overheard {
    /// Whether the session was closed because the server had begun a message, or an answer, that was
    /// too long.
    pub(super) fn overlong(&self) -> bool {
        self.0.overlong.load(Ordering::Acquire)
    }

    /// Lets an answer have any length: who asked takes its rows one at a time.
    pub(super) fn streaming(&self) -> Streaming {
        self.0.streams.store(true, Ordering::Release);
        Streaming(self.clone())
    }

    fn asked(&self) {
        self.0.answered.store(0, Ordering::Release);
    }

    /// Takes note of `more` bytes of an answer; whether it may still go on.
    fn answered(&self, more: usize, longest: usize) -> bool {
        let before = self.0.answered.fetch_add(more, Ordering::AcqRel);
        self.0.streams.load(Ordering::Acquire)
            || before.saturating_add(more) <= longest.saturating_add(LONGEST_ANSWER)
    }

    /// Takes what the server said of the statement that it described last.
    pub(super) fn take_description(&self) -> Option<Description> {
        match std::mem::take(&mut *self.last()) {
            Last::Whole(description) => Some(description),
            Last::None | Last::Parameters(_) => None,
        }
    }

    fn last(&self) -> MutexGuard<'_, Last> {
        self.0.last.lock().unwrap_or_else(PoisonError::into_inner)
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
/// `longest` bytes, or goes on with an answer that is taken whole and has many more.
pub(super) async fn pass(
    door: UnixStream,
    own: UnixStream,
    longest: usize,
    overheard: Overheard,
) -> io::Result<()> {
    let (mut from_door, mut to_door) = door.into_split();
    let (mut from_own, mut to_own) = own.into_split();
    tokio::select! {
        sent = send(&mut from_own, &mut to_door, &overheard) => sent,
        received = receive(&mut from_door, &mut to_own, longest, &overheard) => {
            overheard.0.overlong.store(received? == Received::TooLong, Ordering::Release);
            Ok(())
        }
    }
}

async fn send(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    overheard: &Overheard,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        overheard.asked();
        to.write_all(buffer.get(..read).unwrap_or_default()).await?;
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
    overheard: &Overheard,
) -> io::Result<Received> {
    let (mut frames, mut buffer) = (Frames::default(), vec![0; BUFFER]);
    loop {
        let read = from.read(&mut buffer).await?;
        let bytes = buffer.get(..read).unwrap_or_default();
        if bytes.is_empty() {
            return Ok(Received::All);
        }
        // Before it goes on: who has read the answer finds what was said.
        let hear = |kind, body: Option<&[u8]>| overheard.last().hear(kind, body);
        let Some(begun) = frames.follow(bytes, longest, description::MESSAGES, hear) else {
            return Ok(Received::TooLong);
        };
        if !overheard.answered(read + begun * OVERHEAD, longest) {
            return Ok(Received::TooLong);
        }
        to.write_all(bytes).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::frames::HEAD;
    use super::*;

    fn message(length: usize) -> Vec<u8> {
        let mut bytes = vec![b'D'];
        bytes.extend(u32::try_from(length + 4).unwrap().to_be_bytes());
        bytes.resize(HEAD + length, b'x');
        bytes
    }

    #[tokio::test]
    async fn nothing_of_a_message_that_is_too_long_comes_through() {
        let (door, mut server) = UnixStream::pair().unwrap();
        let (own, mut client) = UnixStream::pair().unwrap();
        let overheard = Overheard::default();
        let passing = pass(door, own, 100, overheard.clone());
        let talking = async {
            client.write_all(b"question").await.unwrap();
            let mut asked = [0; 8];
            server.read_exact(&mut asked).await.unwrap();
            server.write_all(&message(96)).await.unwrap();
            let mut answer = vec![0; HEAD + 96];
            client.read_exact(&mut answer).await.unwrap();
            assert!(!overheard.overlong());
            server.write_all(&message(97)).await.unwrap();
            assert_eq!(client.read(&mut answer).await.unwrap(), 0);
            assert_eq!(server.read(&mut asked).await.unwrap(), 0);
        };
        let (passed, ()) = tokio::join!(passing, talking);
        passed.unwrap();
        assert!(overheard.overlong());
    }

    #[tokio::test]
    async fn an_answer_has_an_end_unless_its_rows_are_taken_one_at_a_time() {
        let (door, mut server) = UnixStream::pair().unwrap();
        let (own, mut client) = UnixStream::pair().unwrap();
        let overheard = Overheard::default();
        let passing = pass(door, own, BUFFER, overheard.clone());
        let rows = message(0).repeat(1000);
        let most = LONGEST_ANSWER / (1000 * (HEAD + OVERHEAD));
        let mut answer = vec![0; rows.len()];
        let talking = async {
            for streaming in [false, true, false] {
                let _streaming = streaming.then(|| overheard.streaming());
                client.write_all(b"question").await.unwrap();
                server.read_exact(&mut [0; 8]).await.unwrap();
                for _ in 0..if streaming { 3 * most } else { most } {
                    server.write_all(&rows).await.unwrap();
                    client.read_exact(&mut answer).await.unwrap();
                }
                assert!(!overheard.overlong());
            }
            while server.write_all(&rows).await.is_ok() {
                let _end = client.read_exact(&mut answer).await;
            }
        };
        let (passed, ()) = tokio::join!(passing, talking);
        passed.unwrap();
        assert!(overheard.overlong());
    }

    /// One that is too long to be kept does not leave the one before, which is another statement's.
    #[tokio::test]
    async fn a_description_that_is_not_kept_is_not_the_last_one() {
        let (mut door, mut server) = UnixStream::pair().unwrap();
        let overheard = Overheard::default();
        let mut hear = async |messages: &[u8], door: &mut UnixStream| {
            let sent = server.write_all(messages);
            let mut passed = vec![0; messages.len()];
            let (mut to, mut own) = tokio::io::duplex(BUFFER);
            tokio::select! {
                _ = receive(door, &mut to, usize::MAX, &overheard) => panic!("it ended"),
                (sent, passed) = async { tokio::join!(sent, own.read_exact(&mut passed)) } => {
                    sent.unwrap();
                    passed.unwrap();
                }
            }
        };
        hear(b"t\0\0\0\x06\0\0n\0\0\0\x04", &mut door).await;
        assert_eq!(overheard.take_description(), Some(Description::default()));
        hear(b"t\0\0\0\x06\0\0n\0\0\0\x04", &mut door).await;
        let mut long = message(frames::KEPT + 1);
        *long.first_mut().unwrap() = b't';
        long.extend(b"n\0\0\0\x04");
        hear(&long, &mut door).await;
        assert_eq!(overheard.take_description(), None);
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
