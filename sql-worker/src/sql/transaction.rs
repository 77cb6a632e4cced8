//! The transaction that a statement runs in; always one of ours.
//!
//! `BEGIN READ ONLY` alone is undone by `SET TRANSACTION READ WRITE`, which PostgreSQL takes
//! until the first query has its snapshot (`check_transaction_read_only`). So the snapshot is
//! taken here, before the server sees anything of the statement, and the answer that proves it
//! is what makes a [`Pinned`].

use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{Connection as _, Row as _};

use super::pool::Session;
use super::statement::Mode;
use super::{Lease, failure};
use crate::error::Failure;

/// Takes the snapshot and tells what the transaction is, in the round trip that begins it.
const PIN: &str = "begin isolation level repeatable read read only; \
    select pg_catalog.current_setting('transaction_read_only'), \
           pg_catalog.current_setting('transaction_isolation')";

/// Where a statement runs. What is not finished is rolled back when its session is given back,
/// or ends with it.
#[derive(Debug)]
pub(super) struct Scope<'c> {
    session: &'c mut Session,
    begun: Begun,
}

/// What was begun on a session; only [`Begun::on`] makes one.
#[derive(Debug)]
enum Begun {
    /// A transaction in which the server refuses writes and that can no longer be made to allow
    /// them.
    ReadOnly(Pinned),
    /// A transaction that is committed when its statement succeeded.
    ReadWrite,
    /// What the server runs only outside of a block: a transaction of its own making.
    Alone,
}

/// That the server said so.
#[derive(Debug)]
struct Pinned(());

/// What is left to do with a session before it can be made as good as new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(crate) enum Left {
    /// Nothing.
    Nothing,
    /// Its transaction is open.
    RollBack,
}

impl Begun {
    async fn on(connection: &mut PgConnection, mode: Mode) -> Result<Self, sqlx::Error> {
        match mode {
            Mode::Read => Pinned::on(connection).await.map(Self::ReadOnly),
            Mode::Write => {
                // Not what a role's default_transaction_read_only says: the policy says it.
                sqlx::raw_sql("begin read write").execute(connection).await?;
                Ok(Self::ReadWrite)
            }
            // It shows that the session lives, as the others do.
            Mode::Alone => connection.ping().await.map(|()| Self::Alone),
        }
    }
}

impl Pinned {
    async fn on(connection: &mut PgConnection) -> Result<Self, sqlx::Error> {
        let rows = sqlx::raw_sql(PIN).fetch_all(connection).await?;
        let said = |row: &PgRow, at: usize| row.try_get::<String, _>(at);
        match rows.as_slice() {
            [row] if said(row, 0)? == "on" && said(row, 1)? == "repeatable read" => Ok(Self(())),
            _ => Err(sqlx::Error::BeginFailed),
        }
    }
}

impl<'c> Scope<'c> {
    /// Begins what a statement of `mode` runs in. A session that was cut while it was idle is
    /// replaced: nothing of the statement was sent on it.
    pub(super) async fn open(lease: &'c mut Lease, mode: Mode) -> Result<Self, Failure> {
        let begun = match Begun::on(lease.connection(), mode).await {
            Err(error) if lease.was_idle() && !failure::is_in_step(&error) => {
                lease.replace().await?;
                Begun::on(lease.connection(), mode).await
            }
            other => other,
        };
        let begun = begun.map_err(|error| lease.loss(failure::of_statement(&error, &[])))?;
        Ok(Self { session: lease.session(), begun })
    }

    pub(super) fn connection(&mut self) -> &mut PgConnection {
        &mut self.session.connection
    }

    pub(super) fn session(&mut self) -> &mut Session {
        self.session
    }

    /// Ends it after a statement that succeeded: what may be kept is kept.
    pub(super) async fn finish(self) -> Result<Left, sqlx::Error> {
        match self.begun {
            Begun::ReadOnly(Pinned(())) => Ok(Left::RollBack),
            Begun::ReadWrite => {
                let done = sqlx::raw_sql("commit").execute(&mut self.session.connection).await;
                done.map(|_| Left::Nothing)
            }
            Begun::Alone => Ok(Left::Nothing),
        }
    }

    /// Gives it up; nothing is kept.
    pub(super) fn abandon(self) -> Left {
        match self.begun {
            Begun::ReadOnly(Pinned(())) | Begun::ReadWrite => Left::RollBack,
            Begun::Alone => Left::Nothing,
        }
    }
}
