//! What is asked of the broker by who brings an own password.

use std::time::Duration;

use credbroker_proto::v1;

use super::span;
use crate::{Bind, Error};

/// A request for a handle on a user name and password of one's own; the password comes beside
/// it, as a [`Secret`](crate::Secret). What is not set is the broker's default.
#[derive(Clone, Debug)]
#[must_use]
pub struct RegisterRequest {
    connection: String,
    username: String,
    ttl: Option<Duration>,
    max_uses: Option<u32>,
    max_sessions: Option<u32>,
    bind: Bind,
    subject: String,
    purpose: String,
}

impl RegisterRequest {
    /// For a connection that has no credential of its own, as the database role `username`.
    pub fn new(connection: impl Into<String>, username: impl Into<String>) -> Self {
        Self {
            connection: connection.into(),
            username: username.into(),
            ttl: None,
            max_uses: None,
            max_sessions: None,
            bind: Bind::default(),
            subject: String::new(),
            purpose: String::new(),
        }
    }

    /// How long the handle lives without renewal. The broker cuts it to its maximum.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
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

    /// How it is tied to this process.
    pub fn bind(mut self, bind: Bind) -> Self {
        self.bind = bind;
        self
    }

    /// An opaque name of whom it is for: at most 128 bytes of printable ASCII.
    pub fn subject(mut self, subject: impl Into<String>) -> Self {
        self.subject = subject.into();
        self
    }

    /// What it is for, for people: `[A-Za-z0-9 _.-]{0,64}`.
    pub fn purpose(mut self, purpose: impl Into<String>) -> Self {
        self.purpose = purpose.into();
        self
    }

    pub(crate) fn into_wire(self) -> Result<v1::RegisterRequest, Error> {
        Ok(v1::RegisterRequest {
            connection: self.connection,
            username: self.username,
            ttl: self.ttl.map(span).transpose()?,
            max_uses: self.max_uses,
            max_sessions: self.max_sessions,
            bind: self.bind.into_wire().into(),
            subject: self.subject,
            purpose: self.purpose,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_set_is_sent() {
        let request = RegisterRequest::new("scratch", "alice")
            .ttl(Duration::from_secs(60))
            .max_uses(3)
            .max_sessions(2)
            .bind(Bind::Process)
            .subject("s")
            .purpose("p");
        let expected = v1::RegisterRequest {
            connection: "scratch".into(),
            username: "alice".into(),
            ttl: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
            max_uses: Some(3),
            max_sessions: Some(2),
            bind: v1::Bind::Process.into(),
            subject: "s".into(),
            purpose: "p".into(),
        };
        assert_eq!(request.into_wire().unwrap(), expected);
    }
}
