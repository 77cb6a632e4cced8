//! What a role may see of a database, as queries of our own; pure.
//!
//! Each row that they give is one JSON object, so that a step costs one round trip. The rule of
//! what is seen is that of `information_schema` (PostgreSQL 15, 37.1): owned, or with any
//! privilege on the table or one of its columns, in a schema that the role may use. System
//! schemas are seen only when they are named. Of those, a [`Guard`] leaves the tables that are
//! offered.
//!
//! Functions and types are qualified, and operators get operands of exactly their types: else
//! somebody who may create operators in a schema of the role's `search_path` could have theirs
//! run with the role's rights (PostgreSQL 15, 10.2).

mod names;
mod shown;

use serde_json::Value;

pub use self::names::{Pattern, TableName};
use self::shown::Shown;
use super::{Guard, Params};

/// Schemas, and tables over all of them, that an overview or a search shows.
pub const MAX_LISTED: usize = 100;
/// Columns of a table that are shown.
pub const MAX_COLUMNS: usize = 300;
/// Keys, checks, indexes and partitions of a table, each.
pub const MAX_PARTS: usize = 50;
/// Characters of a comment, an expression or a definition.
const MAX_TEXT: usize = 300;

/// A query, and what it is asked with.
#[derive(Debug)]
pub struct Query {
    /// One statement.
    pub sql: String,
    /// Its parameters.
    pub params: Params,
}

/// Every schema that the role may use: `{name, table_count, tables}`, with the names of the
/// first [`MAX_LISTED`] tables over all schemas. Partitions count as part of their table.
#[must_use]
pub fn overview(guard: &Guard) -> Query {
    let mut shown = Shown::new(guard, vec![]);
    let seen = shown.table("c");
    // A schema is no secret, but one without an offered table is of no use.
    let having = if shown.is_partial() { "having pg_catalog.count(s.relname) > 0" } else { "" };
    let sql = format!(
        "with seen as (
             select c.relnamespace, c.relname,
                    pg_catalog.row_number() over (order by n.nspname, c.relname) as place
             from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
             where {IS_TABLE} and not c.relispartition and {OWN_SCHEMA} and {seen}
         )
         select pg_catalog.json_build_object(
             'name', n.nspname,
             'table_count', pg_catalog.count(s.relname),
             'tables', coalesce(pg_catalog.json_agg(s.relname order by s.relname)
                 filter (where s.place <= {MAX_LISTED}), '[]'))
         from pg_catalog.pg_namespace n left join seen s on s.relnamespace = n.oid
         where {OWN_SCHEMA} and pg_catalog.has_schema_privilege(n.oid, 'USAGE')
         group by n.nspname {having} order by n.nspname limit {limit}",
        limit = MAX_LISTED + 1,
    );
    Query { sql, params: Params::List(shown.into_params()) }
}

/// The tables that a pattern names: `{schema, name, kind, row_estimate?, comment?}`.
#[must_use]
pub fn matching(pattern: &Pattern, guard: &Guard) -> Query {
    let schema = pattern.schema.as_deref().map_or(Value::Null, Value::from);
    let mut shown = Shown::new(guard, vec![schema, pattern.table.as_str().into()]);
    let seen = shown.table("c");
    let sql = format!(
        "select pg_catalog.json_strip_nulls(pg_catalog.json_build_object(
             'schema', n.nspname, 'name', c.relname, 'kind', {KIND},
             'row_estimate', {ROW_ESTIMATE},
             'comment', pg_catalog.left(pg_catalog.obj_description(c.oid, 'pg_class'), {MAX_TEXT})))
         from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
         where {IS_TABLE} and {seen}
           and case when $1::pg_catalog.text is null then {OWN_SCHEMA}
                    else n.nspname ilike $1::pg_catalog.text end
           and c.relname ilike $2::pg_catalog.text
         order by n.nspname, c.relname limit {limit}",
        limit = MAX_LISTED + 1,
    );
    Query { sql, params: Params::List(shown.into_params()) }
}

