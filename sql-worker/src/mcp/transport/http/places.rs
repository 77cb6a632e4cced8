//! The connections that there may be, and which of them gives way to a new one.
//!
//! Nobody can tell whose a connection is before it has shown a bearer, and anybody of this machine
//! can open one. So when all places are taken, the connection that has asked for nothing for the
//! longest is closed: one that never had a valid bearer before any other.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

const MAX_CONNECTIONS: usize = 512;
/// While every connection is busy, one that no longer is is looked for this often.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// All places.
#[derive(Debug, Clone)]
pub(super) struct Places {
    free: Arc<Semaphore>,
    taken: Arc<Mutex<Taken>>,
}

#[derive(Debug, Default)]
struct Taken {
    next: u64,
    connections: HashMap<u64, Connection>,
}

#[derive(Debug)]
struct Connection {
    /// Whether it has shown a valid bearer.
    known: bool,
    /// Requests that are in the works.
    requests: usize,
    /// When it was made, or had its last answer.
    since: Instant,
    closed: CancellationToken,
}

/// One connection's place, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    number: u64,
    places: Places,
    closed: CancellationToken,
    _permit: OwnedSemaphorePermit,
}

/// A request of somebody who may ask, from its head to the last byte of its answer.
#[derive(Debug)]
pub(super) struct Busy {
    number: u64,
    places: Places,
}

impl Default for Places {
    fn default() -> Self {
        Self { free: Arc::new(Semaphore::new(MAX_CONNECTIONS)), taken: Arc::default() }
    }
}

impl Places {
    /// A place for one more connection, which another may have to leave.
    pub(super) async fn take(&self) -> Option<Place> {
        loop {
            let free = Arc::clone(&self.free);
            let permit = match Arc::clone(&free).try_acquire_owned() {
                Ok(permit) => permit,
                Err(_taken) => {
                    self.clear_one();
                    match timeout(LOOK_EVERY, free.acquire_owned()).await {
                        Ok(permit) => permit.ok()?,
                        Err(_busy) => continue,
                    }
                }
            };
            let closed = CancellationToken::new();
            let mut taken = self.taken();
            taken.next += 1;
            let number = taken.next;
            let connection = Connection {
                known: false,
                requests: 0,
                since: Instant::now(),
                closed: closed.clone(),
            };
            taken.connections.insert(number, connection);
            drop(taken);
            return Some(Place { number, places: self.clone(), closed, _permit: permit });
        }
    }

    /// Closes one that has asked for nothing, if there is any.
    fn clear_one(&self) {
        let taken = self.taken();
        let waiting = taken
            .connections
            .values()
            .filter(|connection| connection.requests == 0 && !connection.closed.is_cancelled());
        if let Some(first) = waiting.min_by_key(|connection| (connection.known, connection.since)) {
            first.closed.cancel();
        }
    }

    fn with(&self, number: u64, change: impl FnOnce(&mut Connection)) {
        if let Some(connection) = self.taken().connections.get_mut(&number) {
            change(connection);
        }
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Fires when the connection has to give way.
    pub(super) fn closed(&self) -> CancellationToken {
        self.closed.clone()
    }

    /// To be called for a request that has a valid bearer.
    pub(super) fn begin(&self) -> Busy {
        self.places.with(self.number, |connection| {
            connection.known = true;
            connection.requests += 1;
        });
        Busy { number: self.number, places: self.places.clone() }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.taken().connections.remove(&self.number);
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.places.with(self.number, |connection| {
            connection.requests = connection.requests.saturating_sub(1);
            connection.since = Instant::now();
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_asks_for_nothing_gives_way_and_strangers_first() {
        let places = Places::default();
        let mut taken = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            taken.push(places.take().await.unwrap());
        }
        // The first two are somebody's, and one of them is busy.
        let busy = taken[0].begin();
        drop(taken[1].begin());
        for expected in [2, 3] {
            assert!(timeout(LOOK_EVERY / 5, places.take()).await.is_err());
            let closed: Vec<usize> =
                (0..taken.len()).filter(|at| taken[*at].closed().is_cancelled()).collect();
            assert_eq!(closed, [expected]);
            taken.remove(expected);
            taken.insert(expected, places.take().await.unwrap());
            let _asks = taken[expected].begin();
        }
        for place in &taken[2..] {
            drop(place.begin());
        }
        places.clear_one();
        assert!(taken[1].closed().is_cancelled() && !taken[0].closed().is_cancelled());
        drop((busy, taken));
        assert!(places.taken().connections.is_empty());
    }
}
