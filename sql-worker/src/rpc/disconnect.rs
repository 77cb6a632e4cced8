//! `Disconnect`: ends what `Connect` or `ConnectNamed` opened.

use credbroker_proto::v1::{DisconnectRequest, DisconnectResponse};

use crate::app::{App, Principal};
use crate::error::Failure;

pub(super) async fn run(
    app: &App,
    caller: &Principal,
    request: DisconnectRequest,
) -> Result<DisconnectResponse, Failure> {
    app.disconnect(caller, &request.connection_id).await?;
    Ok(DisconnectResponse {})
}
