//! How many connections may be open at once, over all peers and for one uid, so that nobody's
//! flood shuts the others out.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Resource, getrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::peer::Uid;

/// A number of places, of which no uid can take all. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Lobby {
    all: Arc<Semaphore>,
    most_for_one: usize,
    by_uid: Arc<Mutex<HashMap<Uid, usize>>>,
}

/// A place in the lobby, given up on drop.
#[derive(Debug)]
pub(crate) struct Place {
    _permit: OwnedSemaphorePermit,
    by_uid: Arc<Mutex<HashMap<Uid, usize>>>,
    uid: Uid,
}

impl Lobby {
    /// `places` in all, or as many as there are descriptors for; a quarter of them at most for one
    /// uid.
    pub(crate) fn new(places: usize) -> Self {
        Self::of(places.min(affordable()))
    }

    fn of(places: usize) -> Self {
        Self {
            all: Arc::new(Semaphore::new(places)),
            most_for_one: places / 4,
            by_uid: Arc::default(),
        }
    }

    /// `None` when there is no place left: the connection is closed without an answer.
    pub(crate) fn enter(&self, uid: Uid) -> Option<Place> {
        let permit = Arc::clone(&self.all).try_acquire_owned().ok()?;
        let mut counts = self.by_uid.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(uid).or_default();
        if *count >= self.most_for_one {
            return None;
        }
        *count += 1;
        Some(Place { _permit: permit, by_uid: Arc::clone(&self.by_uid), uid })
    }
}

impl Drop for Place {
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

/// A place takes two descriptors at least, and there are several lobbies beside the sessions: an
/// eighth of the table for each, so that those who wait cannot shut out those who are in.
fn affordable() -> usize {
    let limit = getrlimit(Resource::Nofile).current.and_then(|limit| usize::try_from(limit).ok());
    limit.map_or(usize::MAX, |limit| limit / 8).max(4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_uid_cannot_fill_the_lobby() {
        let lobby = Lobby::of(64);
        let (greedy, other) = (Uid::from_raw(1), Uid::from_raw(2));
        let mut places: Vec<_> = std::iter::from_fn(|| lobby.enter(greedy)).collect();
        assert_eq!(places.len(), 16);
        assert!(lobby.enter(other).is_some());
        places.pop();
        assert!(lobby.enter(greedy).is_some());
    }
}
