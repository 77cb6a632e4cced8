//! Masked columns and offered tables, by whatever way a statement gets at them.

use std::sync::Arc;

use credbroker_sql_worker::error::Code;
use credbroker_sql_worker::sql::{
    Answer, ColumnPattern, Format, Guard, Limits, Params, Policy, Pool, TablePattern,
};
use serde_json::json;

use crate::cluster::{Cluster, LIMITS, SETTINGS, prepare, rows, run, run_within, succeed};
use crate::mcp::Client;

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
        succeed(&pool, &sql, Params::None).await;
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
        ("; select count(*) from S.users; -- end", json!([["2"]])),
        (
            "select count(*), name from S.users group by name order by 2 limit (select 1)",
            json!([["1", "Ada"]]),
        ),
        // The plan tells of what is below by the first of it.
        (
            "select count(*) from S.users union select length(email) from S.users",
            json!([[m], [m], [m]]),
        ),
        (
            "select count(*) from S.users union all select length(email) from S.users \
             limit (select count(*) from S.orders)",
            json!([[m], [m]]),
        ),
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
        let answer = succeed(&pool, &sql, params).await;
        let Answer::Rows(set) = &answer else { panic!("{sql}") };
        let masked: Vec<bool> = set.columns.iter().map(|column| column.masked).collect();
        let rows = json!(rows(answer));
        assert_eq!(rows, expected, "{sql}");
        let of_first = rows[0].as_array().unwrap().iter().map(|cell| *cell == json!(m));
        assert_eq!(masked, of_first.collect::<Vec<_>>(), "{sql}");
    }
    let refused = [
        "explain select email from S.users",
        "explain analyze select id from S.contacts where address > 'a'",
        "select S.read()",
        "select total, S.read() from S.orders",
        "select most_common_vals::text from pg_stats where tablename = 'users'",
        "select most_common_vals from pg_stats where tablename = 'users'",
        "select stavalues1::text from pg_statistic",
        "select stavalues1 from pg_statistic",
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
    // What the server knows of itself is not masked.
    for sql in ["explain select 1", "show server_version", "select version()"] {
        let answer = run(&pool, sql, Params::None).await.unwrap();
        assert!(!rows(answer)[0].to_string().contains(m), "{sql}");
    }
    // The control: without the mask it is there.
    let answer = run(&cluster.read_only(), "select masks.read()", Params::None).await.unwrap();
    assert_eq!(rows(answer), [json!([SECRET])]);
}

/// The driver refuses to describe a multirange, so the worker does; the origins of columns are still
/// the server's.
#[tokio::test]
async fn masks_hold_beside_types_that_the_driver_does_not_know() {
    let cluster = Cluster::get();
    let owner = cluster.pool();
    prepare(
        &owner,
        &[
            "create schema away",
            "create table away.stays (id int4, guest text, nights datemultirange)",
            "create table away.rooms (id int4, free datemultirange)",
            "insert into away.stays values (1, 'ada@example.com', '{[2024-01-01,2024-01-03)}')",
            "insert into away.rooms values (1, '{[2024-02-01,2024-03-01)}')",
        ],
    )
    .await;
    let (m, nights) = ("[masked]", "{[2024-01-01,2024-01-03)}");
    let offered = ["away.stays".to_owned()];
    let by = |mask: &str| pool(&cluster, &[mask.to_owned()], Some(&offered));
    let cases = [
        ("away.stays.guest", "select * from away.stays", json!([[1, m, nights]])),
        ("away.stays.guest", "select upper(guest), nights from away.stays", json!([[m, nights]])),
        (
            "away.stays.guest",
            "select count(*), nights from away.stays group by 2",
            json!([["1", nights]]),
        ),
        ("away.stays.guest", "select s, nights from away.stays s", json!([[m, nights]])),
        ("away.stays.guest", "select nights + $1, nights from away.stays", json!([[m, nights]])),
        ("away.stays.guest", "select $1::datemultirange", json!([["{}"]])),
        ("away.stays.nights", "select * from away.stays", json!([[1, "ada@example.com", m]])),
        ("away.stays.nights", "select id, array[nights] from away.stays", json!([[1, m]])),
        ("away.stays.nights", "select unnest(nights), id from away.stays", json!([[m, 1]])),
    ];
    for (mask, sql, expected) in cases {
        let params =
            if sql.contains("$1") { Params::List(vec![json!("{}")]) } else { Params::None };
        let answer = succeed(&by(mask), sql, params).await;
        assert_eq!(json!(rows(answer)), expected, "{sql}");
    }
    for sql in [
        "select free from away.rooms",
        "select nights, (select count(*) from away.rooms) from away.stays",
        "explain select guest, nights from away.stays",
    ] {
        let failure = run(&by("away.stays.guest"), sql, Params::None).await.unwrap_err();
        assert_eq!(failure.code(), Code::AccessDenied, "{sql}: {failure}");
    }
    let answer = run(&cluster.read_only(), "select free from away.rooms", Params::None).await;
    assert_eq!(rows(answer.unwrap()), [json!(["{[2024-02-01,2024-03-01)}"])]);
}

