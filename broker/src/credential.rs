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

mod breaker;
mod refresh;
mod replacing;
mod rules;
mod salted;

pub(crate) use self::breaker::{Attempt, Breaker, BreakerView, Open, Refused, Verdict};
use self::replacing::sources;
pub(crate) use self::rules::{ChannelBinding, LoginRules, Method, SecretForm};
pub(crate) use self::salted::{SaltedPassword, SaltedPasswords};

/// A user name and a secret. The secret is in the arena; nothing of it is printable.
pub(crate) struct Credential {
    username: String,
    secret: Slot,
    form: SecretForm,
    version: u64,
    since: SystemTime,
    salted: SaltedPasswords,
    breaker: Breaker,
}

impl Credential {
    /// One that is nobody's version of anything: it belongs to whoever has it.
    #[cfg(test)]
    pub(crate) fn new(username: String, secret: Slot) -> Self {
        Self::of(Material { username, secret, form: SecretForm::Password }, 1)
    }

    /// What a peer brought for a handle of its own. Version 0: no change of the connection's own
    /// credential concerns it.
    pub(crate) fn registered(material: Material) -> Self {
        Self::of(material, 0)
    }

    pub(crate) fn of(material: Material, version: u64) -> Self {
        let Material { username, secret, form } = material;
        Self {
            username,
            secret,
            form,
            version,
            since: SystemTime::now(),
            salted: SaltedPasswords::default(),
            breaker: Breaker::default(),
        }
    }

    /// The database role; not a secret.
    pub(crate) fn username(&self) -> &str {
        &self.username
    }

    /// For the login machines only: the password, or the text of the keys.
    pub(crate) fn secret(&self) -> &Slot {
        &self.secret
    }

    /// What the secret is.
    pub(crate) fn form(&self) -> SecretForm {
        self.form
    }

    /// What was derived from the password before.
    pub(crate) fn salted(&self) -> &SaltedPasswords {
        &self.salted
    }

    /// Who may try it now.
    pub(crate) fn breaker(&self) -> &Breaker {
        &self.breaker
    }

