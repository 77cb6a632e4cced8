//! The configuration as it is written: serde's mirror of the file, and nothing decided yet.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

use crate::arena::BackendChoice;
use crate::audit::Durability;
use crate::credential::{ChannelBinding, Method, SecretForm};
use crate::policy::Action;

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Raw {
    pub(super) config_version: Option<u32>,
    pub(super) broker: Broker,
    pub(super) arena: Arena,
    pub(super) audit: Audit,
    pub(super) handles: Handles,
    pub(super) limits: Limits,
    pub(super) metrics: Metrics,
    pub(super) connections: BTreeMap<String, Connection>,
    pub(super) grants: Vec<Grant>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Broker {
    pub(super) runtime_dir: Option<PathBuf>,
    pub(super) admin_dir: Option<PathBuf>,
    pub(super) state_dir: Option<PathBuf>,
    pub(super) socket_group: Option<NameOrId>,
    pub(super) operators: Option<Vec<Selector>>,
    pub(super) drain: Option<String>,
    pub(super) allow_own_uid: Option<bool>,
    pub(super) connections_file: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Arena {
    pub(super) backend: BackendChoice,
    pub(super) capacity: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Audit {
    pub(super) path: Option<PathBuf>,
    pub(super) sinks: Option<Vec<Sink>>,
    pub(super) durability: Durability,
    pub(super) max_size: Option<String>,
    pub(super) keep: Option<u32>,
    pub(super) signing_key: Option<SigningKey>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct SigningKey {
    pub(super) file: Option<PathBuf>,
    pub(super) systemd: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Sink {
    File,
    Stdout,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Handles {
    pub(super) default_ttl: Option<String>,
    pub(super) max_ttl: Option<String>,
    pub(super) max_lifetime: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Limits {
    pub(super) sessions: Option<usize>,
    pub(super) rate_per_second: Option<u32>,
    pub(super) queue_timeout: Option<String>,
    pub(super) handles: Option<usize>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Metrics {
    pub(super) listen: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Connection {
    pub(super) r#type: Option<String>,
    pub(super) host: Option<Hosts>,
    pub(super) port: Option<u16>,
    pub(super) peer_user: Option<NameOrId>,
    pub(super) connect_timeout: Option<String>,
    pub(super) database: Option<String>,
    pub(super) databases: Vec<String>,
    pub(super) username: Option<Username>,
    pub(super) secret: Option<Secret>,
    pub(super) tls: Option<Tls>,
    pub(super) credential: SecretForm,
    pub(super) require_auth: Option<Vec<Method>>,
    pub(super) channel_binding: ChannelBinding,
    pub(super) startup: Option<Vec<String>>,
    pub(super) replication: bool,
    pub(super) insecure_handoff: bool,
    pub(super) rotation_grace: Option<String>,
    pub(super) max_session_age: Option<String>,
    #[serde(default)]
    pub(super) warm: u8,
    /// `connections.json` only.
    #[serde(rename = "credentialsEnv")]
    pub(super) credentials_env: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Hosts {
    One(String),
    Several(Vec<String>),
}

impl Hosts {
    pub(super) fn all(&self) -> &[String] {
        match self {
            Self::One(host) => std::slice::from_ref(host),
            Self::Several(hosts) => hosts,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Username {
    Text(String),
    File { file: PathBuf },
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Secret {
    pub(super) file: Option<PathBuf>,
    pub(super) dir: Option<PathBuf>,
    pub(super) env: Option<String>,
    pub(super) systemd: Option<String>,
    pub(super) exec: Option<Vec<String>>,
    pub(super) store: Option<bool>,
    pub(super) refresh: Option<String>,
    pub(super) timeout: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Tls {
    pub(super) mode: Option<String>,
    pub(super) insecure: bool,
    pub(super) ca_file: Option<PathBuf>,
    pub(super) cert_file: Option<PathBuf>,
    pub(super) key: Option<SigningKey>,
    pub(super) negotiation: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Grant {
    pub(super) name: Option<String>,
    pub(super) peer: Selector,
    pub(super) connections: Vec<String>,
    pub(super) may: Vec<Action>,
    pub(super) redeemers: Vec<Selector>,
    pub(super) max_ttl: Option<String>,
    pub(super) max_sessions: Option<usize>,
    pub(super) rate_per_second: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Selector {
    pub(super) uid: Option<u32>,
    pub(super) user: Option<String>,
    pub(super) gid: Option<u32>,
    pub(super) group: Option<NameOrId>,
    pub(super) exe: Option<PathBuf>,
    pub(super) unit: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum NameOrId {
    Id(u32),
    Name(String),
}

/// `{"connections": {…}}`, the file that `broker.connections_file` names.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ConnectionsFile {
    pub(super) connections: BTreeMap<String, Connection>,
}
