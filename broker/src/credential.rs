//! The secret material of the connections, in the arena: which version of it is in force, and
//! how another comes into force.
//!
//! A version belongs to a connection, begins at 1, and is never used again, whatever is deleted
//! or reloaded meanwhile: what was derived from one can be told from what belongs to another. A
//! source that cannot be read, or holds nonsense, changes nothing: the last good credential stays
//! in force, and the problem shows.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Instant, SystemTime};

use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::arena::{Arena, ArenaFull, Slot, Usage};
use crate::config::Config;
use crate::connection::ConnectionName;
use crate::keeper::{Keeper, MAX_RUNNING};
use crate::peer::Uid;
use crate::source::{Loaded, Material, Source, SourceError, SourceFault, SourceKind, Stamp};

mod refresh;

/// A user name and a password. The password is in the arena; nothing of it is printable.
pub(crate) struct Credential {
    username: String,
    password: Slot,
    version: u64,
    since: SystemTime,
}

impl Credential {
    /// One that is nobody's version of anything: it belongs to whoever has it.
    #[cfg(test)]
    pub(crate) fn new(username: String, password: Slot) -> Self {
        Self { username, password, version: 1, since: SystemTime::now() }
    }

    /// What a peer brought for a handle of its own. Version 0: no change of the connection's own
    /// credential concerns it.
    pub(crate) fn registered(material: Material) -> Self {
        let Material { username, password } = material;
        Self { username, password, version: 0, since: SystemTime::now() }
    }

    /// The database role; not a secret.
    pub(crate) fn username(&self) -> &str {
        &self.username
    }

    /// For the login machines only.
    pub(crate) fn password(&self) -> &Slot {
        &self.password
    }

    /// Which version of its connection's credential it is, from 1.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[REDACTED]")
    }
}

/// What may be told of a credential.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CredentialView {
    pub(crate) version: u64,
    pub(crate) since: SystemTime,
    /// When it will be of no use, if whoever put it said so.
    pub(crate) expires_at: Option<SystemTime>,
    pub(crate) labels: BTreeMap<String, String>,
    /// Whether a broker that starts anew has it again.
    pub(crate) persistent: bool,
    /// Since when its source cannot be read, if it cannot.
    pub(crate) stale_since: Option<SystemTime>,
    /// Why.
    pub(crate) last_problem: Option<String>,
}

/// The credential of every connection. Cheap to clone; clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Credentials {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    arena: Arena,
    keeper: Keeper,
    /// What the sandbox leaves open for files of sources.
    directories: Vec<PathBuf>,
    /// Held for moments, and never while anything is read.
    state: RwLock<State>,
    news: mpsc::UnboundedSender<(ConnectionName, u64)>,
    /// Taken by the task that tells them on.
    told: Mutex<Option<mpsc::UnboundedReceiver<(ConnectionName, u64)>>>,
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<ConnectionName, Entry>,
    /// The last version of every connection there ever was.
    versions: BTreeMap<ConnectionName, u64>,
}

#[derive(Debug)]
struct Entry {
    source: Arc<Source>,
    current: Option<Arc<Credential>>,
    expires_at: Option<SystemTime>,
    labels: BTreeMap<String, String>,
    persistent: bool,
    problem: Option<Problem>,
    reading: Reading,
}

/// Why, and since when, what is in force may not be what the source has.
#[derive(Debug)]
struct Problem {
    since: SystemTime,
    text: String,
    /// In a row.
    failures: u32,
}

