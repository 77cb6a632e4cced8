//! Configuration: everything is read and parsed before anything is made. What a [`Config`] holds
//! cannot be wrong any more.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use self::error::ConfigError;
use crate::arena::{Arena, BackendChoice};
use crate::audit::Durability;
use crate::connection::{Connection, ConnectionName, Tls};
use crate::harden;
use crate::peer::{Gid, Uid, program_can_be_known, unit_can_be_known};
use crate::policy::{Policy, Rule, Selector};
use crate::source::{ExecSource, Source, SourceError};
use crate::upstream::tls::ClientCertificate;

mod client_certificate;
mod connections;
mod error;
mod file;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod grants;
mod hosts;
mod login;
mod merge;
mod parse;
mod raw;
mod show;

/// The whole configuration.
#[derive(Debug)]
pub struct Config {
    pub(crate) file: PathBuf,
    pub(crate) runtime_dir: PathBuf,
    pub(crate) admin_dir: PathBuf,
    pub(crate) state_dir: PathBuf,
    pub(crate) socket_group: Option<Gid>,
    pub(crate) drain: Duration,
    pub(crate) allow_own_uid: bool,
    pub(crate) arena: ArenaConfig,
    pub(crate) audit: AuditConfig,
    pub(crate) handles: HandleLimits,
    pub(crate) limits: Limits,
    /// Absent when there is nobody to listen to.
    pub(crate) metrics: Option<MetricsListen>,
    pub(crate) connections: BTreeMap<ConnectionName, ConfiguredConnection>,
    connections_file: Option<PathBuf>,
    rules: Vec<Rule>,
    operators: Vec<Selector>,
}

/// `[arena]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ArenaConfig {
    pub(crate) backend: BackendChoice,
    pub(crate) capacity: usize,
}

/// `[audit]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AuditConfig {
    /// Absent when `sinks` names no file.
    pub(crate) file: Option<PathBuf>,
    pub(crate) stdout: bool,
    pub(crate) durability: Durability,
    /// Bytes of a file after which a new one is begun.
    pub(crate) max_size: u64,
    /// How many full files are kept beside the one that is written.
    pub(crate) keep: u32,
    pub(crate) signing_key: Option<SigningKey>,
}

/// A key that signs: `audit.signing_key`, and `tls.key` of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SigningKey {
    File(PathBuf),
    /// A credential of the service manager (systemd.exec(5), LoadCredential=).
    Systemd {
        name: String,
        path: PathBuf,
    },
}

impl SigningKey {
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::File(path) | Self::Systemd { path, .. } => path,
        }
    }
}

/// `[handles]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HandleLimits {
    pub(crate) default_ttl: Duration,
    pub(crate) max_ttl: Duration,
    pub(crate) max_lifetime: Duration,
}

/// `[limits]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) sessions: usize,
    pub(crate) rate_per_second: u32,
    pub(crate) queue_timeout: Duration,
    pub(crate) handles: usize,
}

/// What a process is made of when it starts, and no reload can change.
#[derive(Debug)]
pub(crate) struct Fixed {
    runtime_dir: PathBuf,
    admin_dir: PathBuf,
    state_dir: PathBuf,
    socket_group: Option<Gid>,
    allow_own_uid: bool,
    arena: ArenaConfig,
    audit: AuditConfig,
    metrics: Option<MetricsListen>,
}

impl Fixed {
    /// The first key that is not the same in `new`.
    pub(crate) fn differs(&self, new: &Self) -> Option<&'static str> {
        let checks = [
            ("broker.runtime_dir", self.runtime_dir == new.runtime_dir),
            ("broker.admin_dir", self.admin_dir == new.admin_dir),
            ("broker.state_dir", self.state_dir == new.state_dir),
            ("broker.socket_group", self.socket_group == new.socket_group),
            ("broker.allow_own_uid", self.allow_own_uid == new.allow_own_uid),
            ("[arena]", self.arena == new.arena),
            ("[audit]", self.audit == new.audit),
            ("[metrics]", self.metrics == new.metrics),
        ];
        checks.into_iter().find(|(_, same)| !same).map(|(key, _)| key)
    }
}

