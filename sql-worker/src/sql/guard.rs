//! Masked columns and offered tables: an aid against what a model should not see, and no
//! boundary. The boundary is what the database role may read.
//!
//! Which tables a statement reads is not read out of its text. The server locks every table,
//! those behind views and inside of functions included, and keeps the locks until our
//! transaction ends; so they are asked for once when the statement was described, and again
//! when it has run, before anything of it is shown. Where a value comes from is told by the
//! server for plain columns only; of a statement that reads a table with masked columns,
//! everything else is masked as well.

use std::collections::{BTreeMap, BTreeSet};

use sqlx::postgres::PgConnection;
use sqlx::postgres::types::Oid;

use super::described::Origin;
use super::pattern::{ColumnPattern, TablePattern};
use super::statement::Mode;
use crate::error::{Code, Failure};

/// What is shown in place of a masked value, NULL included.
pub(super) const MASK: &str = "[masked]";

/// Catalogues that hold values of the tables' columns.
const VALUE_STATISTICS: [&str; 2] = ["pg_statistic", "pg_statistic_ext_data"];

/// What a connection does not show.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Guard {
    /// Columns whose values are masked.
    pub mask: Vec<ColumnPattern>,
    /// The only tables that are offered; `None` for all.
    pub tables: Option<Vec<TablePattern>>,
}

/// A table that a statement has locked, with what it inherits from.
struct Touched {
    oid: Oid,
    ancestor: Oid,
    kind: String,
    schema: String,
    name: String,
    columns: Vec<(i16, String)>,
}

/// What a statement reads, as far as its description tells: only [`Guard::inspect`] makes one.
#[derive(Debug)]
pub(super) struct Inspected {
    /// Tables that have masked columns, their ancestors included.
    masking: BTreeSet<u32>,
    /// Columns that may be shown: table and number.
    open: BTreeSet<(u32, i16)>,
    /// The names of those, by table.
    open_names: BTreeMap<u32, BTreeSet<String>>,
    before: Uses,
}

/// How often each relation was used in this session, as far as the server has not yet told
/// others of it, with the table that it belongs to. It only grows while our transaction lasts.
#[derive(Debug)]
pub(super) struct Uses(BTreeMap<u32, (Oid, i64)>);

impl Uses {
    /// The tables that were used since.
    fn since(&self, before: &Self) -> Vec<Oid> {
        let count = |relation: &u32| before.0.get(relation).map_or(0, |(_, count)| *count);
        let used = self.0.iter().filter(|(relation, (_, now))| *now > count(relation));
        used.map(|(_, (table, _))| *table).collect()
    }
}

/// Of relations that are not the server's own: it uses those itself. Reads are counted whether
/// their subtransaction was rolled back or not (PostgreSQL 15, 28.2.1).
const USES: &str = "
select c.oid, coalesce(i.indrelid, c.oid), u.count
from pg_catalog.pg_class c
left join pg_catalog.pg_index i on i.indexrelid operator(pg_catalog.=) c.oid
cross join lateral (select pg_catalog.pg_stat_get_xact_numscans(c.oid)
  operator(pg_catalog.+) pg_catalog.pg_stat_get_xact_blocks_fetched(c.oid)) u(count)
where c.oid operator(pg_catalog.>=) 16384::pg_catalog.oid
  and u.count operator(pg_catalog.>) 0::pg_catalog.int8";

/// Every name is qualified, for `search_path` is the role's. What was dropped meanwhile has no
/// name any more.
const TOUCHED: &str = "
with recursive touched(oid) as (
  select distinct l.relation from pg_catalog.pg_locks l
  where l.locktype operator(pg_catalog.=) 'relation'
    and l.pid operator(pg_catalog.=) pg_catalog.pg_backend_pid()
  union
  select pg_catalog.unnest($1::pg_catalog.oid[])
), family(oid, ancestor) as (
  select t.oid, t.oid from touched t
  union
  select f.oid, i.inhparent from family f
  join pg_catalog.pg_inherits i on i.inhrelid operator(pg_catalog.=) f.ancestor
)
select f.oid, f.ancestor, coalesce(c.relkind::pg_catalog.text, ''),
  coalesce(n.nspname::pg_catalog.text, ''), coalesce(c.relname::pg_catalog.text, ''),
  array(select a.attnum from pg_catalog.pg_attribute a
        where a.attrelid operator(pg_catalog.=) f.oid and not a.attisdropped order by a.attnum),
  array(select a.attname::pg_catalog.text from pg_catalog.pg_attribute a
        where a.attrelid operator(pg_catalog.=) f.oid and not a.attisdropped order by a.attnum)
