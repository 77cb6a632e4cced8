//! Statements, parameters and results. sqlx lives in here only.
//!
//! A call is: [`Statement::parse`] (pure) → [`Pool::lease`] → [`execute`]. Invariants:
//! statements go by the extended protocol, one at a time, each in a transaction of ours; what
//! the [`Policy`] of a pool does not allow cannot be run on it; rows are streamed and bounded; a
//! connection whose statement did not come to a clean end is closed, which is what ends the
//! statement in the database, and never used again.

pub mod catalogue;
mod csv;
mod described;
mod explain;
mod failure;
mod guard;
mod lexer;
mod limits;
pub mod paging;
mod params;
mod pattern;
mod plan;
mod policy;
mod pool;
mod postgres;
mod relay;
mod roles;
mod sink;
mod statement;
mod transaction;
mod types;
mod value;
mod with;

use std::time::Duration;

use serde_json::Value;

pub use explain::{Explanation, explain};
pub use guard::Guard;
pub(crate) use limits::MAX_ROWS_CEILING;
pub use limits::{Cut, Limits};
pub use params::{Params, Script};
pub use pattern::{ColumnPattern, TablePattern};
pub use policy::{Access, Policy, Role};
pub use pool::{Lease, Pool, PoolSettings, Target};
pub use postgres::{execute, execute_into};
pub use sink::{Batch, Sink, Summary};
pub use statement::Statement;
pub(crate) use transaction::Left;

/// In which form rows are collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// An array of arrays.
    #[default]
    Json,
    /// RFC 4180 text.
    Csv,
}

/// What a statement gave.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// Rows, if only none of them.
    Rows(ResultSet),
    /// A statement without a result set.
    Done {
        /// Rows that it changed.
        affected_rows: u64,
        /// How long it took.
        elapsed: Duration,
    },
}

/// The rows of a statement, as many as the limits allowed.
#[derive(Debug, Clone, PartialEq)]
pub struct ResultSet {
    /// The columns, in order; names may repeat.
    pub columns: Vec<Column>,
    /// The rows.
    pub body: Body,
    /// How many rows there are in `body`.
    pub row_count: usize,
    /// Rows that were changed, where the statement wrote; `row_count` may be less.
    pub affected_rows: Option<u64>,
    /// Why there is less in `body` than the statement gave; `None` when all of it is there.
    pub cut: Option<Cut>,
    /// How long it took.
    pub elapsed: Duration,
}

/// A column of a result set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Its name in the result.
    pub name: String,
    /// PostgreSQL's name of its type: `int8`, `text[]`, ….
    pub type_name: String,
    /// Whether its values are replaced by `[masked]`.
    pub masked: bool,
}

/// Rows in the form that was asked for.
#[derive(Debug, Clone, PartialEq)]
pub enum Body {
    /// One array of cells a row.
    Rows(Vec<Value>),
    /// A header line and one record a row.
    Csv(String),
}

impl Body {
    fn empty(format: Format) -> Self {
        match format {
            Format::Json => Self::Rows(Vec::new()),
            Format::Csv => Self::Csv(String::new()),
        }
    }
}
