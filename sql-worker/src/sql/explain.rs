//! The plan of a statement that is not run.
//!
//! Parameters have no values here, so the plan is the generic one: the statement is prepared
//! and the plan of its execution is asked for under `plan_cache_mode = force_generic_plan`,
//! where the values given to EXECUTE play no part (PostgreSQL 15, PREPARE). All of it happens
//! in a read-only transaction that is rolled back; PREPARE takes nothing but queries and
//! changes of rows, so the caller's text can neither end that transaction nor be run by it.
//! A plan's estimates are statistics of what is in the tables, so there is none over a table
//! that has masked columns.

use std::collections::HashMap;

use futures_util::TryStreamExt as _;
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Row as _};
use tokio::time::timeout;

use super::guard::Uses;
use super::lexer::{Kind, tokens};
use super::postgres::Trouble;
use super::statement::{Mode, check_text};
use super::transaction::Scope;
use super::{Guard, Lease, Limits};
use crate::error::{Code, Failure};

/// Lines of a plan that are kept.
const MAX_LINES: usize = 300;
/// Bytes of a plan that are kept.
const MAX_BYTES: usize = 64 << 10;

const NAME: &str = "credbroker_explain";

/// What the database would do.
#[derive(Debug, Clone, PartialEq)]
pub struct Explanation {
    /// The plan as text, a node or a detail a line.
    pub lines: Vec<String>,
    /// The planner's cost of the whole, in its own unit.
    pub total_cost: Option<f64>,
    /// How many rows the planner expects.
    pub row_estimate: Option<f64>,
    /// Whether lines are missing.
    pub truncated: bool,
}

/// Asks for the plan of `query` and takes the lease with it, as
/// [`execute`](super::execute) does.
///
/// # Errors
/// `INVALID_REQUEST` when it is no statement that has a plan; else those of
/// [`execute`](super::execute).
pub async fn explain(lease: Lease, query: &str, limits: &Limits) -> Result<Explanation, Failure> {
    check_text(query)?;
    let query = positional(query)?;
    let closed = lease.closed();
    let work = timeout(limits.statement_timeout, run(lease, query));
    tokio::select! {
        biased;
        () = closed.cancelled() => Err(Failure::cancelled()),
        done = work => done.unwrap_or_else(|_elapsed| {
            Err(Failure::new(Code::Timeout, "planning took too long and was stopped"))
        }),
    }
}

async fn run(mut lease: Lease, query: String) -> Result<Explanation, Failure> {
    let policy = lease.policy();
    let mut scope = Scope::open(&mut lease, Mode::Read).await?;
    match plan(scope.connection(), query, &policy.guard).await {
        Ok(explanation) => {
            let left = scope.abandon();
            lease.give_back(left);
            Ok(explanation)
        }
        Err(trouble) => {
            if !trouble.is_in_step() {
                return Err(lease.loss(trouble.into()));
            }
            let left = scope.abandon();
            lease.give_back(left);
            Err(trouble.into())
        }
    }
}

async fn plan(
    connection: &mut PgConnection,
    query: String,
    guard: &Guard,
) -> Result<Explanation, Trouble> {
    let (explanation, before) = explained(connection, query, guard).await?;
    // The planner locks more: partitions, and what it inlines.
    look(connection, guard, before.as_ref()).await?;
    Ok(explanation)
}

async fn look(
    connection: &mut PgConnection,
    guard: &Guard,
    before: Option<&Uses>,
) -> Result<Option<Uses>, Trouble> {
    match guard.is_open() {
        true => Ok(None),
        false => Ok(Some(guard.check_plan(connection, before).await?)),
    }
}

