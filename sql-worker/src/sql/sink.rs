//! Where rows go: in batches, as they come.

use super::{Body, Column, Cut, Format};
use crate::error::Failure;

/// Some rows of a result, in the form that was asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// The rows; the first batch of CSV begins with the header line.
    pub body: Body,
    /// How many there are.
    pub rows: usize,
}

/// What takes the rows of a statement.
///
/// The statement waits for it: nothing more is read from the database until `batch` returns,
/// and all of it counts as time of the statement. A failure stops the statement. Rows of a
/// statement that writes are delivered before it is committed: they hold when
/// [`execute_into`](super::execute_into) has succeeded.
pub trait Sink: Send {
    /// Takes the columns, once, before any row; none for a statement without a result set.
    fn columns(&mut self, columns: &[Column]) -> impl Future<Output = Result<(), Failure>> + Send;
    /// Takes the next rows.
    fn batch(&mut self, batch: Batch) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// How a statement ended, when all that it gave is delivered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Rows that were delivered.
    pub row_count: usize,
    /// Rows that were changed, where the statement wrote or has no result set.
    pub affected_rows: Option<u64>,
    /// Why less was delivered than the statement gave; `None` when it was all.
    pub cut: Option<Cut>,
    /// How long it took.
    pub elapsed: std::time::Duration,
}

/// Keeps everything.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) columns: Vec<Column>,
    pub(super) body: Body,
}

impl Kept {
    pub(super) fn new(format: Format) -> Self {
        Self { columns: Vec::new(), body: Body::empty(format) }
    }
}

impl Sink for Kept {
    async fn columns(&mut self, columns: &[Column]) -> Result<(), Failure> {
        self.columns = columns.to_vec();
        Ok(())
    }

    async fn batch(&mut self, batch: Batch) -> Result<(), Failure> {
        match (&mut self.body, batch.body) {
            (Body::Rows(kept), Body::Rows(rows)) => kept.extend(rows),
            (Body::Csv(kept), Body::Csv(text)) => kept.push_str(&text),
            // One statement has one format.
            (kept, other) => *kept = other,
        }
        Ok(())
    }
}
