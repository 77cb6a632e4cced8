//! `credbroker list`: the connections that the caller may use, masked.

use std::process::ExitCode;

use credbroker_client::ConnectionInfo;
use serde::Serialize;

use crate::args::Global;
use crate::failure::Failure;
use crate::output::{ConnectionView, table};

#[derive(Serialize)]
struct View<'a> {
    connections: Vec<ConnectionView<'a>>,
}

pub(crate) fn run(global: &Global) -> Result<ExitCode, Failure> {
    let connections = global.with_client(async |client| Ok(client.list_connections().await?))?;
    let view = View { connections: connections.iter().map(ConnectionView::from).collect() };
    global.output.print(&view, || text(&connections))?;
    Ok(ExitCode::SUCCESS)
}

fn text(connections: &[ConnectionInfo]) -> String {
    let rows: Vec<_> = connections
        .iter()
        .map(|connection| {
            [
                connection.name.clone(),
                connection.kind.clone(),
                connection.target.clone(),
                connection.may.join(","),
                if connection.has_credential { "yes" } else { "missing" }.to_owned(),
            ]
        })
        .collect();
    table(["NAME", "TYPE", "TARGET", "MAY", "CREDENTIAL"], &rows)
}