from family f
left join pg_catalog.pg_class c on c.oid operator(pg_catalog.=) f.ancestor
left join pg_catalog.pg_namespace n on n.oid operator(pg_catalog.=) c.relnamespace";

type Row = (Oid, Oid, String, String, String, Vec<i16>, Vec<String>);

impl Guard {
    /// Whether there is nothing to look at.
    pub(super) fn is_open(&self) -> bool {
        self.mask.is_empty() && self.tables.is_none()
    }

    /// Whether an error of the server may hold what is not shown: a statement that failed has given
    /// up its locks, and cannot be looked at again. Who writes can make a function that tells.
    pub(super) fn withholds_errors(&self, mode: Mode) -> bool {
        !self.mask.is_empty() || (self.tables.is_some() && mode == Mode::Read)
    }

    /// Looks at what the statement that was just described reads.
    pub(super) async fn inspect(&self, connection: &mut PgConnection) -> Result<Inspected, Error> {
        let before = uses(connection).await?;
        let touched = touched(connection, &[]).await?;
        self.check_tables(&touched)?;
        let mut seen = Inspected {
            masking: BTreeSet::new(),
            open: BTreeSet::new(),
            open_names: BTreeMap::new(),
            before,
        };
        for relation in &touched {
            let masked = self.masked(&touched, relation.oid);
            if !masked.is_empty() {
                seen.masking.extend([relation.oid.0, relation.ancestor.0]);
            }
            // Values in a view's column may come from anywhere.
            if relation.oid == relation.ancestor && relation.kind != "v" {
                let open = relation.columns.iter().filter(|(number, _)| !masked.contains(number));
                seen.open.extend(open.clone().map(|(number, _)| (relation.oid.0, *number)));
                let names = open.map(|(_, name)| name.clone()).collect();
                seen.open_names.insert(relation.oid.0, names);
            }
        }
        Ok(seen)
    }

    /// Looks again when the statement has run: functions may have read more.
    pub(super) async fn confirm(
        &self,
        connection: &mut PgConnection,
        seen: &Inspected,
    ) -> Result<(), Error> {
        names_as_they_are(connection).await?;
        let used = uses(connection).await?.since(&seen.before);
        let touched = touched(connection, &used).await?;
        self.check_tables(&touched)?;
        let oids: BTreeSet<u32> = touched.iter().map(|relation| relation.oid.0).collect();
        for oid in oids {
            let masked = self.masked(&touched, Oid(oid));
            if masked.is_empty() {
                continue;
            }
            let mut family = touched.iter().filter(|relation| relation.oid.0 == oid);
            if !family.clone().any(|relation| seen.masking.contains(&relation.ancestor.0)) {
                let what = "a function in the statement reads a table with masked columns";
                return Err(Failure::new(Code::AccessDenied, what).into());
            }
            let own = family.clone().find(|relation| relation.ancestor == relation.oid);
            let columns = own.into_iter().flat_map(|relation| &relation.columns);
            let names = columns.filter(|(number, _)| masked.contains(number));
            let names: BTreeSet<&str> = names.map(|(_, name)| name.as_str()).collect();
            // Read through a table that it comes from, its values stand in that one's columns.
            let shown = |relation: &Touched| {
                let open = seen.open_names.get(&relation.ancestor.0);
                open.is_some_and(|open| open.iter().any(|name| names.contains(name.as_str())))
            };
            if family.any(|relation| relation.ancestor != relation.oid && shown(relation)) {
                let what = "a part of a table that the statement reads has more masked columns";
                return Err(Failure::new(Code::AccessDenied, what)
                    .with_hint("mask the columns of the whole table in the worker's configuration")
                    .into());
            }
        }
        Ok(())
    }

