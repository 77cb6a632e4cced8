//! A Unix socket that is served to any number of clients, each named by the kernel.
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
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::listener::{BindError, Listener};
use crate::app::Principal;

/// Connections of one principal.
const MAX_OF_ONE: usize = 64;
/// Connections of all principals.
const MAX_OF_ALL: usize = 512;
/// When so many are taken, the rest are for those who have few: a handful of users cannot take all.
const CROWDED: usize = MAX_OF_ALL / 4 * 3;
/// Connections of one principal then.
const FEW: usize = 8;
/// How long who is turned away may take to read why.
const FAREWELL: Duration = Duration::from_millis(500);
/// How many are told so at once; others are turned away without a word.
const MAX_LEAVING: usize = 32;
/// How long accepting pauses when descriptors or memory have run out.
pub(crate) const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);

impl Listener {
    /// Has everybody who connects served by `serve`, until `stop` fires; then waits until each
    /// is done. Who finds no place is told so by `refuse`, for half a second at most. `protocol` is
    /// for the log.
    ///
    /// # Errors
    /// When the socket cannot be handed to the runtime.
    pub(crate) async fn serve_each<F, R>(
        self,
        protocol: &'static str,
        stop: &CancellationToken,
        mut serve: impl FnMut(UnixStream, Principal) -> F,
        mut refuse: impl FnMut(UnixStream) -> R,
    ) -> io::Result<()>
    where
        F: Future<Output = ()> + Send + 'static,
        R: Future<Output = ()> + Send + 'static,
    {
        let (listener, _unlinked_at_the_end) = self.into_parts(protocol)?;
        let (seats, tasks) = (Seats::default(), TaskTracker::new());
        let leaving = Arc::new(Semaphore::new(MAX_LEAVING));
        while let Some((stream, caller)) = accept(&listener, stop).await {
            let Some(seat) = seats.take(&caller) else {
                tracing::warn!(principal = caller.subject(), "turned away: too many connections");
                if let Ok(place) = Arc::clone(&leaving).try_acquire_owned() {
                    let refusing = timeout(FAREWELL, refuse(stream));
                    tasks.spawn(async move {
                        let _told = refusing.await;
                        drop(place);
                    });
                }
                continue;
            };
            let serving = serve(stream, caller);
            tasks.spawn(async move {
                serving.await;
                drop(seat);
            });
        }
        tasks.close();
        tasks.wait().await;
        Ok(())
    }
}

/// Whether accepting failed for want of something that others may give back.
pub(crate) fn is_exhausted(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let exhausted = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    Errno::from_io_error(error).is_some_and(|errno| exhausted.contains(&errno))
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
        let most = match taken.values().sum::<usize>() {
            MAX_OF_ALL.. => 0,
            CROWDED.. => FEW,
            _ => MAX_OF_ONE,
        };
        if taken.get(principal).copied().unwrap_or(0) >= most {
            return None;
        }
        *taken.entry(principal.clone()).or_default() += 1;
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

    #[test]
    fn a_handful_of_users_cannot_take_all_seats() {
        let seats = Seats::default();
        let take = |uid: u32| seats.take(&Principal::unix(uid).unwrap());
        let all = |uid: u32| std::iter::from_fn(|| take(uid)).collect::<Vec<_>>();
        let taken: Vec<_> = (0..MAX_OF_ALL).map(|uid| all(u32::try_from(uid).unwrap())).collect();
        let sizes: Vec<_> = taken.iter().map(Vec::len).filter(|size| *size > 0).collect();
        let (many, few) = (CROWDED / MAX_OF_ONE, (MAX_OF_ALL - CROWDED) / FEW);
        assert_eq!(sizes, [vec![MAX_OF_ONE; many], vec![FEW; few]].concat());
    }
}
