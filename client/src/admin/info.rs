//! What operators ask and are answered, in types of our own.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use credbroker_proto::v1;

use crate::info::time;
use crate::{Error, HandleInfo};

pub use self::explanation::{Considered, Explanation, PeerDescription};
pub use self::status::{ArenaUse, AuditHead, Status};

mod explanation;
mod status;

/// A connection as an operator sees it: nothing secret.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AdminConnection {
    /// Its name.
    pub name: String,
    /// Its type: `postgresql`.
    pub kind: String,
    /// Where it leads, with user and password masked.
    pub target: String,
    /// Where its credential comes from: `file /etc/…`, `store`, `none`.
    pub source: String,
    /// `None`: it has none now.
    pub credential: Option<CredentialInfo>,
    /// Whether an operator has suspended it, by itself or with all.
    pub suspended: bool,
    /// Live sessions.
    pub sessions: u32,
    /// Live handles.
    pub handles: u32,
}

impl AdminConnection {
    pub(super) fn from_wire(connection: v1::AdminConnection) -> Result<Self, Error> {
        Ok(Self {
            name: connection.name,
            kind: connection.r#type,
            target: connection.target,
            source: connection.source,
            credential: connection.credential.map(CredentialInfo::from_wire).transpose()?,
            suspended: connection.suspended,
            sessions: connection.sessions,
            handles: connection.handles,
        })
    }
}

/// What may be known of a credential.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CredentialInfo {
    /// Counts up from 1 with each change.
    pub version: u64,
    /// When this version came.
    pub since: SystemTime,
    /// When it will be of no use, if somebody said so.
    pub expires_at: Option<SystemTime>,
    /// As they were put.
    pub labels: BTreeMap<String, String>,
    /// Whether it outlives the broker.
    pub persistent: bool,
    /// `None`: the server takes it, as far as is known.
    pub breaker: Option<OpenBreaker>,
}

/// That a server has refused a credential, and is not asked again for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct OpenBreaker {
    /// When one login may try again. In the past: the next one does.
    pub open_until: SystemTime,
    /// Refusals in a row.
    pub refusals: u32,
}

impl OpenBreaker {
    fn from_wire(breaker: v1::Breaker) -> Result<Self, Error> {
        let open_until = time("open_until", breaker.open_until)?;
        Ok(Self { open_until, refusals: breaker.refusals })
    }
}

impl CredentialInfo {
    fn from_wire(credential: v1::Credential) -> Result<Self, Error> {
        Ok(Self {
            version: credential.version,
            since: time("since", credential.since)?,
            expires_at: optional_time("expires_at", credential.expires_at)?,
            labels: credential.labels.into_iter().collect(),
            persistent: credential.persistent,
            breaker: credential.breaker.map(OpenBreaker::from_wire).transpose()?,
        })
    }
}

/// What came of trying a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Validation {
    /// The server's version, as it says.
    pub server_version: String,
    /// What an operator should know of the role, one sentence each.
    pub warnings: Vec<String>,
    /// From dialling until the server was ready.
    pub took: Duration,
    /// How the server let the broker in: `scram-sha-256-plus` (bound to the TLS channel),
    /// `scram-sha-256`, `md5`, `password`, `none`. Empty: the broker is too old to say.
    pub method: String,
}

impl Validation {
    pub(super) fn from_wire(response: v1::ValidateConnectionResponse) -> Self {
        let took = response.took.and_then(|took| took.try_into().ok());
        Self {
            server_version: response.server_version,
            warnings: response.warnings,
            took: took.unwrap_or_default(),
            method: response.method,
        }
    }
}

/// What is suspended or resumed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// One connection, by name.
    Connection(String),
    /// All that there are and will be.
    All,
}

impl Scope {
    pub(super) fn into_suspend(self) -> v1::suspend_request::Scope {
        match self {
            Self::Connection(name) => v1::suspend_request::Scope::Connection(name),
            Self::All => v1::suspend_request::Scope::All(true),
        }
    }

    pub(super) fn into_resume(self) -> v1::resume_request::Scope {
        match self {
            Self::Connection(name) => v1::resume_request::Scope::Connection(name),
            Self::All => v1::resume_request::Scope::All(true),
        }
    }
}

/// What was ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Cut {
    /// Handles that were revoked.
    pub handles: u32,
    /// Sessions that were cut.
    pub sessions: u32,
}

