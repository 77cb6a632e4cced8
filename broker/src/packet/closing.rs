//! Closing what came from peers, on threads that may wait.
//!
//! The last close(2) of a TCP socket with SO_LINGER waits for its unsent bytes, that of a file in
//! a FUSE mount for its server; and a Unix socket takes along what still waits in it. So nothing
//! that a peer had a hand in is closed on a thread that serves others, and what one uid makes
//! wait, waits behind that uid's own.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SendError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::peer::Uid;

/// Descriptors of one uid that may wait to be closed: two packets full. A peer with more of them
/// is not read from until there is room.
const ROOM: usize = 512;
/// Threads at once. Whoever comes when all are busy shares one.
const MAX_LANES: usize = 32;
/// How long a thread waits for more before it ends.
const IDLE: Duration = Duration::from_secs(10);

/// Closes descriptors. Cheap to clone; clones share their threads.
#[derive(Clone, Debug)]
pub(crate) struct Closing {
    lanes: Arc<Mutex<HashMap<Uid, Lane>>>,
    /// Runs from the start: for connections that nobody is known to have made, and for more uids
    /// than there are threads.
    shared: Lane,
}

/// A thread's queue.
#[derive(Clone, Debug)]
struct Lane {
    queue: Sender<Batch>,
    room: Arc<Semaphore>,
}

/// Descriptors, and the room that they take.
#[derive(Debug)]
struct Batch {
    _descriptors: Vec<OwnedFd>,
    _room: OwnedSemaphorePermit,
}

/// The queue is full.
#[derive(Debug)]
pub(super) struct NoRoom(pub(super) OwnedFd);

impl Closing {
    /// Starts the shared thread. After the sandbox: threads inherit it.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub(crate) fn start() -> io::Result<Self> {
        let lanes = Arc::default();
        let (shared, queue) = Lane::new();
        thread::Builder::new()
            .name("close".into())
            .spawn(move || queue.into_iter().for_each(drop))?;
        Ok(Self { lanes, shared })
    }

    /// Queues what `uid`, or nobody known, sent, waiting for room.
    pub(crate) async fn close(&self, uid: Option<Uid>, descriptors: Vec<OwnedFd>) {
        let Ok(count @ 1..) = u32::try_from(descriptors.len().min(ROOM)) else { return };
        let lane = self.lane_of(uid);
        // Never closed, so there is always a permit in the end.
        if let Ok(room) = Arc::clone(&lane.room).acquire_many_owned(count).await {
            self.queue(uid, &lane, Batch { _descriptors: descriptors, _room: room });
        }
    }

    /// Queues one descriptor of `uid`, or of nobody known, if there is room at this moment.
    ///
    /// # Errors
    /// [`NoRoom`], with the descriptor.
    pub(super) fn try_close(&self, uid: Option<Uid>, descriptor: OwnedFd) -> Result<(), NoRoom> {
        let lane = self.lane_of(uid);
        let Ok(room) = Arc::clone(&lane.room).try_acquire_owned() else {
            return Err(NoRoom(descriptor));
        };
        self.queue(uid, &lane, Batch { _descriptors: vec![descriptor], _room: room });
        Ok(())
    }

    fn queue(&self, uid: Option<Uid>, lane: &Lane, batch: Batch) {
        // Its thread may have gone home just now; the next one's queue has room of its own.
        if let Err(SendError(batch)) = lane.queue.send(batch)
            && let Err(SendError(batch)) = self.lane_of(uid).queue.send(batch)
        {
            drop(self.shared.queue.send(batch));
        }
    }

    /// The queue of `uid`, with a thread at its other end.
    fn lane_of(&self, uid: Option<Uid>) -> Lane {
        let Some(uid) = uid else { return self.shared.clone() };
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lane) = lanes.get(&uid) {
            return lane.clone();
        }
        if lanes.len() >= MAX_LANES {
            return self.shared.clone();
        }
        let (lane, queue) = Lane::new();
        let others = Arc::clone(&self.lanes);
        let run = move || run_lane(uid, &queue, &others);
        if thread::Builder::new().name(format!("close-{uid}")).spawn(run).is_err() {
            return self.shared.clone();
        }
        lanes.insert(uid, lane.clone());
        lane
    }
}

impl Lane {
    fn new() -> (Self, Receiver<Batch>) {
        // As long as there is room.
        let (queue, receiver) = channel();
        (Self { queue, room: Arc::new(Semaphore::new(ROOM)) }, receiver)
    }
}

/// Closes what comes until nothing has come for a while.
fn run_lane(uid: Uid, queue: &Receiver<Batch>, lanes: &Mutex<HashMap<Uid, Lane>>) {
    loop {
        match queue.recv_timeout(IDLE) {
            Ok(batch) => drop(batch),
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {
                let mut lanes = lanes.lock().unwrap_or_else(PoisonError::into_inner);
                // Whoever holds a sender still finds the queue gone, and asks for another.
                let Ok(batch) = queue.try_recv() else {
                    lanes.remove(&uid);
                    return;
                };
                drop(lanes);
                drop(batch);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, pipe};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[tokio::test]
    async fn what_is_queued_is_closed() {
        let closing = Closing::start().unwrap();
        let (mut reader, writer) = pipe().unwrap();
        closing.close(Some(Uid::from_raw(1)), vec![writer.into()]).await;
        // The end of the pipe comes when its last writer is closed.
        let end = tokio::task::spawn_blocking(move || reader.read(&mut [0]).unwrap());
        assert_eq!(end.await.unwrap(), 0);
    }

    /// A socket whose close takes a minute: its peer's window is full, and it lingers.
    fn lingering() -> (OwnedFd, TcpStream) {
        use std::io::Write as _;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (receiver, _) = listener.accept().unwrap();
        sender.set_nonblocking(true).unwrap();
        while sender.write(&[0; 65536]).is_ok() {}
        let minute = Some(Duration::from_secs(60));
        rustix::net::sockopt::set_socket_linger(&sender, minute).unwrap();
        (sender.into(), receiver)
    }

    #[tokio::test]
    async fn one_uids_lingering_socket_holds_up_nobody_else() {
        let closing = Closing::start().unwrap();
        let (socket, peer) = lingering();
        closing.close(Some(Uid::from_raw(1)), vec![socket]).await;
        let (mut reader, writer) = pipe().unwrap();
        closing.close(Some(Uid::from_raw(2)), vec![writer.into()]).await;
        let end = tokio::task::spawn_blocking(move || reader.read(&mut [0]).unwrap());
        assert_eq!(end.await.unwrap(), 0);
        // Behind its own it waits, and is refused when the room is used up.
        let full = (0..=ROOM).any(|_| {
            let (_, writer) = pipe().unwrap();
            closing.try_close(Some(Uid::from_raw(1)), writer.into()).is_err()
        });
        assert!(full);
        drop(peer);
    }
}
