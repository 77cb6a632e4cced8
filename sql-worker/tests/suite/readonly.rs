//! What a read-only statement may and may not do, and which roles are let in.

use std::sync::Arc;

use credbroker_sql_worker::error::Code;
use credbroker_sql_worker::sql::{
    Access, Answer, Format, Params, Policy, Pool, Role, Statement, execute,
};
use serde_json::json;

use crate::cluster::{Cluster, LIMITS, SETTINGS, prepare, rows, run};

#[tokio::test]
async fn analytics_pass() {
    let cluster = Cluster::get();
    let pool = cluster.read_only();
    for sql in [
        "with a as (select 1 as n union all select 2) select sum(n) from a",
        "with recursive r(n) as (values (1) union all select n + 1 from r where n < 9) table r",
        "with m as materialized (select g from generate_series(1, 9) g) select * from m",
        "select g, row_number() over w, lag(g) over w, sum(g) over (order by g rows between 2 \
         preceding and current row) from generate_series(1, 5) g window w as (order by g desc)",
        "select percentile_cont(0.5) within group (order by g), mode() within group (order by g) \
         from generate_series(1, 10) g",
        "select g % 2, g % 3, count(*) filter (where g > 3), grouping(g % 2) \
         from generate_series(1, 9) g group by grouping sets ((g % 2), (g % 3), ())",
        "select g % 2, count(*) from generate_series(1, 9) g group by rollup (g % 2) \
         having count(*) > 1 order by 1 nulls last",
        "select * from generate_series(1, 3) g, lateral (select g * 2 as d) l",
        "select string_agg(g::text, ',' order by g), array_agg(distinct g), json_agg(g), \
         jsonb_object_agg(g, g) from generate_series(1, 3) g",
        "select corr(g, g * 2), regr_slope(g, g), stddev(g), var_pop(g) from generate_series(1, 9) g",
        "select to_tsvector('english', 'running dogs') @@ to_tsquery('dog & run'), \
         ts_headline('a dog', to_tsquery('dog'))",
        "select '{\"a\": [1, 2]}'::jsonb -> 'a' ->> 0, \
         jsonb_path_query_array('{\"a\": [1, 2]}', '$.a[*] ? (@ > 1)')",
        "select date_trunc('week', d) from generate_series('2024-01-01'::timestamptz, \
         '2024-02-01', '1 day') d",
        "select distinct on (g % 3) g from generate_series(1, 9) g order by g % 3, g",
        "select relname from pg_class tablesample bernoulli (10) repeatable (1)",
        "select width_bucket(5.3, 0, 10, 5), ntile(4) over (order by g), \
         cume_dist() over (order by g) from generate_series(1, 4) g",
        "values (1, 'a'), (2, 'b')",
        "table pg_catalog.pg_namespace",
        "(select 1) union (select 2) intersect (select 2)",
        "select case when true then 1 end, coalesce(null, 2), nullif(1, 1), greatest(1, 2)",
        "explain select * from pg_class",
        "explain (analyze, buffers, format json) select count(*) from pg_class",
        "explain verbose with x as (select 1) select * from x",
        "show work_mem",
        "select count(*) from information_schema.tables",
        "select setseed(0.5), random() is not null",
        "select cube.a from (select row(1, 2)) as cube(a)",
    ] {
        let answer = run(&pool, sql, Params::None).await;
        let rows = rows(answer.unwrap_or_else(|failure| panic!("{sql}: {failure}")));
        assert!(!rows.is_empty() || sql.contains("tablesample"), "{sql}");
    }
}

#[tokio::test]
async fn a_transaction_cannot_be_made_to_write() {
    let cluster = Cluster::get();
    let owner = cluster.pool();
    run(&owner, "create table kept (n int4)", Params::None).await.unwrap();
    run(
        &owner,
        "create function unlock() returns text language plpgsql as $$ begin \
         set local transaction_read_only = off; return 'open'; end $$",
        Params::None,
    )
    .await
    .unwrap();
    run(
        &owner,
        "create function write() returns int4 language plpgsql security definer as $$ begin \
         insert into public.kept values (1); return 1; end $$",
        Params::None,
    )
    .await
    .unwrap();
    let pool = cluster.read_only();
    let cases = [
        ("insert into kept values (1)", Code::ReadOnly),
        ("with w as (insert into kept values (1) returning n) select * from w", Code::ReadOnly),
        ("select write()", Code::ReadOnly),
        ("select unlock()", Code::SqlError),
        ("select set_config('transaction_read_only', 'off', true)", Code::SqlError),
        ("set transaction read write", Code::ReadOnly),
        ("explain analyze insert into kept values (1)", Code::ReadOnly),
        ("select * into copied from kept", Code::ReadOnly),
        ("select 1; drop table kept", Code::SqlError),
        ("commit", Code::InvalidRequest),
        ("do $$ begin commit; insert into kept values (1); end $$", Code::ReadOnly),
        ("selec 1", Code::SqlError),
    ];
    for (sql, code) in cases {
        let failure = run(&pool, sql, Params::None).await.unwrap_err();
        assert_eq!(failure.code(), code, "{sql}: {failure}");
    }
    // A call that asks for it is read-only on a connection that is not.
    let statement =
        Statement::parse("select write()", &Params::None).unwrap().with_access(Access::ReadOnly);
    let lease = owner.lease().await.unwrap();
    let failure = execute(lease, &statement, Format::Json, &LIMITS).await.unwrap_err();
    assert_eq!((failure.code(), failure.sqlstate()), (Code::ReadOnly, Some("25006")));
    let none = run(&pool, "select count(*)::int4 from kept", Params::None).await.unwrap();
    assert_eq!(rows(none), [json!([0])]);
    assert_eq!(rows(run(&owner, "select write()", Params::None).await.unwrap()), [json!([1])]);
    let one = run(&pool, "select count(*)::int4 from kept", Params::None).await.unwrap();
    assert_eq!(rows(one), [json!([1])]);
}

