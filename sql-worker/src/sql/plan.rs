//! A statement that is ready to be run: described, with a codec for every column.

use sqlx::postgres::{PgArguments, PgColumn, PgConnection, PgRow, PgStatement, PgTypeInfo};
use sqlx::{
    Arguments as _, AssertSqlSafe, Column as _, Either, Executor as _, Row as _, SqlSafeStr as _,
    Statement as _, ValueRef as _,
};

use super::guard::{self, Guard, Inspected, MASK};
use super::limits::Collector;
use super::params::{Bound, to_text};
use super::postgres::Trouble;
use super::statement::{Mode, Statement};
use super::types::{self, ParamType};
use super::value::{Codec, Malformed, Scalar};
use super::{Column, Limits};
use crate::error::{Code, Failure};

/// Text, by a name that no `search_path` changes.
const TEXT: &str = "pg_catalog.text";

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
    /// As a WITH query, which is where a statement that writes may stand.
    With,
}

impl Plan {
    pub(super) async fn make(
        connection: &mut PgConnection,
        statement: &Statement<'_>,
        mode: Mode,
        guard: &Guard,
        limits: &Limits,
    ) -> Result<Self, Trouble> {
        let bound = &statement.bound;
        let original = describe(connection, bound.render(numbered), &[], &[]).await?;
        let inspected = match guard.is_open() {
            true => None,
            false => Some(guard.inspect(connection).await?),
        };
        if statement.is_explain() && inspected.as_ref().is_some_and(Inspected::has_masks) {
            return Err(guard::plan_withheld().into());
        }
        let casts = casts(connection, &original, bound).await?;
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
                let explain = format!("explain (verbose, format json) {}", bound.render(cast));
                masked(connection, (guard, seen), &original, explain, (&argument_types, &values))
                    .await?
            }
            Some(_) | None => vec![false; original.columns().len()],
        };
        // The names are those of the statement as it was written: a cast would rename `$1`.
        let (columns, codecs): (Vec<_>, Vec<_>) = original
            .columns()
            .iter()
            .zip(masked)
            .map(|(column, masked)| {
                let (type_name, codec) = types::column(column.type_info());
                (Column { name: column.name().to_owned(), type_name, masked }, codec)
            })
            .unzip();
        let undecodable = codecs.iter().any(Option::is_none);
        let wrap = if columns.is_empty() || statement.is_report() {
            if undecodable { Wrap::Subquery(None) } else { Wrap::Not }
        } else if inspected.is_some() && mode == Mode::Read && statement.is_query() {
            // It then comes to its end, where it can be looked at again.
            Wrap::Subquery(Some(limits.max_rows.saturating_add(1)))
        } else if !undecodable {
            Wrap::Not
        } else if statement.is_change() {
            Wrap::With
        } else {
            Wrap::Subquery(None)
        };
        let statement = match wrap {
            Wrap::Not if casts.is_empty() => original,
            Wrap::Not => describe(connection, bound.render(cast), &argument_types, &values).await?,
            Wrap::Subquery(_) | Wrap::With => {
                let sql = wrapped(&wrap, &bound.render_inner(cast), &codecs);
                describe(connection, sql, &argument_types, &values).await.map_err(|trouble| {
                    match undecodable {
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
    described: &PgStatement,
    explain: String,
    (types, values): (&[PgTypeInfo], &[Option<String>]),
) -> Result<Vec<bool>, Trouble> {
    let columns = described.columns();
    let no_origin = |column: &PgColumn| column.relation_id().is_none();
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
    Ok(columns.iter().enumerate().map(|(at, c)| seen.masks(c, || harmless(at))).collect())
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
                ParamType { shown: types::base(info).unwrap_or_else(|| name.clone()), sql: name }
            }
        });
    }
    Ok(casts)
}

/// The statement inside of one that casts the columns that have no codec to text. Ordering
/// survives: PostgreSQL does not flatten a subquery that sorts, nor a WITH query that writes.
fn wrapped(wrap: &Wrap, sql: &str, codecs: &[Option<Codec>]) -> String {
    let names: Vec<String> = (1..=codecs.len()).map(|number| format!("c{number}")).collect();
    let cast = |(name, codec): (&String, &Option<Codec>)| match codec {
        Some(_) => name.clone(),
        None => format!("{name}::{TEXT}"),
    };
    let outer: Vec<String> = names.iter().zip(codecs).map(cast).collect();
    let (outer, names) = (outer.join(", "), names.join(", "));
    // The line break ends a comment that the statement may end with.
    match wrap {
        Wrap::With => format!("with q({names}) as (\n{sql}\n) select {outer} from q"),
        Wrap::Subquery(Some(rows)) => {
            format!("select {outer} from (\n{sql}\n) as q({names}) limit {rows}")
        }
        Wrap::Subquery(None) | Wrap::Not => {
            format!("select {outer} from (\n{sql}\n) as q({names})")
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