/// A mask is found in the description of the whole statement: what runs is all of it, wherever a
/// semicolon seems to end it.
#[tokio::test]
async fn masks_hold_for_the_statement_that_runs() {
    let cluster = Cluster::get();
    schema(&cluster, "whole").await;
    let pool = pool(&cluster, &["whole.users.email".to_owned()], None);
    // To who reads over the quote with a backslash, the comment is a part of a string.
    let begin = "select u.email, E'x'\n'\\'' as t from whole.users u -- ' ;";
    for rest in ["\n (id, email, name)", " /*\n (id, email, name) -- */"] {
        let sql = format!("{begin}{rest} order by id");
        let answer = succeed(&pool, &sql, Params::None).await;
        assert_eq!(rows(answer), [json!(["Ada", "[masked]"]), json!(["Bo", "[masked]"])], "{sql}");
    }
    // Nor is a backslash what it was before PostgreSQL 9.1, whatever the role's settings say.
    let root = cluster.superuser();
    prepare(
        &root,
        &["create role quoter login", "alter role quoter set standard_conforming_strings = off"],
    )
    .await;
    let quoter = Pool::new(cluster.target_as("quoter"), SETTINGS);
    let answer = run(&quoter, r"select 'a\', ';'", Params::None).await.unwrap();
    assert_eq!(rows(answer), [json!(["a\\", ";"])]);
}