/// `metrics.listen`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MetricsListen {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl fmt::Display for MetricsListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A connection and where its credential comes from.
#[derive(Debug)]
pub(crate) struct ConfiguredConnection {
    pub(crate) connection: Arc<Connection>,
    pub(crate) source: Arc<Source>,
}

/// Where things are when nobody says otherwise: the machine's places for root and for service
/// users, the user's own for an ordinary user who gives no file.
#[derive(Clone, Debug)]
pub struct Places {
    /// The configuration file.
    pub config: PathBuf,
    pub(crate) runtime_dir: PathBuf,
    state_dir: PathBuf,
    user_mode: bool,
}

impl Places {
    /// `config` is what `--config` says.
    #[must_use]
    pub fn find(config: Option<PathBuf>) -> Self {
        let xdg = |variable: &str, below_home: &str| {
            let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(below_home));
            std::env::var_os(variable)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
                .or_else(home)
        };
        let user_mode = config.is_none() && Uid::own().as_raw() != 0;
        if user_mode
            && let (Some(config), Some(runtime), Some(state)) = (
                xdg("XDG_CONFIG_HOME", ".config"),
                xdg("XDG_RUNTIME_DIR", ".cache"),
                xdg("XDG_STATE_HOME", ".local/state"),
            )
        {
            return Self {
                config: config.join("credbroker/broker.toml"),
                runtime_dir: runtime.join("credbroker"),
                state_dir: state.join("credbroker"),
                user_mode,
            };
        }
        Self {
            config: config.unwrap_or_else(|| PathBuf::from("/etc/credbroker/broker.toml")),
            runtime_dir: PathBuf::from(credbroker_proto::DEFAULT_RUNTIME_DIR),
            state_dir: PathBuf::from("/var/lib/credbroker"),
            user_mode: false,
        }
    }
}

impl Config {
    /// Reads and parses the file at `places.config`, those of `conf.d` beside it, and what they
    /// refer to.
    ///
    /// # Errors
    /// The first thing that is wrong, in one line.
    pub fn load(places: &Places) -> Result<Self, ConfigError> {
        let written = file::read_all(&places.config)?;
        parse::config(merge::merge(&places.config, written)?, places)
    }

    /// The same for a text, as if it stood at `places.config` and there were no `conf.d`. What
    /// the text names is still looked up: users, groups, programs, `ca_file`, `connections_file`.
    ///
    /// # Errors
    /// The first thing that is wrong, in one line.
    pub fn parse(text: &str, places: &Places) -> Result<Self, ConfigError> {
        let written = file::parse_toml(text, &places.config)?;
        parse::config(merge::merge(&places.config, vec![written])?, places)
    }

    /// Whether a selector asks for what stands in other processes' /proc.
    pub(crate) fn reads_proc(&self) -> bool {
        self.selectors().any(|(_, selector)| selector.unit.is_some())
    }

    /// The selectors that can match nobody here, and why: one line each.
    pub(crate) fn unreadable(&self) -> Vec<String> {
        let landlocked = harden::landlock_is_available();
        let mut lines = Vec::new();
        for (of, selector) in self.selectors() {
            if let Some(exe) = &selector.exe
                && let Err(why) = program_can_be_known(selector.uid, landlocked)
            {
                lines.push(format!(
                    "{of}: exe {exe} cannot be evaluated, so it matches nobody: {why}"
                ));
            }
            if let Some(unit) = &selector.unit
                && let Err(why) = unit_can_be_known()
            {
                lines.push(format!(
                    "{of}: unit {unit} cannot be evaluated, so it matches nobody: {why}"
                ));
            }
        }
        lines
    }

