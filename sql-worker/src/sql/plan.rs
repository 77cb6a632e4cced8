//! A statement that is ready to be run: described, with a codec for every column.

use sqlx::postgres::{PgArguments, PgConnection, PgRow, PgStatement, PgTypeInfo};
use sqlx::{Arguments as _, Executor as _, Row as _, Statement as _, ValueRef as _};

use super::described::{Described, DescribedColumn, prepare};
use super::guard::{self, Guard, Inspected, MASK};
use super::limits::Collector;
use super::params::{Bound, to_text};
use super::pool::Session;
use super::postgres::Trouble;
use super::statement::{Mode, Statement};
use super::types::{ParamType, Type};
use super::value::{Codec, Malformed, Scalar};
use super::{Column, Limits};
use crate::error::{Code, Failure};

/// Text, by a name that no `search_path` changes.
const TEXT: &str = "pg_catalog.text";
/// Beside the caller's own WITH queries, where a table may have the name of none of them.
const WITH_NAME: &str = "credbroker_result";

#[derive(Debug)]
pub(super) struct Plan {
    pub(super) statement: PgStatement,
    pub(super) columns: Vec<Column>,
    pub(super) values: Vec<Option<String>>,
    /// What it reads, where the connection has a guard.
    pub(super) inspected: Option<Inspected>,
    codecs: Vec<Codec>,
}

/// How a statement is put into another one.
enum Wrap {
    Not,
    /// As a subquery; with at most so many rows, if that is said.
    Subquery(Option<usize>),
    /// As a WITH query, the last of its list, which is where a statement that writes may stand.
    With,
}