/// What is known of the source, for reading it again.
#[derive(Debug, Default)]
struct Reading {
    /// Held by whoever reads.
    alone: Arc<tokio::sync::Mutex<()>>,
    /// When the last read began.
    began: Option<Instant>,
    /// How the files looked then.
    seen: Option<Stamp>,
    /// When it is to be read without a sign of change.
    due: Option<Instant>,
    /// Whether somebody looks at the files now.
    looking: bool,
}

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
    /// Reads every credential of the configuration. Programs run side by side.
    ///
    /// # Errors
    /// The first that cannot be read.
    pub(crate) fn load(
        config: &Config,
        arena: &Arena,
        keeper: &Keeper,
    ) -> Result<Self, SourceError> {
        let mut state = State::default();
        let sources: Vec<_> = config
            .connections
            .iter()
            .map(|(name, configured)| (name, Arc::clone(&configured.source)))
            .collect();
        for some in sources.chunks(MAX_RUNNING) {
            let begun = some.iter().map(|(_, source)| source.begin(arena, keeper));
            let begun = begun.collect::<Result<Vec<_>, _>>()?;
            for ((name, source), begun) in some.iter().zip(begun) {
                let mut entry = Entry::new(Arc::clone(source));
                let began = Instant::now();
                if let Some(loaded) = source.finish(begun, arena)? {
                    let version = state.next_version(name);
                    entry.read(loaded, version, began);
                }
                state.entries.insert((*name).clone(), entry);
            }
        }
        // Two connections may name one variable, so it goes when all have read it.
        sources.iter().for_each(|(_, source)| source.wipe());
        let (news, told) = mpsc::unbounded_channel();
        let shared = Shared {
            arena: arena.clone(),
            keeper: keeper.clone(),
            directories: config
                .secret_directories()
                .map(|path| path.canonicalize().unwrap_or(path))
                .collect(),
            state: RwLock::new(state),
            news,
            told: Mutex::new(Some(told)),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The one in force; `None` where there is none, or no such connection.
    pub(crate) fn of(&self, connection: &ConnectionName) -> Option<Arc<Credential>> {
        self.state().entries.get(connection)?.current.clone()
    }

    /// What may be told of the one in force.
    pub(crate) fn describe(&self, connection: &ConnectionName) -> Option<CredentialView> {
        let state = self.state();
        let entry = state.entries.get(connection)?;
        let current = entry.current.as_ref()?;
        Some(CredentialView {
            version: current.version,
            since: current.since,
            expires_at: entry.expires_at,
            labels: entry.labels.clone(),
            persistent: entry.persistent,
            stale_since: entry.problem.as_ref().map(|problem| problem.since),
            last_problem: entry.problem.as_ref().map(|problem| problem.text.clone()),
        })
    }

    /// Whether operators put the credential of this connection: otherwise its source would take
    /// back what they put.
    pub(crate) fn takes_put(&self, connection: &ConnectionName) -> bool {
        let state = self.state();
        state.entries.get(connection).is_some_and(|entry| entry.source.kind == SourceKind::Store)
    }

    /// Installs a password, in the arena until the broker ends, and gives its version.
    pub(crate) fn put(
        &self,
        connection: &ConnectionName,
        material: Material,
        expires_at: Option<SystemTime>,
        labels: BTreeMap<String, String>,
    ) -> u64 {
        let mut state = self.state_mut();
        let version = state.next_version(connection);
        if let Some(entry) = state.entries.get_mut(connection) {
            entry.install(material, version);
            (entry.expires_at, entry.labels, entry.persistent) = (expires_at, labels, false);
        }
        version
    }

    /// Turns secret text that an operator brought into a credential's material: as the
    /// connection's source is configured, unless a user name came with it.
    ///
    /// # Errors
    /// When it could not be logged in with.
    pub(crate) fn material(
        &self,
        connection: &ConnectionName,
        username: Option<String>,
        text: &Slot,
    ) -> Result<Material, SourceFault> {
        let username = username.or_else(|| {
            let source = self.source(connection)?;
            source.configured_username().map(str::to_owned)
        });
        Material::parse(text, username.as_deref())
    }

    /// Room for what an operator brings.
    pub(crate) fn room(&self, len: usize) -> Result<Slot, ArenaFull> {
        self.shared.arena.allocate(len)
    }

    /// Room for what a peer brings: its share, and no more.
    pub(crate) fn room_for(&self, uid: Uid, len: usize) -> Result<Slot, ArenaFull> {
        self.shared.arena.allocate_for(uid, len)
    }

    /// What is in the arena.
    pub(crate) fn arena_usage(&self) -> Usage {
        self.shared.arena.usage()
    }

    /// The connections whose credential has an end, and when that is.
    pub(crate) fn expiries(&self) -> Vec<(ConnectionName, SystemTime)> {
        let state = self.state();
        let ends = state.entries.iter().filter_map(|(name, entry)| {
            entry.current.as_ref()?;
            Some((name.clone(), entry.expires_at?))
        });
        ends.collect()
    }

    /// Where a connection's credential comes from, for people.
    pub(crate) fn source_of(&self, connection: &ConnectionName) -> String {
        self.source(connection).map(|source| source.kind.to_string()).unwrap_or_default()
    }

    /// What an operator should look at, one sentence each.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let state = self.state();
        for (name, entry) in &state.entries {
            if let Some(problem) = &entry.problem {
                warnings.push(format!("{name}: its credential may be old: {}", problem.text));
            }
            if entry.current.is_none() && entry.source.kind == SourceKind::Store {
                warnings.push(format!("{name} has no credential: credbroker put {name}"));
            }
            if entry.expires_at.is_some_and(|at| at <= SystemTime::now()) {
                warnings.push(format!("{name}: its credential has expired"));
            }
        }
        if !self.shared.keeper.is_alive() {
            warnings.push(
                "the keeper is gone: exec sources are not read again until a restart".to_owned(),
            );
        }
        warnings
    }

    /// Takes the credential of a connection away. Whether there was one.
    pub(crate) fn delete(&self, connection: &ConnectionName) -> bool {
        let mut state = self.state_mut();
        let Some(entry) = state.entries.get_mut(connection) else { return false };
        (entry.expires_at, entry.labels) = (None, BTreeMap::new());
        entry.current.take().is_some()
    }

    /// The first half of a reload: reads what the new configuration has otherwise. Nothing
    /// changes yet.
    ///
    /// # Errors
    /// The first that cannot be read, or that needs what was fixed at the start.
    pub(crate) async fn prepare(&self, config: &Config) -> Result<Prepared, SourceError> {
        let mut connections = BTreeMap::new();
        for (name, configured) in &config.connections {
            let source = Arc::clone(&configured.source);
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

    fn source(&self, connection: &ConnectionName) -> Option<Arc<Source>> {
        Some(Arc::clone(&self.state().entries.get(connection)?.source))
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.shared.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn state_mut(&self) -> RwLockWriteGuard<'_, State> {
        self.shared.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn next_version(&mut self, connection: &ConnectionName) -> u64 {
        let last = self.versions.entry(connection.clone()).or_default();
        *last += 1;
        *last
    }

    fn adopt(&mut self, connection: &ConnectionName, material: Material) -> Option<u64> {
        let current = self.entries.get(connection)?.current.as_ref();
        if current.is_some_and(|current| material.is_same_as(current)) {
            return None;
        }
        let version = self.next_version(connection);
        self.entries.get_mut(connection)?.install(material, version);
        Some(version)
    }
}

impl Entry {
    fn new(source: Arc<Source>) -> Self {
        Self {
            source,
            current: None,
            expires_at: None,
            labels: BTreeMap::new(),
            persistent: false,
            problem: None,
            reading: Reading::default(),
        }
    }

    /// What the source had, for the first time.
    fn read(&mut self, loaded: Loaded, version: u64, began: Instant) {
        self.install(loaded.material, version);
        self.looked(Some(loaded.stamp), began);
    }

    /// A version that its source has again after a restart, unless somebody says otherwise.
    fn install(&mut self, material: Material, version: u64) {
        let Material { username, password } = material;
        let since = SystemTime::now();
        self.current = Some(Arc::new(Credential { username, password, version, since }));
        (self.expires_at, self.labels, self.persistent) = (None, BTreeMap::new(), true);
    }

    /// The source was read, and all is well with it.
    fn looked(&mut self, stamp: Option<Stamp>, began: Instant) {
        self.persistent = true;
        self.problem = None;
        self.reading.seen = stamp;
        self.reading.began = Some(began);
        self.reading.due = self.source.refresh().map(|span| began + refresh::jittered(span));
    }

    /// The source was read in vain.
    fn failed(&mut self, connection: &ConnectionName, error: &SourceError) {
        let text = error.to_string();
        let (since, failures) = match &self.problem {
            Some(before) => (before.since, before.failures.saturating_add(1)),
            None => (SystemTime::now(), 1),
        };
        if self.problem.as_ref().is_none_or(|before| before.text != text) {
            warn!(%connection, "the credential could not be read again and stays as it was: {text}");
        }
        self.problem = Some(Problem { since, text, failures });
        let wait = refresh::back_off(failures, self.source.refresh());
        self.reading.due = Some(Instant::now() + wait);
    }

    /// Says once that a problem is over.
    fn mended(&self, connection: &ConnectionName) {
        if self.problem.is_some() {
            info!(%connection, "the credential can be read again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::BackendChoice;

    #[test]
    fn debug_shows_neither_user_nor_password() {
        let arena = Arena::map(BackendChoice::Auto, 64 * 1024).unwrap();
        let mut slot = arena.allocate(6).unwrap();
        slot.fill(|bytes| bytes.copy_from_slice(b"canary"));
        let credential = Credential::new("app".into(), slot);
        assert_eq!(format!("{credential:?}"), "[REDACTED]");
    }
}
