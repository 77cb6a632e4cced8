//! What is asked of the broker by an operator who stores a credential.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use credbroker_proto::v1;

use super::span;
use crate::Error;

/// A request to store a credential; the secret comes beside it, as a
/// [`Secret`](crate::Secret). What is not set is the broker's default.
#[derive(Clone, Debug)]
#[must_use]
pub struct PutRequest {
    connection: String,
    username: String,
    expires_at: Option<SystemTime>,
    labels: HashMap<String, String>,
    grace: Option<Duration>,
}

impl PutRequest {
    /// For the connection with this name.
    pub fn new(connection: impl Into<String>) -> Self {
        Self {
            connection: connection.into(),
            username: String::new(),
            expires_at: None,
            labels: HashMap::new(),
            grace: None,
        }
    }

    /// The database role. Default: the configured one, else the secret is `username:password`.
    pub fn username(mut self, username: impl Into<String>) -> Self {
        self.username = username.into();
        self
    }

    /// When it will be of no use any more, for warnings and metrics.
    pub fn expires_at(mut self, at: SystemTime) -> Self {
        self.expires_at = Some(at);
        self
    }

    /// For people: at most 16, keys and values of at most 64 printable ASCII characters.
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.labels.insert(key.into(), value.into());
        self
    }

    /// How long sessions of the version before may go on; zero cuts them at once.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = Some(grace);
        self
    }

    pub(crate) fn into_wire(self) -> Result<v1::PutRequest, Error> {
        Ok(v1::PutRequest {
            connection: self.connection,
            username: self.username,
            expires_at: self.expires_at.map(Into::into),
            labels: self.labels,
            grace: self.grace.map(span).transpose()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_set_is_sent() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(100);
        let request = PutRequest::new("main_db").username("app").expires_at(at).label("k", "v");
        let expected = v1::PutRequest {
            connection: "main_db".into(),
            username: "app".into(),
            expires_at: Some(prost_types::Timestamp { seconds: 100, nanos: 0 }),
            labels: HashMap::from([("k".into(), "v".into())]),
            grace: Some(prost_types::Duration { seconds: 0, nanos: 0 }),
        };
        assert_eq!(request.grace(Duration::ZERO).into_wire().unwrap(), expected);
        assert_eq!(PutRequest::new("main_db").into_wire().unwrap().grace, None);
    }
}
