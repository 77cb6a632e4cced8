//! `RevokeCredentialToken`: ends a token of the caller, with its sessions.

use credbroker_proto::v1::{RevokeCredentialTokenRequest, RevokeCredentialTokenResponse};

use crate::app::{App, Principal};
use crate::broker::Token;
use crate::error::Failure;

pub(super) async fn run(
    app: &App,
    caller: &Principal,
    request: RevokeCredentialTokenRequest,
) -> Result<RevokeCredentialTokenResponse, Failure> {
    let token = Token::parse(&request.credential_token)
        .map_err(|_not_a_token| Failure::handle_invalid())?;
    app.revoke_token(caller, &token).await?;
    Ok(RevokeCredentialTokenResponse {})
}
