//! The transaction that a statement runs in; always one of ours.
//!
//! `BEGIN READ ONLY` alone is undone by `SET TRANSACTION READ WRITE`, which PostgreSQL takes
//! until the first query has its snapshot (`check_transaction_read_only`). So the snapshot is
//! taken here, before the server sees anything of the statement, and the answer that proves it
//! is what makes a [`ReadOnlyTransaction`].

use sqlx::Row as _;
use sqlx::postgres::{PgConnection, PgRow};

use super::statement::Mode;

/// Takes the snapshot and tells what the transaction is, in the round trip that begins it.
const PIN: &str = "begin isolation level repeatable read read only; \
    select pg_catalog.current_setting('transaction_read_only'), \
           pg_catalog.current_setting('transaction_isolation')";

/// A transaction in which the server refuses writes and that can no longer be made to allow
/// them. It ends by being rolled back, or with its session.
#[derive(Debug)]
pub(super) struct ReadOnlyTransaction<'c>(&'c mut PgConnection);

/// A transaction that is committed when its statement succeeded.
#[derive(Debug)]
pub(super) struct WriteTransaction<'c>(&'c mut PgConnection);

/// Where a statement runs.
#[derive(Debug)]
pub(super) enum Scope<'c> {
    ReadOnly(ReadOnlyTransaction<'c>),
    ReadWrite(WriteTransaction<'c>),
    /// What the server runs only outside of a block: a transaction of its own making.
    Alone(&'c mut PgConnection),
}

impl<'c> ReadOnlyTransaction<'c> {
    async fn begin(connection: &'c mut PgConnection) -> Result<Self, sqlx::Error> {
        let rows = sqlx::raw_sql(PIN).fetch_all(&mut *connection).await?;
        let said = |row: &PgRow, at: usize| row.try_get::<String, _>(at);
        match rows.as_slice() {
            [row] if said(row, 0)? == "on" && said(row, 1)? == "repeatable read" => {
                Ok(Self(connection))
            }
            _ => Err(sqlx::Error::BeginFailed),
        }
    }
}

impl<'c> Scope<'c> {
    /// Begins what a statement of `mode` runs in.
    pub(super) async fn open(
        connection: &'c mut PgConnection,
        mode: Mode,
    ) -> Result<Self, sqlx::Error> {
        Ok(match mode {
            Mode::Read => Self::ReadOnly(ReadOnlyTransaction::begin(connection).await?),
            Mode::Write => {
                // Not what a role's default_transaction_read_only says: the policy says it.
                sqlx::raw_sql("begin read write").execute(&mut *connection).await?;
                Self::ReadWrite(WriteTransaction(connection))
            }
            Mode::Alone => Self::Alone(connection),
        })
    }

    pub(super) fn connection(&mut self) -> &mut PgConnection {
        match self {
            Self::ReadOnly(ReadOnlyTransaction(connection))
            | Self::ReadWrite(WriteTransaction(connection))
            | Self::Alone(connection) => connection,
        }
    }

    /// Ends it after a statement that succeeded: what may be kept is kept.
    pub(super) async fn finish(self) -> Result<(), sqlx::Error> {
        match self {
            Self::ReadOnly(_) => self.roll_back().await,
            Self::ReadWrite(WriteTransaction(connection)) => {
                sqlx::raw_sql("commit").execute(connection).await.map(|_| ())
            }
            Self::Alone(_) => Ok(()),
        }
    }

    /// Ends it, and keeps nothing.
    pub(super) async fn roll_back(self) -> Result<(), sqlx::Error> {
        match self {
            Self::ReadOnly(ReadOnlyTransaction(connection))
            | Self::ReadWrite(WriteTransaction(connection)) => {
                sqlx::raw_sql("rollback").execute(connection).await.map(|_| ())
            }
            Self::Alone(_) => Ok(()),
        }
    }
}