/// Which tables a name can mean: `{oid, found_by_path}`, at most two.
#[must_use]
pub fn resolve(table: &TableName, guard: &Guard) -> Query {
    let schema = table.schema.as_deref().map_or(Value::Null, Value::from);
    let mut shown = Shown::new(guard, vec![schema, table.name.as_str().into()]);
    let seen = shown.table("c");
    let sql = format!(
        "select pg_catalog.json_build_object('oid', c.oid::pg_catalog.int8,
             'found_by_path', pg_catalog.pg_table_is_visible(c.oid))
         from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
         where {IS_TABLE} and {seen}
           and ($1::pg_catalog.text is null or n.nspname = $1::pg_catalog.text)
           and c.relname = $2::pg_catalog.text
         order by pg_catalog.pg_table_is_visible(c.oid) desc, n.nspname limit 2"
    );
    Query { sql, params: Params::List(shown.into_params()) }
}

/// One table in full. Lists hold one item more than is shown, where there are more.
#[must_use]
pub fn details(oid: i64, guard: &Guard) -> Query {
    let mut shown = Shown::new(guard, vec![oid.into()]);
    let (seen, seen_other, masked) = (shown.table("c"), shown.table("o"), shown.masked_column());
    let (parts, columns) = (MAX_PARTS + 1, MAX_COLUMNS + 1);
    let names = |keys: &str, table: &str| {
        format!(
            "(select pg_catalog.json_agg(ka.attname order by u.place)
              from pg_catalog.unnest(k.{keys}) with ordinality u(number, place)
              join pg_catalog.pg_attribute ka on ka.attrelid = k.{table} and ka.attnum = u.number)"
        )
    };
    let (own, other) = (names("conkey", "conrelid"), names("confkey", "confrelid"));
    // The constraints of the table: what each gives, which of them, and at which end it stands.
    let constraints = |gives: &str, kinds: &str, end: &str, other_end: &str| {
        format!(
            "(select pg_catalog.json_agg(g.item) from (
                 select {gives} as item from pg_catalog.pg_constraint k
                 left join pg_catalog.pg_class o on o.oid = k.{other_end}
                 left join pg_catalog.pg_namespace os on os.oid = o.relnamespace
                 where k.{end} = c.oid and {kinds}
                 order by k.conname limit {parts}) g)"
        )
    };
    let foreign = format!("k.contype = 'f' and {seen_other}");
    let foreign_keys = constraints(
        &format!(
            "pg_catalog.json_build_object('columns', {own},
             'references', pg_catalog.concat(os.nspname, '.', o.relname), 'referenced_columns', {other})"
        ),
        // A key to a partitioned table has a row for each of its partitions too.
        &format!(
            "{foreign} and not exists (select from pg_catalog.pg_constraint kp
                 where kp.oid = k.conparentid and kp.conrelid = k.conrelid)"
        ),
        "conrelid",
        "confrelid",
    );
    let referenced_by = constraints(
        &format!(
            "pg_catalog.json_build_object('table', pg_catalog.concat(os.nspname, '.', o.relname),
             'columns', {own}, 'referenced_columns', {other})"
        ),
        &format!("{foreign} and k.conparentid = 0::pg_catalog.oid"),
        "confrelid",
        "conrelid",
    );
    let primary_key = names("conkey", "conrelid");
    let unique = constraints(&own, "k.contype = 'u'", "conrelid", "confrelid");
    let checks = constraints(
        &format!("pg_catalog.left(pg_catalog.pg_get_constraintdef(k.oid, true), {MAX_TEXT})"),
        "k.contype in ('c', 'x')",
        "conrelid",
        "confrelid",
    );
    let sql = format!(
        "select pg_catalog.json_strip_nulls(pg_catalog.json_build_object(
             'schema', n.nspname, 'name', c.relname, 'kind', {KIND},
             'row_estimate', {ROW_ESTIMATE},
             'comment', pg_catalog.left(pg_catalog.obj_description(c.oid, 'pg_class'), {MAX_TEXT}),
             'columns', coalesce((select pg_catalog.json_agg(g.item) from (
                 select pg_catalog.json_build_object(
                     'name', a.attname,
                     'type', pg_catalog.format_type(a.atttypid, a.atttypmod),
                     'nullable', not a.attnotnull,
                     'default', case when a.attgenerated = '' then {expression} end,
                     'generated', case when a.attgenerated <> '' then {expression} end,
                     'identity', case a.attidentity
                         when 'a' then 'always' when 'd' then 'by default' end,
                     'comment', pg_catalog.left(
                         pg_catalog.col_description(a.attrelid, a.attnum), {MAX_TEXT}),
                     'masked', case when {masked} then true end) as item
                 from pg_catalog.pg_attribute a
                 left join pg_catalog.pg_attrdef d
                   on d.adrelid = a.attrelid and d.adnum = a.attnum
                 where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
                   and (pg_catalog.pg_has_role(c.relowner, 'USAGE')
                        or pg_catalog.has_column_privilege(
                            c.oid, a.attnum, 'SELECT, INSERT, UPDATE, REFERENCES'))
                 order by a.attnum limit {columns}) g), '[]'),
             'primary_key', (select {primary_key} from pg_catalog.pg_constraint k
                 where k.conrelid = c.oid and k.contype = 'p'),
             'unique', {unique},
             'foreign_keys', {foreign_keys},
             'referenced_by', {referenced_by},
             'checks', {checks},
             'indexes', (select pg_catalog.json_agg(g.item) from (
                 select pg_catalog.left(pg_catalog.pg_get_indexdef(i.indexrelid), {MAX_TEXT})
                     as item
                 from pg_catalog.pg_index i
                 where i.indrelid = c.oid and not i.indisprimary
                 order by i.indexrelid limit {parts}) g),
             'partition_of', (select pg_catalog.concat(os.nspname, '.', o.relname)
                 from pg_catalog.pg_inherits h
                 join pg_catalog.pg_class o on o.oid = h.inhparent
                 join pg_catalog.pg_namespace os on os.oid = o.relnamespace
                 where h.inhrelid = c.oid and c.relispartition and {seen_other} limit 1),
             'partition_key', pg_catalog.pg_get_partkeydef(c.oid),
             'partitions', (select pg_catalog.json_agg(g.item) from (
                 select pg_catalog.json_build_object('name', pg_catalog.concat(os.nspname, '.', o.relname),
                     'bound', pg_catalog.left(
                         pg_catalog.pg_get_expr(o.relpartbound, o.oid), {MAX_TEXT})) as item
                 from pg_catalog.pg_inherits h
                 join pg_catalog.pg_class o on o.oid = h.inhrelid
                 join pg_catalog.pg_namespace os on os.oid = o.relnamespace
                 where h.inhparent = c.oid and o.relispartition and {seen_other}
                 order by os.nspname, o.relname limit {parts}) g)))
         from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
         where c.oid = $1::pg_catalog.int8::pg_catalog.oid and {seen}",
        expression =
            format_args!("pg_catalog.left(pg_catalog.pg_get_expr(d.adbin, d.adrelid), {MAX_TEXT})"),
    );
    Query { sql, params: Params::List(shown.into_params()) }
}

