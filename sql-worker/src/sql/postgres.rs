//! One statement, from description to last row.
//!
//! Order matters: the statement is described first, so that parameters get the types that the
//! database infers and a column that cannot be decoded is found while nothing has run yet.
//! Such columns are fetched as text by wrapping the statement, and the wrapped statement is
//! described as well; a statement is executed once, and only when every column has a codec.
//! All of it happens inside of the transaction that its mode asks for.

use std::time::{Duration, Instant};

use futures_util::TryStreamExt as _;
use sqlx::postgres::{PgArguments, PgConnection, PgRow, PgStatement, PgTypeInfo};
use sqlx::{
    Arguments as _, AssertSqlSafe, Column as _, Either, Executor as _, Row as _, SqlSafeStr as _,
    Statement as _, ValueRef as _,
};
use tokio::time::timeout;

use super::limits::{Collector, Room};
use super::params::{Bound, to_text};
use super::statement::{Mode, Statement, not_a_query};
use super::transaction::Scope;
use super::types::{self, ParamType};
use super::value::{Codec, Malformed, Scalar};
use super::{Answer, Column, Format, Lease, Limits, ResultSet, failure};
use crate::error::{Code, Failure};

/// Text, by a name that no `search_path` changes.
const TEXT: &str = "pg_catalog.text";

/// Runs `statement` and takes the lease with it: back to the pool after a clean end, else
/// closed, so that the database stops what it does. Dropping the future is how to cancel it.
///
/// # Errors
/// `SQL_ERROR` from the database, `TIMEOUT`, `CANCELLED` when the handle ended, `UPSTREAM_UNREACHABLE` when the session was lost, `UNSUPPORTED` for results that
/// cannot be shown.
pub async fn execute(
    lease: Lease,
    statement: &Statement<'_>,
    format: Format,
    limits: &Limits,
) -> Result<Answer, Failure> {
    let closed = lease.closed();
    let work = timeout(limits.statement_timeout, run(lease, statement, format, limits));
    tokio::select! {
        biased;
        () = closed.cancelled() => Err(Failure::cancelled()),
        done = work => done.unwrap_or_else(|_elapsed| Err(timed_out(limits.statement_timeout))),
    }
}

fn timed_out(after: Duration) -> Failure {
    let seconds = after.as_secs_f64();
    Failure::new(Code::Timeout, format!("the statement was stopped after {seconds} s"))
        .with_hint("ask for less, or add an index; nothing that it changed was kept")
}

/// What is left to do with a session after a statement.
enum After {
    /// It is in step, and can be reset.
    Reset,
    /// Rows are still on their way.
    Close,
}

async fn run(
    mut lease: Lease,
    statement: &Statement<'_>,
    format: Format,
    limits: &Limits,
) -> Result<Answer, Failure> {
    let started = Instant::now();
    let mode = statement.mode(lease.policy().access);
    let mut scope = Scope::open(lease.connection(), mode)
        .await
        .map_err(|error| Trouble::new(&error, &[]).failure)?;
    let outcome = match Plan::make(scope.connection(), &statement.bound).await {
        // The server has understood it, and run nothing.
        Ok(_) if mode == Mode::Read && !statement.is_query() => Err(not_a_query().into()),
        Ok(plan) => plan.fetch(scope.connection(), statement, format, limits, started).await,
        Err(trouble) => Err(trouble),
    };
    match outcome {
        Ok((answer, After::Close)) => Ok(answer),
        Ok((answer, After::Reset)) => match scope.finish().await {
            Ok(()) => lease.reset().await.map(|()| answer),
            Err(error) => {
                let trouble = Trouble::new(&error, &[]);
                if let After::Reset = trouble.after {
                    let _ = lease.reset().await;
                }
                Err(trouble.failure)
            }
        },
        Err(Trouble { failure, after: After::Close }) => Err(failure),
        Err(Trouble { failure, after: After::Reset }) => {
            // The first failure is the one to tell; a session that does not reset is closed.
            if scope.roll_back().await.is_ok() {
                let _ = lease.reset().await;
            }
            Err(failure)
        }
    }
}

