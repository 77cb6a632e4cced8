//! `disconnect`: ends what `connect_named_storage` opened.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::tool::{Hints, Tool};
use crate::app::{App, Principal};
use crate::error::Failure;

/// The tool.
pub(super) struct Disconnect;

/// Which one.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Arguments {
    connection_id: String,
}

/// That it is gone.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Output {
    success: bool,
    disconnected: bool,
}

impl Tool for Disconnect {
    const NAME: &'static str = "disconnect";
    const TITLE: &'static str = "Close an open connection";
    const DESCRIPTION: &'static str = "Closes a connection_id, with its sessions and statements.";
    const HINTS: Hints = Hints::Ends;
    type Arguments = Arguments;
    type Output = Output;

    async fn run(app: &App, caller: &Principal, arguments: Arguments) -> Result<Output, Failure> {
        app.disconnect(caller, &arguments.connection_id).await?;
        Ok(Output { success: true, disconnected: true })
    }
}
