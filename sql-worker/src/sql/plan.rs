//! A statement that is ready to be run: described, with a codec for every column.

mod sent;
mod wrap;

use sqlx::postgres::{PgArguments, PgConnection, PgRow, PgStatement};
use sqlx::{Executor as _, Row as _, Statement as _, ValueRef as _};

use self::sent::Sent;
use self::wrap::Wrap;
use super::described::{Described, DescribedColumn, origins};
use super::guard::{self, Guard, Inspected, MASK};
use super::limits::Collector;
use super::pool::Session;
use super::postgres::Trouble;
use super::statement::{Mode, Statement};
use super::value::{Codec, Malformed, Scalar};
use super::{Column, Limits};
use crate::error::{Code, Failure};

/// Text, by a name that no `search_path` changes.
const TEXT: &str = "pg_catalog.text";

#[derive(Debug)]
pub(super) struct Plan {
    pub(super) statement: PgStatement,
    pub(super) columns: Vec<Column>,
    /// What it reads, where the connection has a guard.
    pub(super) inspected: Option<Inspected>,
    sent: Sent,
    codecs: Vec<Codec>,
}

impl Plan {
    pub(super) async fn make(
        session: &mut Session,
        statement: &Statement<'_>,
        mode: Mode,
        guard: &Guard,
        limits: &Limits,
    ) -> Result<Self, Trouble> {
        let bound = &statement.bound;
        let original = Described::ask(session, bound.render(numbered)).await?;
        let connection = &mut session.connection;
        let inspected = match guard.is_open() {
            true => None,
            false => Some(guard.inspect(connection).await?),
        };
        let has_masks = inspected.as_ref().is_some_and(Inspected::has_masks);
        if statement.is_explain() && has_masks {
            return Err(guard::plan_withheld().into());
        }
        let sent = Sent::of(connection, &original.parameters, bound).await?;
        let cast = |at: usize| sent.cast(at);
        let masked = match &inspected {
            Some(seen) if !statement.is_explain() => {
                let sql = bound.render_inner(cast);
                masked(connection, (guard, seen), &original.columns, sql, &sent).await?
            }
            Some(_) | None => vec![false; original.columns.len()],
        };
        let looked_at = original.origins();
        // The names are those of the statement as it was written: a cast would rename `$1`.
        let (columns, codecs): (Vec<_>, Vec<_>) = original
            .columns
            .into_iter()
            .zip(masked)
            .map(|(DescribedColumn { name, column_type, .. }, masked)| {
                let (type_name, codec) = column_type.column();
                (Column { name, type_name, masked }, codec)
            })
            .unzip();
        let is_whole = codecs.iter().all(Option::is_some);
        // A query that is looked at again when it has run must come to its end. One that changes
        // something does not run, and can stand in no other statement.
        let asks = statement.is_query() && !statement.is_list_of_changes();
        let ends = inspected.is_some() && mode == Mode::Read && asks;
        let most = ends.then(|| limits.max_rows.saturating_add(1));
        let wrap = Wrap::of(statement, &codecs, most);
        let prepared = match original.statement {
            Some(statement) if wrap == Wrap::Not && sent.is_empty() => statement,
            Some(_) | None => {
                let sql = wrap.around(bound, cast, codecs.iter().map(Option::is_some));
                sent.describe(connection, sql).await.map_err(|trouble| {
                    // A session that was lost says nothing of the statement.
                    match !is_whole && trouble.is_in_step() {
                        true => unshowable(statement, &columns, &codecs).into(),
                        false => trouble,
                    }
                })?
            }
        };
        if has_masks {
            // The masks were found by what was described first, and our lexer is not the server's.
            let runs = if is_whole {
                origins(&prepared)
            } else {
                // What is given as text has no origin any more.
                let sql = wrap.around(bound, cast, codecs.iter().map(|_| true));
                Described::ask(session, sql).await?.origins()
            };
            if runs != looked_at {
                let what = "the statement does not run as it was looked at";
                return Err(Failure::new(Code::AccessDenied, what).into());
            }
        }
        let codecs = codecs.into_iter().map(|codec| codec.unwrap_or(Codec::Scalar(Scalar::Text)));
        Ok(Self { statement: prepared, columns, inspected, sent, codecs: codecs.collect() })
    }

    /// The values of the parameters, as text.
    pub(super) fn values(&self) -> &[Option<String>] {
        self.sent.values()
    }

    /// The parameters, as they are sent.
    pub(super) fn arguments(&self) -> Result<PgArguments, Failure> {
        self.sent.arguments()
    }

    pub(super) fn decode(
        &self,
        row: &PgRow,
        collector: &mut Collector<'_>,
    ) -> Result<Vec<serde_json::Value>, Malformed> {
        let mut cells = Vec::with_capacity(self.codecs.len());
        for (at, (codec, column)) in self.codecs.iter().zip(&self.columns).enumerate() {
            let raw = row.try_get_raw(at).map_err(|_missing| Malformed)?;
            cells.push(if column.masked {
                MASK.into()
            } else if raw.is_null() {
                serde_json::Value::Null
            } else {
                collector.cell(codec, raw.as_bytes().map_err(|_null| Malformed)?)?
            });
            if collector.is_over() {
                break;
            }
        }
        Ok(cells)
    }
}

/// Which columns are masked. The plan is asked for only where it can matter.
async fn masked(
    connection: &mut PgConnection,
    (guard, seen): (&Guard, &Inspected),
    columns: &[DescribedColumn],
    sql: String,
    sent: &Sent,
) -> Result<Vec<bool>, Trouble> {
    let no_origin = |column: &DescribedColumn| column.origin.is_none();
    let counts = if seen.has_masks() && columns.iter().any(no_origin) {
        // A function that says that it depends on nothing is run for a plan. What it set, by which
        // the statement would mean something else when it is read again, is undone.
        sqlx::raw_sql("savepoint credbroker_plan").execute(&mut *connection).await?;
        let sql = format!("explain (verbose, format json) {sql}");
        let explain = sent.describe(connection, sql).await?;
        let row = connection
            .fetch_one(explain.query_with(sent.arguments()?))
            .await
            .map_err(|error| Trouble::of_planning(&error, guard))?;
        sqlx::raw_sql("rollback to savepoint credbroker_plan").execute(&mut *connection).await?;
        let plan: &str = row.try_get_unchecked(0)?;
        guard::counts(&serde_json::from_str(plan).unwrap_or_default())
    } else {
        Vec::new()
    };
    let harmless = |at: usize| counts.get(at).copied().unwrap_or(false);
    Ok(columns.iter().enumerate().map(|(at, c)| seen.masks(c.origin, || harmless(at))).collect())
}

fn unshowable(statement: &Statement<'_>, columns: &[Column], codecs: &[Option<Codec>]) -> Failure {
    let at = codecs.iter().position(Option::is_none).unwrap_or(0);
    let type_name = columns.get(at).map_or("?", |column| column.type_name.as_str());
    Failure::quoting(
        Code::Unsupported,
        format!("column {} has type {type_name}, which cannot be shown; nothing was run", at + 1),
    )
    .with_hint(match statement.is_call() {
        true => "the procedure's parameter must be text; or write a function, and select from it",
        false => "cast it to text in the statement: x::text",
    })
}

fn numbered(at: usize) -> String {
    format!("${}", at + 1)
}