/// A failure, and what it means for the session.
struct Trouble {
    failure: Failure,
    after: After,
}

impl Trouble {
    fn new(error: &sqlx::Error, values: &[Option<String>]) -> Self {
        let after = if failure::is_in_step(error) { After::Reset } else { After::Close };
        Self { failure: failure::of_statement(error, values), after }
    }
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self { failure, after: After::Reset }
    }
}

/// A statement that is ready to be run: described, with a codec for every column.
struct Plan {
    statement: PgStatement,
    columns: Vec<Column>,
    codecs: Vec<Codec>,
    values: Vec<Option<String>>,
}

impl Plan {
    async fn make(connection: &mut PgConnection, bound: &Bound<'_>) -> Result<Self, Trouble> {
        let original = describe(connection, bound.render(numbered), &[], &[]).await?;
        let casts = casts(connection, &original, bound).await?;
        let mut values = Vec::with_capacity(casts.len());
        for (at, (value, cast)) in bound.values().iter().zip(&casts).enumerate() {
            values.push(to_text(value, &cast.shown, at + 1)?);
        }
        // The names are those of the statement as it was written: a cast would rename `$1`.
        let (columns, codecs): (Vec<_>, Vec<_>) = original
            .columns()
            .iter()
            .map(|column| {
                let (type_name, codec) = types::column(column.type_info());
                (Column { name: column.name().to_owned(), type_name }, codec)
            })
            .unzip();
        let argument_types = vec![text_type(); casts.len()];
        let cast = |at: usize| match casts.get(at) {
            Some(cast) => format!("(CAST(${}::{TEXT} AS {}))", at + 1, cast.sql),
            None => numbered(at),
        };
        let statement = if codecs.iter().any(Option::is_none) {
            let sql = wrapped(&bound.render_inner(cast), &codecs);
            describe(connection, sql, &argument_types, &values)
                .await
                .map_err(|_cannot_be_wrapped| undecodable(&columns, &codecs))?
        } else if casts.is_empty() {
            original
        } else {
            describe(connection, bound.render(cast), &argument_types, &values).await?
        };
        let codecs = codecs.into_iter().map(|codec| codec.unwrap_or(Codec::Scalar(Scalar::Text)));
        Ok(Self { statement, columns, codecs: codecs.collect(), values })
    }

    async fn fetch(
        &self,
        connection: &mut PgConnection,
        statement: &Statement<'_>,
        format: Format,
        limits: &Limits,
        started: Instant,
    ) -> Result<(Answer, After), Trouble> {
        let mut arguments = PgArguments::default();
        for value in &self.values {
            arguments
                .add(value.as_deref())
                .map_err(|_too_long| Failure::invalid("a parameter is too long"))?;
        }
        let mut rows = connection.fetch_many(self.statement.query_with(arguments));
        let mut collector = Collector::new(limits, format, &self.columns);
        let mut affected_rows = 0;
        let mut after = After::Reset;
        let mut room = Room::Left;
        while let Some(item) =
            rows.try_next().await.map_err(|error| Trouble::new(&error, &self.values))?
        {
            match item {
                Either::Left(done) => affected_rows += done.rows_affected(),
                Either::Right(_) if room == Room::None => {}
                Either::Right(row) => {
                    room = collector
                        .push(|collector| self.decode(&row, collector))
                        .map_err(|_malformed| not_text())?;
                    // A statement that writes must come to its end to be committed; its rows
                    // are read and left out. A query is stopped by closing its session.
                    if room == Room::None && !statement.bound.may_write() {
                        after = After::Close;
                        break;
                    }
                }
            }
        }
        let elapsed = started.elapsed();
        if self.columns.is_empty() {
            return Ok((Answer::Done { affected_rows, elapsed }, after));
        }
        let (body, row_count, cut) = collector.finish();
        let columns = self.columns.clone();
        let affected_rows = statement.bound.may_write().then_some(affected_rows);
        let set = ResultSet { columns, body, row_count, affected_rows, cut, elapsed };
        Ok((Answer::Rows(set), after))
    }

