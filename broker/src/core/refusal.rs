//! Saying no: audited, explained to the operator in the log, and told to the caller without the
//! explanation.

#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use tracing::info;

use super::{Asked, Core};
use crate::audit::{AuditUnavailable, Event, Outcome, Record, Seq};
use crate::connection::ConnectionName;
use crate::peer::Peer;
use crate::policy::Denial;

/// The name of a setting as servers have them, `[A-Za-z0-9_.]{1,63}`: fit to be said back to who
/// sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SettingName(String);

impl SettingName {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let plausible = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.');
        let good = (1..=63).contains(&text.len()) && text.bytes().all(plausible);
        good.then(|| Self(text.to_owned()))
    }
}

impl fmt::Display for SettingName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a caller is told. Each edge words it in its own codes, by an exhaustive match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// Denied, or no such connection: the same answer.
    AccessDenied,
    /// A field is wrong, and what it must do or be.
    InvalidRequest { field: &'static str, must: &'static str },
    /// A setting that the connection lets no client set; which, if it has a plausible name.
    SettingRefused(Option<SettingName>),
    /// The handle is unknown, of another peer, or revoked: the same answer.
    HandleInvalid,
    /// The caller's own handle has expired.
    HandleExpired,
    /// Too many of something, and when there may be room again.
    LimitReached { what: &'static str, retry: Duration },
    /// An operator has suspended the connection; told to peers with a grant only.
    Suspended,
    /// The broker is shutting down.
    Draining,
    /// The database did not answer.
    UpstreamUnreachable,
    /// The database refused the credential of this connection.
    UpstreamRefused(ConnectionName),
    /// It refused it a moment ago, and is not asked again before that time has passed.
    UpstreamHeld { connection: ConnectionName, retry: Duration },
    /// There is nothing to log in with.
    NoCredential(ConnectionName),
    /// The database did not prove who it is.
    UpstreamUntrusted,
    /// The audit log cannot be written.
    AuditUnavailable,
    /// The socket of this connection cannot be handed over, and why; told to peers with a grant
    /// only.
    HandoffUnsupported(&'static str),
    /// The broker does not offer this.
    Unsupported(&'static str),
    /// A fault of the broker.
    Internal(&'static str),
    /// The broker's state could not be written, and what the disk says; told to operators only.
    NotSaved(String),
    /// The process that connected has exited; nobody is there to read the answer.
    PeerExited,
}

impl Why {
    /// A limit under which there may be room again at any time.
    pub(crate) const fn limit(what: &'static str) -> Self {
        Self::LimitReached { what, retry: Duration::from_secs(1) }
    }

    /// The reason as it stands in audit records and on the wire.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::AccessDenied | Self::PeerExited => "ACCESS_DENIED",
            Self::InvalidRequest { .. } | Self::SettingRefused(_) => "INVALID_REQUEST",
            Self::HandleInvalid => "HANDLE_INVALID",
            Self::HandleExpired => "HANDLE_EXPIRED",
            Self::LimitReached { .. } => "LIMIT_REACHED",
            Self::Suspended => "SUSPENDED",
            Self::Draining => "DRAINING",
            Self::UpstreamUnreachable => "UPSTREAM_UNREACHABLE",
            Self::UpstreamRefused(_) | Self::UpstreamHeld { .. } | Self::NoCredential(_) => {
                "UPSTREAM_REFUSED"
            }
            Self::UpstreamUntrusted => "UPSTREAM_UNTRUSTED",
            Self::AuditUnavailable => "AUDIT_UNAVAILABLE",
            Self::HandoffUnsupported(_) => "HANDOFF_UNSUPPORTED",
            Self::Unsupported(_) => "UNSUPPORTED",
            Self::Internal(_) | Self::NotSaved(_) => "INTERNAL",
        }
    }

    /// The sentence for the caller. It names nothing that the caller may not know.
    fn text(&self) -> Cow<'static, str> {
        match self {
            Self::AccessDenied | Self::PeerExited => "access denied, or no such connection".into(),
            Self::InvalidRequest { field, must } => format!("{field} must {must}").into(),
            Self::SettingRefused(name) => {
                let which = name.as_ref().map(|name| format!(" {name}")).unwrap_or_default();
                format!(
                    "the startup parameter{which} must be among those that the connection's `startup` key allows"
                )
                .into()
            }
            Self::HandleInvalid => "the handle is not valid: ask for a new one".into(),
            Self::HandleExpired => "the handle has expired: ask for a new one".into(),
            Self::LimitReached { what, .. } => {
                format!("the limit on {what} is reached: try again later").into()
            }
            Self::Suspended => "the connection is suspended by an operator".into(),
            Self::Draining => "the broker is shutting down".into(),
            Self::UpstreamUnreachable => "the database cannot be reached".into(),
            Self::UpstreamRefused(name) | Self::UpstreamHeld { connection: name, .. } => {
                format!("the database refused the broker's credential for {name}").into()
            }
            Self::NoCredential(name) => {
                format!("the broker has no credential for {name}: an operator must put one").into()
            }
            Self::UpstreamUntrusted => {
                "the database did not prove who it is, so nothing was sent to it".into()
            }
            Self::AuditUnavailable => {
                "the audit log cannot be written, so nothing is granted".into()
            }
            Self::HandoffUnsupported(because) => format!(
                "the socket of this connection cannot be handed over: {because}; use the door"
            )
            .into(),
            Self::Unsupported(what) => format!("not supported: {what}").into(),
            Self::Internal(_) => "the broker met a fault of its own".into(),
            Self::NotSaved(problem) => format!(
                "nothing has changed, because it could not be saved: {problem}; mend that, and try again"
            )
            .into(),
        }
    }

    /// When it makes sense to try again.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::LimitReached { retry, .. } | Self::UpstreamHeld { retry, .. } => Some(*retry),
            Self::UpstreamUnreachable | Self::AuditUnavailable => Some(Duration::from_secs(1)),
            Self::Draining => Some(Duration::from_secs(5)),
            Self::AccessDenied
            | Self::PeerExited
            | Self::InvalidRequest { .. }
            | Self::SettingRefused(_)
            | Self::HandleInvalid
            | Self::HandleExpired
            | Self::UpstreamRefused(_)
            | Self::NoCredential(_)
            | Self::UpstreamUntrusted
            | Self::Suspended
            | Self::HandoffUnsupported(_)
            | Self::Unsupported(_)
            | Self::Internal(_)
            | Self::NotSaved(_) => None,
        }
    }

    /// The field of the request that is wrong, if one is.
    pub(crate) fn field(&self) -> Option<&'static str> {
        match self {
            Self::InvalidRequest { field, .. } => Some(field),
            Self::SettingRefused(_) => Some("startup parameters"),
            Self::AccessDenied
            | Self::PeerExited
            | Self::HandleInvalid
            | Self::HandleExpired
            | Self::LimitReached { .. }
            | Self::Suspended
            | Self::Draining
            | Self::UpstreamUnreachable
            | Self::UpstreamRefused(_)
            | Self::UpstreamHeld { .. }
            | Self::NoCredential(_)
            | Self::UpstreamUntrusted
            | Self::AuditUnavailable
            | Self::HandoffUnsupported(_)
            | Self::Unsupported(_)
            | Self::Internal(_)
            | Self::NotSaved(_) => None,
        }
    }
}

