//! `create_credential_token`: a handle on a connection's own credential, for the caller; or, with
//! `--allow-inline-secrets`, on a login that the call brings.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::list_connections::ConnectionResult;
use super::schema::object;
use super::secrets::{InlineSecret, inline_secret};
use super::tool::{Hints, Tool};
use crate::app::{App, Principal};
use crate::error::Failure;

const MINUTES: std::ops::RangeInclusive<u64> = 1..=1440;
const DEFAULT_MINUTES: u64 = 30;

/// The tool.
pub(super) struct CreateCredentialToken;

/// For what, and for how long.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Arguments {
    /// From list_connections.
    database: String,
    /// Refused, unless the worker was started to take it.
    username: Option<String>,
    /// As username: never send one.
    #[schemars(with = "Option<String>")]
    password: Option<InlineSecret>,
    /// Default 30.
    #[schemars(range(min = 1, max = 1440))]
    expiry_minutes: Option<u64>,
}

/// The token.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Output {
    success: bool,
    credential_token: String,
    /// RFC 3339.
    expires_at: String,
    #[schemars(schema_with = "object")]
    connection: ConnectionResult,
}

impl Arguments {
    fn ttl(&self) -> Result<Duration, Failure> {
        let minutes = self.expiry_minutes.unwrap_or(DEFAULT_MINUTES);
        if !MINUTES.contains(&minutes) {
            return Err(Failure::invalid("expiry_minutes must be between 1 and 1440"));
        }
        Ok(Duration::from_secs(minutes * 60))
    }
}

impl Tool for CreateCredentialToken {
    const NAME: &'static str = "create_credential_token";
    const TITLE: &'static str = "Create a credential token";
    const DESCRIPTION: &'static str = "Makes a token for execute_sql on the stored credential, for this \
        caller only. It lives expiry_minutes, or less where the broker says so.";
    const HINTS: Hints = Hints::Adds;
    type Arguments = Arguments;
    type Output = Output;

    async fn run(app: &App, caller: &Principal, arguments: Arguments) -> Result<Output, Failure> {
        let ttl = arguments.ttl();
        let Arguments { database, username, password, .. } = arguments;
        let login = inline_secret(app.inline_secrets(), username, password)?;
        let (token, expires, connection) = match login {
            None => app.create_token(caller, &database, ttl?).await?,
            Some(login) => app.register_token(caller, &database, login, ttl?).await?,
        };
        let access = app.access_of(&connection.name);
        Ok(Output {
            success: true,
            credential_token: token.expose().to_owned(),
            expires_at: humantime::format_rfc3339_seconds(expires).to_string(),
            connection: ConnectionResult::of(connection, access),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ttl(arguments: serde_json::Value) -> Result<Duration, Failure> {
        serde_json::from_value::<Arguments>(arguments).unwrap().ttl()
    }

    #[test]
    fn minutes_have_a_default_and_bounds() {
        assert_eq!(ttl(json!({"database": "d"})), Ok(Duration::from_secs(1800)));
        let minutes = |m: u64| ttl(json!({"database": "d", "expiry_minutes": m}));
        assert_eq!(minutes(1), Ok(Duration::from_secs(60)));
        assert_eq!(minutes(1440), Ok(Duration::from_secs(86_400)));
        assert!(minutes(0).is_err() && minutes(1441).is_err() && minutes(u64::MAX).is_err());
    }
}
