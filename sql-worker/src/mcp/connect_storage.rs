//! `connect_storage`: opens the connection that leads to a destination.
//!
//! The destination is only looked up: the broker compares it with its own configuration and
//! gives a connection's name, or none. Nothing that was given here is dialled, sent anywhere
//! else, or repeated in an answer.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::connection_string::ConnectionString;
use super::secrets::{InlineSecret, in_a_text, inline_secret};
use super::tool::{Hints, Tool};
use crate::app::{App, Principal};
use crate::broker::{Destination, Login};
use crate::config::InlineSecrets;
use crate::error::{Code, Failure};

/// Bytes of one argument.
const MAX_ARGUMENT: usize = 1024;

/// The tool.
pub(super) struct ConnectStorage;

/// Where to.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Arguments {
    /// postgresql
    storage_type: Option<String>,
    host: Option<String>,
    database: Option<String>,
    #[schemars(with = "Option<i64>")]
    port: Option<u16>,
    /// Ignored without password.
    username: Option<String>,
    /// Refused, unless the worker was started to take it: never send one.
    #[schemars(with = "Option<String>")]
    password: Option<InlineSecret>,
    /// URL or key=value text, instead of the others.
    connection_string: Option<String>,
}

/// Its reference.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Output {
    success: bool,
    connection_id: String,
    /// Masked.
    connection_string: String,
}

impl Arguments {
    /// Where to, and the login that was brought.
    fn read(self, allowed: InlineSecrets) -> Result<(Destination, Option<Login>), Failure> {
        // Alone it says nothing: the broker's credential says who logs in.
        let username = self.username.filter(|_| self.password.is_some());
        let login = inline_secret(allowed, username, self.password)?;
        let storage_type = self.storage_type.as_deref();
        if storage_type.is_some_and(|kind| !["postgresql", "postgres"].contains(&kind)) {
            return Err(Failure::new(Code::Unsupported, "storage_type must be postgresql"));
        }
        let Some(text) = self.connection_string else {
            return match (storage_type, self.host, self.database) {
                (Some(_), Some(host), Some(database))
                    if host.len() <= MAX_ARGUMENT && database.len() <= MAX_ARGUMENT =>
                {
                    Ok((Destination { host, port: self.port, database }, login))
                }
                (Some(_), Some(_), Some(_)) => {
                    Err(Failure::invalid("host or database is too long"))
                }
                (None, _, _) | (_, None, _) | (_, _, None) => Err(Failure::invalid(
                    "give storage_type, host and database, or connection_string",
                )),
            };
        };
        if self.host.is_some() || self.database.is_some() || self.port.is_some() {
            return Err(Failure::invalid("give connection_string or host, database and port"));
        }
        let parsed = ConnectionString::parse(&text)?;
        if parsed.has_secret {
            return Err(in_a_text(allowed));
        }
        Ok((parsed.destination, login))
    }
}

impl Tool for ConnectStorage {
    const NAME: &'static str = "connect_storage";
    const TITLE: &'static str = "Open by destination";
    const DESCRIPTION: &'static str = "Opens the configured connection to a host and database. Its connection_id \
        lives until disconnect or the server's end.";
    const HINTS: Hints = Hints::Adds;
    type Arguments = Arguments;
    type Output = Output;

    async fn run(app: &App, caller: &Principal, arguments: Arguments) -> Result<Output, Failure> {
        let (destination, login) = arguments.read(app.inline_secrets())?;
        let (connection_id, connection) = app.connect_to(caller, &destination, login).await?;
        Ok(Output { success: true, connection_id, connection_string: connection.target })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn destination(arguments: Value) -> Result<Destination, Failure> {
        serde_json::from_value::<Arguments>(arguments).unwrap().read(InlineSecrets::Refused).map(
            |(to, login)| {
                assert!(login.is_none());
                to
            },
        )
    }

    #[test]
    fn a_destination_comes_from_parts_or_from_a_text() {
        let parts = json!({"storage_type": "postgresql", "host": "db", "database": "app",
            "username": "ignored", "port": 6432});
        let text = json!({"connection_string": "postgres://ignored@db:6432/app"});
        let expected = Destination { host: "db".into(), port: Some(6432), database: "app".into() };
        assert_eq!(destination(parts).unwrap(), expected);
        assert_eq!(destination(text).unwrap(), expected);
    }

    #[test]
    fn what_is_missing_or_too_much_is_said_without_values() {
        let long = "x".repeat(MAX_ARGUMENT + 1);
        let cases = [
            (json!({}), Code::InvalidRequest),
            (json!({"storage_type": "postgresql", "host": "canary"}), Code::InvalidRequest),
            (json!({"host": "canary", "database": "canary"}), Code::InvalidRequest),
            (
                json!({"storage_type": "postgresql", "host": long, "database": "canary"}),
                Code::InvalidRequest,
            ),
            (
                json!({"storage_type": "canary", "host": "canary", "database": "canary"}),
                Code::Unsupported,
            ),
            (json!({"connection_string": "postgres://canary/x", "port": 1}), Code::InvalidRequest),
            (
                json!({"storage_type": "postgresql", "host": "canary", "database": "canary",
                    "password": "canary"}),
                Code::Unsupported,
            ),
            (json!({"connection_string": "postgres://u:canary@h/d"}), Code::Unsupported),
            (json!({"connection_string": "host=h password=canary"}), Code::Unsupported),
            (json!({"connection_string": "canary"}), Code::InvalidRequest),
        ];
        for (arguments, code) in cases {
            let failure = destination(arguments).unwrap_err();
            assert_eq!(failure.code(), code, "{failure}");
            assert!(!failure.to_json().to_string().contains("canary"), "{failure}");
        }
    }
}