#[tokio::test]
async fn roles_that_no_transaction_confines_are_refused() {
    let cluster = Cluster::get();
    let root = cluster.superuser();
    let roles = [
        ("r_super", "superuser", "", Some("superuser")),
        ("r_replication", "replication", "", Some("replication")),
        ("r_plain", "", "", None),
        ("r_create", "createrole", "", None),
        ("r_reader", "", "pg_read_server_files", Some("pg_read_server_files")),
        // Not inherited, but it may SET ROLE.
        ("r_settable", "noinherit", "pg_write_server_files", Some("pg_write_server_files")),
        ("r_indirect", "", "r_reader", Some("pg_read_server_files")),
        ("r_program", "", "pg_execute_server_program", Some("pg_execute_server_program")),
        ("r_member", "", "r_super", Some("superuser")),
    ];
    for (name, attributes, member_of, refused) in roles {
        run(&root, &format!("create role {name} login {attributes}"), Params::None).await.unwrap();
        if !member_of.is_empty() {
            run(&root, &format!("grant {member_of} to {name}"), Params::None).await.unwrap();
        }
        let open = async |policy: Policy| {
            Pool::new(cluster.target_as(name).with_policy(Arc::new(policy)), SETTINGS).lease().await
        };
        let failure = open(Policy::default()).await.err();
        let said = failure.as_ref().map(|failure| failure.to_json().to_string());
        match refused {
            None => assert_eq!(said, None, "{name}"),
            Some(role) => {
                assert_eq!(failure.unwrap().code(), Code::AccessDenied, "{name}");
                let said = said.unwrap();
                assert!(said.contains(&format!("is or holds {role}\"")), "{name}: {said}");
                let allowed = Policy {
                    allow_roles: [Role::parse(role).unwrap()].into(),
                    ..Policy::default()
                };
                assert!(open(allowed).await.is_ok(), "{name}");
            }
        }
    }
    let create = Policy::read_write();
    let target = cluster.target_as("r_create").with_policy(Arc::new(create));
    let failure = Pool::new(target, SETTINGS).lease().await.unwrap_err();
    assert!(failure.to_json().to_string().contains("createrole"), "{failure}");
}

#[tokio::test]
async fn a_write_runs_in_a_transaction_and_says_what_it_did() {
    let cluster = Cluster::get();
    let pool = cluster.pool();
    prepare(
        &pool,
        &[
            "create table deferred (n int4 primary key, \
         other int4 references deferred deferrable initially deferred)",
            "vacuum deferred",
            "create index concurrently deferred_n on deferred (n)",
            "create database made_alone",
            "drop database made_alone",
        ],
    )
    .await;
    // What the commit refuses was not done.
    let sql = "insert into deferred values (1, 99)";
    let failure = run(&pool, sql, Params::None).await.unwrap_err();
    assert_eq!((failure.code(), failure.sqlstate()), (Code::SqlError, Some("23503")));
    let sql = "insert into deferred values (1, 1), (2, 1) returning n";
    let Answer::Rows(set) = run(&pool, sql, Params::None).await.unwrap() else { panic!("no rows") };
    assert_eq!((set.row_count, set.affected_rows), (2, Some(2)));
    let answer = run(&pool, "update deferred set other = 2", Params::None).await.unwrap();
    assert!(matches!(answer, Answer::Done { affected_rows: 2, .. }), "{answer:?}");
    let Answer::Rows(set) = run(&pool, "table deferred", Params::None).await.unwrap() else {
        panic!("no rows")
    };
    assert_eq!((set.row_count, set.affected_rows), (2, None));
}

#[tokio::test]
async fn the_server_has_timeouts_of_its_own() {
    let cluster = Cluster::get();
    let sql = "select current_setting('statement_timeout'), current_setting('lock_timeout'), \
               current_setting('idle_in_transaction_session_timeout'), \
               current_setting('idle_session_timeout'), current_setting('transaction_read_only'), \
               current_setting('transaction_isolation')";
    let answer = run(&cluster.read_only(), sql, Params::None).await.unwrap();
    assert_eq!(rows(answer), [json!(["21s", "5s", "10s", "10min", "on", "repeatable read"])]);
}
