//! One call: admitted, run, ended early when its time or the worker's is over, and logged.

use std::future::pending;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use tokio::time::sleep_until;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;
use tonic::{Response, Status};

use super::status;
use crate::app::{App, Principal, Share};
use crate::error::{Code, Failure};

/// Who calls what, until when.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) app: Arc<App>,
    pub(super) caller: Principal,
    verb: &'static str,
    started: Instant,
    deadline: Option<tokio::time::Instant>,
    stop: CancellationToken,
    share: Option<Result<Share, Failure>>,
}

impl Call {
    pub(super) fn new(
        verb: &'static str,
        app: Arc<App>,
        caller: Principal,
        stop: CancellationToken,
        metadata: &MetadataMap,
    ) -> Self {
        let given = metadata.get("grpc-timeout").and_then(|value| value.to_str().ok());
        let deadline =
            given.and_then(span).and_then(|span| tokio::time::Instant::now().checked_add(span));
        Self { app, caller, verb, started: Instant::now(), deadline, stop, share: None }
    }

    /// With what it takes of its caller's room, or why there was none.
    pub(super) fn with_share(self, share: Result<Share, Failure>) -> Self {
        Self { share: Some(share), ..self }
    }

    /// The answer of a call that has one. Dropping the future stops what it does.
    pub(super) async fn answer<T>(
        self,
        work: impl AsyncFnOnce(&App, &Principal) -> Result<T, Failure>,
    ) -> Result<Response<T>, Status> {
        let outcome = self.bounded(work(&self.app, &self.caller)).await;
        self.log(&outcome);
        outcome.map(Response::new).map_err(|failure| status::refused(&failure))
    }

    /// What `work` gives, unless something ends before it does.
    pub(super) async fn bounded<T>(
        &self,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        self.app.admit(&self.caller)?;
        if let Some(Err(none)) = &self.share {
            return Err(none.clone());
        }
        let over = async {
            match self.deadline {
                Some(deadline) => sleep_until(deadline).await,
                None => pending().await,
            }
        };
        // What a call leaves behind when it unwinds is dropped with it: a session in the middle
        // of something is not given back to its pool.
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(Failure::cancelled()),
            () = over => {
                Err(Failure::new(Code::Timeout, "the call's deadline is over; it was stopped"))
            }
            done = AssertUnwindSafe(work).catch_unwind() => done.unwrap_or_else(|_logged| {
                Err(Failure::new(Code::Internal, "the worker failed at this call"))
            }),
        }
    }

    pub(super) fn log<T>(&self, outcome: &Result<T, Failure>) {
        let code = outcome.as_ref().map_or_else(|failure| failure.code().as_str(), |_| "OK");
        tracing::info!(
            principal = self.caller.subject(),
            verb = self.verb,
            code,
            elapsed_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            "call"
        );
    }
}

/// A `grpc-timeout`: at most eight digits and a unit (gRPC over HTTP/2, "Requests"). What is
/// none of that is ignored: the statement's own time bounds the call.
fn span(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if !(1..=8).contains(&digits.len()) || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_digits_and_a_unit() {
        assert_eq!(span("1H"), Some(Duration::from_secs(3600)));
        assert_eq!(span("99999999M"), Some(Duration::from_secs(5_999_999_940)));
        assert_eq!(span("3S"), Some(Duration::from_secs(3)));
        assert_eq!(span("250m"), Some(Duration::from_millis(250)));
        assert_eq!(span("7u"), Some(Duration::from_micros(7)));
        assert_eq!(span("0n"), Some(Duration::ZERO));
        for text in ["", "S", "1", "1s", "-1S", "+1S", "123456789S", "1é", "é"] {
            assert_eq!(span(text), None, "{text}");
        }
    }
}
