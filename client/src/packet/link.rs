//! One connection to a packet socket: requests go out whole, replies come back in their order.
//!
//! Invariants: a request is on the list of those that wait from the moment it is sent, and stays
//! there until its reply comes, whether or not anybody still waits: so a reply is never taken
//! for that of another request. What is read is decoded and wiped at once; no descriptor that
//! came with it is left open by accident.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use credbroker_proto::v1::packet_reply::Reply;
use credbroker_proto::{MAX_PACKET, v1};
use prost::Message as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_seqpacket::UnixSeqpacket;
use tokio_seqpacket::ancillary::{AncillaryMessageWriter, OwnedAncillaryMessage};
use tokio_util::sync::CancellationToken;
use zeroize::{Zeroize as _, Zeroizing};

use crate::Error;
use crate::secret::Lent;

/// Requests that may wait for their replies at once.
const MAX_IN_FLIGHT: usize = 64;
/// CMSG_SPACE of one descriptor is 24. The writer makes a slice that reaches a header's length
/// beyond what it fills, so there is room for that as well.
const CONTROL_OUT: usize = 64;
/// CMSG_SPACE of SCM_MAX_FD = 253 descriptors: so many can come, and are closed.
const CONTROL_IN: usize = 1040;

/// A request, ready to be sent.
pub(super) struct Call {
    pub(super) id: u64,
    pub(super) bytes: Zeroizing<Vec<u8>>,
    pub(super) secret: Option<Lent>,
    pub(super) deliver: Deliver,
}

/// Takes what came of a request. It must not wait.
pub(super) type Deliver = Box<dyn FnOnce(Result<Answer, Error>) + Send>;

/// A reply and what rode along.
pub(super) struct Answer {
    pub(super) reply: Option<Reply>,
    pub(super) descriptors: Vec<OwnedFd>,
}

pub(super) struct Link {
    socket: UnixSeqpacket,
    /// `None` once nothing more comes.
    waiting: Mutex<Option<VecDeque<Waiting>>>,
    room: Arc<Semaphore>,
    /// Held by who sends: the socket wakes only one.
    turn: tokio::sync::Mutex<()>,
}

struct Waiting {
    id: u64,
    secret: Option<Lent>,
    deliver: Deliver,
    _room: OwnedSemaphorePermit,
}

impl Link {
    pub(super) fn new(socket: UnixSeqpacket) -> Arc<Self> {
        Arc::new(Self {
            socket,
            waiting: Mutex::new(Some(VecDeque::new())),
            room: Arc::new(Semaphore::new(MAX_IN_FLIGHT)),
            turn: tokio::sync::Mutex::new(()),
        })
    }

    pub(super) fn is_open(&self) -> bool {
        self.waiting().is_some()
    }

    /// Sends `call`, or gives it back when this link is dead. Dropping the future before it is
    /// done sends nothing.
    pub(super) async fn send(&self, call: Call) -> Result<(), Call> {
        let Ok(room) = Arc::clone(&self.room).acquire_owned().await else { return Err(call) };
        let _turn = self.turn.lock().await;
        let mut unsent = Some((call, room));
        poll_fn(|context| self.poll_send(context, &mut unsent)).await;
        match unsent {
            None => Ok(()),
            Some((call, _room)) => Err(call),
        }
    }

    /// Ready with the call taken when it was sent, and left where it is when the link is dead.
    fn poll_send(
        &self,
        context: &mut Context<'_>,
        unsent: &mut Option<(Call, OwnedSemaphorePermit)>,
    ) -> Poll<()> {
        // Held over both, so that the reply cannot come before there is somebody to take it.
        let mut waiting = self.waiting();
        let (Some(queue), Some((call, _))) = (waiting.as_mut(), unsent.as_ref()) else {
            return Poll::Ready(());
        };
        match ready!(self.poll_transmit(context, call)) {
            Ok(()) => {
                if let Some((Call { id, secret, deliver, .. }, room)) = unsent.take() {
                    queue.push_back(Waiting { id, secret, deliver, _room: room });
                }
            }
            // Whatever it is, the next link is as good a remedy as there is; those that wait
            // here are told by the reader, which meets the same end.
            Err(_error) => {
                let _gone = self.socket.shutdown(std::net::Shutdown::Both);
            }
        }
        Poll::Ready(())
    }

