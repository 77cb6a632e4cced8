//! `ExecuteQuery`: one statement, its rows as they come.

use std::time::Duration;

use credbroker_proto::v1::{ExecuteQueryRequest, SqlFormat};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::call::Call;
use super::outlet::{Outlet, Parts, channel};
use super::place::place;
use super::value;
use crate::app::{App, Principal, Request};
use crate::broker::Token;
use crate::error::Failure;
use crate::sql::{Format, Summary};

/// How long a client may leave the rest of an answer unread once its statement has ended: what
/// is left stays in memory for that long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Starts it. It is stopped when the parts are dropped. `lost` is fired when nobody takes them.
pub(super) fn start(
    call: Call,
    tasks: &TaskTracker,
    lost: CancellationToken,
    request: ExecuteQueryRequest,
) -> Parts {
    let (outlet, ending, parts) = channel();
    tasks.spawn(async move {
        let watch = outlet.watch();
        let outcome = tokio::select! {
            biased;
            () = watch.gone() => Err(Failure::cancelled()),
            outcome = call.bounded(run(&call.app, &call.caller, request, outlet)) => outcome,
        };
        call.log(&outcome);
        // What it holds open is closed, or the client would wait for more.
        drop(watch);
        if !ending.tell(outcome, PATIENCE, &lost).await {
            tracing::warn!(principal = call.caller.subject(), "an answer was left unread");
        }
    });
    parts
}

async fn run(
    app: &App,
    caller: &Principal,
    request: ExecuteQueryRequest,
    mut outlet: Outlet,
) -> Result<Summary, Failure> {
    let format = match SqlFormat::try_from(request.format) {
        Ok(SqlFormat::Unspecified | SqlFormat::Rows) => Format::Json,
        Ok(SqlFormat::Csv) => Format::Csv,
        Err(_unknown) => return Err(Failure::invalid("format is unknown")),
    };
    let place = place(request.target)?;
    let token = match request.credential_token.as_str() {
        "" => None,
        text => Some(Token::parse(text).map_err(|_not_a_token| Failure::handle_invalid())?),
    };
    let statement = Request {
        sql: &request.sql,
        params: value::params(request.params)?,
        max_rows: request.max_rows.map(|rows| usize::try_from(rows).unwrap_or(usize::MAX)),
        format,
        readonly: request.readonly,
    };
    let source = place.source_with(token.as_ref())?;
    app.run_into(caller, source, statement, &mut outlet).await
}
