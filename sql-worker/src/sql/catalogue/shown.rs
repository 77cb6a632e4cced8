//! What a connection's guard shows of the catalogue, as conditions of a query; pure.
//!
//! The same rules as the guard's own: a table goes by its own name and by those of the tables
//! that it inherits from or is a partition of, and system tables are always offered.

use serde_json::Value;

use crate::sql::Guard;

/// A query's parameters, and the conditions that stand for a guard. Patterns travel as
/// parameters.
#[derive(Debug)]
pub(super) struct Shown<'g> {
    guard: &'g Guard,
    params: Vec<Value>,
}

impl<'g> Shown<'g> {
    /// For a query that has `params` itself.
    pub(super) fn new(guard: &'g Guard, params: Vec<Value>) -> Self {
        Self { guard, params }
    }

    /// All parameters, in their order.
    pub(super) fn into_params(self) -> Vec<Value> {
        self.params
    }

    /// Whether tables may be left out.
    pub(super) fn is_partial(&self) -> bool {
        self.guard.tables.is_some()
    }

    /// Whether the table that `pg_class` is joined as `class` for is offered, and the role may
    /// see it.
    pub(super) fn table(&mut self, class: &str) -> String {
        let seen = super::seen(class);
        let Some(tables) = &self.guard.tables else {
            return seen;
        };
        let mut any = vec!["fn.nspname in ('pg_catalog', 'information_schema')".to_owned()];
        for table in tables {
            let [schema, table] = table.to_like().map(|pattern| self.param(pattern));
            any.push(format!("(fn.nspname like {schema} and fc.relname like {table})"));
        }
        format!("({seen} and {})", in_family(&format!("{class}.oid"), &any.join(" or ")))
    }

    /// Whether the column that `pg_attribute` is joined as `a` for is masked.
    pub(super) fn masked_column(&mut self) -> String {
        let mut any = Vec::with_capacity(self.guard.mask.len());
        for column in &self.guard.mask {
            let [schema, table, column] = column.to_like().map(|pattern| self.param(pattern));
            any.push(format!(
                "(fn.nspname like {schema} and fc.relname like {table} and a.attname like {column})"
            ));
        }
        match any.as_slice() {
            [] => "false".to_owned(),
            any => in_family("a.attrelid", &any.join(" or ")),
        }
    }

    fn param(&mut self, pattern: String) -> String {
        self.params.push(pattern.into());
        format!("${}::pg_catalog.text", self.params.len())
    }
}

/// Whether `condition` holds for a table or one that it comes from, as `fn` and `fc`.
fn in_family(table: &str, condition: &str) -> String {
    format!(
        "exists (
             with recursive family(oid) as (
                 select {table}
                 union
                 select fi.inhparent from family f
                 join pg_catalog.pg_inherits fi on fi.inhrelid = f.oid)
             select from family f join pg_catalog.pg_class fc on fc.oid = f.oid
             join pg_catalog.pg_namespace fn on fn.oid = fc.relnamespace
             where {condition})"
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::sql::{ColumnPattern, TablePattern};

    #[test]
    fn patterns_are_parameters_behind_those_of_the_query() {
        let guard = Guard {
            mask: vec![ColumnPattern::parse("users.e'mail").unwrap()],
            tables: Some(vec![TablePattern::parse("sales.*").unwrap()]),
        };
        let mut shown = Shown::new(&guard, vec![json!("own")]);
        let table = shown.table("c");
        assert!(table.contains("fn.nspname like $2::") && table.contains("fc.relname like $3::"));
        let column = shown.masked_column();
        assert!(column.contains("a.attname like $6::") && !column.contains("mail"), "{column}");
        let params = shown.into_params();
        assert_eq!(params, ["own", "sales", "%", "%", "users", "e'mail"].map(Value::from));
    }

    #[test]
    fn an_open_guard_adds_nothing() {
        let guard = Guard::default();
        let mut shown = Shown::new(&guard, vec![]);
        assert_eq!(shown.table("c"), super::super::seen("c"));
        assert_eq!((shown.masked_column().as_str(), shown.into_params()), ("false", vec![]));
    }
}
