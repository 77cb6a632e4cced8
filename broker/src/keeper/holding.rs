//! The broker's side of the sockets that the keeper holds: one question at a time, each answered.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::error;

use super::message::{Reply, Request};
use super::packet::{Received, receive, send};
use super::{Keeper, sockets};
use crate::sys;

/// For one answer; the keeper does nothing else on the thread that gives it.
const ANSWERED_WITHIN: Duration = Duration::from_secs(5);

/// Has sockets held by the keeper. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Holding {
    orders: mpsc::UnboundedSender<Order>,
    gone: CancellationToken,
}

/// What [`Holding`] asks for, to be run.
#[derive(Debug)]
pub(crate) struct HoldingQueue {
    /// Absent when the keeper was gone before it began.
    channel: Option<OwnedFd>,
    orders: mpsc::UnboundedReceiver<Order>,
    gone: CancellationToken,
    next: u64,
    /// The keeper ends with the last of these.
    _keeper: Keeper,
}

/// As many as there are sessions, and one or two for each.
#[derive(Debug)]
enum Order {
    Hold(OwnedFd, oneshot::Sender<Result<u64, NotHeld>>),
    Drop(u64, Option<oneshot::Sender<()>>),
}

/// The keeper has a dup. Dropped, it is told to close it.
#[must_use]
#[derive(Debug)]
pub(crate) struct Held {
    holding: Holding,
    /// Absent when it was told.
    number: Option<u64>,
}

/// The keeper has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotHeld {
    /// It has as many as it takes.
    Full,
    /// There is no keeper any more.
    KeeperGone,
}

impl Keeper {
    /// A channel of its own for sockets, once. Without a keeper nothing is held.
    pub(crate) fn hold_sockets(&self) -> (Holding, HoldingQueue) {
        let channel = sockets().and_then(|(ours, theirs)| {
            let request = Request::Channel.encode();
            send(&self.shared.socket, &request, Some(theirs.as_fd())).map(|()| ours)
        });
        let (orders, queue) = mpsc::unbounded_channel();
        let gone = CancellationToken::new();
        let holding = Holding { orders, gone: gone.clone() };
        let channel = channel.ok();
        let queue = HoldingQueue { channel, orders: queue, gone, next: 0, _keeper: self.clone() };
        (holding, queue)
    }
}

impl Holding {
    /// Has the keeper hold `socket` too. When this returns, the end of the broker is the end of
    /// the socket.
    pub(crate) async fn hold(&self, socket: OwnedFd) -> Result<Held, NotHeld> {
        let (answer, held) = oneshot::channel();
        self.orders.send(Order::Hold(socket, answer)).map_err(|_ended| NotHeld::KeeperGone)?;
        let number = held.await.map_err(|_ended| NotHeld::KeeperGone)??;
        Ok(Held { holding: self.clone(), number: Some(number) })
    }

    /// Whether the keeper has ended.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.is_cancelled()
    }

    /// Returns when the keeper has ended: nothing would end what was handed over with the broker.
    pub(crate) async fn gone(&self) {
        self.gone.cancelled().await;
    }
}

impl Held {
    /// Returns when the keeper has closed its dup, so that it is not the one that closes last.
    pub(crate) async fn release(mut self) {
        let Some(number) = self.number.take() else { return };
        let (answer, dropped) = oneshot::channel();
        if self.holding.orders.send(Order::Drop(number, Some(answer))).is_ok() {
            let _ = dropped.await;
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(number) = self.number.take() {
            let _ = self.holding.orders.send(Order::Drop(number, None));
        }
    }
}

impl HoldingQueue {
    /// Asks for what is ordered until nobody is left to order anything.
    pub(crate) async fn run(mut self) {
        if let Some(channel) = self.channel.take()
            && let Err(error) = self.serve(&channel).await
        {
            error!(%error, "the keeper does not hold sockets any more: what was handed over is cut");
        }
        self.gone.cancel();
        while let Some(order) = self.orders.recv().await {
            match order {
                Order::Hold(_, answer) => drop(answer.send(Err(NotHeld::KeeperGone))),
                Order::Drop(_, answer) => drop(answer),
            }
        }
    }

