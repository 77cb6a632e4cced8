//! Reading sources again: when their files change, when their time has come, and when somebody
//! asks because the server refused a login.

#![forbid(unsafe_code)]

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use ring::rand::{SecureRandom as _, SystemRandom};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::error;

use super::Credentials;
use crate::connection::ConnectionName;
use crate::source::{Loaded, Source, SourceError, Stamp};

/// How often files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long files must look the same before they are read: whoever writes them is not done yet.
const SETTLED_AFTER: Duration = Duration::from_millis(200);
/// After so many changes in a row it waits for the next look.
const MOST_CHANGES: u32 = 10;
/// How many looks may hang at once, as on a dead network disk; logins use the same threads.
const MOST_LOOKS: usize = 16;
/// Longest time between tries while a source cannot be read.
const LONGEST_BACK_OFF: Duration = Duration::from_secs(60);

impl Credentials {
    /// Keeps credentials as their sources have them, until `stopped`. `rotated` is told of every
    /// version that came from reading a source again, whoever asked for that.
    pub(crate) async fn run_refresh(
        self,
        stopped: CancellationToken,
        rotated: impl Fn(&ConnectionName, u64),
    ) {
        let told = self.shared.told.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut news) = told else { return };
        let turns = Arc::new(Semaphore::new(MOST_LOOKS));
        let mut looks = JoinSet::new();
        let mut tick = tokio::time::interval(LOOK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut keeper_is_gone = false;
        loop {
            tokio::select! {
                () = stopped.cancelled() => return,
                Some((connection, version)) = news.recv() => rotated(&connection, version),
                Some(_ended) = looks.join_next(), if !looks.is_empty() => {}
                _ = tick.tick() => {
                    // Asked every time: it is reaped a moment after its socket closed.
                    if !self.shared.keeper.is_alive() && !keeper_is_gone {
                        keeper_is_gone = true;
                        error!("the keeper process is gone: what programs gave stays as it is, until the broker is restarted");
                    }
                    for look in self.due() {
                        looks.spawn(self.clone().look(look, Arc::clone(&turns)));
                    }
                }
            }
        }
    }

    /// Reads a source again, now. `Some` version when another one than at the time of asking is
    /// in force after that, whoever read it: many who ask at once are answered by one read.
    ///
    /// # Errors
    /// When the source cannot be read; the credential in force stays.
    pub(crate) async fn reread(
        &self,
        connection: &ConnectionName,
    ) -> Result<Option<u64>, SourceError> {
        let asked = Instant::now();
        let (source, alone, before) = {
            let state = self.state();
            let Some(entry) = state.entries.get(connection) else { return Ok(None) };
            (Arc::clone(&entry.source), Arc::clone(&entry.reading.alone), entry.version())
        };
        if !source.is_rereadable() {
            return Ok(None);
        }
        let _alone = alone.lock().await;
        let began = Instant::now();
        {
            let mut state = self.state_mut();
            let Some(entry) = state.entries.get_mut(connection) else { return Ok(None) };
            if entry.reading.began.is_some_and(|began| began >= asked) {
                return Ok(entry.version().filter(|_| entry.version() != before));
            }
            entry.reading.began = Some(began);
        }
        let loaded = source.load(&self.shared.arena, &self.shared.keeper).await;
        self.conclude(connection, &source, began, loaded)?;
        let now = self.of(connection).map(|current| current.version());
        Ok(now.filter(|_| now != before))
    }

    fn conclude(
        &self,
        connection: &ConnectionName,
        source: &Arc<Source>,
        began: Instant,
        loaded: Result<Option<Loaded>, SourceError>,
    ) -> Result<(), SourceError> {
        let mut state = self.state_mut();
        let entry = state.entries.get_mut(connection);
        // A reload may have given the connection another source meanwhile.
        let Some(entry) = entry.filter(|entry| Arc::ptr_eq(&entry.source, source)) else {
            return Ok(());
        };
        match loaded {
            Ok(None) => Ok(()),
            Ok(Some(Loaded { material, stamp })) => {
                entry.mended(connection);
                entry.looked(Some(stamp), began);
                let version = state.adopt(connection, material);
                drop(state);
                if let Some(version) = version {
                    // Nobody listens before the task runs and after it ends.
                    let _ = self.shared.news.send((connection.clone(), version));
                }
                Ok(())
            }
            Err(error) => {
                entry.failed(connection, &error);
                Err(error)
            }
        }
    }

    /// What is to be looked at now. It is marked, so that one that hangs is not piled upon.
    fn due(&self) -> Vec<Look> {
        let now = Instant::now();
        let mut state = self.state_mut();
        let looks = state.entries.iter_mut().filter_map(|(connection, entry)| {
            let is_due = entry.reading.due.is_some_and(|due| due <= now);
            if entry.reading.looking || !(is_due || entry.source.has_files()) {
                return None;
            }
            entry.reading.looking = true;
            Some(Look {
                connection: connection.clone(),
                source: Arc::clone(&entry.source),
                seen: entry.reading.seen.clone(),
                is_due,
            })
        });
        looks.collect()
    }

    async fn look(self, look: Look, turns: Arc<Semaphore>) {
        let Look { connection, source, seen, is_due } = look;
        let found = {
            // It is never closed.
            let _turn = turns.acquire().await;
            changed(&source, seen.as_ref()).await
        };
        if is_due || found.is_some() {
            // A failure was noted, and is tried again in its time or when the files change again.
            let _noted = self.reread(&connection).await;
        }
        let mut state = self.state_mut();
        let entry = state.entries.get_mut(&connection);
        if let Some(entry) = entry.filter(|entry| Arc::ptr_eq(&entry.source, &source)) {
            entry.reading.looking = false;
            if entry.problem.is_some() && found.is_some() {
                entry.reading.seen = found;
            }
        }
    }
}

/// One source that is to be looked at.
#[derive(Debug)]
struct Look {
    connection: ConnectionName,
    source: Arc<Source>,
    seen: Option<Stamp>,
    is_due: bool,
}

impl super::Entry {
    fn version(&self) -> Option<u64> {
        self.current.as_ref().map(|current| current.version)
    }
}

/// How the files look, if that is another way than before and has stayed so for a moment.
async fn changed(source: &Arc<Source>, seen: Option<&Stamp>) -> Option<Stamp> {
    if !source.has_files() {
        return None;
    }
    let mut found = stamp(source).await?;
    if seen == Some(&found) {
        return None;
    }
    for _ in 0..MOST_CHANGES {
        tokio::time::sleep(SETTLED_AFTER).await;
        let again = stamp(source).await?;
        if again == found {
            return Some(found);
        }
        found = again;
    }
    None
}

/// Looks on a thread of its own: stat(2) may hang.
async fn stamp(source: &Arc<Source>) -> Option<Stamp> {
    let source = Arc::clone(source);
    tokio::task::spawn_blocking(move || source.stamp()).await.ok()
}

/// A tenth more or less, so that brokers started together do not ask together.
pub(super) fn jittered(span: Duration) -> Duration {
    let mut random = [0; 1];
    // Without randomness they do.
    let _ = SystemRandom::new().fill(&mut random);
    let [random] = random;
    span * 9 / 10 + span / 5 * u32::from(random) / 255
}

/// The time until the next try after so many failures in a row.
pub(super) fn back_off(failures: u32, refresh: Option<Duration>) -> Duration {
    let doubled = Duration::from_secs(1 << failures.saturating_sub(1).min(6));
    jittered(doubled.min(LONGEST_BACK_OFF).min(refresh.unwrap_or(LONGEST_BACK_OFF)))
}
