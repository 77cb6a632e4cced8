//! The state of the broker, as it tells it.

use std::time::SystemTime;

use credbroker_proto::v1;

use super::optional_time;
use crate::Error;
use crate::info::time;

/// The state of the broker.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// The broker's version.
    pub version: String,
    /// When it started.
    pub started: SystemTime,
    /// The facts that security rests on, by name, as `credbrokerd posture` orders them.
    pub posture: Vec<(String, String)>,
    /// What is not well. Empty: nothing.
    pub warnings: Vec<String>,
    /// Connections.
    pub connections: u32,
    /// Live handles.
    pub handles: u32,
    /// Sessions, those being opened included.
    pub sessions: u32,
    /// Names of what is suspended; `*` for all.
    pub suspended: Vec<String>,
    /// Where the audit chain stands; keep a copy elsewhere.
    pub audit_head: Option<AuditHead>,
    /// Whether grants can be written.
    pub audit_writable: bool,
    /// What the arena holds.
    pub arena: ArenaUse,
    /// When the configuration was last taken over.
    pub configured: Option<SystemTime>,
    /// Why the last reload was refused. Empty: it was not.
    pub last_reload_problem: String,
}

impl Status {
    pub(in crate::admin) fn from_wire(status: v1::GetStatusResponse) -> Result<Self, Error> {
        let arena = status.arena.unwrap_or_default();
        Ok(Self {
            version: status.version,
            started: time("started", status.started)?,
            posture: status.posture.into_iter().map(|fact| (fact.name, fact.value)).collect(),
            warnings: status.warnings,
            connections: status.connections,
            handles: status.handles,
            sessions: status.sessions,
            suspended: status.suspended,
            audit_head: status.audit_head.map(|head| AuditHead {
                seq: head.seq,
                hash: head.hash,
                signed_to: head.signed_to,
            }),
            audit_writable: status.audit_writable,
            arena: ArenaUse {
                capacity: arena.capacity,
                own: arena.own,
                registered: arena.registered,
            },
            configured: optional_time("configured", status.configured)?,
            last_reload_problem: status.last_reload_problem,
        })
    }
}

/// Where the audit chain stands.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AuditHead {
    /// Sequence number of the last record.
    pub seq: u64,
    /// Its hash, in hexadecimal.
    pub hash: String,
    /// Sequence number up to which records are signed.
    pub signed_to: u64,
}

/// What the arena holds, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ArenaUse {
    /// In all.
    pub capacity: u64,
    /// Used by the operator's credentials and keys.
    pub own: u64,
    /// Used by registrations of peers.
    pub registered: u64,
}
