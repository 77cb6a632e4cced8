//! Doors: sockets that speak a destination's own protocol, for clients that know nothing of us.
//!
//! [`login`] is the one flow by which a client comes in; a protocol only words it. [`relay`]
//! carries bytes once it is in. [`wire`] is what every codec is made of.

pub(crate) mod login;
pub(crate) mod postgres;
pub(crate) mod relay;
pub(crate) mod wire;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::peer::Uid;

/// Logins at once, over all peers: each holds a buffer of its startup message.
const MAX_LOGINS: usize = 1024;
/// Logins at once for one uid, so that nobody's flood shuts the others out.
const MAX_LOGINS_PER_UID: usize = 256;

/// Bounds what unfinished logins can cost. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Lobby {
    all: Arc<Semaphore>,
    by_uid: Arc<Mutex<HashMap<Uid, usize>>>,
}

/// A place in the lobby, given up on drop.
#[derive(Debug)]
pub(crate) struct Waiting {
    _permit: OwnedSemaphorePermit,
    by_uid: Arc<Mutex<HashMap<Uid, usize>>>,
    uid: Uid,
}

impl Lobby {
    pub(crate) fn new() -> Self {
        Self { all: Arc::new(Semaphore::new(MAX_LOGINS)), by_uid: Arc::default() }
    }

    /// `None` when there is no place left: the connection is closed without an answer.
    pub(crate) fn enter(&self, uid: Uid) -> Option<Waiting> {
        let permit = Arc::clone(&self.all).try_acquire_owned().ok()?;
        let mut counts = self.by_uid.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(uid).or_default();
        if *count >= MAX_LOGINS_PER_UID {
            return None;
        }
        *count += 1;
        Some(Waiting { _permit: permit, by_uid: Arc::clone(&self.by_uid), uid })
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut counts = self.by_uid.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_uid_cannot_fill_the_lobby() {
        let lobby = Lobby::new();
        let (greedy, other) = (Uid::from_raw(1), Uid::from_raw(2));
        let mut places: Vec<_> = std::iter::from_fn(|| lobby.enter(greedy)).collect();
        assert_eq!(places.len(), MAX_LOGINS_PER_UID);
        assert!(lobby.enter(other).is_some());
        places.pop();
        assert!(lobby.enter(greedy).is_some());
    }
}
