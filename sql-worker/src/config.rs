//! The configuration file: read once, refused whole when anything in it is wrong.
//!
//! Invariant: a [`Config`] is in range everywhere. All of it is optional, and so is the file.

mod connection;
mod raw;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use self::connection::Connection;
use self::raw::{Raw, RawLevel, Span};
use crate::app::Name;
use crate::sql::{Access, Limits, Policy, PoolSettings};

/// What the worker runs with.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the broker's sockets are, if not where the client library looks.
    pub runtime_dir: Option<PathBuf>,
    /// Bounds of one statement; a call may ask for its own `max_rows`.
    pub limits: Limits,
    /// Sessions of one handle.
    pub pool: PoolSettings,
    /// Statements at once, over all handles.
    pub concurrency: usize,
    /// Calls a second of one principal, in the long run; twice as many at once.
    pub calls_per_second: u32,
    /// Who may use `--http`, and where the bearer token of each is.
    pub bearers: BTreeMap<Name, PathBuf>,
    /// The group that may connect to the Unix socket that is served, by name or number.
    pub socket_group: Option<String>,
    /// What is logged.
    pub log_level: tracing::Level,
    /// Whether calls may bring passwords; from the command line only.
    pub inline_secrets: InlineSecrets,
    /// Which tools are offered; from the command line.
    pub tools: ToolSet,
    connections: BTreeMap<String, Connection>,
    /// What holds for those that are not named.
    others: Connection,
}

/// A choice of tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum ToolSet {
    /// All of them.
    #[default]
    Full,
    /// What a model needs that only reads and writes rows: the fewest tokens.
    Core,
}

/// Whether passwords are taken as tool arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InlineSecrets {
    /// They are refused.
    #[default]
    Refused,
    /// They pass through the model and through this process.
    Allowed,
}

/// Why a configuration file was refused.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", file.display())]
pub struct ConfigError {
    file: PathBuf,
    problem: String,
}

impl Default for Config {
    fn default() -> Self {
        let raw = Raw::default();
        Self {
            limits: raw.limits.limits(),
            pool: pool(raw.limits.pool_timeout),
            concurrency: raw.limits.concurrency,
            calls_per_second: raw.limits.calls_per_second,
            bearers: BTreeMap::new(),
            socket_group: None,
            runtime_dir: None,
            log_level: tracing::Level::INFO,
            inline_secrets: InlineSecrets::default(),
            tools: ToolSet::default(),
            connections: BTreeMap::new(),
            others: Connection { policy: Arc::default(), limits: raw.limits.limits() },
        }
    }
}

impl Config {
    /// Reads `file`.
    ///
    /// # Errors
    /// When it cannot be read, when others can write it, and when anything in it is unknown
    /// or out of range; the text names the file and the key or line.
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        let error = |problem: String| ConfigError { file: file.to_owned(), problem };
        let mut opened = File::open(file).map_err(|cause| error(cause.to_string()))?;
        // Of the open file, so that nobody can swap it in between.
        let metadata = opened.metadata().map_err(|cause| error(cause.to_string()))?;
        let own = rustix::process::geteuid().as_raw();
        if metadata.mode() & 0o022 != 0 || (metadata.uid() != 0 && metadata.uid() != own) {
            let problem = "others can write it: it must belong to root or to this user, mode 0644";
            return Err(error(problem.to_owned()));
        }
        let mut text = String::new();
        opened.read_to_string(&mut text).map_err(|cause| error(cause.to_string()))?;
        Self::parse(&text).map_err(error)
    }

    /// Parses the text of a configuration file; pure.
    ///
    /// # Errors
    /// A text that says which key or line is wrong, and what is wanted.
    pub fn parse(text: &str) -> Result<Self, String> {
        let raw: Raw = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            let line = text.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1;
            format!("line {line}: {}", error.message())
        })?;
        Self::from_raw(&raw)
    }

    /// What is configured for the connection `name`.
    #[must_use]
    pub fn connection(&self, name: &str) -> &Connection {
        self.connections.get(name).unwrap_or(&self.others)
    }

    /// Whether any connection is read-write, named or not.
    #[must_use]
    pub fn may_write(&self) -> bool {
        let mut all = self.connections.values().chain([&self.others]);
        all.any(|connection| connection.policy.access == Access::ReadWrite)
    }

    fn from_raw(raw: &Raw) -> Result<Self, String> {
        let limits = raw.limits.check()?;
        let bearers = raw.http.check()?;
        let access = raw.defaults.access;
        let mut connections = BTreeMap::new();
        for (name, connection) in &raw.connections {
            connections.insert(name.clone(), Connection::parse(name, connection, access, limits)?);
        }
        let policy = Policy { access: access.into(), ..Policy::default() };
        Ok(Self {
            runtime_dir: raw.runtime_dir.clone(),
            limits,
            pool: pool(raw.limits.pool_timeout),
            concurrency: raw.limits.concurrency,
            calls_per_second: raw.limits.calls_per_second,
            bearers,
            socket_group: raw.unix.group.clone(),
            inline_secrets: InlineSecrets::default(),
            tools: ToolSet::default(),
            log_level: match raw.log.level {
                RawLevel::Error => tracing::Level::ERROR,
                RawLevel::Warn => tracing::Level::WARN,
                RawLevel::Info => tracing::Level::INFO,
                RawLevel::Debug => tracing::Level::DEBUG,
            },
            connections,
            others: Connection { policy: Arc::new(policy), limits },
        })
    }
}

