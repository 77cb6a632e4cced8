//! `ConnectNamed`: opens a connection and names it.

use credbroker_proto::v1::{ConnectNamedRequest, ConnectNamedResponse};

use crate::app::{App, Principal};
use crate::error::Failure;

pub(super) async fn run(
    app: &App,
    caller: &Principal,
    request: ConnectNamedRequest,
) -> Result<ConnectNamedResponse, Failure> {
    let connection_id = app.connect(caller, &request.connection_name).await?;
    Ok(ConnectNamedResponse { connection_id })
}
