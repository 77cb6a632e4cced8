//! What a database holds and what it would do: questions that change nothing.

use std::sync::Arc;

use serde_json::Value;

use super::{App, Principal, Source};
use crate::error::{Code, Failure};
use crate::sql::catalogue::{self, MAX_COLUMNS, MAX_LISTED, MAX_PARTS, Pattern, Query, TableName};
use crate::sql::{
    Access, Answer, Body, Cut, Explanation, Format, Guard, Limits, Statement, execute, explain,
};

/// Of the catalogue's own answers; what they hold is bounded by their queries.
const MAX_CELL_BYTES: usize = 1 << 20;

/// What of a database is asked about.
#[derive(Debug)]
pub enum Subject {
    /// Its schemas.
    Database,
    /// Tables by a pattern.
    Tables(Pattern),
    /// One table.
    Table(TableName),
}

/// The answer, as JSON objects of the shapes that [`catalogue`] gives.
#[derive(Debug)]
pub enum Description {
    /// Schemas with the names of their tables.
    Schemas(Vec<Value>),
    /// Tables.
    Tables(Vec<Value>),
    /// One table in full.
    Table(Value),
}

/// A description, and whether it is whole.
#[derive(Debug)]
pub struct Described {
    /// What is there.
    pub description: Description,
    /// Whether something was left out for its length.
    pub truncated: bool,
}

impl App {
    /// Describes what the connection's role may see, of what the connection offers.
    ///
    /// # Errors
    /// `INVALID_REQUEST` when there is no such table, or several; else those of
    /// [`App::run`].
    pub async fn describe(
        &self,
        caller: &Principal,
        source: Source<'_>,
        subject: &Subject,
    ) -> Result<Described, Failure> {
        let policy = Arc::clone(&self.config.connection(&self.name(caller, &source)?).policy);
        let guard = &policy.guard;
        match subject {
            Subject::Database => {
                let mut schemas = self.inspect(caller, source, catalogue::overview(guard)).await?;
                let truncated = cut_to(&mut schemas, MAX_LISTED) | schemas.iter().any(is_cut);
                Ok(Described { description: Description::Schemas(schemas), truncated })
            }
            Subject::Tables(pattern) => {
                let mut tables =
                    self.inspect(caller, source, catalogue::matching(pattern, guard)).await?;
                let truncated = cut_to(&mut tables, MAX_LISTED);
                Ok(Described { description: Description::Tables(tables), truncated })
            }
            Subject::Table(name) => {
                let oid = self.resolve(caller, source, name, guard).await?;
                let found = self.inspect(caller, source, catalogue::details(oid, guard)).await?;
                let mut table = found.into_iter().next().ok_or_else(no_such_table)?;
                let mut truncated = false;
                for (key, part) in table.as_object_mut().into_iter().flatten() {
                    let most = if key == "columns" { MAX_COLUMNS } else { MAX_PARTS };
                    if key != "primary_key"
                        && let Value::Array(items) = part
                    {
                        truncated |= cut_to(items, most);
                    }
                }
                Ok(Described { description: Description::Table(table), truncated })
            }
        }
    }

    /// The plan of a statement, which is not run.
    ///
    /// # Errors
    /// `INVALID_REQUEST` when it has none; else those of [`App::run`].
    pub async fn explain(
        &self,
        caller: &Principal,
        source: Source<'_>,
        query: &str,
    ) -> Result<Explanation, Failure> {
        let limits = self.config.connection(&self.name(caller, &source)?).limits;
        let _running = self.turn(caller).await?;
        let lease = self.lease(caller, source).await?;
        explain(lease, query, &limits).await
    }

    /// The object identifier of the one table that `name` means.
    async fn resolve(
        &self,
        caller: &Principal,
        source: Source<'_>,
        name: &TableName,
        guard: &Guard,
    ) -> Result<i64, Failure> {
        let mut found = self.inspect(caller, source, catalogue::resolve(name, guard)).await?;
        if let (true, Some(folded)) = (found.is_empty(), name.folded()) {
            found = self.inspect(caller, source, catalogue::resolve(&folded, guard)).await?;
        }
        let first = found.first().ok_or_else(no_such_table)?;
        if found.len() > 1 && first.get("found_by_path") != Some(&Value::Bool(true)) {
            return Err(Failure::invalid("several schemas have a table of that name")
                .with_hint("name it with its schema: schema.table"));
        }
        first.get("oid").and_then(Value::as_i64).ok_or_else(unreadable)
    }

    /// The objects that one of our own queries gives.
    async fn inspect(
        &self,
        caller: &Principal,
        source: Source<'_>,
        query: Query,
    ) -> Result<Vec<Value>, Failure> {
        let statement = Statement::parse(&query.sql, &query.params)?.with_access(Access::ReadOnly);
        let configured = self.config.connection(&self.name(caller, &source)?).limits;
        let limits = Limits {
            max_rows: MAX_LISTED + 1,
            max_bytes: 2 * MAX_CELL_BYTES,
            max_cell_bytes: MAX_CELL_BYTES,
            ..configured
        };
        let _running = self.turn(caller).await?;
        let lease = self.lease(caller, source).await?;
        let Answer::Rows(set) = execute(lease, &statement, Format::Json, &limits).await? else {
            return Err(unreadable());
        };
        match set.cut {
            Some(Cut::Cell | Cut::Bytes) => {
                return Err(Failure::new(Code::LimitReached, "the description is too large")
                    .with_hint("ask the catalogue for less with execute_sql"));
            }
            Some(Cut::Rows) | None => {}
        }
        let Body::Rows(rows) = set.body else { return Err(unreadable()) };
        rows.into_iter()
            .map(|row| match row {
                Value::Array(cells) => cells.into_iter().next().ok_or_else(unreadable),
                Value::Null
                | Value::Bool(_)
                | Value::Number(_)
                | Value::String(_)
                | Value::Object(_) => Err(unreadable()),
            })
            .collect()
    }
}

/// Leaves `most` items; whether there were more.
fn cut_to(items: &mut Vec<Value>, most: usize) -> bool {
    let more = items.len() > most;
    items.truncate(most);
    more
}

/// Whether a schema has more tables than it shows.
fn is_cut(schema: &Value) -> bool {
    let count = schema.get("table_count").and_then(Value::as_u64);
    let shown = schema.get("tables").and_then(Value::as_array).map(|tables| tables.len() as u64);
    count > shown
}

fn no_such_table() -> Failure {
    Failure::invalid("no such table, or the connection's role may not see it")
        .with_hint("describe_schema with a pattern finds names")
}

fn unreadable() -> Failure {
    Failure::new(Code::Internal, "the catalogue answered in an unexpected way")
}
