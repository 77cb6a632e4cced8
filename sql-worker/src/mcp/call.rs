//! One tool call: admitted, run, reported, ended early when nobody waits for it, and logged.
//!
//! Invariant: a call ends, and its statement with it, as soon as one of these does: the
//! request (`notifications/cancelled`, a stateless HTTP request that lost its client), whoever
//! would get the answer ([`Gone`]), or the transport it came by.

use std::panic::AssertUnwindSafe;
use std::time::Instant;

use futures_util::FutureExt as _;
use rmcp::RoleServer;
use rmcp::model::{CallToolResult, JsonObject};
use rmcp::service::RequestContext;
use tokio_util::sync::CancellationToken;

use super::progress::reported;
use super::tool::{Entry, Outcome};
use super::trace::TraceParent;
use super::untrusted;
use crate::app::{App, Principal, Share};
use crate::error::{Code, Failure};

/// Fires when nobody is left who would get a call's answer; rides in a request's extensions.
#[derive(Debug, Clone)]
pub(super) struct Gone(pub(super) CancellationToken);

/// What a large request takes of its principal's room, or why there was none; rides there too.
#[derive(Debug, Clone)]
pub(super) struct Weight(pub(super) Result<Share, Failure>);

impl Weight {
    /// Whether there was room for a request. HTTP weighs its own before they are read.
    fn check(context: &RequestContext<RoleServer>) -> Result<(), Failure> {
        match context.extensions.get::<Self>() {
            Some(Self(Err(failure))) => Err(failure.clone()),
            Some(Self(Ok(_))) | None => Ok(()),
        }
    }
}

/// Does what `entry` says. A refusal is a result too, with `isError`.
pub(super) async fn answer(
    app: &App,
    caller: &Principal,
    entry: &Entry,
    arguments: JsonObject,
    context: &RequestContext<RoleServer>,
    ended: &CancellationToken,
) -> CallToolResult {
    let started = Instant::now();
    let gone = context.extensions.get::<Gone>().map(|gone| gone.0.clone()).unwrap_or_default();
    let work = async {
        app.admit(caller)?;
        Weight::check(context)?;
        run(app, caller, entry, arguments).await
    };
    let outcome = tokio::select! {
        biased;
        () = context.ct.cancelled() => Err(Failure::cancelled()),
        () = gone.cancelled() => Err(Failure::cancelled()),
        () = ended.cancelled() => Err(Failure::cancelled()),
        outcome = reported(context, work) => outcome,
    };
    let code = outcome.as_ref().map_or_else(|failure| failure.code().as_str(), |_| "OK");
    let traceparent = context.meta.get_traceparent().and_then(TraceParent::parse);
    tracing::info!(
        principal = caller.subject(),
        tool = %entry.definition.name,
        code,
        elapsed_ms = millis(started),
        traceparent = traceparent.map(TraceParent::as_str),
        "call"
    );
    untrusted::result(outcome)
}

pub(super) fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

async fn run(app: &App, caller: &Principal, entry: &Entry, arguments: JsonObject) -> Outcome {
    // What a call leaves behind when it unwinds is dropped with it: a session in the middle of
    // something is not given back to its pool.
    AssertUnwindSafe(entry.run(app, caller, arguments)).catch_unwind().await.unwrap_or_else(
        |_logged_by_the_hook| Err(Failure::new(Code::Internal, "the worker failed at this call")),
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::broker::client::Remote;
    use crate::config::Config;
    use crate::mcp::tool::entry;

    #[tokio::test]
    async fn a_panic_in_a_tool_is_an_answer() {
        let mut entry = entry::<crate::mcp::list_connections::ListConnections>(false);
        entry.call = |_, _, _, _| Box::pin(async { panic!("in a tool") });
        let app = App::new(Arc::new(Remote::new(None)), Config::default());
        let failed = run(&app, &Principal::stdio(), &entry, JsonObject::new()).await.unwrap_err();
        assert_eq!(failed.code(), Code::Internal);
    }
}
