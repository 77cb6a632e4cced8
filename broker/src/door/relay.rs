//! Carrying bytes both ways, in one task, until one side ends or the session is cut.
//!
//! Nothing is parsed: frame headers are counted, so that a cut can say so between two messages,
//! and so that it is known whether the server still works on something.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::session::CutReason;

const BUFFER: usize = 64 * 1024;
/// How long the server may take to end its side after a client that said goodbye.
const LINGER: Duration = Duration::from_secs(1);
/// How long after the server's socket ended a cut may make itself known.
const CUT_FOLLOWS: Duration = Duration::from_millis(2);
/// How often a client that nothing is read from is looked at.
const GONE_CHECK: Duration = Duration::from_millis(250);

/// What a relay keeps count of; a protocol knows its own frames.
pub(crate) trait Watcher: Send {
    fn client_sent(&mut self, bytes: &[u8]);
    fn server_sent(&mut self, bytes: &[u8]);
    /// Whether the stream to the client stands between two messages.
    fn client_at_boundary(&self) -> bool;
    /// Whether the server may still be at work for this session.
    fn server_busy(&self) -> bool;
    /// Whether the client said goodbye.
    fn client_said_goodbye(&self) -> bool;
}

/// How a relay came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The client closed its side.
    Client,
    /// The server closed its side.
    Server,
    /// The broker ended the session.
    Cut(CutReason),
    /// Reading or writing failed.
    Broken,
}

/// Bytes carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Carried {
    pub(crate) from_client: u64,
    pub(crate) from_server: u64,
}

/// Relays until the end. `cut` is the session's; the revoker has shut the server's socket down
/// by the time it returns. `last_words` is what a cut says.
pub(crate) async fn relay<S, W>(
    client: &mut UnixStream,
    server: &mut S,
    watcher: &mut W,
    cut: impl Future<Output = CutReason>,
    last_words: impl FnOnce(CutReason) -> Vec<u8>,
) -> (End, Carried)
where
    S: AsyncRead + AsyncWrite + Unpin,
    W: Watcher,
{
    let mut carried = Carried::default();
    let end = {
        tokio::pin!(cut);
        carry(client, server, watcher, &mut carried, cut).await
    };
    if let End::Cut(reason) = end
        && watcher.client_at_boundary()
    {
        // Never waits: a client that does not read cannot hold up its own end.
        let _ = client.try_write(&last_words(reason));
    }
    (end, carried)
}

async fn carry<S, W>(
    client: &mut UnixStream,
    server: &mut S,
    watcher: &mut W,
    carried: &mut Carried,
    mut cut: std::pin::Pin<&mut impl Future<Output = CutReason>>,
) -> End
where
    S: AsyncRead + AsyncWrite + Unpin,
    W: Watcher,
{
    let (mut client_reader, mut client_writer) = client.split();
    let (mut server_reader, mut server_writer) = tokio::io::split(server);
    let (mut upward, mut downward) = (Pump::new(), Pump::new());
    loop {
        tokio::select! {
            biased;
            reason = &mut cut => return End::Cut(reason),
            moved = upward.step(&mut client_reader, &mut server_writer), if !upward.ended => match moved {
                Ok(Moved::Written(bytes)) => {
                    carried.from_client += bytes.len() as u64;
                    watcher.client_sent(bytes);
                }
                Ok(Moved::Along) => {}
                Ok(Moved::Ended) if watcher.client_said_goodbye() => {
                    let _ = timeout(LINGER, drain(&mut server_reader)).await;
                    return End::Client;
                }
                Ok(Moved::Ended) if is_gone(client_reader.as_ref()) => return End::Client,
                Ok(Moved::Ended) => {
                    // It closed its writing half only: the server hears of it, and what it still
                    // answers goes through.
                    if server_writer.shutdown().await.is_err() {
                        return End::Broken;
                    }
                }
                Err(_) => return either(&mut cut, End::Broken).await,
            },
            moved = downward.step(&mut server_reader, &mut client_writer) => match moved {
                Ok(Moved::Written(bytes)) => {
                    carried.from_server += bytes.len() as u64;
                    watcher.server_sent(bytes);
                }
                Ok(Moved::Along) => {}
                Ok(Moved::Ended) => return either(&mut cut, End::Server).await,
                Err(_) => return either(&mut cut, End::Broken).await,
            },
            // Who writes to a client that reads nothing, or reads from one that is stalled, does
            // not see it go.
            () = tokio::time::sleep(GONE_CHECK), if upward.ended || upward.is_stalled() => {
                if is_gone(client_reader.as_ref()) {
                    return End::Client;
                }
            }
        }
    }
}

