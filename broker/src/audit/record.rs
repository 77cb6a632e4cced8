//! What a record says. Its fields are an allow-list: names from configuration and identities
//! from the kernel, never what a caller typed.

#![forbid(unsafe_code)]

use std::fmt;

use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

use crate::connection::{AllowedDatabase, ConnectionName};
use crate::handle::HandleId;
use crate::peer::{Peer, Uid};
use crate::policy::Grant;
use crate::session::SessionId;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    BrokerStarted,
    BrokerStopped,
    HandleIssued,
    HandleRenewed,
    HandleRevoked,
    HandleExpired,
    SessionOpened,
    SessionClosed,
    AccessDenied,
    AuditRepaired,
    SecretRegistered,
    SecretRevealed,
    SecretPut,
}

impl Event {
    const fn name(self) -> &'static str {
        match self {
            Self::BrokerStarted => "broker.started",
            Self::BrokerStopped => "broker.stopped",
            Self::HandleIssued => "handle.issued",
            Self::HandleRenewed => "handle.renewed",
            Self::HandleRevoked => "handle.revoked",
            Self::HandleExpired => "handle.expired",
            Self::SessionOpened => "session.opened",
            Self::SessionClosed => "session.closed",
            Self::AccessDenied => "access.denied",
            Self::AuditRepaired => "audit.repaired",
            Self::SecretRegistered => "secret.registered",
            Self::SecretRevealed => "secret.revealed",
            Self::SecretPut => "secret.put",
        }
    }
}

impl Serialize for Event {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Outcome {
    Allowed,
    Denied,
    Done,
    Failed,
}

/// A record before it has a place in the chain.
#[derive(Debug, Serialize)]
pub(crate) struct Record {
    event: Event,
    outcome: Outcome,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<PeerFields>,
    #[serde(skip_serializing_if = "Option::is_none")]
    grant: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    connection: Option<ConnectionName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    database: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    db_user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    handle: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    purpose: Option<String>,
    #[serde(skip_serializing_if = "Map::is_empty")]
    detail: Map<String, Value>,
}

#[derive(Debug, Serialize)]
struct PeerFields {
    uid: u32,
    gid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<i32>,
}

impl Record {
    pub(crate) fn new(event: Event, outcome: Outcome) -> Self {
        Self {
            event,
            outcome,
            reason: None,
            peer: None,
            grant: None,
            connection: None,
            database: None,
            db_user: None,
            handle: None,
            session: None,
            subject: None,
            purpose: None,
            detail: Map::new(),
        }
    }

    pub(crate) fn reason(mut self, reason: impl fmt::Display) -> Self {
        self.reason = Some(reason.to_string());
        self
    }

    pub(crate) fn peer(mut self, peer: &Peer) -> Self {
        self.peer = Some(PeerFields {
            uid: peer.uid().as_raw(),
            gid: peer.gid().as_raw(),
            pid: peer.pid(),
        });
        self
    }

    /// The grant's name and connection.
    pub(crate) fn grant(mut self, grant: &Grant) -> Self {
        self.grant = Some(grant.rule().to_owned());
        self.connection(grant.connection())
    }

    pub(crate) fn connection(mut self, connection: &ConnectionName) -> Self {
        self.connection = Some(connection.clone());
        self
    }

    pub(crate) fn database(mut self, database: &AllowedDatabase) -> Self {
        self.database = Some(database.as_str().to_owned());
        self
    }

    pub(crate) fn db_user(mut self, role: &str) -> Self {
        self.db_user = Some(role.to_owned());
        self
    }

    pub(crate) fn handle(mut self, handle: HandleId) -> Self {
        self.handle = Some(handle.to_string());
        self
    }

    pub(crate) fn session(mut self, session: SessionId) -> Self {
        self.session = Some(session.to_string());
        self
    }

    pub(crate) fn subject(mut self, subject: &str) -> Self {
        self.subject = (!subject.is_empty()).then(|| subject.to_owned());
        self
    }

    pub(crate) fn purpose(mut self, purpose: &str) -> Self {
        self.purpose = (!purpose.is_empty()).then(|| purpose.to_owned());
        self
    }

    pub(crate) fn redeemer(self, redeemer: Option<Uid>) -> Self {
        match redeemer {
            Some(uid) => self.detail("redeemer", uid.as_raw()),
            None => self,
        }
    }

    /// A number or a text of our own making.
    pub(crate) fn detail(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.detail.insert(key.to_owned(), value.into());
        self
    }
}
