//! What a record says. Its fields are an allow-list: names from configuration and identities
//! from the kernel, never what a caller typed. Every field is bounded here, so that every line
//! fits into one atomic write to a pipe.

#![forbid(unsafe_code)]

use std::fmt::{self, Write as _};

use serde::Serialize;
use serde_json::{Map, Value};

use super::chain::MAX_LINE;
use crate::connection::{AllowedDatabase, ConnectionName};
use crate::handle::HandleId;
use crate::peer::{Peer, Uid};
use crate::policy::Grant;
use crate::session::SessionId;

/// Longest text of one field, in bytes as JSON writes it.
const MAX_TEXT: usize = 256;
/// What reason, facts and detail may take together. A line has at most 700 bytes beside them:
/// number, time, broker, event, outcome and both hashes. Of `detail`, what does not fit is left
/// out and counted.
const MAX_BODY: usize = MAX_LINE - 700;

macro_rules! events {
    ($($variant:ident = $name:literal,)*) => {
        /// What happened.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(dead_code, reason = "the list is the contract's; verbs come to use it one by one")]
        pub(crate) enum Event {
            $($variant,)*
        }

        impl Event {
            /// As it stands in records.
            pub(crate) const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            #[cfg(test)]
            const ALL: &[Self] = &[$(Self::$variant,)*];
        }
    };
}

events! {
    BrokerStarted = "broker.started",
    BrokerStopped = "broker.stopped",
    BrokerReloaded = "broker.reloaded",
    HandleIssued = "handle.issued",
    HandleRenewed = "handle.renewed",
    HandleRevoked = "handle.revoked",
    HandleExpired = "handle.expired",
    SessionOpened = "session.opened",
    SessionClosed = "session.closed",
    UpstreamDialled = "upstream.dialled",
    SecretPut = "secret.put",
    SecretRegistered = "secret.registered",
    SecretRotated = "secret.rotated",
    SecretDeleted = "secret.deleted",
    SecretRevealed = "secret.revealed",
    CredentialDiverged = "credential.diverged",
    ConnectionSuspended = "connection.suspended",
    ConnectionResumed = "connection.resumed",
    KeyRotated = "key.rotated",
    AccessDenied = "access.denied",
    AuditRepaired = "audit.repaired",
    Checkpoint = "checkpoint",
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Allowed,
    Denied,
    Done,
    Failed,
}

impl Outcome {
    const fn name(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Denied => "denied",
            Self::Done => "done",
            Self::Failed => "failed",
        }
    }
}

/// A record before it has a place in the chain.
#[derive(Debug)]
pub(crate) struct Record {
    event: Event,
    outcome: Outcome,
    reason: Option<String>,
    facts: Facts,
    detail: Map<String, Value>,
}

#[derive(Debug, Default, Serialize)]
struct Facts {
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
}

#[derive(Debug, Serialize)]
struct PeerFields {
    uid: u32,
    gid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exe: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unit: Option<String>,
}

/// A record as text, up to what only its place in the chain decides.
#[derive(Debug)]
pub(super) struct Text {
    event: Event,
    outcome: Outcome,
    reason: Option<String>,
    /// `"peer":{…},…`, without braces; may be empty.
    facts: String,
    /// A JSON object; empty when there is none.
    detail: String,
}

impl Record {
    pub(crate) fn new(event: Event, outcome: Outcome) -> Self {
        Self { event, outcome, reason: None, facts: Facts::default(), detail: Map::new() }
    }

    pub(crate) fn reason(mut self, reason: impl fmt::Display) -> Self {
        self.reason = Some(bounded(&reason.to_string()));
        self
    }

    pub(crate) fn peer(mut self, peer: &Peer) -> Self {
        self.facts.peer = Some(PeerFields {
            uid: peer.uid().as_raw(),
            gid: peer.gid().as_raw(),
            pid: peer.pid(),
            exe: None,
            unit: None,
        });
        self
    }

    /// The grant's name and connection.
    pub(crate) fn grant(mut self, grant: &Grant) -> Self {
        self.facts.grant = Some(bounded(grant.rule()));
        self.connection(grant.connection())
    }

    pub(crate) fn connection(mut self, connection: &ConnectionName) -> Self {
        self.facts.connection = Some(connection.clone());
        self
    }

    pub(crate) fn database(mut self, database: &AllowedDatabase) -> Self {
        self.facts.database = Some(bounded(database.as_str()));
        self
    }

    pub(crate) fn db_user(mut self, role: &str) -> Self {
        self.facts.db_user = Some(bounded(role));
        self
    }

    pub(crate) fn handle(mut self, handle: HandleId) -> Self {
        self.facts.handle = Some(handle.to_string());
        self
    }

    pub(crate) fn session(mut self, session: SessionId) -> Self {
        self.facts.session = Some(session.to_string());
        self
    }

    pub(crate) fn subject(mut self, subject: &str) -> Self {
        self.facts.subject = (!subject.is_empty()).then(|| bounded(subject));
        self
    }

