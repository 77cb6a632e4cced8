//! Carrying bytes both ways, in one task on one core, until one side ends or the session is cut.
//!
//! Nothing is parsed: frame headers are counted, so that a cut can say so between two messages,
//! and so that it is known whether the server still works on something.

#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tokio::time::{Sleep, sleep, timeout};

use self::pump::{Moved, Pump};
use crate::core::Session;
use crate::session::CutReason;
use crate::socket::Socket;

mod pump;
pub(crate) mod workers;

const BUFFER: usize = 64 * 1024;
/// How many buffers one direction carries before the other sessions of the core have their turn.
const TURN: usize = 16;
/// How long the server may take to end its side after a client that said goodbye.
const LINGER: Duration = Duration::from_secs(1);
/// How long after the server's socket ended a cut may make itself known.
const CUT_FOLLOWS: Duration = Duration::from_millis(2);
/// How often a client that nothing is read from is looked at.
const GONE_CHECK: Duration = Duration::from_millis(250);

thread_local! {
    /// Bytes are read and written on without a pause, so that a core needs one buffer, and an
    /// idle session none.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into_boxed_slice());
}

/// What a relay keeps count of; a protocol knows its own frames.
pub(crate) trait Watcher: Send {
    fn client_sent(&mut self, bytes: &[u8]);
    fn server_sent(&mut self, bytes: &[u8]);
    /// Whether what came from the server ends between two messages.
    fn server_at_boundary(&self) -> bool;
    /// Whether the server may still be at work for this session.
    fn server_busy(&self) -> bool;
    /// Whether the client said goodbye.
    fn client_said_goodbye(&self) -> bool;
}

/// What holds a session: it is let go of when the session is to end.
pub(crate) trait Leash {
    /// Whether it is to end. From then on nothing more that the client sent goes to the server.
    fn is_cut(&self) -> bool;
    /// Returns when it is to end. Its client has been told by then, and its socket shut down.
    fn cut(&self) -> impl Future<Output = CutReason> + Send;
    /// Whether the client has been sent whole messages, and nothing waits to be sent.
    fn client_can_be_told(&self, can: bool);
}

impl Leash for Session {
    fn is_cut(&self) -> bool {
        Self::is_cut(self)
    }

    fn cut(&self) -> impl Future<Output = CutReason> + Send {
        Self::cut(self)
    }

    fn client_can_be_told(&self, can: bool) {
        Self::client_can_be_told(self, can);
    }
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

/// Relays until the end.
pub(crate) async fn relay<S, W, L>(
    client: &mut Socket,
    server: &mut S,
    watcher: &mut W,
    leash: &L,
) -> (End, Carried)
where
    S: AsyncRead + AsyncWrite + Unpin,
    W: Watcher,
    L: Leash,
{
    let mut relay = Relay {
        client,
        server,
        watcher,
        leash,
        upward: Pump::default(),
        downward: Pump::default(),
        half: Half::Open,
        carried: Carried::default(),
    };
    let mut cut = pin!(leash.cut());
    let stop = {
        let mut look = pin!(None::<Sleep>);
        poll_fn(|cx| match cut.as_mut().poll(cx) {
            Poll::Ready(reason) => Poll::Ready(Stop::End(End::Cut(reason))),
            Poll::Pending => {
                let polled = relay.poll(cx, look.as_mut());
                let whole = relay.watcher.server_at_boundary() && !relay.downward.is_stalled();
                leash.client_can_be_told(whole);
                polled
            }
        })
        .await
    };
    let end = match stop {
        Stop::End(end) => end,
        Stop::Goodbye => {
            let _ = timeout(LINGER, drain(relay.server)).await;
            End::Client
        }
        Stop::Sudden(otherwise) => timeout(CUT_FOLLOWS, cut).await.map_or(otherwise, End::Cut),
    };
    (end, relay.carried)
}

/// Why carrying stopped.
#[derive(Debug)]
enum Stop {
    End(End),
    /// The client said goodbye, and the server ends its side next.
    Goodbye,
    /// An end of which a cut may be the cause: it shuts the server's socket.
    Sudden(End),
}

/// How far the client has closed its side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Half {
    Open,
    /// It writes no more, and the server is to hear of it.
    Closing,
    /// The server has heard of it. What it still answers goes through.
    Closed,
}