/// A cut shuts the server's socket first, so that end may be seen before the cut itself.
async fn either(
    cut: &mut std::pin::Pin<&mut impl Future<Output = CutReason>>,
    otherwise: End,
) -> End {
    tokio::select! {
        biased;
        reason = cut => End::Cut(reason),
        () = tokio::time::sleep(CUT_FOLLOWS) => otherwise,
    }
}

/// One direction: a buffer that is filled, then emptied.
struct Pump {
    buffer: Vec<u8>,
    filled: usize,
    written: usize,
    /// TLS keeps what it was given until it is flushed.
    unflushed: bool,
    ended: bool,
}

enum Moved<'a> {
    /// Bytes came in, or what had gone out was flushed.
    Along,
    /// These bytes went out.
    Written(&'a [u8]),
    /// No more will come.
    Ended,
}

impl Pump {
    fn new() -> Self {
        Self { buffer: vec![0; BUFFER], filled: 0, written: 0, unflushed: false, ended: false }
    }

    /// Whether bytes wait for the other side to take them.
    fn is_stalled(&self) -> bool {
        self.unflushed || self.written < self.filled
    }

    /// One read, one write or one flush. Each is a single await with its bookkeeping right behind
    /// it, so a step that is dropped half-way has either happened and is known, or has not: a
    /// byte that was written and forgotten would be sent twice.
    async fn step<R, W>(&mut self, reader: &mut R, writer: &mut W) -> io::Result<Moved<'_>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        if self.written < self.filled {
            let from = self.written;
            let waiting = self.buffer.get(from..self.filled).unwrap_or_default();
            let count = writer.write(waiting).await?;
            self.written += count;
            self.unflushed = true;
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            return Ok(Moved::Written(self.buffer.get(from..self.written).unwrap_or_default()));
        }
        if self.unflushed {
            writer.flush().await?;
            self.unflushed = false;
            return Ok(Moved::Along);
        }
        let count = reader.read(&mut self.buffer).await?;
        (self.filled, self.written) = (count, 0);
        self.ended = count == 0;
        Ok(if self.ended { Moved::Ended } else { Moved::Along })
    }
}

async fn drain<R: AsyncRead + Unpin>(reader: &mut R) {
    let mut sink = [0; 4096];
    while reader.read(&mut sink).await.is_ok_and(|count| count > 0) {}
}

/// Returns when the other end has closed both halves of the socket.
pub(crate) async fn gone(socket: &UnixStream) {
    while !is_gone(socket) {
        tokio::time::sleep(GONE_CHECK).await;
    }
}

/// Whether the other end has closed both halves: nobody is there to read an answer.
fn is_gone(socket: &UnixStream) -> bool {
    let fd = socket.as_fd();
    let mut fds = [PollFd::new(&fd, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let polled = poll(&mut fds, Some(&now));
    let [polled_fd] = &fds;
    polled.is_ok() && polled_fd.revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use super::*;

    /// Takes every byte, and is slow to flush them: what TLS does on a full socket.
    #[derive(Default)]
    struct SlowToFlush {
        taken: Vec<u8>,
        flushes: u32,
    }

    impl AsyncWrite for SlowToFlush {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.taken.extend_from_slice(buf);
            Poll::Ready(Ok(buf.len()))
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.flushes += 1;
            if self.flushes.is_multiple_of(3) {
                return Poll::Ready(Ok(()));
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn a_step_that_is_dropped_sends_no_byte_twice() {
        let sent: Vec<u8> = (0..=255).cycle().take(300_000).collect();
        let (mut reader, mut writer, mut pump) = (&sent[..], SlowToFlush::default(), Pump::new());
        while !pump.ended {
            tokio::select! {
                biased;
                moved = pump.step(&mut reader, &mut writer) => drop(moved.unwrap()),
                // What the other direction does in the relay: it wins whenever this one waits.
                () = std::future::ready(()) => {}
            }
        }
        assert!(writer.taken == sent, "{} of {} bytes", writer.taken.len(), sent.len());
    }
}