async fn explained(
    connection: &mut PgConnection,
    query: String,
    guard: &Guard,
) -> Result<(Explanation, Option<Uses>), Trouble> {
    fixed(connection, "SET LOCAL plan_cache_mode = force_generic_plan").await?;
    // By the extended protocol, so it is one statement or none.
    let prepare = AssertSqlSafe(format!("PREPARE {NAME} AS {query}"));
    sqlx::query(prepare).persistent(false).execute(&mut *connection).await?;
    let parameters: i32 = sqlx::query_scalar(
        "select pg_catalog.cardinality(parameter_types) from pg_catalog.pg_prepared_statements
         where name = $1",
    )
    .bind(NAME)
    .fetch_one(&mut *connection)
    .await?;
    let before = look(connection, guard, None).await?;
    let nulls = vec!["NULL"; usize::try_from(parameters).unwrap_or(0)].join(", ");
    let arguments = if nulls.is_empty() { nulls } else { format!("({nulls})") };
    let explain = AssertSqlSafe(format!("EXPLAIN EXECUTE {NAME}{arguments}"));
    let mut rows = sqlx::query(explain).persistent(false).fetch(&mut *connection);
    let mut kept = Explanation::empty();
    let mut bytes = 0;
    while let Some(row) =
        rows.try_next().await.map_err(|error| Trouble::of_planning(&error, guard))?
    {
        let line: String = row.try_get(0)?;
        bytes += line.len() + 1;
        if kept.lines.len() < MAX_LINES && bytes <= MAX_BYTES {
            kept.lines.push(line);
        } else {
            kept.truncated = true;
        }
    }
    let top = kept.lines.first().map(String::as_str).unwrap_or_default();
    kept.total_cost = number_after(top, "..");
    kept.row_estimate = number_after(top, " rows=");
    Ok((kept, before))
}

async fn fixed(connection: &mut PgConnection, sql: &'static str) -> Result<(), sqlx::Error> {
    sqlx::query(sql).persistent(false).execute(connection).await.map(|_done| ())
}

impl Explanation {
    fn empty() -> Self {
        Self { lines: Vec::new(), total_cost: None, row_estimate: None, truncated: false }
    }
}

/// A number of the cost that a plan's first line ends with: `(cost=0.00..35.50 rows=10 width=4)`.
fn number_after(line: &str, mark: &str) -> Option<f64> {
    let (_, cost) = line.rsplit_once("(cost=")?;
    let (_, rest) = cost.split_once(mark)?;
    rest.split([' ', ')']).next()?.parse().ok()
}

/// `query` with its `:name` parameters numbered, if it is a statement that has a plan.
fn positional(query: &str) -> Result<String, Failure> {
    let tokens = tokens(query);
    let first = tokens.iter().find(|token| token.kind != Kind::Blank && token.text != "(");
    let planned = ["select", "with", "values", "table", "insert", "update", "delete", "merge"];
    if !first.is_some_and(|first| planned.iter().any(|word| first.text.eq_ignore_ascii_case(word)))
    {
        return Err(Failure::invalid("only queries, INSERT, UPDATE, DELETE and MERGE have a plan")
            .with_hint("send the statement itself, without EXPLAIN"));
    }
    let named = !tokens.iter().any(|token| token.kind == Kind::Position);
    let mut places: HashMap<&str, usize> = HashMap::new();
    let mut sql = String::with_capacity(query.len());
    for token in &tokens {
        if named && token.kind == Kind::Name {
            let next = places.len() + 1;
            sql.push_str(&format!("${}", places.entry(token.text).or_insert(next)));
        } else {
            sql.push_str(token.text);
        }
    }
    Ok(sql)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_numbered_where_nothing_else_is() {
        let cases = [
            ("select :a, :b, :a", "select $1, $2, $1"),
            ("select $1, a[x:y]", "select $1, a[x:y]"),
            ("  -- c\n (select ':a')", "  -- c\n (select ':a')"),
        ];
        for (query, expected) in cases {
            assert_eq!(positional(query).unwrap(), expected);
        }
        for query in ["", "explain select 1", "show all", "copy t to stdout", "set x = 1"] {
            assert_eq!(positional(query).unwrap_err().code(), Code::InvalidRequest, "{query}");
        }
    }

    #[test]
    fn the_first_line_tells_cost_and_rows() {
        let line = "Seq Scan on \"(cost=9..8\"  (cost=0.00..35.50 rows=2550 width=4)";
        assert_eq!(number_after(line, ".."), Some(35.5));
        assert_eq!(number_after(line, " rows="), Some(2550.0));
        assert_eq!(number_after("Utility", ".."), None);
    }
}
