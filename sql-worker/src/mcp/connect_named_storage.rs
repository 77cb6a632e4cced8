//! `connect_named_storage`: opens a connection and names it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::tool::{Hints, Tool};
use crate::app::{App, Principal};
use crate::error::Failure;

/// The tool.
pub(super) struct ConnectNamedStorage;

/// Which one.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Arguments {
    /// From list_connections.
    connection_name: String,
}

/// Its reference.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Output {
    success: bool,
    connection_id: String,
    connection_name: String,
}

impl Tool for ConnectNamedStorage {
    const NAME: &'static str = "connect_named_storage";
    const TITLE: &'static str = "Open a named connection";
    const DESCRIPTION: &'static str = "Opens a connection. Its connection_id, for execute_query, lives until \
        disconnect or the server's end.";
    const HINTS: Hints = Hints::Adds;
    type Arguments = Arguments;
    type Output = Output;

    async fn run(app: &App, caller: &Principal, arguments: Arguments) -> Result<Output, Failure> {
        let connection_name = arguments.connection_name;
        let connection_id = app.connect(caller, &connection_name).await?;
        Ok(Output { success: true, connection_id, connection_name })
    }
}