    fn poll_transmit(&self, context: &mut Context<'_>, call: &Call) -> Poll<io::Result<()>> {
        let mut control = [0; CONTROL_OUT];
        let mut ancillary = AncillaryMessageWriter::new(&mut control);
        if let Some(secret) = &call.secret {
            ancillary.add_fds([secret.as_fd()])?;
        }
        // A packet goes whole or not at all (man unix(7)).
        self.socket.poll_send_with_ancillary(context, &call.bytes, &mut ancillary).map_ok(|_all| ())
    }

    /// Reads replies until there are no more, or `stop`; then everybody who waits is told.
    pub(super) async fn read(self: Arc<Self>, stop: CancellationToken) {
        let end = stop.run_until_cancelled(self.read_replies()).await;
        let waiting = self.waiting().take().unwrap_or_default();
        // Nobody shall wait for room on a dead link.
        self.room.close();
        // The first is the one whose answer could not be understood, if that was the end.
        let mut reason = Some(end.unwrap_or(Error::Disconnected));
        for Waiting { deliver, .. } in waiting {
            deliver(Err(reason.take().unwrap_or(Error::Disconnected)));
        }
    }

    /// Gives why there is nothing more to read.
    async fn read_replies(&self) -> Error {
        let mut buffer = Zeroizing::new(vec![0; MAX_PACKET]);
        loop {
            let answer = match self.receive(&mut buffer).await {
                Ok(answer) => answer,
                Err(error) => return error,
            };
            match self.first_waiting(&answer) {
                Ok(Waiting { secret, deliver, .. }) => {
                    if let Some(secret) = secret {
                        secret.settle();
                    }
                    let Received { reply, descriptors } = answer;
                    deliver(Ok(Answer { reply: reply.reply, descriptors }));
                }
                Err(error) => return error,
            }
        }
    }

    async fn receive(&self, buffer: &mut [u8]) -> Result<Received, Error> {
        let mut control = Control([0; CONTROL_IN]);
        let (info, ancillary) = self
            .socket
            .recv_with_ancillary(buffer, &mut control.0)
            .await
            .map_err(|_broken| Error::Disconnected)?;
        let mut descriptors = Vec::new();
        for message in ancillary.into_messages() {
            if let OwnedAncillaryMessage::FileDescriptors(fds) = message {
                descriptors.extend(fds);
            }
        }
        let bytes = buffer.get_mut(..info.bytes_read()).unwrap_or_default();
        let reply = v1::PacketReply::decode(&*bytes);
        bytes.zeroize();
        if info.truncated() {
            return Err(Error::protocol("it is longer than a packet may be"));
        }
        if info.ancillary_truncated() {
            return Err(Error::protocol("not all descriptors that came with it could be taken"));
        }
        if info.bytes_read() == 0 {
            return Err(Error::Disconnected);
        }
        let reply = reply.map_err(|_error| Error::protocol("it is no reply"))?;
        Ok(Received { reply, descriptors })
    }

    /// Whose reply `received` is: of who has waited longest, or of nobody.
    fn first_waiting(&self, received: &Received) -> Result<Waiting, Error> {
        let mut waiting = self.waiting();
        let queue = waiting.as_mut().ok_or(Error::Disconnected)?;
        let first = queue.front().ok_or_else(|| Error::protocol("nothing was asked"))?;
        // The broker does not know the id of what it could not read.
        let unread =
            received.reply.id == 0 && matches!(received.reply.reply, Some(Reply::Refused(_)));
        if received.reply.id != first.id && !unread {
            return Err(Error::protocol("it is that of another request"));
        }
        queue.pop_front().ok_or(Error::Disconnected)
    }

    fn waiting(&self) -> MutexGuard<'_, Option<VecDeque<Waiting>>> {
        // No panic leaves the list half changed.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Received {
    reply: v1::PacketReply,
    descriptors: Vec<OwnedFd>,
}

/// Aligned as the kernel's headers are, which are read in place.
#[repr(align(8))]
struct Control([u8; CONTROL_IN]);