/// A refusal that has been written down; only the core makes one.
#[must_use]
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    why: Why,
    reference: Seq,
}

impl Refusal {
    pub(crate) fn why(&self) -> &Why {
        &self.why
    }

    /// The audit sequence number.
    pub(crate) fn reference(&self) -> Seq {
        self.reference
    }

    /// What the caller reads: the sentence and the reference.
    pub(crate) fn message(&self) -> String {
        format!("{} (ref={})", self.why.text(), self.reference)
    }
}

impl Core {
    /// A denial by policy. The log gets the reason and the nearest grant, the caller neither.
    pub(super) fn deny(&self, peer: &Peer, asked: Asked, denial: &Denial) -> Refusal {
        let mut record =
            Record::new(Event::AccessDenied, Outcome::Denied).peer(peer).reason(denial.reason);
        if let Some(connection) = &asked.connection {
            record = record.connection(connection);
        }
        let reference = self.shared.audit.denied(peer.uid(), &record);
        self.shared.metrics.denied_by_policy(denial.reason);
        let connection = asked.connection.clone();
        // A flood of one kind fills neither log.
        if self.shared.refusals.remember(reference, peer, asked, &denial.reason.to_string()) {
            let connection = connection.as_ref().map_or("-", ConnectionName::as_str);
            let nearest = denial.nearest.as_deref().unwrap_or("-");
            info!(
                "denied ref={reference} uid={} gid={} connection={connection} reason={} nearest={nearest}",
                peer.uid(),
                peer.gid(),
                denial.reason
            );
        }
        Refusal { why: Why::AccessDenied, reference }
    }