    /// Which version of its connection's credential it is, from 1; 0 for a peer's own.
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
    /// `None` while the server takes it, as far as is known.
    pub(crate) breaker: Option<BreakerView>,
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
        Self::of_sources(&sources(config), arena, keeper)
    }

    fn of_sources(
        sources: &BTreeMap<ConnectionName, Arc<Source>>,
        arena: &Arena,
        keeper: &Keeper,
    ) -> Result<Self, SourceError> {
        let mut state = State::default();
        let all: Vec<_> = sources.iter().collect();
        for some in all.chunks(MAX_RUNNING) {
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
        sources.values().for_each(|source| source.wipe());
        let directories = sources.values().flat_map(|source| source.directories());
        let (news, told) = mpsc::unbounded_channel();
        let shared = Shared {
            arena: arena.clone(),
            keeper: keeper.clone(),
            directories: directories.map(|path| path.canonicalize().unwrap_or(path)).collect(),
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
            breaker: current.breaker.view(),
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
        let source = self.source(connection);
        let configured = || source.as_ref()?.configured_username().map(str::to_owned);
        let username = username.or_else(configured);
        let form = source.as_ref().map(|source| source.form).unwrap_or_default();
        Material::parse(text, username.as_deref(), form)
    }

    /// Room for what an operator brings.
    pub(crate) fn room(&self, len: usize) -> Result<Slot, ArenaFull> {
        self.shared.arena.allocate(len)
    }

    /// Room for what a peer brings: its share, and no more.
    pub(crate) fn room_for(&self, uid: Uid, len: usize) -> Result<Slot, ArenaFull> {
        self.shared.arena.allocate_for(uid, len)
    }

    /// Where they lie.
    pub(crate) fn arena(&self) -> &Arena {
        &self.shared.arena
    }

    /// What is in the arena, whose canaries are looked at on the occasion.
    pub(crate) fn arena_usage(&self) -> Usage {
        self.shared.arena.check();
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
            if let Some(Open { retry }) = entry.current.as_ref().and_then(|c| c.breaker.is_open()) {
                warnings.push(format!(
                    "{name}: the database refuses its credential; the next login is tried in {} s",
                    retry.as_secs()
                ));
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
        self.current = Some(Arc::new(Credential::of(material, version)));
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
    use std::fs;
    use std::path::Path;
    use std::time::Duration;

    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::arena::BackendChoice;
    use crate::source::tests::source;
    use crate::source::{ExecSource, UsernameSource};

    fn name(text: &str) -> ConnectionName {
        ConnectionName::parse(text).unwrap()
    }

    fn slot(arena: &Arena, text: &[u8]) -> Slot {
        let mut slot = arena.allocate(text.len()).unwrap();
        slot.fill(|bytes| bytes.copy_from_slice(text));
        slot
    }

    fn material(arena: &Arena, username: &str, password: &[u8]) -> Material {
        let secret = slot(arena, password);
        Material { username: username.into(), secret, form: SecretForm::Password }
    }

    fn shell(script: &str) -> ExecSource {
        let argv = ["/bin/sh", "-c", script].map(str::to_owned).into();
        ExecSource { argv, timeout: Duration::from_secs(20) }
    }

    fn file(path: &Path) -> Source {
        source(SourceKind::File(path.to_owned()), UsernameSource::InSecret)
    }

    fn exec(command: ExecSource, refresh: Duration) -> Source {
        source(SourceKind::Exec { command, refresh }, UsernameSource::InSecret)
    }

    /// Credentials of these sources, as a start reads them.
    fn credentials(sources: Vec<(&str, Source)>) -> Credentials {
        let arena = Arena::map(BackendChoice::Auto, 64 * 1024).unwrap();
        let commands = sources.iter().filter_map(|(_, source)| source.command().cloned());
        let keeper = Keeper::on_a_thread(commands.collect());
        let sources = sources.into_iter().map(|(text, source)| (name(text), Arc::new(source)));
        Credentials::of_sources(&sources.collect(), &arena, &keeper).unwrap()
    }

    fn password(credentials: &Credentials, connection: &str) -> Option<Vec<u8>> {
        let credential = credentials.of(&name(connection))?;
        Some(credential.secret().expose(<[u8]>::to_vec))
    }

    #[test]
    fn debug_shows_neither_user_nor_password() {
        let arena = Arena::map(BackendChoice::Auto, 64 * 1024).unwrap();
        let credential = Credential::new("app".into(), slot(&arena, b"canary"));
        assert_eq!(format!("{credential:?}"), "[REDACTED]");
        assert_eq!(format!("{:?}", material(&arena, "app", b"canary")), "[REDACTED]");
    }

    #[test]
    fn versions_go_up_and_are_never_used_again() {
        let store = || source(SourceKind::Store, UsernameSource::InSecret);
        let credentials = credentials(vec![("a", store()), ("b", store())]);
        let arena = credentials.shared.arena.clone();
        let put = |connection: &str, password: &[u8]| {
            let labels = BTreeMap::from([("from".to_owned(), "test".to_owned())]);
            let secret = slot(&arena, password);
            credentials.put(
                &name(connection),
                Material { username: "app".into(), secret, form: SecretForm::Password },
                None,
                labels,
            )
        };
        assert!(credentials.of(&name("a")).is_none() && credentials.describe(&name("a")).is_none());
        assert!(credentials.takes_put(&name("a")) && !credentials.takes_put(&name("c")));
        assert_eq!([put("a", b"1"), put("a", b"2"), put("b", b"1")], [1, 2, 1]);
        let view = credentials.describe(&name("a")).unwrap();
        assert_eq!((view.version, view.persistent, view.labels.len()), (2, false, 1));
        assert!(credentials.delete(&name("a")) && !credentials.delete(&name("a")));
        assert_eq!(put("a", b"2"), 3);
        assert_eq!(password(&credentials, "a").unwrap(), b"2");
    }

    #[test]
    fn only_what_differs_is_another_version() {
        let credentials =
            credentials(vec![("a", source(SourceKind::Store, UsernameSource::InSecret))]);
        let arena = credentials.shared.arena.clone();
        let adopt = |user: &str, word: &[u8]| {
            credentials.state_mut().adopt(&name("a"), material(&arena, user, word))
        };
        assert_eq!(adopt("app", b"one"), Some(1));
        assert_eq!(adopt("app", b"one"), None);
        assert_eq!(adopt("app", b"onf"), Some(2));
        assert_eq!(adopt("app", b"on"), Some(3));
        assert_eq!(adopt("apq", b"on"), Some(4));
        assert_eq!(credentials.state_mut().adopt(&name("b"), material(&arena, "app", b"x")), None);
    }

    #[tokio::test]
    async fn a_source_that_fails_keeps_the_last_good_credential_and_recovers() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("secret");
        fs::write(&path, "app:one").unwrap();
        let credentials = credentials(vec![("a", file(&path))]);
        let a = name("a");
        assert_eq!(credentials.reread(&a).await.unwrap(), None);
        for nonsense in ["", "nocolon", "app:", "app:a\0b"] {
            fs::write(&path, nonsense).unwrap();
            credentials.reread(&a).await.unwrap_err();
            let view = credentials.describe(&a).unwrap();
            assert_eq!(view.version, 1);
            assert!(view.stale_since.is_some() && view.last_problem.is_some(), "{view:?}");
            assert_eq!(password(&credentials, "a").unwrap(), b"one");
        }
        fs::write(&path, "app:two").unwrap();
        assert_eq!(credentials.reread(&a).await.unwrap(), Some(2));
        let view = credentials.describe(&a).unwrap();
        assert_eq!((view.stale_since, view.last_problem), (None, None));
    }

    #[tokio::test]
    async fn many_who_ask_at_once_are_answered_by_one_run() {
        let root = tempfile::tempdir().unwrap();
        let (runs, word) = (root.path().join("runs"), root.path().join("word"));
        fs::write(&word, "one").unwrap();
        let script =
            format!("echo run >>{}; sleep 0.2; echo app:$(cat {})", runs.display(), word.display());
        let source = exec(shell(&script), Duration::from_secs(600));
        let credentials = credentials(vec![("a", source)]);
        fs::write(&word, "two").unwrap();
        let a = name("a");
        let mut asking = tokio::task::JoinSet::new();
        for _ in 0..50 {
            let (credentials, a) = (credentials.clone(), a.clone());
            asking.spawn(async move { credentials.reread(&a).await.unwrap() });
        }
        let answers = asking.join_all().await;
        assert!(answers.iter().all(|version| *version == Some(2)), "{answers:?}");
        let runs = fs::read_to_string(&runs).unwrap().lines().count();
        assert!((2..=3).contains(&runs), "{runs} runs, one of them at the start");
    }

    #[tokio::test]
    async fn a_broken_program_says_how_and_nothing_of_what_it_said() {
        let scripts = [
            ("echo app:canary; exit 3", "ended with status 3"),
            ("echo app:canary; kill -9 $$", "was ended by signal 9"),
            ("yes canary", "printed more than 16384 bytes"),
            ("echo canary >&2; exit 1", "ended with status 1"),
            ("echo canary", "username:password"),
        ];
        let root = tempfile::tempdir().unwrap();
        for (script, says) in scripts {
            let flag = root.path().join("broken");
            let _absent = fs::remove_file(&flag);
            let script = format!("[ -e {} ] || exec echo app:good; {script}", flag.display());
            let source = exec(shell(&script), Duration::from_secs(600));
            let credentials = credentials(vec![("a", source)]);
            fs::write(&flag, "").unwrap();
            let error = credentials.reread(&name("a")).await.unwrap_err();
            let told = format!("{error} {error:?} {:?}", credentials.describe(&name("a")));
            assert!(told.contains(says), "{told}");
            assert!(!told.replace(&script, "").contains("canary"), "{told}");
            assert_eq!(password(&credentials, "a").unwrap(), b"good");
        }
    }

    #[tokio::test]
    async fn files_are_watched_and_programs_asked_again() {
        let root = tempfile::tempdir().unwrap();
        let (path, word) = (root.path().join("secret"), root.path().join("word"));
        fs::write(&path, "app:one").unwrap();
        fs::write(&word, "app:one").unwrap();
        let command = shell(&format!("cat {}", word.display()));
        let credentials = credentials(vec![
            ("exec", exec(command, Duration::from_secs(1))),
            ("file", file(&path)),
        ]);
        let stopped = CancellationToken::new();
        let (told, mut news) = mpsc::unbounded_channel();
        let refresh =
            credentials.clone().run_refresh(stopped.clone(), move |connection, version| {
                told.send((connection.to_string(), version)).unwrap();
            });
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(refresh);
        let changed = Instant::now();
        fs::write(root.path().join("new"), "app:two").unwrap();
        fs::rename(root.path().join("new"), &path).unwrap();
        fs::write(&word, "app:two").unwrap();
        let mut heard = vec![news.recv().await.unwrap(), news.recv().await.unwrap()];
        heard.sort();
        assert_eq!(heard, [("exec".to_owned(), 2), ("file".to_owned(), 2)]);
        assert!(changed.elapsed() < Duration::from_secs(10), "{:?}", changed.elapsed());
        assert_eq!(password(&credentials, "file").unwrap(), b"two");
        stopped.cancel();
        assert!(tasks.join_next().await.unwrap().is_ok());
    }

    #[tokio::test]
    async fn a_reload_keeps_what_stays_and_is_refused_what_needs_a_restart() {
        let root = tempfile::tempdir().unwrap();
        let at = |file: &str| root.path().join(file);
        for file in ["a", "b"] {
            fs::write(at(file), format!("app:{file}")).unwrap();
        }
        let command = shell("echo app:x");
        let credentials = credentials(vec![
            ("gone", file(&at("a"))),
            ("moved", file(&at("a"))),
            ("same", file(&at("a"))),
            ("program", exec(command.clone(), Duration::from_secs(600))),
            ("put", source(SourceKind::Store, UsernameSource::InSecret)),
        ]);
        let secret = slot(&credentials.shared.arena, b"put");
        let put = Material { username: "app".into(), secret, form: SecretForm::Password };
        credentials.put(&name("put"), put, None, BTreeMap::new());
        let sources = |more: Vec<(&str, Source)>| {
            let more = more.into_iter().map(|(text, source)| (name(text), Arc::new(source)));
            more.collect::<BTreeMap<_, _>>()
        };
        let usual = |moved: &str| {
            vec![
                ("moved", file(&at(moved))),
                ("same", file(&at("a"))),
                ("new", file(&at("b"))),
                // Asked more often: that needs no restart.
                ("program", exec(command.clone(), Duration::from_secs(1))),
                ("put", source(SourceKind::Store, UsernameSource::InSecret)),
            ]
        };
        let refusals = [
            (exec(shell("id"), Duration::from_secs(600)), "programs are settled at the start"),
            (source(SourceKind::Env("HOME".into()), UsernameSource::InSecret), "environment"),
            (file(Path::new("/etc/hostname")), "sandbox"),
            (file(&at("absent")), "absent"),
        ];
        for (bad, says) in refusals {
            let mut all = usual("b");
            all.push(("zzz", bad));
            let error = credentials.prepare_sources(&sources(all)).await.unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
        }
        assert_eq!(password(&credentials, "moved").unwrap(), b"a", "nothing changed");

        let prepared = credentials.prepare_sources(&sources(usual("b"))).await.unwrap();
        assert!(credentials.of(&name("gone")).is_some(), "nothing changed yet");
        let changed = credentials.commit(prepared);
        assert_eq!(changed, [(name("moved"), 2), (name("new"), 1)]);
        assert!(credentials.of(&name("gone")).is_none());
        for (connection, version) in [("same", 1), ("program", 1), ("put", 1), ("moved", 2)] {
            assert_eq!(
                credentials.of(&name(connection)).unwrap().version(),
                version,
                "{connection}"
            );
        }
        let prepared = credentials.prepare_sources(&sources(usual("a"))).await.unwrap();
        assert_eq!(credentials.commit(prepared), [(name("moved"), 3)]);
    }
}