    fn selectors(&self) -> impl Iterator<Item = (String, &Selector)> {
        let rules = self.rules.iter().flat_map(|rule| {
            let redeemers = rule.redeemers.iter();
            let redeemers = redeemers
                .map(|selector| (format!("redeemers of the grant {}", rule.name), selector));
            [(format!("grant {}", rule.name), &rule.peer)].into_iter().chain(redeemers)
        });
        let operators = self.operators.iter();
        rules.chain(operators.map(|selector| ("broker.operators".to_owned(), selector)))
    }

    /// The effective configuration as TOML, nothing secret in it.
    #[must_use]
    pub fn show(&self) -> String {
        show::toml(self)
    }

    /// Where the gRPC socket is.
    #[must_use]
    pub fn broker_socket(&self) -> PathBuf {
        self.runtime_dir.join(credbroker_proto::BROKER_SOCKET)
    }

    /// The directory of the Postgres door's socket, relative to the runtime directory.
    pub(crate) const POSTGRES_DOOR: &str = "postgres";

    pub(crate) fn postgres_socket(&self) -> PathBuf {
        self.runtime_dir.join(Self::POSTGRES_DOOR).join(".s.PGSQL.5432")
    }

    pub(crate) fn packet_socket(&self) -> PathBuf {
        self.runtime_dir.join(credbroker_proto::PACKET_SOCKET)
    }

    pub(crate) fn admin_socket(&self) -> PathBuf {
        self.admin_dir.join(credbroker_proto::ADMIN_SOCKET)
    }

    pub(crate) fn admin_packet_socket(&self) -> PathBuf {
        self.admin_dir.join(credbroker_proto::ADMIN_PACKET_SOCKET)
    }

    pub(crate) fn fixed(&self) -> Fixed {
        Fixed {
            runtime_dir: self.runtime_dir.clone(),
            admin_dir: self.admin_dir.clone(),
            state_dir: self.state_dir.clone(),
            socket_group: self.socket_group,
            allow_own_uid: self.allow_own_uid,
            arena: self.arena.clone(),
            audit: self.audit.clone(),
            metrics: self.metrics.clone(),
        }
    }

    /// Takes the grants out.
    pub(crate) fn take_policy(&mut self) -> Policy {
        let denied_own = (!self.allow_own_uid).then(Uid::own);
        Policy::new(
            std::mem::take(&mut self.rules),
            std::mem::take(&mut self.operators),
            denied_own,
        )
    }

    /// Directories that the sandbox must let the broker read, also when what is in them is
    /// replaced.
    pub(crate) fn secret_directories(&self) -> impl Iterator<Item = PathBuf> {
        self.connections.values().flat_map(|configured| configured.source.directories())
    }

    /// Reads the keys of client certificates into the arena; before it nobody may be dialled by
    /// this configuration. Blocks.
    ///
    /// # Errors
    /// The first that cannot be read, or is not its certificate's.
    pub(crate) fn load_client_keys(&self, arena: &Arena) -> Result<(), SourceError> {
        self.client_certificates().try_for_each(|client| client.load_key(arena))
    }

    fn client_certificates(&self) -> impl Iterator<Item = &ClientCertificate> {
        self.connections.values().filter_map(|configured| match &configured.connection.tls {
            Tls::Required { client, .. } => client.as_deref(),
            Tls::Disable | Tls::Optional { .. } => None,
        })
    }

    /// Directories of other files that a reload reads again: the roots that `tls.ca_file` names,
    /// client certificates and their keys, and `connections_file`.
    pub(crate) fn referred_directories(&self) -> impl Iterator<Item = PathBuf> {
        let roots = self.connections.values().filter_map(|configured| {
            let Tls::Required { ca_file, .. } = &configured.connection.tls else { return None };
            ca_file.as_deref()
        });
        let files = roots.chain(self.connections_file.as_deref());
        let files = files.filter_map(Path::parent).map(Path::to_owned);
        let clients = self.client_certificates().flat_map(ClientCertificate::directories);
        files.chain(clients).collect::<Vec<_>>().into_iter()
    }