    fn decode(
        &self,
        row: &PgRow,
        collector: &mut Collector<'_>,
    ) -> Result<Vec<serde_json::Value>, Malformed> {
        let mut cells = Vec::with_capacity(self.codecs.len());
        for (at, codec) in self.codecs.iter().enumerate() {
            let raw = row.try_get_raw(at).map_err(|_missing| Malformed)?;
            cells.push(if raw.is_null() {
                serde_json::Value::Null
            } else {
                collector.cell(codec, raw.as_bytes().map_err(|_null| Malformed)?)?
            });
        }
        Ok(cells)
    }
}

async fn describe(
    connection: &mut PgConnection,
    sql: String,
    types: &[PgTypeInfo],
    values: &[Option<String>],
) -> Result<PgStatement, Trouble> {
    // The text is the caller's statement with parameters numbered; no value is in it.
    let sql = AssertSqlSafe(sql).into_sql_str();
    connection.prepare_with(sql, types).await.map_err(|error| Trouble::new(&error, values))
}

/// What each parameter is cast to, by what the database inferred for it.
async fn casts(
    connection: &mut PgConnection,
    described: &PgStatement,
    bound: &Bound<'_>,
) -> Result<Vec<ParamType>, Trouble> {
    let inferred = match described.parameters() {
        Some(Either::Left(inferred)) => inferred,
        Some(Either::Right(_)) | None => &[],
    };
    if inferred.len() != bound.values().len() {
        return Err(Failure::invalid("params do not match the statement's parameters").into());
    }
    let mut casts = Vec::with_capacity(inferred.len());
    for info in inferred {
        casts.push(match types::parameter(info) {
            Ok(cast) => cast,
            Err(oid) => {
                // -1, not NULL: without a modifier "character" would mean one character.
                let name: String =
                    sqlx::query_scalar("select pg_catalog.format_type($1::text::oid, -1)")
                        .bind(oid.to_string())
                        .fetch_one(&mut *connection)
                        .await
                        .map_err(|error| Trouble::new(&error, &[]))?;
                ParamType { shown: name.clone(), sql: name }
            }
        });
    }
    Ok(casts)
}

/// The statement as a subquery, with the columns that have no codec cast to text. Ordering
/// survives: PostgreSQL does not flatten a subquery that sorts.
fn wrapped(sql: &str, codecs: &[Option<Codec>]) -> String {
    let names: Vec<String> = (1..=codecs.len()).map(|number| format!("c{number}")).collect();
    let cast = |(name, codec): (&String, &Option<Codec>)| match codec {
        Some(_) => name.clone(),
        None => format!("{name}::{TEXT}"),
    };
    let outer: Vec<String> = names.iter().zip(codecs).map(cast).collect();
    // The line break ends a comment that the statement may end with.
    format!("select {} from (\n{sql}\n) as q({})", outer.join(", "), names.join(", "))
}

fn undecodable(columns: &[Column], codecs: &[Option<Codec>]) -> Failure {
    let at = codecs.iter().position(Option::is_none).unwrap_or(0);
    let type_name = columns.get(at).map_or("?", |column| column.type_name.as_str());
    Failure::new(
        Code::Unsupported,
        format!("column {} has type {type_name}, which cannot be shown; nothing was run", at + 1),
    )
    .with_hint("cast it to text in the statement: x::text")
}

fn not_text() -> Trouble {
    let failure = Failure::new(Code::SqlError, "a value is not valid text in UTF-8")
        .with_hint("cast the column to bytea");
    Trouble { failure, after: After::Close }
}

fn text_type() -> PgTypeInfo {
    <str as sqlx::Type<sqlx::Postgres>>::type_info()
}

fn numbered(at: usize) -> String {
    format!("${}", at + 1)
}
