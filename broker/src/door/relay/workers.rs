//! Where sessions live: one thread and one runtime a core.
//!
//! A session stays on the core it came to, login and relay, both directions in one task. So a
//! message that comes in goes out without another thread being woken, and no lock is contended.

#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Threads of a runtime beside its own: for names that are looked up, and key derivation.
const HELPERS: usize = 32;

/// The runtimes. Cheap to clone; they end when the [`Running`] does.
#[derive(Clone, Debug)]
pub(crate) struct Workers {
    workers: Arc<[Worker]>,
}

#[derive(Debug)]
struct Worker {
    runtime: Handle,
    sessions: AtomicUsize,
}

/// Ends the runtimes when dropped; what still runs there is dropped with them.
#[derive(Debug)]
pub(crate) struct Running {
    stop: CancellationToken,
    threads: Vec<thread::JoinHandle<()>>,
}

/// A session's place on a worker.
#[derive(Debug)]
struct Counted {
    workers: Arc<[Worker]>,
    index: usize,
}

impl Workers {
    /// As many as this process has cores to run on.
    ///
    /// # Errors
    /// When there is no thread, or no epoll instance, to be had.
    pub(crate) fn start() -> io::Result<(Self, Running)> {
        let mut workers = Vec::new();
        let mut running = Running { stop: CancellationToken::new(), threads: Vec::new() };
        for number in 0..thread::available_parallelism().map_or(1, usize::from) {
            let runtime =
                Builder::new_current_thread().enable_all().max_blocking_threads(HELPERS).build()?;
            workers
                .push(Worker { runtime: runtime.handle().clone(), sessions: AtomicUsize::new(0) });
            let stop = running.stop.clone();
            let thread = thread::Builder::new().name(format!("relay-{number}"));
            running.threads.push(thread.spawn(move || {
                runtime.block_on(stop.cancelled());
                runtime.shutdown_background();
            })?);
        }
        Ok((Self { workers: workers.into() }, running))
    }

    /// Runs a session where there are the fewest.
    pub(crate) fn spawn(
        &self,
        tasks: &TaskTracker,
        session: impl Future<Output = ()> + Send + 'static,
    ) {
        let sessions = |worker: &Worker| worker.sessions.load(Ordering::Relaxed);
        let fewest = self.workers.iter().enumerate().min_by_key(|(_, worker)| sessions(worker));
        let Some((index, worker)) = fewest else { return };
        worker.sessions.fetch_add(1, Ordering::Relaxed);
        let counted = Counted { workers: Arc::clone(&self.workers), index };
        tasks.spawn_on(
            async move {
                let _counted = counted;
                session.await;
            },
            &worker.runtime,
        );
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(worker) = self.workers.get(self.index) {
            worker.sessions.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
        for thread in self.threads.drain(..) {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn sessions_are_spread_and_their_places_given_up() {
        let (workers, running) = Workers::start().unwrap();
        let (tasks, release) = (TaskTracker::new(), CancellationToken::new());
        let (told, threads) = mpsc::channel();
        for _ in 0..8 {
            let (told, release) = (told.clone(), release.clone());
            workers.spawn(&tasks, async move {
                told.send(thread::current().id()).unwrap();
                release.cancelled().await;
            });
        }
        let mut counts = HashMap::new();
        threads.iter().take(8).for_each(|thread| *counts.entry(thread).or_insert(0) += 1);
        let cores = thread::available_parallelism().unwrap().get().min(8);
        assert_eq!(counts.len(), cores);
        assert!(counts.values().all(|count| *count <= 8_usize.div_ceil(cores)), "{counts:?}");
        release.cancel();
        tasks.close();
        Builder::new_current_thread().build().unwrap().block_on(tasks.wait());
        assert!(workers.workers.iter().all(|worker| worker.sessions.load(Ordering::Relaxed) == 0));
        drop(running);
    }
}
