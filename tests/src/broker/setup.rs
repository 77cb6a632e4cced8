//! The directories and the configuration of a broker that is to be started.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use toml::{Table, Value};

use super::Broker;
use crate::identity::{Identity, SOCKET_GROUP, give, several};
use crate::postgres::Database;
use crate::{binaries, shared};

/// The directories of one broker, and the configuration that is being written for it.
#[derive(Debug)]
pub struct Setup {
    root: TempDir,
    config: Table,
    environment: Vec<(String, String)>,
}

/// How the broker reaches a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// TCP to `localhost` with TLS verify-full and the cluster's CA: how it is meant.
    Tls,
    /// Plain TCP to a port of 127.0.0.1, where a [`crate::proxy::LoginProxy`] listens.
    Plain(u16),
}

/// A grant that is being written.
#[derive(Debug, Clone)]
pub struct Grant(Table);

impl Grant {
    /// A grant for one uid.
    #[must_use]
    pub fn to(identity: &Identity, may: &[&str], connections: &[&str]) -> Self {
        Self(Table::new())
            .with("peer", Table::from_iter([("uid".to_owned(), i64::from(identity.uid()).into())]))
            .with("may", may)
            .with("connections", connections)
    }

    /// Sets any key of the grant.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl IntoToml) -> Self {
        self.0.insert(key.into(), value.into_toml());
        self
    }
}

/// What can stand on the right of an equals sign.
pub trait IntoToml {
    /// The value.
    fn into_toml(self) -> Value;
}

impl IntoToml for &[&str] {
    fn into_toml(self) -> Value {
        Value::Array(self.iter().map(|text| (*text).into()).collect())
    }
}

impl<const N: usize> IntoToml for [&str; N] {
    fn into_toml(self) -> Value {
        self.as_slice().into_toml()
    }
}

macro_rules! into_toml {
    ($($type:ty),+) => {$(
        impl IntoToml for $type {
            fn into_toml(self) -> Value {
                self.into()
            }
        }
    )+};
}

into_toml!(&str, i64, bool, Table, Value);

impl Setup {
    /// Makes the directories: `etc`, `run` and `state` for the broker, `logs` for the test.
    ///
    /// # Panics
    /// When they cannot be made.
    #[must_use]
    #[allow(clippy::new_without_default, reason = "it makes directories, which a default does not")]
    pub fn new() -> Self {
        shared::hold_lease();
        let root = tempfile::Builder::new()
            .prefix(shared::TEMPORARY)
            .tempdir_in(shared::directory())
            .expect("a directory");
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
        for (name, mode) in [("etc", 0o700), ("run", 0o755), ("state", 0o700)] {
            let path = root.path().join(name);
            DirBuilder::new().mode(mode).create(&path).expect("a directory of the broker");
            give(&path, &Identity::broker()).expect("the broker gets its directory");
        }
        DirBuilder::new().mode(0o700).create(root.path().join("logs")).expect("a log directory");
        let setup = Self { root, config: Table::new(), environment: Vec::new() };
        let (run, state) = (setup.path("run/credbroker"), setup.path("state"));
        let setup = setup
            .set("broker.runtime_dir", text(&run))
            .set("broker.state_dir", text(&state))
            .set("broker.drain", "1s")
            .set("audit.path", text(&state.join("audit.jsonl")));
        if several() {
            setup.set("broker.socket_group", i64::from(SOCKET_GROUP))
        } else {
            setup.set("broker.allow_own_uid", true)
        }
    }

    /// A path below the root of this broker's directories.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Sets a key; dots go down: `handles.default_ttl`.
    ///
    /// # Panics
    /// When something other than a table is on the way.
    #[must_use]
    pub fn set(mut self, key: &str, value: impl IntoToml) -> Self {
        let mut table = &mut self.config;
        let (tables, name) = key.rsplit_once('.').unwrap_or(("", key));
        for part in tables.split('.').filter(|part| !part.is_empty()) {
            let entry = table.entry(part).or_insert_with(|| Table::new().into());
            table = entry.as_table_mut().expect("a table is on the way");
        }
        table.insert(name.into(), value.into_toml());
        self
    }

    /// Takes a key away again.
    #[must_use]
    pub fn without(mut self, key: &str) -> Self {
        let (tables, name) = key.rsplit_once('.').unwrap_or(("", key));
        let mut parts = tables.split('.').filter(|part| !part.is_empty());
        let table =
            parts.try_fold(&mut self.config, |table, part| table.get_mut(part)?.as_table_mut());
        let _there = table.and_then(|table| table.remove(name));
        self
    }

    /// Takes a grant away again.
    #[must_use]
    pub fn without_grant(mut self, name: &str) -> Self {
        if let Some(grants) = self.config.get_mut("grants").and_then(Value::as_array_mut) {
            grants.retain(|grant| grant.get("name").and_then(Value::as_str) != Some(name));
        }
        self
    }

