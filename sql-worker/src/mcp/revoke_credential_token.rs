//! `revoke_credential_token`: ends a token of the caller, with its sessions.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::tool::{Hints, Tool};
use crate::app::{App, Principal};
use crate::broker::Token;
use crate::error::Failure;

/// The tool.
pub(super) struct RevokeCredentialToken;

/// Which one.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Arguments {
    credential_token: String,
}

/// That it is gone.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Output {
    success: bool,
    revoked: bool,
}

impl Tool for RevokeCredentialToken {
    const NAME: &'static str = "revoke_credential_token";
    const TITLE: &'static str = "Revoke a credential token";
    const DESCRIPTION: &'static str = "Ends a token at once, with its sessions and statements.";
    const HINTS: Hints = Hints::Ends;
    type Arguments = Arguments;
    type Output = Output;

    async fn run(app: &App, caller: &Principal, arguments: Arguments) -> Result<Output, Failure> {
        let token = Token::parse(&arguments.credential_token)
            .map_err(|_not_a_token| Failure::handle_invalid())?;
        app.revoke_token(caller, &token).await?;
        Ok(Output { success: true, revoked: true })
    }
}
