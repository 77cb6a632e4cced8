//! `credbroker handle list`: what the caller holds or may redeem.

use std::process::ExitCode;

use credbroker_client::HandleInfo;
use serde::Serialize;

use crate::args::Global;
use crate::failure::Failure;
use crate::output::{HandleView, bind_name, from_now, or_dash, table};

#[derive(Serialize)]
struct View<'a> {
    handles: Vec<HandleView<'a>>,
    truncated: bool,
}

pub(crate) fn run(global: &Global) -> Result<ExitCode, Failure> {
    let list = global.with_client(async |client| Ok(client.list_handles().await?))?;
    let view = View {
        handles: list.handles.iter().map(HandleView::from).collect(),
        truncated: list.truncated,
    };
    global.output.print(&view, || text(&list.handles))?;
    if list.truncated {
        global.output.warn("there are more handles than are shown");
    }
    Ok(ExitCode::SUCCESS)
}

fn text(handles: &[HandleInfo]) -> String {
    let rows: Vec<_> = handles.iter().map(row).collect();
    let header = [
        "ID",
        "CONNECTION",
        "EXPIRES",
        "SESSIONS",
        "USES",
        "HOLDER",
        "REDEEMER",
        "BIND",
        "SUBJECT",
        "PURPOSE",
    ];
    table(header, &rows)
}

fn row(handle: &HandleInfo) -> [String; 10] {
    [
        handle.id.clone(),
        handle.connection.clone(),
        from_now(handle.expires),
        handle.sessions.to_string(),
        or_dash(handle.uses_left),
        handle.holder.to_string(),
        or_dash(handle.redeemer),
        bind_name(handle.bind).to_owned(),
        or_dash(Some(&handle.subject)),
        or_dash(Some(&handle.purpose)),
    ]
}
