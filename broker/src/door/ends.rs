//! The ends of sockets that were handed over, seen without reading from them.
//!
//! A registration of the runtime's would wake a thread whenever bytes come. Here only an end does:
//! an epoll instance of its own asks for nothing else, and the runtime waits for that instance.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{Timespec, epoll};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::sys;

/// Ends that are taken up at once.
const BATCH: usize = 256;

/// Watches sockets for their ends. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Ends {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    epoll: OwnedFd,
    watched: Mutex<Watched>,
}

#[derive(Debug, Default)]
struct Watched {
    next: u64,
    sockets: HashMap<u64, CancellationToken>,
}

/// A socket that is being watched. Its description lives on elsewhere, so the watch must be taken
/// back before the descriptor is closed: epoll(7), question 6.
#[derive(Debug)]
pub(crate) struct Watch {
    ends: Ends,
    number: u64,
    ended: CancellationToken,
    /// Absent only when it was taken out.
    socket: Option<OwnedFd>,
}

impl Ends {
    /// To be given to [`Ends::run`] as well.
    ///
    /// # Errors
    /// When there is no epoll instance to be had.
    pub(crate) fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Self { shared: Arc::new(Shared { epoll, watched: Mutex::default() }) })
    }

    /// Tells of ends, until `over`.
    pub(crate) async fn run(self, over: impl Future<Output = ()>) {
        let looked = async {
            let second = self.shared.epoll.try_clone()?;
            let ready = sys::register(second, Interest::READABLE).map_err(|(_fd, error)| error)?;
            loop {
                self.look(&ready).await?;
            }
        };
        let looked: io::Result<()> = tokio::select! {
            looked = looked => looked,
            () = over => return,
        };
        if let Err(error) = looked {
            // Fail closed: whoever watches is told that it is over.
            error!(%error, "sockets that were handed over can no longer be watched");
            let watched = self.shared.watched.lock().unwrap_or_else(PoisonError::into_inner);
            watched.sockets.values().for_each(CancellationToken::cancel);
        }
    }

    async fn look(&self, ready: &AsyncFd<OwnedFd>) -> io::Result<()> {
        let mut guard = ready.readable().await?;
        let mut events = Vec::with_capacity(BATCH);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::io::retry_on_intr(|| {
            let spare = rustix::buffer::spare_capacity(&mut events);
            epoll::wait(ready.get_ref(), spare, Some(&now))
        })?;
        if events.is_empty() {
            guard.clear_ready();
        }
        let watched = self.shared.watched.lock().unwrap_or_else(PoisonError::into_inner);
        for event in &events {
            if let Some(ended) = watched.sockets.get(&event.data.u64()) {
                ended.cancel();
            }
        }
        Ok(())
    }

    /// Begins to watch a socket for the end of its reading side.
    ///
    /// # Errors
    /// When the kernel does not take it.
    pub(crate) fn watch(&self, socket: OwnedFd) -> io::Result<Watch> {
        let ended = CancellationToken::new();
        let number = {
            let mut watched = self.shared.watched.lock().unwrap_or_else(PoisonError::into_inner);
            watched.next += 1;
            let number = watched.next;
            watched.sockets.insert(number, ended.clone());
            number
        };
        // From here on the number is given back by the watch, whatever happens.
        let watch = Watch { ends: self.clone(), number, ended, socket: Some(socket) };
        if let Some(socket) = &watch.socket {
            let flags = epoll::EventFlags::RDHUP | epoll::EventFlags::ONESHOT;
            epoll::add(&self.shared.epoll, socket, epoll::EventData::new_u64(number), flags)?;
        }
        Ok(watch)
    }
}

impl Watch {
    /// Returns when no more bytes will come from the server: it closed its side, the link broke,
    /// or somebody who has the socket shut it down.
    pub(crate) async fn ended(&self) {
        self.ended.cancelled().await;
    }

    pub(crate) fn socket(&self) -> Option<&OwnedFd> {
        self.socket.as_ref()
    }

    /// Ends the watch and gives the socket back.
    pub(crate) fn into_socket(mut self) -> Option<OwnedFd> {
        self.forget();
        self.socket.take()
    }

    fn forget(&self) {
        if let Some(socket) = &self.socket {
            let _ = epoll::delete(&self.ends.shared.epoll, socket);
        }
        let mut watched = self.ends.shared.watched.lock().unwrap_or_else(PoisonError::into_inner);
        watched.sockets.remove(&self.number);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.forget();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::Shutdown;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn an_end_is_seen_and_bytes_are_not() {
        let ends = Ends::new().unwrap();
        let over = CancellationToken::new();
        #[expect(clippy::disallowed_methods, reason = "a task of the test's own")]
        let running = tokio::task::spawn(ends.clone().run(over.clone().cancelled_owned()));
        let (mut server, ours) = UnixStream::pair().unwrap();
        let client = ours.try_clone().unwrap();
        let watch = ends.watch(ours.into()).unwrap();
        let (_other, idle) = UnixStream::pair().unwrap();
        let other = ends.watch(idle.into()).unwrap();

        server.write_all(b"bytes").unwrap();
        assert!(timeout(Duration::from_millis(50), watch.ended()).await.is_err());
        // By whoever has it: the description is one.
        client.shutdown(Shutdown::Both).unwrap();
        timeout(Duration::from_secs(5), watch.ended()).await.unwrap();
        assert!(timeout(Duration::from_millis(20), other.ended()).await.is_err());
        drop(watch.into_socket().unwrap());
        drop(other);
        assert!(ends.shared.watched.lock().unwrap().sockets.is_empty());
        over.cancel();
        running.await.unwrap();
    }
}