struct Relay<'a, S, W, L> {
    client: &'a mut Socket,
    server: &'a mut S,
    watcher: &'a mut W,
    leash: &'a L,
    upward: Pump,
    downward: Pump,
    half: Half,
    carried: Carried,
}

impl<S, W, L> Relay<'_, S, W, L>
where
    S: AsyncRead + AsyncWrite + Unpin,
    W: Watcher,
    L: Leash,
{
    fn poll(&mut self, cx: &mut Context<'_>, look: Pin<&mut Option<Sleep>>) -> Poll<Stop> {
        SCRATCH.with_borrow_mut(|scratch| {
            for _ in 0..TURN {
                let up = self.poll_upward(cx, scratch);
                if let Poll::Ready(Some(stop)) = up {
                    return Poll::Ready(stop);
                }
                let down = self.poll_downward(cx, scratch);
                if let Poll::Ready(Some(stop)) = down {
                    return Poll::Ready(stop);
                }
                if up.is_pending() && down.is_pending() {
                    return self.poll_gone(cx, look);
                }
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
    }

    /// From the client to the server.
    fn poll_upward(&mut self, cx: &mut Context<'_>, scratch: &mut [u8]) -> Poll<Option<Stop>> {
        match self.half {
            Half::Open => {}
            Half::Closing => {
                return Pin::new(&mut *self.server).poll_shutdown(cx).map(|shut| match shut {
                    Ok(()) => {
                        self.half = Half::Closed;
                        None
                    }
                    Err(_) => Some(Stop::Sudden(End::Broken)),
                });
            }
            Half::Closed => return Poll::Pending,
        }
        let may_write = || !self.leash.is_cut();
        let moved = self.upward.step(cx, self.client, self.server, scratch, may_write);
        moved.map(|moved| match moved {
            Ok(Moved::Bytes(count)) => {
                self.carried.from_client += count as u64;
                self.watcher.client_sent(scratch.get(..count).unwrap_or_default());
                None
            }
            Ok(Moved::Ended) if self.watcher.client_said_goodbye() => Some(Stop::Goodbye),
            Ok(Moved::Ended) if is_gone(self.client) => Some(Stop::End(End::Client)),
            Ok(Moved::Ended) => {
                // It closed its writing half only.
                self.half = Half::Closing;
                None
            }
            Err(_) => Some(Stop::Sudden(End::Broken)),
        })
    }

    /// From the server to the client.
    fn poll_downward(&mut self, cx: &mut Context<'_>, scratch: &mut [u8]) -> Poll<Option<Stop>> {
        let moved = self.downward.step(cx, self.server, self.client, scratch, || true);
        moved.map(|moved| match moved {
            Ok(Moved::Bytes(count)) => {
                self.carried.from_server += count as u64;
                self.watcher.server_sent(scratch.get(..count).unwrap_or_default());
                None
            }
            Ok(Moved::Ended) => Some(Stop::Sudden(End::Server)),
            Err(_) => Some(Stop::Sudden(End::Broken)),
        })
    }

    /// Who writes to a client that reads nothing, or reads from one that is stalled, does not see
    /// it go: now and then somebody must look.
    fn poll_gone(&self, cx: &mut Context<'_>, mut look: Pin<&mut Option<Sleep>>) -> Poll<Stop> {
        if self.half == Half::Open && !self.upward.is_stalled() {
            look.set(None);
            return Poll::Pending;
        }
        loop {
            if let Some(waiting) = look.as_mut().as_pin_mut() {
                ready!(waiting.poll(cx));
                if is_gone(self.client) {
                    return Poll::Ready(Stop::End(End::Client));
                }
            }
            look.set(Some(sleep(GONE_CHECK)));
        }
    }
}

async fn drain<R: AsyncRead + Unpin>(reader: &mut R) {
    let mut sink = [0; 4096];
    while reader.read(&mut sink).await.is_ok_and(|count| count > 0) {}
}

/// Returns when the other end has closed both halves of the socket.
pub(crate) async fn gone(socket: &Socket) {
    while !is_gone(socket) {
        sleep(GONE_CHECK).await;
    }
}

/// Whether the other end has closed both halves: nobody is there to read an answer.
fn is_gone(socket: &Socket) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let polled = poll(&mut fds, Some(&now));
    let [polled_fd] = &fds;
    polled.is_ok() && polled_fd.revents().intersects(PollFlags::HUP | PollFlags::ERR)
}