/// A function that says that it depends on nothing is run by the planner, and may change how the
/// server reads what comes next: between the look at a statement and its run.
#[tokio::test]
async fn a_statement_means_what_it_meant_when_it_was_looked_at() {
    let cluster = Cluster::get();
    schema(&cluster, "turned").await;
    let owner = cluster.pool();
    prepare(&owner, &[
        "create table turned.spans (n int4, s int4multirange)",
        "insert into turned.spans values (1, '{[1,2)}')",
        "create function turned.liar() returns int4 immutable language plpgsql as \
         $$ begin perform set_config('standard_conforming_strings', 'off', false); return 1; end $$",
        "create schema turned_count",
        "create function turned_count.add(n int8) returns int8 language sql as \
         $$ select length(email) from turned.users where id = 1 $$",
        "create aggregate turned_count.count(*) (sfunc = turned_count.add, stype = int8)",
        "create function turned.mover() returns int4 immutable language plpgsql as \
         $$ begin perform set_config('search_path', 'turned_count, pg_catalog', false); return 1; end $$",
        "create function turned.reread(sql text) returns setof text language plpgsql \
         set standard_conforming_strings = off as \
         $$ begin return query execute 'select q.email from (' || sql || chr(10) || ') q'; end $$",
        "create function turned.recount() returns int8 language sql \
         set search_path = turned_count, pg_catalog as $$ select count(*) from turned.users $$",
    ]).await;
    let pool = pool(&cluster, &["turned.users.email".to_owned()], None);
    let m = "[masked]";
    // Read as it was looked at, `email` is another name of `name`; read again, it is the address.
    let turns = |more: &str, from: &str| {
        let seen = format!("turned.liar(){more} from {from}turned.users u --");
        let read = format!("' as t, 1{more} from {from}turned.users u /*");
        format!(
            "select u.email, '\\' as t, {seen} {read}\n (id, email, name) order by 1 limit 1 -- */"
        )
    };
    // Of the rows, or of an address: the plan calls it by its full name once there are two.
    let counts = "select count(*), turned.mover() from turned.users";
    for (sql, expected) in [
        (turns("", ""), json!([["Ada", m, m]])),
        (turns(", s", "turned.spans, "), json!([["Ada", m, m, "{[1,2)}"]])),
        (counts.to_owned(), json!([[m, m]])),
    ] {
        let answer = succeed(&pool, &sql, Params::None).await;
        assert_eq!(json!(rows(answer)), expected, "{sql}");
    }
    // The control: each means something else once it is read so.
    let again = |text: &str| Params::List(vec![json!(text)]);
    let read = run(&owner, "select turned.reread($1)", again(&turns("", ""))).await.unwrap();
    assert!(rows(read).contains(&json!([SECRET])));
    let counted = run(&owner, "select turned.recount()", Params::None).await.unwrap();
    assert_eq!(rows(counted), [json!([SECRET.len().to_string()])]);
}

