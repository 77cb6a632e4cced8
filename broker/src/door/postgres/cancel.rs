//! CancelRequest: a client's key is the broker's own, and is turned into the server's here.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::debug;

use super::backend::ServerKey;
use super::codec;
use crate::session::SessionId;
use crate::upstream::{Link, Remote};

/// Cancel requests on their way at once: a storm of them must not use up the server's slots.
const MAX_AT_ONCE: usize = 16;
/// For one request, from dialling to the server's end of it.
const WITHIN: Duration = Duration::from_secs(5);

/// What the live sessions' queries are cancelled with. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Cancels {
    targets: Arc<Mutex<HashMap<SessionId, Target>>>,
    slots: Arc<Semaphore>,
}

#[derive(Clone, Debug)]
struct Target {
    remote: Remote,
    request: Vec<u8>,
    /// One request on its way is enough for a session: more ask for the same thing.
    busy: Arc<Semaphore>,
}

/// Takes a session off the list when dropped.
#[derive(Debug)]
pub(crate) struct Registered {
    cancels: Cancels,
    session: SessionId,
}

impl Default for Cancels {
    fn default() -> Self {
        Self { targets: Arc::default(), slots: Arc::new(Semaphore::new(MAX_AT_ONCE)) }
    }
}

impl Cancels {
    pub(super) fn register(
        &self,
        session: SessionId,
        remote: &Remote,
        key: &ServerKey,
    ) -> Registered {
        let request = codec::cancel_request(key.pid, &key.secret);
        let target = Target { remote: remote.clone(), request, busy: Arc::new(Semaphore::new(1)) };
        self.targets.lock().unwrap_or_else(PoisonError::into_inner).insert(session, target);
        Registered { cancels: self.clone(), session }
    }

    /// Sends the server's own cancel request for a session and waits for the server to take it,
    /// so that the client's connection closes after it has been acted on.
    pub(super) async fn cancel(&self, session: SessionId) {
        let target =
            self.targets.lock().unwrap_or_else(PoisonError::into_inner).get(&session).cloned();
        let Some(target) = target else { return };
        let Ok(_only) = target.busy.try_acquire() else { return };
        let Ok(_slot) = self.slots.acquire().await else { return };
        send(&target.remote, &target.request).await;
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.cancels.targets.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.session);
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