    /// The programs that the keeper must know, each once.
    pub(crate) fn commands(&self) -> Vec<ExecSource> {
        let mut commands: Vec<ExecSource> = Vec::new();
        for command in self.connections.values().filter_map(|one| one.source.command()) {
            if !commands.contains(command) {
                commands.push(command.clone());
            }
        }
        commands
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use std::path::Path;

    use super::*;
    use crate::connection::ConnectionName;
    use crate::peer::Peer;
    use crate::policy::{Action, Decision};

    const MAIN: &str = r#"
        [connections.main_db]
        type = "postgresql"
        host = "localhost"
        database = "mydb"
        secret = { file = "/secret" }
        tls = { mode = "disable" }
    "#;
    const GRANT: &str = r#"
        [[grants]]
        peer = { uid = 10 }
        connections = ["main_db"]
        may = ["open"]
    "#;

    /// A `broker.toml` and its `conf.d`, which nobody else can write to.
    struct Etc(tempfile::TempDir);

    impl Etc {
        fn new(main: &str) -> Self {
            let etc = Self(tempfile::tempdir().unwrap());
            fs::create_dir(etc.path("conf.d")).unwrap();
            fs::set_permissions(etc.path("conf.d"), fs::Permissions::from_mode(0o755)).unwrap();
            etc.with("broker.toml", main)
        }

        fn with(self, name: &str, text: &str) -> Self {
            fs::write(self.path(name), text).unwrap();
            self.mode(name, 0o644)
        }

        fn mode(self, name: &str, mode: u32) -> Self {
            fs::set_permissions(self.path(name), fs::Permissions::from_mode(mode)).unwrap();
            self
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn load(&self) -> Result<Config, String> {
            let loaded = Config::load(&Places::find(Some(self.path("broker.toml"))));
            // The directory has another name each time.
            let root = self.0.path().display().to_string();
            loaded.map_err(|error| error.to_string().replace(&root, "ETC"))
        }
    }

    #[test]
    fn grants_and_connections_of_all_files_add_up() {
        let other = MAIN.replace("main_db", "other_db");
        let etc = Etc::new(MAIN)
            .with("conf.d/10-grants.toml", &GRANT.replace("main_db", "other_db"))
            .with("conf.d/20-other.toml", &format!("{other}\n[limits]\nsessions = 3\n"))
            .with("conf.d/30-grants.toml", GRANT)
            .with("conf.d/.hidden.toml", "nonsense")
            .with("conf.d/README", "nonsense");
        let mut config = etc.load().unwrap();
        assert_eq!(config.limits.sessions, 3);
        assert_eq!(config.connections.len(), 2);
        let policy = config.take_policy();
        let grant = |name: &str| {
            let (peer, name) =
                (Peer::dangerous_for_test(10, 10, &[]), ConnectionName::parse(name).unwrap());
            match policy.decide(&peer, Action::Open, &name) {
                Decision::Allow(grant) => grant.rule().to_owned(),
                Decision::Deny(denial) => panic!("{denial:?}"),
            }
        };
        assert_eq!(grant("other_db"), "10-grants.toml:grants[0]");
        assert_eq!(grant("main_db"), "30-grants.toml:grants[0]");
    }

    #[test]
    fn a_fault_names_the_file_that_it_is_in() {
        let bad_grant = GRANT.replace("main_db", "no_db");
        let cases = [
            (
                "a.toml",
                MAIN,
                "ETC/conf.d/a.toml: connections.main_db: is also in ETC/broker.toml: keep one of them",
            ),
            (
                "a.toml",
                "\n[limits]\nsessions = 0\n",
                "ETC/conf.d/a.toml: limits.sessions: must be at least 1",
            ),
            (
                "a.toml",
                "\n\n[limit]\n",
                "ETC/conf.d/a.toml:3: limit: unknown field `limit`, expected one of `config_version`, `broker`, `arena`, `audit`, `handles`, `limits`, `metrics`, `connections`, `grants`",
            ),
            ("a.toml", "nonsense\n", "ETC/conf.d/a.toml:1: key with no value, expected `=`"),
            (
                "a.toml",
                &bad_grant,
                "ETC/conf.d/a.toml: grants[0].connections: there is no connection \"no_db\": add [connections.no_db], or correct it",
            ),
            (
                "a.toml",
                "config_version = 3",
                "ETC/conf.d/a.toml: config_version: is 3 and this broker reads version 1",
            ),
            (
                "a.toml",
                "[broker]\nconnections_file = \"none.json\"",
                "ETC/conf.d/none.json: cannot read the configuration: No such file or directory (os error 2)",
            ),
        ];
        for (name, text, expected) in cases {
            let etc = Etc::new(MAIN).with(&format!("conf.d/{name}"), text);
            assert_eq!(etc.load().unwrap_err(), expected);
        }
        let twice = Etc::new("[limits]\n")
            .with("conf.d/b.toml", "[handles]\n")
            .with("conf.d/a.toml", "[handles]\n");
        assert_eq!(
            twice.load().unwrap_err(),
            "ETC/conf.d/b.toml: handles: is also in ETC/conf.d/a.toml: keep it in one of them"
        );
    }

    #[test]
    fn who_can_write_to_conf_d_writes_the_configuration() {
        let etc = || Etc::new(MAIN).with("conf.d/a.toml", GRANT);
        assert!(etc().load().is_ok());
        assert_eq!(
            etc().mode("conf.d", 0o777).load().unwrap_err(),
            "ETC/conf.d: others can write to it (mode 0777): chmod go-w it"
        );
        assert_eq!(
            etc().mode("conf.d/a.toml", 0o666).load().unwrap_err(),
            "ETC/conf.d/a.toml: others can write to it (mode 0666): chmod go-w it"
        );
        let no_file = etc();
        fs::create_dir(no_file.path("conf.d/b.toml")).unwrap();
        assert_eq!(no_file.load().unwrap_err(), "ETC/conf.d/b.toml: is not a regular file");
        let dangling = etc();
        symlink(Path::new("/no/such/file"), dangling.path("conf.d/b.toml")).unwrap();
        assert!(dangling.load().unwrap_err().starts_with("ETC/conf.d/b.toml: cannot read"));
        let no_directory = etc();
        fs::remove_dir_all(no_directory.path("conf.d")).unwrap();
        assert!(no_directory.load().is_ok());
        let no_directory = no_directory.with("conf.d", "");
        assert_eq!(no_directory.load().unwrap_err(), "ETC/conf.d: is not a directory");
    }

    #[test]
    fn conf_d_has_a_bound() {
        let mut etc = Etc::new(MAIN);
        for number in 0..256 {
            etc = etc.with(&format!("conf.d/{number}.toml"), "");
        }
        assert!(etc.load().is_ok());
        let etc = etc.with("conf.d/one-more.toml", "");
        assert_eq!(etc.load().unwrap_err(), "ETC/conf.d: has more than 256 files");
    }

    #[test]
    fn what_is_shown_can_be_read_again() {
        let text = format!(
            "{MAIN}{}",
            GRANT.replace("uid = 10", r#"uid = 10, exe = "/bin/sh", unit = "app.service""#)
        );
        let places = Places::find(Some("/etc/credbroker/broker.toml".into()));
        if crate::peer::pidfd_is_available() {
            let shown = Config::parse(&text, &places).unwrap().show();
            assert!(
                shown.starts_with("# warning: grant grants[0]: exe /bin/sh cannot be evaluated, so it matches nobody: "),
                "{shown}"
            );
            assert_eq!(Config::parse(&shown, &places).unwrap().show(), shown);
        }
    }
}
