//! MCP on a Unix socket: the framing of stdio, any number of clients, each named by the kernel.
//!
//! The principal of a connection is the uid of the process that connected, as SO_PEERCRED has
//! it (unix(7)); wherever the descriptor is passed later, it stays that. Bytes are read with
//! read(2), so descriptors that ride along are closed by the kernel and never seen here.

mod listener;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::listener::{BindError, Listener};
use super::{EXHAUSTED_PAUSE, is_exhausted};
use crate::app::{App, Principal};
use crate::mcp;

/// Connections of one principal.
const MAX_OF_ONE: usize = 64;
/// Connections of all principals.
const MAX_OF_ALL: usize = 512;
/// How long a client may leave an answer unread.
const PATIENCE: Duration = Duration::from_secs(60);

impl Listener {
    /// Serves everybody who connects, until `stop` fires; then until each has its answers, at
    /// most half a second.
    ///
    /// # Errors
    /// When the socket cannot be handed to the runtime.
    pub async fn serve(self, app: Arc<App>, stop: CancellationToken) -> io::Result<()> {
        let (listener, _unlinked_at_the_end) = self.into_parts()?;
        let (seats, tasks) = (Seats::default(), TaskTracker::new());
        while let Some((stream, caller)) = accept(&listener, &stop).await {
            let Some(seat) = seats.take(&caller) else {
                tracing::warn!(principal = caller.subject(), "turned away: too many connections");
                continue;
            };
            let (app, stop) = (Arc::clone(&app), stop.clone());
            tasks.spawn(async move {
                let streams = stream.into_split();
                mcp::serve(app, caller, streams, Some(PATIENCE), stop).await;
                drop(seat);
            });
        }
        tasks.close();
        tasks.wait().await;
        Ok(())
    }
}

/// The next client that is somebody; `None` once `stop` has fired.
async fn accept(
    listener: &UnixListener,
    stop: &CancellationToken,
) -> Option<(UnixStream, Principal)> {
    loop {
        match stop.run_until_cancelled(listener.accept()).await? {
            Ok((stream, _)) => match stream.peer_cred() {
                Ok(peer) => match Principal::unix(peer.uid()) {
                    Some(caller) => return Some((stream, caller)),
                    None => tracing::warn!("turned away: a user whom this namespace cannot name"),
                },
                Err(error) => tracing::debug!(%error, "dropped a connection without an identity"),
            },
            Err(error) if is_exhausted(&error) => {
                tracing::warn!(%error, "cannot accept: out of descriptors or memory");
                tokio::time::sleep(EXHAUSTED_PAUSE).await;
            }
            Err(error) => tracing::debug!(%error, "a client left before it was accepted"),
        }
    }
}

/// How many connections each principal has.
#[derive(Debug, Default)]
struct Seats(Arc<Mutex<HashMap<Principal, usize>>>);

/// The right to one connection.
#[derive(Debug)]
struct Seat {
    taken: Arc<Mutex<HashMap<Principal, usize>>>,
    principal: Principal,
}

impl Seats {
    fn take(&self, principal: &Principal) -> Option<Seat> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.values().sum::<usize>() >= MAX_OF_ALL {
            return None;
        }
        let own = taken.entry(principal.clone()).or_default();
        if *own >= MAX_OF_ONE {
            return None;
        }
        *own += 1;
        Some(Seat { taken: Arc::clone(&self.0), principal: principal.clone() })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Occupied(mut own) = taken.entry(self.principal.clone()) {
            *own.get_mut() -= 1;
            if *own.get() == 0 {
                own.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_user_cannot_take_all_seats() {
        let seats = Seats::default();
        let one = Principal::unix(1).unwrap();
        let mut taken: Vec<_> = (0..MAX_OF_ONE).map(|_| seats.take(&one).unwrap()).collect();
        assert!(seats.take(&one).is_none());
        assert!(seats.take(&Principal::unix(2).unwrap()).is_some());
        taken.pop();
        assert!(seats.take(&one).is_some());
        drop(taken);
        assert!(seats.0.lock().unwrap().is_empty());
    }
}
