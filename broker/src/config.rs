//! Configuration: everything is read and parsed before anything is made. What a [`Config`] holds
//! cannot be wrong any more.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use self::error::ConfigError;
use crate::arena::BackendChoice;
use crate::audit::Durability;
use crate::connection::{Connection, ConnectionName};
use crate::peer::{Gid, Uid};
use crate::policy::{Policy, Rule, Selector};
use crate::source::Source;

mod connections;
mod error;
mod file;
mod grants;
mod parse;
mod raw;
mod show;

/// The whole configuration.
#[derive(Debug)]
pub struct Config {
    pub(crate) file: PathBuf,
    pub(crate) runtime_dir: PathBuf,
    pub(crate) state_dir: PathBuf,
    pub(crate) socket_group: Option<Gid>,
    pub(crate) drain: Duration,
    pub(crate) allow_own_uid: bool,
    pub(crate) arena: ArenaConfig,
    pub(crate) audit: AuditConfig,
    pub(crate) handles: HandleLimits,
    pub(crate) limits: Limits,
    pub(crate) connections: BTreeMap<ConnectionName, ConfiguredConnection>,
    rules: Vec<Rule>,
    operators: Vec<Selector>,
}

/// `[arena]`.
#[derive(Debug)]
pub(crate) struct ArenaConfig {
    pub(crate) backend: BackendChoice,
    pub(crate) capacity: usize,
}

/// `[audit]`.
#[derive(Debug)]
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

/// The key `audit.signing_key`.
#[derive(Debug)]
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
#[derive(Clone, Copy, Debug)]
pub(crate) struct HandleLimits {
    pub(crate) default_ttl: Duration,
    pub(crate) max_ttl: Duration,
    pub(crate) max_lifetime: Duration,
}

/// `[limits]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) sessions: usize,
    pub(crate) rate_per_second: u32,
    pub(crate) queue_timeout: Duration,
    pub(crate) handles: usize,
}

/// A connection and where its credential comes from.
#[derive(Debug)]
pub(crate) struct ConfiguredConnection {
    pub(crate) connection: Arc<Connection>,
    pub(crate) source: Source,
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
    /// Reads and parses the file at `places.config` and what it refers to.
    ///
    /// # Errors
    /// The first thing that is wrong, in one line.
    pub fn load(places: &Places) -> Result<Self, ConfigError> {
        let raw = file::read_toml(&places.config)?;
        parse::config(raw, places)
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

    /// Takes the grants out.
    pub(crate) fn take_policy(&mut self) -> Policy {
        let denied_own = (!self.allow_own_uid).then(Uid::own);
        Policy::new(
            std::mem::take(&mut self.rules),
            std::mem::take(&mut self.operators),
            denied_own,
        )
    }

    /// Files that the sandbox must let the broker read.
    pub(crate) fn secret_files(&self) -> impl Iterator<Item = &Path> {
        self.connections.values().filter_map(|configured| configured.source.file())
    }
}