/// Whatever guard it has, a reader is told why.
#[tokio::test]
async fn a_list_of_changes_is_read_only_under_a_guard() {
    let cluster = Cluster::get();
    schema(&cluster, "lists").await;
    let owner = cluster.pool();
    run(&owner, "create table lists.points (p point)", Params::None).await.unwrap();
    let tables = ["lists.orders".to_owned(), "lists.points".to_owned()];
    let pool = pool(&cluster, &["lists.users.email".to_owned()], Some(&tables));
    for sql in [
        "with a as (delete from lists.orders returning *) select id from a",
        "with a as (insert into lists.points values ('(1,2)') returning *) select p from a",
    ] {
        let failure = run(&pool, sql, Params::None).await.unwrap_err();
        assert_eq!(failure.code(), Code::ReadOnly, "{sql}: {failure}");
    }
    // Nor is one that only looks like it kept from being read.
    let sql = "with update as (select id from lists.orders) table update order by 1";
    let answer = run(&pool, sql, Params::None).await.unwrap();
    assert_eq!(rows(answer), [json!([1]), json!([2])]);
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
        succeed(&pool, &sql, Params::None).await;
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

fn config(connection: &str) -> String {
    format!("[connections.main_db]\n{connection}\n")
}

#[tokio::test]
async fn there_is_no_plan_over_what_is_not_shown() {
    let config =
        config("mask = [\"plans.users.email\"]\ntables = [\"plans.users\", \"plans.orders\"]");
    let mut client = Client::start_with(&config).await;
    let cluster = Arc::clone(&client.broker.cluster);
    schema(&cluster, "plans").await;
    let pool = cluster.pool();
    prepare(
        &pool,
        &[
            "create table plans.hidden (n int4)",
            // Inlined by the planner, and run by it.
            "create function plans.inlined() returns setof plans.users stable language sql as \
         $$ select * from plans.users $$",
            "create function plans.folded() returns text immutable language plpgsql as \
         $$ begin return (select email from plans.users where id = 1); end $$",
            "create function plans.telling() returns int4 immutable language plpgsql as \
         $$ begin return (select email from plans.users where id = 1)::int4; end $$",
        ],
    )
    .await;
    let plan =
        json!({"database": "main_db", "query": "select total from plans.orders where id = $1"});
    let plan = client.call("explain_query", plan).await;
    assert!(plan["plan"][0].as_str().unwrap().contains("orders"), "{plan}");
    for query in [
        "select id from plans.users where email = 'ada@example.com'",
        "select * from plans.users_1",
        "select * from plans.contacts",
        "select * from plans.inlined()",
        "select plans.folded()",
        "select total from plans.orders where exists (select from plans.users)",
        "delete from plans.users",
        "select * from plans.hidden",
        "select most_common_vals from pg_stats",
    ] {
        let refused = json!({"database": "main_db", "query": query});
        let refused = client.call("explain_query", refused).await;
        assert_eq!(refused["error"]["code"], "ACCESS_DENIED", "{query}: {refused}");
        assert!(!refused.to_string().contains("example"), "{query}: {refused}");
        // No way around it by the other tool.
        let around = json!({"database": "main_db", "sql": format!("explain {query}")});
        let around = client.call("execute_sql", around).await;
        assert_eq!(around["error"]["code"], "ACCESS_DENIED", "{query}: {around}");
    }
    let telling = json!({"database": "main_db", "query": "select plans.telling()"});
    let telling = client.call("explain_query", telling).await;
    assert_eq!(telling["error"]["code"], "SQL_ERROR", "{telling}");
    assert!(!telling.to_string().contains("example"), "{telling}");
}

#[tokio::test]
async fn only_offered_tables_are_described_and_masks_are_said() {
    let config = config("mask = [\"told.users.em*\"]\ntables = [\"told.users\", \"told.orders\"]");
    let mut client = Client::start_with(&config).await;
    let cluster = Arc::clone(&client.broker.cluster);
    schema(&cluster, "told").await;
    let pool = cluster.pool();
    prepare(&pool, &[
        "create schema told_nothing",
        "create table told_nothing.t (n int4)",
        "create table told.hidden (n int4 primary key)",
        "alter table told.orders add hidden int4 references told.hidden",
        "alter table told.orders add constraint buyer foreign key (user_id) references told.users (id)",
    ]).await;
    let all = client.call("describe_schema", json!({"database": "main_db"})).await;
    assert_eq!(
        all["schemas"],
        json!([{"name": "told", "table_count": 2, "tables": ["orders", "users"]}])
    );
    let found = json!({"database": "main_db", "pattern": "told*.*"});
    let found = client.call("describe_schema", found).await;
    let names: Vec<&str> = found["tables"]
        .as_array()
        .unwrap()
        .iter()
        .map(|table| table["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["orders", "users", "users_1"]);
    for table in ["told.users", "told.users_1"] {
        let described = json!({"database": "main_db", "table": table});
        let described = client.call("describe_schema", described).await;
        let masked: Vec<&str> = described["table"]["columns"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|column| column["masked"] == true)
            .map(|column| column["name"].as_str().unwrap())
            .collect();
        assert_eq!(masked, ["email"], "{described}");
    }
    let orders = json!({"database": "main_db", "table": "told.orders"});
    let orders = client.call("describe_schema", orders).await;
    let keys = orders["table"]["foreign_keys"].as_array().unwrap();
    assert_eq!((keys.len(), &keys[0]["references"]), (1, &json!("told.users")), "{orders}");
    for hidden in ["told.hidden", "told.contacts", "told_nothing.t"] {
        let refused = json!({"database": "main_db", "table": hidden});
        let refused = client.call("describe_schema", refused).await;
        assert_eq!(refused["error"]["code"], "INVALID_REQUEST", "{refused}");
    }
    // The control: a connection that offers everything.
    let open = json!({"database": "other_db", "table": "told.hidden"});
    let open = client.call("describe_schema", open).await;
    assert_eq!(
        open["table"]["columns"][0],
        json!({"name": "n", "type": "integer", "nullable": false})
    );
}