const IS_TABLE: &str = "c.relkind in ('r', 'p', 'v', 'm', 'f')";
const OWN_SCHEMA: &str =
    "(n.nspname <> 'information_schema' and n.nspname not like 'pg\\_%'::pg_catalog.text)";
const KIND: &str = "case when c.relispartition then 'partition' else case c.relkind \
    when 'r' then 'table' when 'p' then 'partitioned table' when 'v' then 'view' \
    when 'm' then 'materialized view' when 'f' then 'foreign table' end end";
/// -1 until the table was vacuumed or analysed.
const ROW_ESTIMATE: &str = "case when c.relkind in ('r', 'p', 'm', 'f') and c.reltuples >= 0::pg_catalog.float4 \
    then c.reltuples::pg_catalog.int8 end";

/// Whether the role may see the table that `pg_class` is joined as.
fn seen(class: &str) -> String {
    format!(
        "(pg_catalog.has_schema_privilege({class}.relnamespace, 'USAGE')
          and (pg_catalog.pg_has_role({class}.relowner, 'USAGE')
               or pg_catalog.has_table_privilege({class}.oid,
                   'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER')
               or pg_catalog.has_any_column_privilege({class}.oid,
                   'SELECT, INSERT, UPDATE, REFERENCES')))"
    )
}