impl Wrap {
    /// As what `statement` is run so that it gives `most` rows, if that is said, and a column that
    /// has no codec as text.
    fn of(statement: &Statement<'_>, codecs: &[Option<Codec>], most: Option<usize>) -> Self {
        let is_whole = codecs.iter().all(Option::is_some);
        let stands_alone = codecs.is_empty() || statement.is_report();
        match most {
            Some(_) if !stands_alone => Self::Subquery(most),
            Some(_) | None if is_whole => Self::Not,
            Some(_) | None if statement.is_change() || statement.is_list_of_changes() => Self::With,
            Some(_) | None => Self::Subquery(None),
        }
    }
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
        if statement.is_explain() && inspected.as_ref().is_some_and(Inspected::has_masks) {
            return Err(guard::plan_withheld().into());
        }
        let casts = casts(connection, &original.parameters, bound).await?;
        let mut values = Vec::with_capacity(casts.len());
        for (at, (value, cast)) in bound.values().iter().zip(&casts).enumerate() {
            values.push(to_text(value, &cast.shown, at + 1)?);
        }
        let argument_types = vec![text_type(); casts.len()];
        let cast = |at: usize| match casts.get(at) {
            Some(cast) => format!("(CAST(${}::{TEXT} AS {}))", at + 1, cast.sql),
            None => numbered(at),
        };
        let masked = match &inspected {
            Some(seen) if !statement.is_explain() => {
                let explain =
                    format!("explain (verbose, format json) {}", bound.render_inner(cast));
                let columns = original.columns.as_slice();
                masked(connection, (guard, seen), columns, explain, (&argument_types, &values))
                    .await?
            }
            Some(_) | None => vec![false; original.columns.len()],
        };
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
        let undecodable = codecs.iter().any(Option::is_none);
        // A query that is looked at again when it has run must come to its end. One that changes
        // something does not run, and can stand in no other statement.
        let asks = statement.is_query() && !statement.is_list_of_changes();
        let ends = inspected.is_some() && mode == Mode::Read && asks;
        let most = ends.then(|| limits.max_rows.saturating_add(1));
        let wrap = Wrap::of(statement, &codecs, most);
        let statement = match (wrap, original.statement) {
            (Wrap::Not, Some(statement)) if casts.is_empty() => statement,
            (Wrap::Not, _) => {
                describe(connection, bound.render(cast), &argument_types, &values).await?
            }
            (wrap @ (Wrap::Subquery(_) | Wrap::With), _) => {
                let sql = wrapped(&wrap, bound, cast, &codecs);
                describe(connection, sql, &argument_types, &values).await.map_err(|trouble| {
                    // A session that was lost says nothing of the statement.
                    match undecodable && trouble.is_in_step() {
                        true => unshowable(&columns, &codecs).into(),
                        false => trouble,
                    }
                })?
            }
        };
        let codecs = codecs.into_iter().map(|codec| codec.unwrap_or(Codec::Scalar(Scalar::Text)));
        Ok(Self { statement, columns, codecs: codecs.collect(), values, inspected })
    }

    /// The parameters, as they are sent.
    pub(super) fn arguments(&self) -> Result<PgArguments, Failure> {
        arguments(&self.values)
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

fn arguments(values: &[Option<String>]) -> Result<PgArguments, Failure> {
    let mut arguments = PgArguments::default();
    for value in values {
        arguments
            .add(value.as_deref())
            .map_err(|_too_long| Failure::invalid("a parameter is too long"))?;
    }
    Ok(arguments)
}

/// Which columns are masked. The plan is asked for only where it can matter.
async fn masked(
    connection: &mut PgConnection,
    (guard, seen): (&Guard, &Inspected),
    columns: &[DescribedColumn],
    explain: String,
    (types, values): (&[PgTypeInfo], &[Option<String>]),
) -> Result<Vec<bool>, Trouble> {
    let no_origin = |column: &DescribedColumn| column.origin.is_none();
    let counts = if seen.has_masks() && columns.iter().any(no_origin) {
        let explain = describe(connection, explain, types, values).await?;
        let row = connection
            .fetch_one(explain.query_with(arguments(values)?))
            .await
            .map_err(|error| Trouble::of_planning(&error, guard))?;
        let plan: &str = row.try_get_unchecked(0).map_err(|error| Trouble::new(&error, values))?;
        guard::counts(&serde_json::from_str(plan).unwrap_or_default())
    } else {
        Vec::new()
    };
    let harmless = |at: usize| counts.get(at).copied().unwrap_or(false);
    Ok(columns.iter().enumerate().map(|(at, c)| seen.masks(c.origin, || harmless(at))).collect())
}

async fn describe(
    connection: &mut PgConnection,
    sql: String,
    types: &[PgTypeInfo],
    values: &[Option<String>],
) -> Result<PgStatement, Trouble> {
    prepare(connection, sql, types).await.map_err(|error| Trouble::new(&error, values))
}

/// What each parameter is cast to, by what the database inferred for it.
async fn casts(
    connection: &mut PgConnection,
    inferred: &[Type],
    bound: &Bound<'_>,
) -> Result<Vec<ParamType>, Trouble> {
    if inferred.len() != bound.values().len() {
        return Err(Failure::invalid("params do not match the statement's parameters").into());
    }
    let mut casts = Vec::with_capacity(inferred.len());
    for inferred in inferred {
        casts.push(match inferred.parameter() {
            Some(cast) => cast,
            None => {
                // -1, not NULL: without a modifier "character" would mean one character.
                let name: String =
                    sqlx::query_scalar("select pg_catalog.format_type($1::text::oid, -1)")
                        .bind(inferred.oid().to_string())
                        .fetch_one(&mut *connection)
                        .await
                        .map_err(|error| Trouble::new(&error, &[]))?;
                ParamType { shown: inferred.base().unwrap_or_else(|| name.clone()), sql: name }
            }
        });
    }
    Ok(casts)
}

/// The statement inside of one that casts the columns that have no codec to text. Ordering
/// survives: PostgreSQL does not flatten a subquery that sorts, nor a WITH query that writes, nor
/// one behind such a query.
fn wrapped(
    wrap: &Wrap,
    bound: &Bound<'_>,
    write: impl Fn(usize) -> String,
    codecs: &[Option<Codec>],
) -> String {
    let names: Vec<String> = (1..=codecs.len()).map(|number| format!("c{number}")).collect();
    let cast = |(name, codec): (&String, &Option<Codec>)| match codec {
        Some(_) => name.clone(),
        None => format!("{name}::{TEXT}"),
    };
    let outer: Vec<String> = names.iter().zip(codecs).map(cast).collect();
    let (outer, names) = (outer.join(", "), names.join(", "));
    // A line break ends a comment that the statement may end with.
    match wrap {
        Wrap::With => {
            let (list, main) = match bound.render_with(&write) {
                Some((list, main)) => (format!("{list}\n,"), main),
                None => ("with".to_owned(), bound.render_inner(&write)),
            };
            format!("{list} {WITH_NAME}({names}) as (\n{main}\n) select {outer} from {WITH_NAME}")
        }
        Wrap::Subquery(_) | Wrap::Not => {
            let most = if let Wrap::Subquery(most) = wrap { *most } else { None };
            let limit = most.map(|rows| format!(" limit {rows}")).unwrap_or_default();
            let sql = bound.render_inner(&write);
            format!("select {outer} from (\n{sql}\n) as q({names}){limit}")
        }
    }
}

fn unshowable(columns: &[Column], codecs: &[Option<Codec>]) -> Failure {
    let at = codecs.iter().position(Option::is_none).unwrap_or(0);
    let type_name = columns.get(at).map_or("?", |column| column.type_name.as_str());
    Failure::quoting(
        Code::Unsupported,
        format!("column {} has type {type_name}, which cannot be shown; nothing was run", at + 1),
    )
    .with_hint("cast it to text in the statement: x::text")
}

fn text_type() -> PgTypeInfo {
    <str as sqlx::Type<sqlx::Postgres>>::type_info()
}

fn numbered(at: usize) -> String {
    format!("${}", at + 1)
}