    /// Adds a connection to `database`, with its secret in a file that only the broker reads.
    #[must_use]
    pub fn connection(self, name: &str, database: &Database, via: Via) -> Self {
        let secret = self.secret_file(name, &database.secret());
        let key = |key: &str| format!("connections.{name}.{key}");
        let setup = self
            .set(&key("type"), "postgresql")
            .set(&key("database"), database.name())
            .set(&key("secret.file"), text(&secret));
        match via {
            Via::Tls => setup
                .set(&key("host"), "localhost")
                .set(&key("port"), i64::from(database.server().port))
                .set(&key("tls.mode"), "verify-full")
                .set(&key("tls.ca_file"), text(&database.server().ca_file)),
            Via::Plain(port) => setup
                .set(&key("host"), "127.0.0.1")
                .set(&key("port"), i64::from(port))
                .set(&key("tls.mode"), "disable"),
        }
    }

    /// Adds a connection that has no credential of its own.
    #[must_use]
    pub fn bare_connection(self, name: &str, database: &Database) -> Self {
        let key = |key: &str| format!("connections.{name}.{key}");
        self.set(&key("type"), "postgresql")
            .set(&key("database"), database.name())
            .set(&key("host"), "localhost")
            .set(&key("port"), i64::from(database.server().port))
            .set(&key("tls.mode"), "verify-full")
            .set(&key("tls.ca_file"), text(&database.server().ca_file))
    }

    /// Adds a connection whose credential an operator is to put.
    #[must_use]
    pub fn stored_connection(self, name: &str, database: &Database) -> Self {
        self.bare_connection(name, database)
            .set(&format!("connections.{name}.secret.store"), true)
            .set(&format!("connections.{name}.rotation_grace"), "0s")
    }

    /// Adds a grant.
    ///
    /// # Panics
    /// Never.
    #[must_use]
    pub fn grant(mut self, grant: Grant) -> Self {
        let grants = self.config.entry("grants").or_insert_with(|| Value::Array(Vec::new()));
        grants.as_array_mut().expect("grants are a list").push(grant.0.into());
        self
    }

    /// Gives the broker an environment variable.
    #[must_use]
    pub fn environment(mut self, key: &str, value: &str) -> Self {
        self.environment.push((key.into(), value.into()));
        self
    }

    /// Writes a file that only the broker can read, and gives its path.
    ///
    /// # Panics
    /// When it cannot be written.
    #[must_use]
    pub fn secret_file(&self, name: &str, content: &str) -> PathBuf {
        self.broker_file(&format!("etc/{name}.secret"), content)
    }

    /// Writes `name` for the broker, mode 0600.
    ///
    /// # Panics
    /// When it cannot be written.
    #[must_use]
    pub fn broker_file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).expect("a file for the broker");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
        give(&path, &Identity::broker()).expect("the broker gets its file");
        path
    }

    /// Writes `broker.toml` as an editor does: a new file, renamed over the old one.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn replace(&self) {
        let config = toml::to_string(&self.config).expect("a table can be written");
        let fresh = self.broker_file("etc/.broker.toml.new", &config);
        fs::rename(fresh, self.path("etc/broker.toml")).expect("the file can be replaced");
    }

    /// Writes `broker.toml` and gives its path.
    ///
    /// # Panics
    /// When it cannot be written.
    #[must_use]
    pub fn write(&self) -> PathBuf {
        let config = toml::to_string(&self.config).expect("a table can be written");
        self.broker_file("etc/broker.toml", &config)
    }

    /// Writes `broker.toml` again, without its grants.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn without_grants(&self) {
        let mut config = self.config.clone();
        config.remove("grants");
        let text = toml::to_string(&config).expect("a table can be written");
        let _path = self.broker_file("etc/broker.toml", &text);
    }

    /// The daemon's command, under the broker's uid, with this environment.
    #[must_use]
    pub fn command(&self, subcommand: &str) -> Command {
        let mut command =
            Identity::broker().command_with_death_signal(binaries::credbrokerd(), "TERM");
        command.arg(subcommand).arg("--config").arg(self.path("etc/broker.toml"));
        command.envs(self.environment.iter().map(|(key, value)| (key, value)));
        command.env("RUST_BACKTRACE", "1");
        command
    }

    /// Starts the broker and waits until it is ready.
    ///
    /// # Panics
    /// When it does not become ready; the message has what it said.
    #[must_use]
    pub fn start(self) -> Broker {
        let _written = self.write();
        let command = self.command("run");
        self.start_by(command)
    }

    /// Starts the broker by another command than its own, and waits until it is ready.
    ///
    /// # Panics
    /// When it does not become ready.
    #[must_use]
    pub fn start_by(self, mut command: Command) -> Broker {
        Broker::run(self, &mut command)
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("the harness makes its paths of ASCII")
}
