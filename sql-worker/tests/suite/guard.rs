//! Masked columns and offered tables, by whatever way a statement gets at them.

use std::sync::Arc;

use credbroker_sql_worker::error::Code;
use credbroker_sql_worker::sql::{
    Answer, ColumnPattern, Format, Guard, Limits, Params, Policy, Pool, TablePattern,
};
use serde_json::json;

use crate::cluster::{Cluster, LIMITS, SETTINGS, rows, run, run_within};

const SECRET: &str = "ada@example.com";

/// Makes what is read below in a schema of its own, for the tests share a database.
async fn schema(cluster: &Cluster, name: &str) {
    let pool = cluster.pool();
    for sql in [
        "create schema S",
        "create table S.users (id int4 primary key, name text, email text, \
         parent int4) partition by range (id)",
        "create table S.users_1 partition of S.users for values from (0) to (1000)",
        "create table S.orders (id int4, user_id int4, total numeric)",
        "create view S.contacts as select id, email as address from S.users",
        "create function S.read() returns text stable language plpgsql as \
         $$ begin return (select email from S.users where id = 1); end $$",
        "create function S.address_of(u S.users) returns text stable language sql as \
         $$ select u.email $$",
        "insert into S.users values (1, 'Ada', 'ada@example.com', null), (2, 'Bo', null, 1)",
        "insert into S.orders values (1, 1, 9.5), (2, 1, 1)",
    ] {
        let sql =
            sql.replace("S.", &format!("{name}.")).replace("schema S", &format!("schema {name}"));
        run(&pool, &sql, Params::None).await.unwrap_or_else(|failure| panic!("{sql}: {failure}"));
    }
}

fn pool(cluster: &Cluster, mask: &[String], tables: Option<&[String]>) -> Pool {
    let guard = Guard {
        mask: mask.iter().map(|text| ColumnPattern::parse(text).unwrap()).collect(),
        tables: tables
            .map(|tables| tables.iter().map(|text| TablePattern::parse(text).unwrap()).collect()),
    };
    let policy = Policy { guard, ..Policy::default() };
    Pool::new(cluster.target_as("app").with_policy(Arc::new(policy)), SETTINGS)
}

