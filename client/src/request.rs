//! What is asked of the broker when a handle is issued.

mod destination;
mod put;
mod register;

pub use self::destination::Destination;
pub use self::put::PutRequest;
pub use self::register::RegisterRequest;

use std::time::Duration;

use credbroker_proto::v1;

use crate::Error;

/// How a handle is tied to the process that holds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Bind {
    /// Lives until it expires or is revoked.
    #[default]
    None,
    /// Dies with the process that issued it. Refused with
    /// [`Reason::Unsupported`](crate::Reason::Unsupported) where the broker's kernel has no
    /// pidfd for peers.
    Lifetime,
    /// Dies with the process that issued it, and only that process can redeem it. Refused as
    /// [`Bind::Lifetime`] is.
    Process,
}

impl Bind {
    pub(crate) fn from_wire(bind: v1::Bind) -> Self {
        match bind {
            v1::Bind::Unspecified | v1::Bind::None => Self::None,
            v1::Bind::Lifetime => Self::Lifetime,
            v1::Bind::Process => Self::Process,
        }
    }

    pub(crate) fn into_wire(self) -> v1::Bind {
        match self {
            Self::None => v1::Bind::None,
            Self::Lifetime => v1::Bind::Lifetime,
            Self::Process => v1::Bind::Process,
        }
    }
}

/// A request for a handle; what is not set is the broker's default.
#[derive(Clone, Debug)]
#[must_use]
pub struct IssueRequest {
    connection: String,
    ttl: Option<Duration>,
    purpose: String,
    subject: String,
    redeemer: Option<u32>,
    bind: Bind,
    max_uses: Option<u32>,
    max_sessions: Option<u32>,
}

impl IssueRequest {
    /// Asks for a handle to the connection with this name.
    pub fn new(connection: impl Into<String>) -> Self {
        Self {
            connection: connection.into(),
            ttl: None,
            purpose: String::new(),
            subject: String::new(),
            redeemer: None,
            bind: Bind::default(),
            max_uses: None,
            max_sessions: None,
        }
    }

    /// How long the handle lives without renewal. The broker cuts it to its maximum.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// What it is for, for people: `[A-Za-z0-9 _.-]{0,64}`.
    pub fn purpose(mut self, purpose: impl Into<String>) -> Self {
        self.purpose = purpose.into();
        self
    }

    /// An opaque name of whom it is for: at most 128 bytes of printable ASCII.
    pub fn subject(mut self, subject: impl Into<String>) -> Self {
        self.subject = subject.into();
        self
    }

    /// The uid that alone may use it, if not the caller. A grant must allow that.
    pub fn redeemer(mut self, uid: u32) -> Self {
        self.redeemer = Some(uid);
        self
    }

    /// How it is tied to this process.
    pub fn bind(mut self, bind: Bind) -> Self {
        self.bind = bind;
        self
    }

    /// How many sessions may be opened in all.
    pub fn max_uses(mut self, uses: u32) -> Self {
        self.max_uses = Some(uses);
        self
    }

    /// How many sessions may be open at once.
    pub fn max_sessions(mut self, sessions: u32) -> Self {
        self.max_sessions = Some(sessions);
        self
    }

    pub(crate) fn into_wire(self) -> Result<v1::IssueHandleRequest, Error> {
        Ok(v1::IssueHandleRequest {
            connection: self.connection,
            ttl: self.ttl.map(span).transpose()?,
            max_uses: self.max_uses,
            max_sessions: self.max_sessions,
            redeemer: self.redeemer,
            bind: self.bind.into_wire().into(),
            subject: self.subject,
            purpose: self.purpose,
        })
    }
}

/// A span as the wire has it: whole seconds are an i64 there.
pub(crate) fn span(duration: Duration) -> Result<prost_types::Duration, Error> {
    duration.try_into().map_err(|_overflow: prost_types::DurationError| Error::Configuration {
        message: "a span of more than 292 billion years cannot be sent".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_set_is_sent() {
        let request = IssueRequest::new("main_db")
            .ttl(Duration::from_millis(1500))
            .purpose("report")
            .subject("alice")
            .redeemer(10002)
            .bind(Bind::Lifetime)
            .max_uses(3)
            .max_sessions(2);
        let expected = v1::IssueHandleRequest {
            connection: "main_db".into(),
            ttl: Some(prost_types::Duration { seconds: 1, nanos: 500_000_000 }),
            max_uses: Some(3),
            max_sessions: Some(2),
            redeemer: Some(10002),
            bind: v1::Bind::Lifetime.into(),
            subject: "alice".into(),
            purpose: "report".into(),
        };
        assert_eq!(request.into_wire().unwrap(), expected);
    }

    #[test]
    fn what_is_not_set_is_left_to_the_broker() {
        let wire = IssueRequest::new("main_db").into_wire().unwrap();
        assert_eq!(wire.ttl, None);
        assert_eq!(wire.redeemer, None);
        assert_eq!(wire.bind(), v1::Bind::None);
    }

    #[test]
    fn a_span_that_does_not_fit_is_an_error() {
        assert!(matches!(span(Duration::MAX), Err(Error::Configuration { .. })));
    }
}