fn pool(wait: Span) -> PoolSettings {
    PoolSettings { size: 4, wait: wait.0, idle: Duration::from_secs(60) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::sql::Role;

    #[test]
    fn everything_has_a_default() {
        let config = Config::parse("").unwrap();
        assert_eq!(config.limits.max_rows, 1000);
        assert_eq!(config.limits.max_bytes, 1 << 20);
        assert_eq!(config.limits.statement_timeout, Duration::from_secs(30));
        assert_eq!(config.runtime_dir, None);
    }

    #[test]
    fn everything_can_be_set() {
        let config = Config::parse(
            "runtime_dir = \"/run/x\"\n[limits]\nmax_rows = 5\nmax_bytes = \"2MiB\"\n\
             max_cell_bytes = 100\nstatement_timeout = \"1m\"\npool_timeout = \"250ms\"\n\
             concurrency = 2\ncalls_per_second = 7\n[unix]\ngroup = \"app\"\n\
             [http.bearers]\nalice = \"/etc/alice\"\n[log]\nlevel = \"debug\"\n",
        )
        .unwrap();
        assert_eq!(config.runtime_dir.as_deref(), Some(Path::new("/run/x")));
        assert_eq!((config.limits.max_rows, config.limits.max_bytes), (5, 2 << 20));
        assert_eq!(config.limits.max_cell_bytes, 100);
        assert_eq!(config.limits.statement_timeout, Duration::from_secs(60));
        assert_eq!(config.pool.wait, Duration::from_millis(250));
        assert_eq!((config.concurrency, config.log_level), (2, tracing::Level::DEBUG));
        assert_eq!((config.calls_per_second, config.socket_group.as_deref()), (7, Some("app")));
        let bearers: Vec<_> = config.bearers.iter().map(|(n, f)| (n.as_str(), f)).collect();
        assert_eq!(bearers, [("alice", &PathBuf::from("/etc/alice"))]);
    }

    /// Every key of `deploy/worker.toml` is known, and every known key is in it.
    #[test]
    fn the_example_has_every_key() {
        let text = include_str!("../../deploy/worker.toml");
        let config = Config::parse(text).unwrap();
        assert_eq!(config.limits, Config::default().limits);
        assert_eq!(config.connection("reports").policy.access, Access::ReadWrite);
        let read: toml::Table = text.parse().unwrap();
        let tables = [
            "",
            "limits",
            "unix",
            "http",
            "log",
            "defaults",
            "connections.main_db",
            "connections.main_db.limits",
        ];
        for table in tables {
            let header = if table.is_empty() { String::new() } else { format!("[{table}]\n") };
            // The refusal of an unknown key names those that are known.
            let refusal = Config::parse(&format!("{header}nobody = 1\n")).unwrap_err();
            let (_, known) = refusal.split_once("expected").unwrap();
            let mut known: Vec<&str> = known.split('`').skip(1).step_by(2).collect();
            known.sort_unstable();
            let names = table.split('.').filter(|name| !name.is_empty());
            let found = names.fold(&read, |table, name| table[name].as_table().unwrap());
            let mut found: Vec<&str> = found.keys().map(String::as_str).collect();
            found.sort_unstable();
            assert_eq!(found, known, "[{table}]");
        }
    }

    #[test]
    fn a_connection_is_read_only_unless_it_is_said_otherwise() {
        let config = Config::parse(
            "[connections.app]\naccess = \"read-write\"\nallow_roles = [\"replication\"]\n\
             [connections.app.limits]\nmax_rows = 5\n",
        )
        .unwrap();
        let app = config.connection("app");
        assert_eq!(app.policy.access, Access::ReadWrite);
        assert!(app.policy.allow_roles.contains(&Role::Replication));
        assert_eq!((app.limits.max_rows, app.limits.max_bytes), (5, 1 << 20));
        let other = config.connection("other");
        assert_eq!((other.policy.access, other.limits.max_rows), (Access::ReadOnly, 1000));
        assert_eq!(Config::default().connection("app").policy.access, Access::ReadOnly);

        let config = Config::parse(
            "[defaults]\naccess = \"read-write\"\n[connections.a]\naccess = \"read-only\"\n\
             [connections.b]\n",
        )
        .unwrap();
        let access = |name| config.connection(name).policy.access;
        assert_eq!(access("a"), Access::ReadOnly);
        assert_eq!((access("b"), access("c")), (Access::ReadWrite, Access::ReadWrite));
    }

    #[test]
    fn faults_name_the_key_or_the_line() {
        let cases = [
            ("[limits]\nmax_rows = 0", "limits.max_rows: 0 is not between 1 and 50000"),
            ("[limits]\nmax_rows = 50001", "limits.max_rows: 50001 is not between 1 and 50000"),
            (
                "[limits]\nstatement_timeout = \"2h\"",
                "limits.statement_timeout: it must be between 10ms and 1h",
            ),
            ("\nrunime_dir = \"x\"", "line 2: unknown field `runime_dir`"),
            ("[limits]\nmax_bytes = \"1GB\"", "line 2: invalid value: string \"1GB\""),
            ("[log]\nlevel = \"trace\"", "line 2: unknown variant `trace`"),
            ("[limits]\npool_timeout = \"soon\"", "line 2: expected number at 0"),
            (
                "[limits]\ncalls_per_second = 0",
                "limits.calls_per_second: it must be between 1 and 100000",
            ),
            ("[http]\nbearers = { \"a b\" = \"/x\" }", "http.bearers: a name is 1 to 64"),
            ("[http]\nbearers = { a = \"x\" }", "http.bearers.a: the path must be absolute"),
            ("[defaults]\naccess = \"all\"", "line 2: unknown variant `all`"),
            ("[connections.a]\nhost = \"x\"", "line 2: unknown field `host`"),
            (
                "[connections.a.limits]\nmax_rows = 0",
                "connections.a.limits.max_rows: 0 is not between 1 and 50000",
            ),
            (
                "[connections.a]\nallow_roles = [\"postgres\"]",
                "connections.a.allow_roles: \"postgres\" is not one of superuser, \
                 pg_execute_server_program, pg_read_server_files, pg_write_server_files, \
                 replication, createrole",
            ),
        ];
        for (text, message) in cases {
            let error = Config::parse(text).unwrap_err();
            assert!(error.starts_with(message), "{error}");
        }
    }

    #[test]
    fn a_file_that_others_can_write_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("worker.toml");
        std::fs::write(&file, "[limits]\nmax_rows = 7\n").unwrap();
        for (mode, accepted) in [(0o644, true), (0o600, true), (0o664, false), (0o646, false)] {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(Config::load(&file).is_ok(), accepted, "{mode:o}");
        }
        let missing = Config::load(&directory.path().join("none")).unwrap_err();
        assert!(missing.to_string().contains("none: No such file"), "{missing}");
    }
}