/// It is suspended, and everything on it is dead.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Suspension {
    /// What was ended.
    pub cut: Cut,
    /// Whether it will hold after a restart of the broker.
    pub persistent: bool,
    /// What an operator must mend. Empty: nothing.
    pub problem: String,
}

impl Suspension {
    pub(super) fn from_wire(response: v1::SuspendResponse) -> Self {
        Self {
            cut: Cut { handles: response.handles_revoked, sessions: response.sessions_cut },
            persistent: response.persistent,
            problem: response.problem,
        }
    }
}

/// Picks handles.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HandleFilter {
    /// Every handle.
    All,
    /// One, by its public identifier.
    Id(String),
    /// Those of which everything given holds; with nothing given, the broker refuses.
    Matching {
        /// Of one connection.
        connection: Option<String>,
        /// Of one holder.
        holder: Option<u32>,
        /// With one subject.
        subject: Option<String>,
    },
}

impl HandleFilter {
    /// All handles of one connection.
    #[must_use]
    pub fn of_connection(name: impl Into<String>) -> Self {
        Self::Matching { connection: Some(name.into()), holder: None, subject: None }
    }

    pub(super) fn into_wire(self) -> v1::HandleFilter {
        match self {
            Self::All => v1::HandleFilter { all: true, ..Default::default() },
            Self::Id(id) => v1::HandleFilter { id: Some(id), ..Default::default() },
            Self::Matching { connection, holder, subject } => {
                v1::HandleFilter { connection, holder, subject, ..Default::default() }
            }
        }
    }
}

/// Handles of all peers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AdminHandleList {
    /// Oldest first.
    pub handles: Vec<HandleInfo>,
    /// How many there are in all.
    pub total: u32,
}

impl AdminHandleList {
    pub(super) fn from_wire(list: v1::AdminListHandlesResponse) -> Result<Self, Error> {
        let handles = list.handles.into_iter().map(|handle| HandleInfo::from_wire(Some(handle)));
        Ok(Self { handles: handles.collect::<Result<_, _>>()?, total: list.total })
    }
}

/// A session.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SessionInfo {
    /// `ses_` and a number.
    pub id: String,
    /// Name of the connection.
    pub connection: String,
    /// The handle; `None` for ambient sessions.
    pub handle: Option<String>,
    /// uid of the peer.
    pub uid: u32,
    /// Process id of the peer, where it is known.
    pub pid: Option<u32>,
    /// When it was entered.
    pub since: SystemTime,
    /// False while it is being opened.
    pub live: bool,
    /// The version of the credential that it logged in with.
    pub credential_version: u64,
    /// The database.
    pub database: String,
    /// The subject of the handle.
    pub subject: String,
    /// How its bytes travel: `door` (through the broker) or `handoff` (the peer has the socket).
    /// Empty: the broker is too old to say.
    pub mode: String,
}

impl SessionInfo {
    fn from_wire(session: v1::SessionInfo) -> Result<Self, Error> {
        Ok(Self {
            id: session.id,
            connection: session.connection,
            handle: session.handle,
            uid: session.uid,
            pid: session.pid,
            since: time("since", session.since)?,
            live: session.live,
            credential_version: session.credential_version,
            database: session.database,
            subject: session.subject,
            mode: session.mode,
        })
    }
}

/// Sessions.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SessionList {
    /// Oldest first.
    pub sessions: Vec<SessionInfo>,
    /// How many there are in all.
    pub total: u32,
}

impl SessionList {
    pub(super) fn from_wire(list: v1::ListSessionsResponse) -> Result<Self, Error> {
        let sessions = list.sessions.into_iter().map(SessionInfo::from_wire);
        Ok(Self { sessions: sessions.collect::<Result<_, _>>()?, total: list.total })
    }
}

/// How far the wrapping of keys is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeyRotation {
    /// Credentials that are done.
    pub done: u64,
    /// Credentials in all.
    pub total: u64,
}

/// The configuration was taken over.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Reloaded {
    /// What the new policy no longer allows.
    pub cut: Cut,
    /// What changed, one line each.
    pub changes: Vec<String>,
}

/// An audit record.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AuditLine {
    /// As it stands in the log, without its newline: one JSON object.
    pub line: String,
    /// Records that were left out just before this one, because the reader was slow.
    pub skipped: u64,
}

fn optional_time(
    field: &str,
    at: Option<prost_types::Timestamp>,
) -> Result<Option<SystemTime>, Error> {
    at.map(|at| time(field, Some(at))).transpose()
}