    async fn serve(&mut self, channel: &OwnedFd) -> io::Result<()> {
        loop {
            let order = tokio::select! {
                biased;
                order = self.orders.recv() => order,
                // It says nothing that it was not asked for but its end.
                _ = sys::readable(channel.as_fd()) => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            };
            match order {
                None => return Ok(()),
                Some(Order::Hold(socket, answer)) => {
                    self.next += 1;
                    let id = self.next;
                    let held = exchange(channel, Request::Hold(id), Some(socket.as_fd())).await?;
                    let said = if held == Reply::Held(id) { Ok(id) } else { Err(NotHeld::Full) };
                    if answer.send(said).is_err() && said.is_ok() {
                        exchange(channel, Request::Drop(id), None).await?;
                    }
                }
                Some(Order::Drop(id, answer)) => {
                    exchange(channel, Request::Drop(id), None).await?;
                    let _ = answer.map(|answer| answer.send(()));
                }
            }
        }
    }
}

async fn exchange(
    channel: &OwnedFd,
    request: Request,
    socket: Option<BorrowedFd<'_>>,
) -> io::Result<Reply> {
    send(channel, &request.encode(), socket)?;
    let answer = timeout(ANSWERED_WITHIN, async {
        loop {
            match receive(channel) {
                Ok(Received::Packet { bytes, fd: None }) => return Ok(Reply::decode(&bytes)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
                Ok(Received::Packet { .. } | Received::End | Received::Oversized) => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            sys::readable(channel.as_fd()).await?;
        }
    });
    let answer = answer.await.unwrap_or_else(|_late| Err(io::ErrorKind::TimedOut.into()))?;
    let fits = answer.filter(|answer| match (request, answer) {
        (Request::Hold(id), Reply::Held(of) | Reply::Full(of))
        | (Request::Drop(id), Reply::Dropped(of)) => id == *of,
        (Request::Hold(_) | Request::Drop(_) | Request::Run(_) | Request::Channel, _) => false,
    });
    fits.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[tokio::test]
    async fn what_the_keeper_holds_ends_with_the_broker_and_what_it_dropped_does_not() {
        let keeper = Keeper::on_a_thread(Vec::new());
        let (holding, queue) = keeper.hold_sockets();
        drop(keeper);
        #[expect(clippy::disallowed_methods, reason = "a task of the test's own")]
        let queue = tokio::task::spawn(queue.run());
        let (mut server, ours) = UnixStream::pair().unwrap();
        let (released, other) = UnixStream::pair().unwrap();
        let held = holding.hold(ours.try_clone().unwrap().into()).await.unwrap();
        let gone = holding.hold(other.try_clone().unwrap().into()).await.unwrap();
        gone.release().await;
        assert!(!holding.is_gone());
        // As when the broker is killed: nothing is told to anybody.
        queue.abort();
        assert!(queue.await.unwrap_err().is_cancelled());
        server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert_eq!(server.read(&mut [0]).unwrap(), 0);
        released.set_nonblocking(true).unwrap();
        assert_eq!((&released).read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop((held, other));
    }

    #[tokio::test]
    async fn without_a_keeper_nothing_is_held_and_everybody_is_told() {
        let (socket, theirs) = sockets().unwrap();
        drop(theirs);
        let keeper = Keeper::of_socket(socket, Vec::new());
        let (holding, queue) = keeper.hold_sockets();
        #[expect(clippy::disallowed_methods, reason = "a task of the test's own")]
        let queue = tokio::task::spawn(queue.run());
        let (_server, ours) = UnixStream::pair().unwrap();
        assert_eq!(holding.hold(ours.into()).await.unwrap_err(), NotHeld::KeeperGone);
        holding.gone().await;
        drop(holding);
        queue.await.unwrap();
    }
}
