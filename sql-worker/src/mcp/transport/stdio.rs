//! Standard streams: a pipe is read without a thread where it can be opened anew; anything else,
//! such as the sockets of clients on Node.js, or a pipe that another user has made, by one that
//! blocks.
//!
//! tokio's own standard input keeps what it has read in a buffer that is never wiped.

use std::io;
use std::os::fd::AsFd as _;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rmcp::transport::io::{StdioWriter, stdio_pipes};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, read, retry_on_intr};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::unix::pipe;
use tokio::task::{JoinHandle, spawn_blocking};
use zeroize::Zeroizing;

/// With O_NONBLOCK for this process alone.
const ANEW: &str = "/proc/self/fd/0";
/// The most that is read at once.
const ROOM: usize = 8 << 10;

/// Both streams; to be called once, for each byte is read once.
pub(super) fn streams() -> (Stdin, StdioWriter) {
    let (_keeps_what_it_reads, output) = stdio_pipes();
    let input = match pipe::OpenOptions::new().open_receiver(ANEW) {
        Ok(pipe) => Stdin::Pipe(pipe),
        Err(_no_pipe_or_not_ours) => Stdin::Thread(Thread::default()),
    };
    (input, output)
}

/// Standard input.
#[derive(Debug)]
pub(super) enum Stdin {
    Pipe(pipe::Receiver),
    Thread(Thread),
}

/// Read by a thread that may wait for ever, and is then left behind.
#[derive(Debug, Default)]
pub(super) struct Thread {
    reading: Option<JoinHandle<io::Result<Chunk>>>,
    chunk: Chunk,
}

/// What was read, and how much of it was taken.
#[derive(Debug, Default)]
struct Chunk {
    bytes: Zeroizing<Vec<u8>>,
    taken: usize,
}

impl AsyncRead for Stdin {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Pipe(pipe) => Pin::new(pipe).poll_read(context, into),
            Self::Thread(thread) => thread.poll(context, into),
        }
    }
}

impl Thread {
    fn poll(&mut self, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.chunk.rest().is_empty() {
            let reading = self.reading.get_or_insert_with(|| spawn_blocking(Chunk::read));
            let read = ready!(Pin::new(reading).poll(context));
            self.reading = None;
            self.chunk = read.map_err(io::Error::other)??;
        }
        let rest = self.chunk.rest();
        let count = rest.len().min(into.remaining());
        into.put_slice(rest.get(..count).unwrap_or_default());
        self.chunk.taken += count;
        if self.chunk.rest().is_empty() {
            self.chunk = Chunk::default();
        }
        Poll::Ready(Ok(()))
    }
}

impl Chunk {
    /// Waits; empty at the end.
    fn read() -> io::Result<Self> {
        let stdin = io::stdin();
        let mut bytes = Zeroizing::new(vec![0; ROOM]);
        loop {
            match retry_on_intr(|| read(stdin.as_fd(), bytes.as_mut_slice())) {
                Ok(count) => {
                    bytes.truncate(count);
                    return Ok(Self { bytes, taken: 0 });
                }
                // Somebody who shares it made it non-blocking.
                Err(Errno::AGAIN) => {
                    retry_on_intr(|| {
                        poll(&mut [PollFd::new(&stdin.as_fd(), PollFlags::IN)], None)
                    })?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn rest(&self) -> &[u8] {
        self.bytes.get(self.taken..).unwrap_or_default()
    }
}
