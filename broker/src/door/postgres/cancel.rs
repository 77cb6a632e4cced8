//! CancelRequest: a client's key is the broker's own, and is turned into the server's here.
//!
//! A cancel request names no query: it ends whatever the session does when the server takes it. So
//! of many that are asked for at once two are enough, the one that is on its way and one after it.
//! What is asked for while one is under way cannot ride on that: the server may have taken it
//! already, before the query that is meant began.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex as StdMutex, PoisonError, Weak};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{Mutex, Semaphore};
use tokio::time::timeout;
use tracing::debug;

use super::backend::ServerKey;
use super::codec;
use crate::session::SessionId;
use crate::upstream::{Link, Remote};

/// Cancel requests on their way to one server at once: a storm of them must not use up its slots.
const MAX_AT_ONCE: usize = 8;
/// For one request, from dialling to the server's end of it.
const WITHIN: Duration = Duration::from_secs(5);

/// What the live sessions' queries are cancelled with. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cancels {
    shared: Arc<StdMutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    targets: HashMap<SessionId, Arc<Target>>,
    /// The slots of each server that a target is on.
    servers: HashMap<String, Weak<Semaphore>>,
}

#[derive(Debug)]
struct Target {
    remote: Remote,
    request: Vec<u8>,
    slots: Arc<Semaphore>,
    asked: AtomicU64,
    /// Of those that were asked for, how many the last request that the server took came after.
    /// Held while one is on its way.
    served: Mutex<u64>,
}

/// Takes a session off the list when dropped.
#[derive(Debug)]
pub(crate) struct Registered {
    cancels: Cancels,
    session: SessionId,
}

impl Cancels {
    pub(super) fn register(
        &self,
        session: SessionId,
        remote: &Remote,
        key: &ServerKey,
    ) -> Registered {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let target = Target {
            remote: remote.clone(),
            request: codec::cancel_request(key.pid, &key.secret),
            slots: shared.slots(remote),
            asked: AtomicU64::new(0),
            served: Mutex::new(0),
        };
        shared.targets.insert(session, Arc::new(target));
        Registered { cancels: self.clone(), session }
    }

    /// Sends the server's own cancel request for a session and waits for the server to take it,
    /// so that the client's connection closes after it has been acted on.
    pub(super) async fn cancel(&self, session: SessionId) {
        let target = {
            let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
            shared.targets.get(&session).cloned()
        };
        let Some(target) = target else { return };
        target.cancel(|| send(&target.remote, &target.request)).await;
    }
}

impl Shared {
    fn slots(&mut self, remote: &Remote) -> Arc<Semaphore> {
        self.servers.retain(|_, slots| slots.strong_count() > 0);
        let server = self.servers.entry(remote.to_string()).or_default();
        server.upgrade().unwrap_or_else(|| {
            let slots = Arc::new(Semaphore::new(MAX_AT_ONCE));
            *server = Arc::downgrade(&slots);
            slots
        })
    }
}

impl Target {
    async fn cancel<S: Future<Output = ()>>(&self, send: impl FnOnce() -> S) {
        let number = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let mut served = self.served.lock().await;
        if *served >= number {
            return;
        }
        let Ok(_slot) = self.slots.acquire().await else { return };
        let asked = self.asked.load(Ordering::SeqCst);
        send().await;
        *served = asked;
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut shared = self.cancels.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.targets.remove(&self.session);
    }
}

/// One cancel request, over the same TLS and to the same address as the session.
pub(super) async fn send(remote: &Remote, request: &[u8]) {
    let sent = timeout(WITHIN, async {
        let mut link = Link::dial_again(remote).await.map_err(|error| error.to_string())?;
        link.stream.write_all(request).await.map_err(|error| error.to_string())?;
        link.stream.flush().await.map_err(|error| error.to_string())?;
        // The server answers nothing and closes when it has signalled the backend.
        let _ = link.stream.read(&mut [0; 16]).await;
        Ok::<(), String>(())
    })
    .await;
    match sent {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(error, "a cancel request could not be sent"),
        Err(_elapsed) => debug!("a cancel request took too long"),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::path::Path;

    use futures_util::future::join_all;
    use tokio::time::{Instant, sleep, sleep_until};

    use super::*;

    fn target() -> Target {
        let remote = Remote::unix_for_test(Path::new("/nowhere"));
        let slots = Arc::new(Semaphore::new(MAX_AT_ONCE));
        let (asked, served) = (AtomicU64::new(0), Mutex::new(0));
        Target { remote, request: Vec::new(), slots, asked, served }
    }

    #[tokio::test(start_paused = true)]
    async fn a_storm_is_two_requests_and_the_second_begins_after_the_last_was_asked_for() {
        let target = target();
        let (sent, last_began) = (Cell::new(0), Cell::new(None));
        let began = Instant::now();
        let ask = |at: u64| {
            let (target, sent, last_began) = (&target, &sent, &last_began);
            async move {
                sleep_until(began + Duration::from_millis(at)).await;
                target
                    .cancel(|| async {
                        sent.set(sent.get() + 1);
                        last_began.set(Some(began.elapsed()));
                        sleep(Duration::from_millis(500)).await;
                    })
                    .await;
                assert!(began.elapsed() >= Duration::from_millis(at + 500), "acted on after {at}");
            }
        };
        join_all((0..200).map(ask)).await;
        assert_eq!(sent.get(), 2);
        assert!(last_began.get().unwrap() >= Duration::from_millis(199));
        ask(2000).await;
        assert_eq!(sent.get(), 3, "a later one is sent again");
    }

    #[test]
    fn servers_are_forgotten_with_their_last_session() {
        let mut shared = Shared::default();
        let (one, other) = (Path::new("/one"), Path::new("/other"));
        let slots = shared.slots(&Remote::unix_for_test(one));
        assert!(Arc::ptr_eq(&slots, &shared.slots(&Remote::unix_for_test(one))));
        let others = shared.slots(&Remote::unix_for_test(other));
        assert!(!Arc::ptr_eq(&slots, &others));
        drop(slots);
        let _again = shared.slots(&Remote::unix_for_test(other));
        assert_eq!(shared.servers.len(), 1);
    }
}