    /// A refusal for any other reason.
    pub(crate) fn refuse(
        &self,
        peer: &Peer,
        connection: Option<&ConnectionName>,
        why: Why,
    ) -> Refusal {
        let mut record =
            Record::new(Event::AccessDenied, Outcome::Denied).peer(peer).reason(why.name());
        if let Some(connection) = connection {
            record = record.connection(connection);
        }
        let reference = self.shared.audit.denied(peer.uid(), &record);
        self.refused(peer, connection, why, reference)
    }

    /// The refusal of what could not be audited. The record that stands in the place of the
    /// grant's is its reference.
    pub(super) fn unaudited(
        &self,
        peer: &Peer,
        connection: Option<&ConnectionName>,
        unavailable: &AuditUnavailable,
    ) -> Refusal {
        match unavailable.reference {
            Some(reference) => self.refused(peer, connection, Why::AuditUnavailable, reference),
            None => self.refuse(peer, connection, Why::AuditUnavailable),
        }
    }

    fn refused(
        &self,
        peer: &Peer,
        connection: Option<&ConnectionName>,
        why: Why,
        reference: Seq,
    ) -> Refusal {
        self.shared.metrics.denied(why.name());
        let asked = Asked { action: None, connection: connection.cloned() };
        if !self.shared.refusals.remember(reference, peer, asked, why.name()) {
            return Refusal { why, reference };
        }
        let connection = connection.map_or("-", ConnectionName::as_str);
        let detail = match &why {
            Why::InvalidRequest { field, .. } => field,
            // Its name is the peer's word.
            Why::SettingRefused(_) => "startup parameters",
            Why::NotSaved(problem) => problem,
            Why::LimitReached { what, .. }
            | Why::HandoffUnsupported(what)
            | Why::Unsupported(what)
            | Why::Internal(what) => what,
            Why::PeerExited => "the peer has exited",
            Why::UpstreamHeld { .. } => "not tried again so soon",
            Why::AccessDenied
            | Why::HandleInvalid
            | Why::HandleExpired
            | Why::Suspended
            | Why::Draining
            | Why::UpstreamUnreachable
            | Why::UpstreamRefused(_)
            | Why::NoCredential(_)
            | Why::UpstreamUntrusted
            | Why::AuditUnavailable => "-",
        };
        info!(
            "refused ref={reference} uid={} gid={} connection={connection} reason={} detail={detail}",
            peer.uid(),
            peer.gid(),
            why.name()
        );
        Refusal { why, reference }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_named_if_it_could_be_one() {
        let said = |name: &str| Why::SettingRefused(SettingName::parse(name)).text().into_owned();
        for name in ["role", "auto_explain.log_min_duration", "A1", &"x".repeat(63)] {
            let text = format!("the startup parameter {name} must be");
            assert!(said(name).starts_with(&text), "{}", said(name));
        }
        for name in ["", &"x".repeat(64), "a b", "role'", "ro\nle", "r\u{f6}le", "a\u{1b}[2J"] {
            assert!(said(name).starts_with("the startup parameter must be"), "{}", said(name));
        }
    }
}
