//! From a statement to an answer in parts.
//!
//! The statement runs in a task of its own, so that its time is over also while nobody reads.
//! One part waits between the two: beyond that, and the buffer of the connection, what the
//! client does not take is not read from the database. How it ended comes by a way of its own,
//! so that a statement is done with its session whether or not its last part was taken.

use std::fmt;
use std::time::Duration;

use credbroker_proto::v1::execute_query_response::Part;
use credbroker_proto::v1::{ExecuteQueryResponse, SqlColumn, SqlColumns, SqlCsv, SqlDone, SqlRows};
use futures_util::stream::{self, BoxStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{status, value};
use crate::error::{Code, Failure};
use crate::sql::{Batch, Body, Column, Sink, Summary};

/// An answer in parts.
pub(super) type Parts = BoxStream<'static, Result<ExecuteQueryResponse, Status>>;

/// Where a statement puts its rows.
#[derive(Debug)]
pub(super) struct Outlet(mpsc::Sender<Part>);

/// Tells how the statement ended.
pub(super) struct Ending {
    outcome: oneshot::Sender<Result<Summary, Failure>>,
    taken: CancellationToken,
}

/// Both, and what the client gets.
pub(super) fn channel() -> (Outlet, Ending, Parts) {
    let (outlet, parts) = mpsc::channel(1);
    let (outcome, ended) = oneshot::channel();
    let taken = CancellationToken::new();
    let start = (parts, Some(ended), taken.clone().drop_guard());
    let parts = stream::unfold(start, async |(mut parts, ended, guard)| {
        if let Some(part) = parts.recv().await {
            return Some((Ok(response(part)), (parts, ended, guard)));
        }
        let lost = |_gone| Err(Failure::new(Code::Internal, "the worker failed at this call"));
        let outcome = ended?.await.unwrap_or_else(lost);
        let last = outcome.map(|summary| response(Part::Done(done(&summary))));
        Some((last.map_err(|failure| status::refused(&failure)), (parts, None, guard)))
    });
    (Outlet(outlet), Ending { outcome, taken }, Box::pin(parts))
}

impl Outlet {
    /// A second way into the same, which does not keep the client from seeing its end.
    pub(super) fn watch(&self) -> Watch {
        Watch(self.0.clone())
    }

    async fn put(&self, part: Part) -> Result<(), Failure> {
        self.0.send(part).await.map_err(|_gone| Failure::cancelled())
    }
}

/// Sees when nobody is left to take anything.
#[derive(Debug)]
pub(super) struct Watch(mpsc::Sender<Part>);

impl Watch {
    pub(super) async fn gone(&self) {
        self.0.closed().await;
    }
}

impl Ending {
    /// Waits until the client has taken everything or is gone. One that does not in time is
    /// lost; gives whether it was not.
    pub(super) async fn tell(
        self,
        outcome: Result<Summary, Failure>,
        patience: Duration,
        lost: &CancellationToken,
    ) -> bool {
        // Nobody may be left.
        let _ = self.outcome.send(outcome);
        let taken = timeout(patience, self.taken.cancelled());
        let in_time = lost.run_until_cancelled(taken).await.is_none_or(|taken| taken.is_ok());
        if !in_time {
            lost.cancel();
        }
        in_time
    }
}

impl fmt::Debug for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ending")
    }
}

impl Sink for Outlet {
    async fn columns(&mut self, columns: &[Column]) -> Result<(), Failure> {
        let columns = columns.iter().map(|column| SqlColumn {
            name: column.name.clone(),
            r#type: column.type_name.clone(),
            masked: column.masked,
        });
        self.put(Part::Columns(SqlColumns { columns: columns.collect() })).await
    }

    async fn batch(&mut self, batch: Batch) -> Result<(), Failure> {
        let rows = count(batch.rows);
        self.put(match batch.body {
            Body::Rows(list) => {
                Part::Rows(SqlRows { rows: list.into_iter().map(value::row).collect() })
            }
            Body::Csv(text) => Part::Csv(SqlCsv { text, rows }),
        })
        .await
    }
}

fn response(part: Part) -> ExecuteQueryResponse {
    ExecuteQueryResponse { part: Some(part) }
}

fn done(summary: &Summary) -> SqlDone {
    SqlDone {
        row_count: count(summary.row_count),
        affected_rows: summary.affected_rows,
        truncated: summary.cut.is_some(),
        truncated_reason: summary.cut.map(|cut| cut.as_str().to_owned()).unwrap_or_default(),
        elapsed: prost_types::Duration::try_from(summary.elapsed).ok(),
    }
}

fn count(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;

    use super::*;

    fn part(answer: Option<Result<ExecuteQueryResponse, Status>>) -> Part {
        answer.unwrap().unwrap().part.unwrap()
    }

    #[tokio::test]
    async fn an_answer_ends_with_done_or_with_an_error() {
        let summary = Summary {
            row_count: 0,
            affected_rows: Some(3),
            cut: None,
            elapsed: Duration::from_millis(5),
        };
        let (mut outlet, ending, mut parts) = channel();
        outlet.columns(&[]).await.unwrap();
        drop(outlet);
        let lost = CancellationToken::new();
        let told = tokio_util::task::TaskTracker::new().spawn({
            let lost = lost.clone();
            async move { ending.tell(Ok(summary), Duration::from_secs(60), &lost).await }
        });
        assert_eq!(part(parts.next().await), Part::Columns(SqlColumns::default()));
        let Part::Done(done) = part(parts.next().await) else { panic!("done is last") };
        assert_eq!((done.affected_rows, done.truncated), (Some(3), false));
        assert!(parts.next().await.is_none());
        assert!(told.await.unwrap() && !lost.is_cancelled());

        let (outlet, ending, mut parts) = channel();
        drop((outlet, ending));
        let lost = parts.next().await.unwrap().unwrap_err();
        assert_eq!(lost.code(), tonic::Code::Internal);
        assert!(parts.next().await.is_none());
    }

    #[tokio::test]
    async fn a_client_that_leaves_an_answer_unread_is_lost() {
        let (outlet, ending, _parts) = channel();
        drop(outlet);
        let lost = CancellationToken::new();
        let patience = Duration::from_millis(10);
        assert!(!ending.tell(Err(Failure::cancelled()), patience, &lost).await);
        assert!(lost.is_cancelled());
    }

    #[tokio::test]
    async fn what_is_not_taken_is_waited_for_and_a_reader_that_left_is_seen() {
        let (mut outlet, _ending, parts) = channel();
        let watch = outlet.watch();
        outlet.columns(&[]).await.unwrap();
        let more = Batch { body: Body::Csv("a\r\n".into()), rows: 0 };
        let mut waiting = Box::pin(outlet.batch(more));
        assert!(futures_util::poll!(&mut waiting).is_pending());
        drop(parts);
        watch.gone().await;
        assert_eq!(waiting.await.unwrap_err().code(), Code::Cancelled);
    }
}