    /// Refuses a plan over what is not shown. To be asked before the planner looks at anything,
    /// and again, with what that gave, before what the planner said is shown.
    pub(super) async fn check_plan(
        &self,
        connection: &mut PgConnection,
        before: Option<&Uses>,
    ) -> Result<Uses, Error> {
        names_as_they_are(connection).await?;
        let now = uses(connection).await?;
        let used = before.map(|before| now.since(before)).unwrap_or_default();
        let touched = touched(connection, &used).await?;
        self.check_tables(&touched)?;
        if touched.iter().any(|relation| !self.masked(&touched, relation.oid).is_empty()) {
            return Err(plan_withheld().into());
        }
        Ok(now)
    }

    /// The numbers of a table's masked columns, by its own name and those of its ancestors.
    fn masked(&self, touched: &[Touched], oid: Oid) -> BTreeSet<i16> {
        let family = touched.iter().filter(|relation| relation.oid == oid && !relation.is_system());
        let masks = |relation: &Touched, column: &str| {
            let mut mask = self.mask.iter();
            mask.any(|mask| mask.matches(&relation.schema, &relation.name, column))
        };
        family
            .flat_map(|relation| {
                let columns = relation.columns.iter();
                columns.filter(move |(_, name)| masks(relation, name)).map(|(number, _)| *number)
            })
            .collect()
    }

    fn check_tables(&self, touched: &[Touched]) -> Result<(), Failure> {
        if touched.iter().any(|relation| {
            relation.is_system() && VALUE_STATISTICS.contains(&relation.name.as_str())
        }) {
            return Err(Failure::new(
                Code::AccessDenied,
                "the planner's statistics hold values of tables, and are not offered here",
            ));
        }
        let Some(tables) = &self.tables else {
            return Ok(());
        };
        let offered = |oid: Oid| {
            let mut family = touched.iter().filter(|relation| relation.oid == oid);
            family.any(|relation| {
                let mut tables = tables.iter();
                relation.is_system()
                    || tables.any(|table| table.matches(&relation.schema, &relation.name))
            })
        };
        if touched.iter().all(|relation| relation.is_index() || offered(relation.oid)) {
            return Ok(());
        }
        Err(Failure::new(Code::AccessDenied, "the statement uses a table that is not offered here")
            .with_hint(
                "what a view reads counts too; the offered tables are those of `tables` in the \
                 worker's configuration",
            ))
    }
}

impl Inspected {
    /// Whether a column of the result must not be shown; `harmless` is asked for those whose
    /// origin is not known.
    pub(super) fn masks(&self, origin: Origin, harmless: impl FnOnce() -> bool) -> bool {
        if self.masking.is_empty() {
            return false;
        }
        match origin {
            // Numbers below zero are the server's own: ctid, tableoid, ….
            Some((table, number)) => number > 0 && !self.open.contains(&(table, number)),
            None => !harmless(),
        }
    }

    /// Whether columns without an origin matter.
    pub(super) fn has_masks(&self) -> bool {
        !self.masking.is_empty()
    }
}

impl Touched {
    fn is_system(&self) -> bool {
        matches!(self.schema.as_str(), "pg_catalog" | "information_schema" | "pg_toast")
    }

    fn is_index(&self) -> bool {
        matches!(self.kind.as_str(), "i" | "I")
    }
}

/// The answer to who asks for a plan over masked columns.
pub(super) fn plan_withheld() -> Failure {
    let what = "the statement reads a table with masked columns, whose plan is not shown";
    Failure::new(Code::AccessDenied, what)
        .with_hint("a plan's estimates tell of values; the masks are in the worker's configuration")
}

/// Why a statement was stopped.
pub(super) enum Error {
    /// By what it reads.
    Refused(Failure),
    /// The server did not tell.
    Server(sqlx::Error),
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Self::Refused(failure)
    }
}

/// A statement can set how the server writes texts, and a name in another encoding may be another
/// one in ours.
async fn names_as_they_are(connection: &mut PgConnection) -> Result<(), Error> {
    let set = sqlx::raw_sql("set local client_encoding to 'UTF8'").execute(connection).await;
    set.map(|_done| ()).map_err(Error::Server)
}

