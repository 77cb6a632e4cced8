//! `ListSqlConnections`: what may be used, masked.

use credbroker_proto::v1::{ListSqlConnectionsRequest, ListSqlConnectionsResponse, SqlConnection};

use crate::app::{App, Principal};
use crate::error::Failure;

pub(super) async fn run(
    app: &App,
    _caller: &Principal,
    ListSqlConnectionsRequest {}: ListSqlConnectionsRequest,
) -> Result<ListSqlConnectionsResponse, Failure> {
    let connections = app.connections().await?.into_iter().map(|connection| SqlConnection {
        name: connection.name,
        r#type: connection.kind,
        target: connection.target,
        needs_credential: !connection.has_credential,
    });
    Ok(ListSqlConnectionsResponse { connections: connections.collect() })
}
