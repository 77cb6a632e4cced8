//! The same statement by sqlx, without MCP.

use sqlx::postgres::PgConnection;
use sqlx::{Connection as _, Executor as _, Row as _, SqlSafeStr as _, Statement as _};
use tokio::runtime::{Builder, Runtime};

use crate::bench::rig::Target;
use crate::identity::Identity;

/// How a statement is run.
#[derive(Debug, Clone, Copy)]
pub(super) enum How {
    /// Parsed and described each time.
    Unprepared,
    /// Parsed and described once.
    Prepared,
    /// With each step that the worker takes for a read-only call.
    Steps,
}

/// A session, and one thread that drives it.
#[derive(Debug)]
pub(super) struct Session {
    runtime: Runtime,
    connection: PgConnection,
    how: How,
}

impl Session {
    pub(super) fn open(target: &Target, how: How) -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let connect = || runtime.block_on(PgConnection::connect_with(&target.sqlx()));
        let connection = Identity::client().act(connect).expect("a thread").expect("a session");
        Self { runtime, connection, how }
    }

    pub(super) fn run(&mut self, sql: &'static str) {
        let Self { runtime, connection, how } = self;
        let aid: i32 = runtime.block_on(async {
            let row = match how {
                How::Unprepared => sqlx::query(sql).persistent(false).fetch_one(connection).await,
                How::Prepared => sqlx::query(sql).fetch_one(connection).await,
                How::Steps => steps(connection, sql).await,
            };
            row.expect("a row").get(0)
        });
        assert_eq!(aid, 4711);
    }
}

async fn steps(
    connection: &mut PgConnection,
    sql: &'static str,
) -> Result<sqlx::postgres::PgRow, sqlx::Error> {
    const PIN: &str = "begin isolation level repeatable read read only; \
        select pg_catalog.current_setting('transaction_read_only'), \
               pg_catalog.current_setting('transaction_isolation')";
    let _pinned = sqlx::raw_sql(PIN).fetch_all(&mut *connection).await?;
    let statement = (&mut *connection).prepare(sql.into_sql_str()).await?;
    let row = statement.query().fetch_one(&mut *connection).await?;
    sqlx::raw_sql("rollback").execute(&mut *connection).await?;
    connection.clear_cached_statements().await?;
    sqlx::raw_sql("DISCARD ALL").execute(&mut *connection).await?;
    Ok(row)
}
