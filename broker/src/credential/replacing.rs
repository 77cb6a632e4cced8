//! Putting the credentials of another configuration in force: all of them, or none.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::{Credentials, Entry};
use crate::config::Config;
use crate::connection::ConnectionName;
use crate::source::{Loaded, Source, SourceError, SourceFault};

/// Credentials of another configuration, read and not yet in force.
#[derive(Debug)]
#[must_use]
pub(crate) struct Prepared {
    connections: BTreeMap<ConnectionName, (Arc<Source>, Change)>,
}

#[derive(Debug)]
enum Change {
    /// The source is as it was, and so is what came from it, or was put.
    Keep,
    Load(Option<Loaded>),
}

impl Credentials {
    /// The first half of a reload: reads what the new configuration has otherwise. Nothing
    /// changes yet.
    ///
    /// # Errors
    /// The first that cannot be read, or that needs what was fixed at the start.
    pub(crate) async fn prepare(&self, config: &Config) -> Result<Prepared, SourceError> {
        self.prepare_sources(&sources(config)).await
    }

    pub(super) async fn prepare_sources(
        &self,
        sources: &BTreeMap<ConnectionName, Arc<Source>>,
    ) -> Result<Prepared, SourceError> {
        let mut connections = BTreeMap::new();
        for (name, source) in sources {
            let source = Arc::clone(source);
            let known = self.source(name);
            let change = if known.is_some_and(|known| known.is_same_as(&source)) {
                Change::Keep
            } else {
                self.check_reach(&source)?;
                Change::Load(source.load(&self.shared.arena, &self.shared.keeper).await?)
            };
            connections.insert(name.clone(), (source, change));
        }
        Ok(Prepared { connections })
    }

    /// The second half, which cannot fail: from now on the new configuration's credentials are
    /// in force. Gives the connections that have another version than before.
    pub(crate) fn commit(&self, prepared: Prepared) -> Vec<(ConnectionName, u64)> {
        let mut state = self.state_mut();
        let mut changed = Vec::new();
        let mut before = std::mem::take(&mut state.entries);
        for (name, (source, change)) in prepared.connections {
            let old = before.remove(&name);
            let entry = match (change, old) {
                // A read of the old source that is under way is still of use: it is the same.
                (Change::Keep, Some(entry)) => entry,
                (Change::Keep, None) => Entry::new(source),
                (Change::Load(loaded), old) => {
                    let mut entry = Entry::new(source);
                    let current = old.and_then(|old| old.current);
                    match (loaded, current) {
                        // It has moved, and is what it was.
                        (Some(loaded), Some(same)) if loaded.material.is_same_as(&same) => {
                            entry.looked(Some(loaded.stamp), Instant::now());
                            entry.current = Some(same);
                        }
                        (Some(loaded), _) => {
                            let version = state.next_version(&name);
                            entry.read(loaded, version, Instant::now());
                            changed.push((name.clone(), version));
                        }
                        (None, _) => {}
                    }
                    entry
                }
            };
            // What the server refused it may take under the new configuration.
            if let Some(current) = &entry.current {
                current.breaker.close();
            }
            state.entries.insert(name, entry);
        }
        changed
    }

    /// What the sandbox and the keeper were not told of at the start cannot be added later.
    fn check_reach(&self, source: &Source) -> Result<(), SourceError> {
        let refuse = |why| Err(source.error(SourceFault::RestartRequired(why)));
        if source.is_environment() {
            return refuse("the environment is read once, at the start");
        }
        if source.command().is_some_and(|command| !self.shared.keeper.knows(command)) {
            return refuse("programs are settled at the start");
        }
        let known = |directory: &PathBuf| {
            let directory = directory.canonicalize().unwrap_or_else(|_absent| directory.clone());
            self.shared.directories.iter().any(|known| directory.starts_with(known))
        };
        if !source.directories().iter().all(known) {
            return refuse("the sandbox does not reach the directory of its file");
        }
        Ok(())
    }
}

pub(super) fn sources(config: &Config) -> BTreeMap<ConnectionName, Arc<Source>> {
    let sources = config.connections.iter();
    sources.map(|(name, configured)| (name.clone(), Arc::clone(&configured.source))).collect()
}