    pub(crate) fn purpose(mut self, purpose: &str) -> Self {
        self.facts.purpose = (!purpose.is_empty()).then(|| bounded(purpose));
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

    /// What makes a refusal like another one: why, and on which connection.
    pub(super) fn likeness(&self) -> (Option<String>, Option<ConnectionName>) {
        (self.reason.clone(), self.facts.connection.clone())
    }

    pub(super) fn text(&self) -> Text {
        let facts = json(&self.facts);
        let facts = facts.strip_prefix('{').and_then(|facts| facts.strip_suffix('}'));
        let room = MAX_BODY.saturating_sub(MAX_TEXT + facts.map_or(0, str::len));
        Text {
            event: self.event,
            outcome: self.outcome,
            reason: self.reason.clone(),
            facts: facts.unwrap_or_default().to_owned(),
            detail: detail(&self.detail, room),
        }
    }
}

impl Text {
    pub(super) fn event(&self) -> Event {
        self.event
    }

    /// Turns the record of what was to be granted into that of its refusal.
    pub(super) fn refused(&mut self, reason: &str) {
        let instead_of = self.event;
        self.event = Event::AccessDenied;
        self.outcome = Outcome::Denied;
        self.reason = Some(reason.to_owned());
        self.detail = json(&Map::from_iter([("instead_of".to_owned(), instead_of.name().into())]));
    }

    /// Appends the members from `event` to `detail` to `line`, without a comma at either end.
    pub(super) fn write_to(&self, line: &mut String) {
        // Writing to a String cannot fail.
        let _ = write!(
            line,
            "\"event\":\"{}\",\"outcome\":\"{}\"",
            self.event.name(),
            self.outcome.name()
        );
        if let Some(reason) = &self.reason {
            line.push_str(",\"reason\":");
            line.push_str(&json(reason));
        }
        if !self.facts.is_empty() {
            line.push(',');
            line.push_str(&self.facts);
        }
        if !self.detail.is_empty() {
            line.push_str(",\"detail\":");
            line.push_str(&self.detail);
        }
    }
}

/// Whatever is written here is a string, a number or a map with string keys: JSON has them all.
pub(super) fn json(value: &(impl Serialize + ?Sized)) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// A JSON object of at most `room` bytes, or nothing.
fn detail(all: &Map<String, Value>, room: usize) -> String {
    if all.is_empty() {
        return String::new();
    }
    let mut text = String::from("{");
    let mut left_out = 0_u32;
    for (key, value) in all {
        let member = format!("{}:{},", json(key), json(value));
        if text.len() + member.len() + "\"left_out\":1000,".len() > room {
            left_out += 1;
        } else {
            text.push_str(&member);
        }
    }
    if left_out > 0 {
        let _ = write!(text, "\"left_out\":{left_out},");
    }
    text.pop();
    text.push('}');
    text
}

/// The beginning of `text` that takes at most [`MAX_TEXT`] bytes in JSON.
fn bounded(text: &str) -> String {
    let mut len = 0;
    text.chars()
        .take_while(|c| {
            len += match c {
                '"' | '\\' => 2,
                c if c.is_control() => 6,
                c => c.len_utf8(),
            };
            len <= MAX_TEXT
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::Seq;
    use crate::audit::chain::Chain;

    #[test]
    fn every_event_has_a_name_of_its_own() {
        let mut names: Vec<_> = Event::ALL.iter().map(|event| event.name()).collect();
        assert!(names.iter().all(|name| name.len() < 32));
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Event::ALL.len());
    }

    #[test]
    fn no_line_is_longer_than_a_pipe_takes_at_once() {
        let worst = "\u{1}".repeat(10_000);
        let mut record = Record::new(Event::ConnectionSuspended, Outcome::Allowed)
            .reason(&worst)
            .db_user(&worst)
            .subject(&worst)
            .purpose(&worst)
            .connection(&ConnectionName::parse(&"c".repeat(63)).unwrap());
        record.facts.grant = Some(bounded(&worst));
        record.facts.database = Some(bounded(&worst));
        record.facts.handle = Some(bounded(&worst));
        record.facts.session = Some(bounded(&worst));
        record.facts.peer = Some(PeerFields {
            uid: u32::MAX,
            gid: u32::MAX,
            pid: Some(i32::MIN),
            exe: Some(bounded(&worst)),
            unit: Some(bounded(&worst)),
        });
        for key in 0..1000 {
            record = record.detail(&format!("key{key}"), "\"".repeat(40));
        }
        let record = record.detail("long", "x".repeat(100_000));
        let mut chain = Chain::continuing(None, &"h".repeat(64));
        let mut line = String::new();
        let now = std::time::SystemTime::now();
        chain.append(Seq(u64::MAX), now, &record.text(), &mut line);
        assert!(line.len() <= MAX_LINE, "{}", line.len());
        assert!(line.contains("\"left_out\":"), "what was left out is counted: {line}");
        serde_json::from_str::<Value>(&line).unwrap();
    }

    #[test]
    fn a_refusal_stands_in_place_of_the_grant() {
        let record = Record::new(Event::HandleIssued, Outcome::Allowed)
            .purpose("report")
            .detail("ttl_seconds", 5);
        let mut text = record.text();
        text.refused("AUDIT_UNAVAILABLE");
        let mut line = String::new();
        text.write_to(&mut line);
        assert_eq!(
            line,
            "\"event\":\"access.denied\",\"outcome\":\"denied\",\"reason\":\"AUDIT_UNAVAILABLE\",\
             \"purpose\":\"report\",\"detail\":{\"instead_of\":\"handle.issued\"}"
        );
    }
}