#[tokio::test]
async fn a_masked_column_is_shown_by_no_way_that_we_know() {
    let cluster = Cluster::get();
    schema(&cluster, "masks").await;
    let pool = pool(&cluster, &["masks.users.email".to_owned()], None);
    let m = "[masked]";
    let shown = [
        ("select id, name, email from S.users order by id", json!([[1, "Ada", m], [2, "Bo", m]])),
        ("select * from S.users where id = 1", json!([[1, "Ada", m, null]])),
        ("select u.email as name from S.users u where id = 1", json!([[m]])),
        ("select b from S.users u (a, c, b) where a = 1", json!([[m]])),
        ("select email from S.users_1 where id = 1", json!([[m]])),
        ("select upper(email) from S.users where id = 1", json!([[m]])),
        ("select max(email), count(*) from S.users", json!([[m, "2"]])),
        ("select count(*) as n, count(*) from S.users where id < $1", json!([["2", "2"]])),
        (
            "select name, count(*) from S.users group by name order by name",
            json!([["Ada", "1"], ["Bo", "1"]]),
        ),
        ("select u from S.users u where id = 1", json!([[m]])),
        ("select row_to_json(u) from S.users u where id = 1", json!([[m]])),
        ("select (u).email from S.users u where id = 1", json!([[m]])),
        ("select S.address_of(u) from S.users u where id = 1", json!([[m]])),
        ("select address from S.contacts where id = 1", json!([[m]])),
        ("with x as (select email as e from S.users where id = 1) select e from x", json!([[m]])),
        (
            "with x as materialized (select email || '' as e from S.users where id = 1) table x",
            json!([[m]]),
        ),
        (
            "select name from S.users where id = 1 union all select email from S.users where id = 1",
            json!([[m], [m]]),
        ),
        ("select (select email from S.users where id = 1)", json!([[m]])),
        (
            "select o.total, u.name, u.email from S.orders o join S.users u on u.id = o.user_id order by 1 limit 1",
            json!([["1", "Ada", m]]),
        ),
        ("select xmlforest(email) from S.users where id = 1", json!([[m]])),
        ("select array_agg(email) from S.users", json!([[m]])),
        ("select total from S.orders order by 1", json!([["1"], ["9.5"]])),
        ("select sum(total) from S.orders", json!([["10.5"]])),
        (
            "select id from S.users natural join (values ('ada@example.com')) v (email)",
            json!([[1]]),
        ),
    ];
    for (sql, expected) in shown {
        let params = if sql.contains("$1") { Params::List(vec![json!(9)]) } else { Params::None };
        let sql = sql.replace("S.", "masks.");
        let answer = run(&pool, &sql, params).await;
        let answer = answer.unwrap_or_else(|failure| panic!("{sql}: {failure}"));
        let Answer::Rows(set) = &answer else { panic!("{sql}") };
        let masked: Vec<bool> = set.columns.iter().map(|column| column.masked).collect();
        let rows = json!(rows(answer));
        assert_eq!(rows, expected, "{sql}");
        let of_first = rows[0].as_array().unwrap().iter().map(|cell| *cell == json!(m));
        assert_eq!(masked, of_first.collect::<Vec<_>>(), "{sql}");
    }
    let refused = [
        "select S.read()",
        "select total, S.read() from S.orders",
        "select most_common_vals::text from pg_stats where tablename = 'users'",
        "select stavalues1::text from pg_statistic",
        "select email::int4 from S.users",
        "select id / (length(email) - length(email)) from S.users",
        "select query_to_xml('select email from masks.users', true, false, '')",
    ];
    for sql in refused {
        let sql = sql.replace("S.", "masks.");
        let failure = run(&pool, &sql, Params::None).await.unwrap_err();
        let text = failure.to_json().to_string();
        assert!(!text.contains(SECRET) && !text.contains("example"), "{sql}: {text}");
    }
    let limits = Limits { max_rows: 1, ..LIMITS };
    let sql = "select masks.read() from generate_series(1, 9)";
    let failure = run_within(&pool, sql, Params::None, Format::Csv, &limits).await.unwrap_err();
    assert_eq!(failure.code(), Code::AccessDenied);
    let sql = "select email from masks.users";
    let answer = run_within(&pool, sql, Params::None, Format::Csv, &limits).await.unwrap();
    let Answer::Rows(set) = answer else { panic!("no rows") };
    assert_eq!((set.row_count, set.cut.map(|cut| cut.as_str())), (1, Some("max_rows")));
    // What tells of a statement, and what the server knows of itself, is not masked.
    for sql in ["explain select email from masks.users", "show server_version", "select version()"]
    {
        let answer = run(&pool, sql, Params::None).await.unwrap();
        assert!(!rows(answer)[0].to_string().contains(m), "{sql}");
    }
    // The control: without the mask it is there.
    let answer = run(&cluster.read_only(), "select masks.read()", Params::None).await.unwrap();
    assert_eq!(rows(answer), [json!([SECRET])]);
}

#[tokio::test]
async fn only_offered_tables_are_read() {
    let cluster = Cluster::get();
    schema(&cluster, "offers").await;
    let pool = pool(&cluster, &[], Some(&["offers.orders".to_owned()]));
    for sql in [
        "select total from S.orders",
        "select count(*) from pg_class",
        "select table_name from information_schema.tables where table_schema = 'offers'",
        "select 1",
        "explain select * from S.orders",
    ] {
        let sql = sql.replace("S.", "offers.");
        run(&pool, &sql, Params::None).await.unwrap_or_else(|failure| panic!("{sql}: {failure}"));
    }
    for sql in [
        "select name from S.users",
        "select name from S.users_1",
        "select * from S.contacts",
        "select total, S.read() from S.orders",
        "select (select name from S.users limit 1) from S.orders",
        "explain select * from S.users",
        "select most_common_vals::text from pg_stats",
    ] {
        let sql = sql.replace("S.", "offers.");
        let failure = run(&pool, &sql, Params::None).await.unwrap_err();
        assert_eq!(failure.code(), Code::AccessDenied, "{sql}: {failure}");
        assert!(!failure.to_json().to_string().contains("users"), "{failure}");
    }
    // Partitions are offered with what they are part of.
    let parent = self::pool(&cluster, &[], Some(&["offers.users".to_owned()]));
    for sql in ["select name from offers.users", "select name from offers.users_1"] {
        assert!(run(&parent, sql, Params::None).await.is_ok(), "{sql}");
    }
}