async fn uses(connection: &mut PgConnection) -> Result<Uses, Error> {
    let rows: Vec<(Oid, Oid, i64)> = sqlx::query_as(USES)
        .persistent(false)
        .fetch_all(connection)
        .await
        .map_err(Error::Server)?;
    let uses = rows.into_iter().map(|(relation, table, count)| (relation.0, (table, count)));
    Ok(Uses(uses.collect()))
}

/// What is locked, and `used` as well.
async fn touched(connection: &mut PgConnection, used: &[Oid]) -> Result<Vec<Touched>, Error> {
    let rows: Vec<Row> = sqlx::query_as(TOUCHED)
        .bind(used)
        .persistent(false)
        .fetch_all(connection)
        .await
        .map_err(Error::Server)?;
    let touched = rows.into_iter().map(|(oid, ancestor, kind, schema, name, numbers, names)| {
        let columns = numbers.into_iter().zip(names).collect();
        Touched { oid, ancestor, kind, schema, name, columns }
    });
    Ok(touched.collect())
}

/// Which columns the plan shows to be `count(*)`: a number of rows, and no value of any.
///
/// `plan` is what EXPLAIN (VERBOSE, FORMAT JSON) gives. A node shows what it makes itself as it
/// is, and in brackets what comes from below; of several inputs that is the text of the first one
/// alone. So it is the aggregate that must count, below nodes that pass its columns on.
pub(super) fn counts(plan: &serde_json::Value) -> Vec<bool> {
    let Some(root) = plan.pointer("/0/Plan") else {
        return Vec::new();
    };
    let mut node = root;
    loop {
        match node.get("Node Type").and_then(serde_json::Value::as_str) {
            Some("Aggregate") => break,
            Some("Sort" | "Incremental Sort" | "Limit") => match input(node) {
                Some(input) => node = input,
                None => return Vec::new(),
            },
            _ => return Vec::new(),
        }
    }
    let counted = output(node).map(|text| text == "count(*)");
    let shown = output(root).map(|text| matches!(text, "count(*)" | "(count(*))"));
    counted.zip(shown).map(|(counted, shown)| counted && shown).collect()
}

/// What a node gets its rows from; what is asked for once, such as a limit, may stand before it.
fn input(node: &serde_json::Value) -> Option<&serde_json::Value> {
    let mut below = node.get("Plans")?.as_array()?.iter();
    below.find(|below| below.get("Parent Relationship").is_some_and(|kind| kind == "Outer"))
}

/// The texts of a node's columns.
fn output(node: &serde_json::Value) -> impl Iterator<Item = &str> {
    let columns = node.get("Output").and_then(serde_json::Value::as_array);
    columns.into_iter().flatten().map(|text| text.as_str().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_an_aggregate_on_top_counts() {
        let below = |kind: &str, output: &[&str], inputs: &[serde_json::Value]| {
            json!({"Node Type": kind, "Parent Relationship": "Outer", "Output": output,
                "Plans": inputs})
        };
        let counts = |plan: &serde_json::Value| counts(&json!([{"Plan": plan}]));
        let none: [bool; 0] = [];
        let aggregate = below("Aggregate", &["count(*)", "max(u.email)", "(count(*))"], &[]);
        assert_eq!(counts(&aggregate), [true, false, false]);
        let inputs = std::slice::from_ref(&aggregate);
        let sort = below("Sort", &["(count(*))", "u.a", "(count(*))"], inputs);
        assert_eq!(counts(&sort), [true, false, false]);
        let append = below("Append", &["(count(*))"], inputs);
        assert_eq!(counts(&append), none);
        // UNION, by hashing.
        let distinct = below("Aggregate", &["(count(*))"], std::slice::from_ref(&append));
        assert_eq!(counts(&distinct), [false]);
        // LIMIT (SELECT count(*) …)
        let most = json!({"Node Type": "Aggregate", "Parent Relationship": "InitPlan",
            "Output": ["count(*)"]});
        assert_eq!(counts(&below("Limit", &["(count(*))"], &[most.clone(), append])), none);
        assert_eq!(counts(&below("Limit", &["(count(*))"], &[most, aggregate])), [true]);
        assert_eq!(counts(&json!(null)), none);
    }
}
