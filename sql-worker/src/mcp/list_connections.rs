//! `list_connections`: what may be used, masked.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::tool::{Hints, Tool};
use crate::app::{App, Principal};
use crate::broker::Connection;
use crate::error::Failure;
use crate::sql::Access;

/// The tool.
pub(super) struct ListConnections;

/// None.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Arguments {}

/// The connections.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Output {
    success: bool,
    connections: Vec<ConnectionResult>,
}

/// A connection, masked.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct ConnectionResult {
    name: String,
    r#type: String,
    /// Where it leads, without anything secret.
    target: String,
    /// True when a person has yet to store a credential: credbroker put NAME.
    needs_credential: bool,
    access: &'static str,
}

impl ConnectionResult {
    pub(super) fn of(connection: Connection, access: Access) -> Self {
        Self {
            name: connection.name,
            r#type: connection.kind,
            target: connection.target,
            needs_credential: !connection.has_credential,
            access: access.as_str(),
        }
    }
}

impl Tool for ListConnections {
    const NAME: &'static str = "list_connections";
    const TITLE: &'static str = "List database connections";
    const DESCRIPTION: &'static str = "Database connections that may be used: names, types, masked targets, \
        access, and whether a credential is missing.";
    const HINTS: Hints = Hints::ReadOnly;
    type Arguments = Arguments;
    type Output = Output;

    async fn run(
        app: &App,
        _caller: &Principal,
        Arguments {}: Arguments,
    ) -> Result<Output, Failure> {
        let connections = app.connections().await?;
        let result = |connection: Connection| {
            let access = app.access_of(&connection.name);
            ConnectionResult::of(connection, access)
        };
        let connections = connections.into_iter().map(result).collect();
        Ok(Output { success: true, connections })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_the_broker_holds_is_not_what_is_needed() {
        let connection = Connection {
            name: "main_db".into(),
            kind: "postgresql".into(),
            target: "postgresql://****:****@db/mydb".into(),
            may: vec!["issue".into()],
            has_credential: false,
            door: None,
        };
        assert_eq!(
            serde_json::to_value(ConnectionResult::of(connection, Access::ReadOnly)).unwrap(),
            json!({"name": "main_db", "type": "postgresql",
                "target": "postgresql://****:****@db/mydb", "needs_credential": true,
                "access": "read-only"})
        );
    }
}
