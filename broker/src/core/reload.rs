//! Reading the configuration again: whole or not at all. What a new one no longer allows is dead
//! before anybody is told that it is in force.

#![forbid(unsafe_code)]

use std::fmt;
use std::sync::{Mutex as StdMutex, PoisonError};
use std::time::SystemTime;

use thiserror::Error;
use tokio::sync::Mutex;
use tracing::{info, warn};

use super::{Core, Settings};
use crate::arena::Arena;
use crate::audit::{Event, Outcome, Record};
use crate::config::{Config, ConfigError, Fixed, Places};
use crate::harden::Paths;
use crate::metrics;
use crate::peer::Peer;
use crate::session::CutReason;
use crate::source::SourceError;

/// What a reload needs to know of the start.
pub(crate) struct Reloading {
    places: Places,
    /// What the process was made of, which no reload can change.
    fixed: Fixed,
    /// What the sandbox lets through; it cannot be widened.
    sandbox: Paths,
    sandbox_of: fn(&Config) -> Paths,
    one_at_a_time: Mutex<()>,
    last: StdMutex<Last>,
}

#[derive(Clone, Debug)]
struct Last {
    at: SystemTime,
    problem: Option<String>,
}

/// What came of a reload.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Reloaded {
    pub(crate) handles_revoked: usize,
    pub(crate) sessions_cut: usize,
    pub(crate) changes: Vec<String>,
}

/// Why the old configuration stays in force.
#[derive(Debug, Error)]
pub(crate) enum ReloadProblem {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Source(#[from] SourceError),
    /// It asks for what the process gave up, or fixed, when it started.
    #[error("restart required: {0}")]
    RestartRequired(String),
    /// There is nothing to put it in force for.
    #[error("the broker is shutting down")]
    ShuttingDown,
}

impl Reloading {
    pub(crate) fn new(
        places: Places,
        config: &Config,
        sandbox: Paths,
        sandbox_of: fn(&Config) -> Paths,
    ) -> Self {
        Self {
            places,
            fixed: config.fixed(),
            sandbox,
            sandbox_of,
            one_at_a_time: Mutex::default(),
            last: StdMutex::new(Last { at: SystemTime::now(), problem: None }),
        }
    }

    /// Reads and checks; nothing is in force yet. Reads files, so it blocks.
    fn read(&self, arena: &Arena) -> Result<Config, ReloadProblem> {
        let config = Config::load(&self.places)?;
        if let Some(key) = self.fixed.differs(&config.fixed()) {
            return Err(ReloadProblem::RestartRequired(format!("{key} has changed")));
        }
        let wanted = (self.sandbox_of)(&config);
        self.sandbox.covers(&wanted).map_err(ReloadProblem::RestartRequired)?;
        config.load_client_keys(arena)?;
        Ok(config)
    }

    fn remember(&self, problem: Option<String>) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) =
            Last { at: SystemTime::now(), problem };
    }

    /// When the configuration was last read, and what was wrong with it.
    pub(super) fn last(&self) -> (SystemTime, Option<String>) {
        let Last { at, problem } = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        (at, problem)
    }
}

impl fmt::Debug for Reloading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reloading").field("last", &self.last).finish_non_exhaustive()
    }
}

impl Core {
    /// Reads the configuration again and puts it in force. `by` is the operator who asked; SIGHUP
    /// has none.
    pub(crate) async fn reload(&self, by: Option<&Peer>) -> Result<Reloaded, ReloadProblem> {
        let timed = self.shared.metrics.begin(metrics::Verb::Reload);
        let _alone = self.shared.reloading.one_at_a_time.lock().await;
        let answer = self.try_reload().await;
        let mut record = Record::new(
            Event::BrokerReloaded,
            if answer.is_ok() { Outcome::Done } else { Outcome::Failed },
        );
        if let Some(by) = by {
            record = record.peer(by);
        }
        match &answer {
            Ok(reloaded) => {
                record = record
                    .detail("handles_revoked", reloaded.handles_revoked)
                    .detail("sessions_cut", reloaded.sessions_cut);
                timed.done();
                self.shared.reloading.remember(None);
                info!(
                    handles_revoked = reloaded.handles_revoked,
                    sessions_cut = reloaded.sessions_cut,
                    "the configuration was read again"
                );
            }
            Err(problem) => {
                self.shared.reloading.remember(Some(problem.to_string()));
                warn!(%problem, "the configuration stays as it was");
            }
        }
        self.shared.audit.always(&record);
        answer
    }

    async fn try_reload(&self) -> Result<Reloaded, ReloadProblem> {
        let core = self.clone();
        let read = tokio::task::spawn_blocking(move || {
            core.shared.reloading.read(core.shared.credentials.arena())
        });
        let read = read.await;
        let mut config = read.map_err(|_cancelled| ReloadProblem::ShuttingDown)??;
        let credentials = self.shared.credentials.prepare(&config).await?;
        let settings = Settings::of(&mut config);
        let changes = self.settings().changes(&settings);
        self.shared.metrics.configured(settings.connections.keys().cloned());
        // In one step: a login finds either the old destination and its credential, or the new
        // ones, because it looks for both under this lock.
        let (changed, taken) = {
            let mut state = self.state();
            (self.shared.credentials.commit(credentials), state.reload(settings))
        };
        // What was logged in ahead was so under the old configuration.
        self.drop_spares(CutReason::Reloaded, u64::MAX, |_| true);
        let (handles_revoked, sessions_cut) = (taken.handles.len(), taken.cuts.len());
        self.carry_out(None, CutReason::Reloaded, taken).await;
        changed.iter().for_each(|(name, version)| self.rotated(name, *version));
        Ok(Reloaded { handles_revoked, sessions_cut, changes })
    }
}
