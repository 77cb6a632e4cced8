//! Ways around masks and offered tables that leave no lock behind, or no column to look at.

use std::sync::Arc;

use credbroker_sql_worker::error::Code;
use credbroker_sql_worker::sql::{
    ColumnPattern, Guard, Params, Policy, Pool, TablePattern, explain,
};

use crate::cluster::{Cluster, LIMITS, SETTINGS, prepare, rows, run};

const SECRET: &str = "ada@example.com";

fn pool(cluster: &Cluster, mask: &[&str], tables: Option<&[&str]>, policy: Policy) -> Pool {
    let mask = mask.iter().map(|text| ColumnPattern::parse(text).unwrap()).collect();
    let tables =
        tables.map(|tables| tables.iter().map(|text| TablePattern::parse(text).unwrap()).collect());
    let policy = Policy { guard: Guard { mask, tables }, ..policy };
    Pool::new(cluster.target_as("app").with_policy(Arc::new(policy)), SETTINGS)
}

async fn gives_nothing(pool: &Pool, sql: &str) {
    match run(pool, sql, Params::None).await {
        Ok(answer) => {
            let text = serde_json::Value::from(rows(answer)).to_string();
            assert!(!text.contains("example"), "{sql}: {text}");
        }
        Err(failure) => {
            let text = failure.to_json().to_string();
            assert!(!text.contains("example"), "{sql}: {text}");
        }
    }
}

/// What a subtransaction locked, its rollback unlocks; and it may have told what it read.
#[tokio::test]
async fn what_was_read_in_a_block_that_failed_was_read() {
    let cluster = Cluster::get();
    prepare(
        &cluster.pool(),
        &[
            "create schema failed",
            "create table failed.users (id int4 primary key, email text)",
            "create table failed.orders (id int4)",
            "insert into failed.users values (1, 'ada@example.com')",
            "insert into failed.orders values (1)",
            "create function failed.attempt(q text) returns text stable language plpgsql as $$ \
             declare r text; begin execute q into r; return r; \
             exception when others then return sqlerrm; end $$",
        ],
    )
    .await;
    let tries = [
        "select failed.attempt('select email::int4 from failed.users')",
        "select failed.attempt('select email::int4 from failed.users where id = 1'), id \
         from failed.orders",
        "select set_config('enable_seqscan', 'off', true), \
         failed.attempt('select email::int4 from failed.users where id = 1')",
        "select failed.attempt('select email::int4 from failed.users where ctid = ''(0,1)''')",
    ];
    let masked = pool(&cluster, &["failed.users.email"], None, Policy::default());
    let offered = pool(&cluster, &[], Some(&["failed.orders"]), Policy::default());
    let written = pool(&cluster, &[], Some(&["failed.orders"]), Policy::read_write());
    for pool in [&masked, &offered, &written] {
        for sql in tries {
            gives_nothing(pool, sql).await;
            let failure = run(pool, sql, Params::None).await.unwrap_err();
            assert_eq!(failure.code(), Code::AccessDenied, "{sql}: {failure}");
        }
        // What a session did before does not count.
        let fine = "select failed.attempt('select 1'), id from failed.orders";
        let answer = run(pool, fine, Params::None).await;
        assert!(answer.is_ok(), "{answer:?}");
    }
    let open = pool(&cluster, &[], None, Policy::default());
    let told = rows(run(&open, tries[0], Params::None).await.unwrap());
    assert!(told[0][0].as_str().unwrap().contains(SECRET), "{told:?}");
}

/// A mask that names a partition's or a child's column alone.
#[tokio::test]
async fn a_mask_of_a_child_holds_when_the_parent_is_read() {
    let cluster = Cluster::get();
    prepare(
        &cluster.pool(),
        &[
            "create schema kids",
            "create table kids.users (id int4, name text, email text) partition by range (id)",
            "create table kids.users_1 partition of kids.users for values from (0) to (9)",
            "insert into kids.users values (1, 'ada@example.com', 'x')",
        ],
    )
    .await;
    for mask in [&["kids.users_1.name"][..], &["kids.users.email", "kids.users_1.name"]] {
        let pool = pool(&cluster, mask, None, Policy::default());
        for sql in [
            "select name from kids.users",
            "select id, name from kids.users where id = 1",
            "select name from kids.users_1",
            "select (select name from kids.users) from kids.users_1",
        ] {
            gives_nothing(&pool, sql).await;
        }
    }
}

/// In EUC_KR, the name has the bytes that another one has in UTF-8.
#[tokio::test]
async fn a_name_is_the_same_in_every_encoding() {
    let cluster = Cluster::get();
    prepare(
        &cluster.pool(),
        &[
            "create schema coded",
            "create table coded.\u{c9d5} (email text)",
            "insert into coded.\u{c9d5} values ('ada@example.com')",
        ],
    )
    .await;
    let pool = pool(&cluster, &["coded.\u{c9d5}.email"], None, Policy::default());
    let sql = "select set_config('client_encoding', 'EUC_KR', true), \
               query_to_xml('select email from coded.\u{c9d5}', true, false, '')";
    let failure = run(&pool, sql, Params::None).await.unwrap_err();
    assert_eq!(failure.code(), Code::AccessDenied, "{failure}");
    // The control.
    let open = rows(run(&cluster.read_only(), sql, Params::None).await.unwrap());
    assert!(open[0].to_string().contains(SECRET), "{open:?}");
}

/// The planner runs immutable functions, and what they say is an error of the server's.
#[tokio::test]
async fn an_error_while_planning_is_withheld() {
    let cluster = Cluster::get();
    prepare(
        &cluster.pool(),
        &[
            "create schema planned",
            "create table planned.users (id int4, email text)",
            "insert into planned.users values (1, 'ada@example.com')",
            "create function planned.tell(state text) returns int4 immutable language plpgsql as \
             $$ begin raise exception '%', (select email from planned.users) \
             using errcode = state; end $$",
        ],
    )
    .await;
    let pool = pool(&cluster, &["planned.users.email"], None, Policy::default());
    for state in ["P0001", "57014", "25006", "57P01", "0A000"] {
        for sql in [
            "select upper(email), planned.tell('STATE') from planned.users",
            "select planned.tell('STATE') from planned.users",
            "select planned.tell('STATE')",
            "select planned.tell(min('STATE')) from planned.users",
            "explain select planned.tell('STATE')",
        ] {
            gives_nothing(&pool, &sql.replace("STATE", state)).await;
        }
    }
}

/// A statement that fails has given up its locks, and the server's words quote what it read.
#[tokio::test]
async fn an_error_tells_nothing_of_a_table_that_is_not_offered() {
    let cluster = Cluster::get();
    prepare(
        &cluster.pool(),
        &[
            "create schema said",
            "create table said.users (id int4, email text)",
            "insert into said.users select n, 'ada@example.com' from generate_series(1, 9) n",
            "analyze said.users",
            "create table said.orders (id int4)",
            "insert into said.orders values (1)",
            "create function said.tell() returns int4 stable language plpgsql as $$ begin \
             raise exception '%', (select email from said.users limit 1); end $$",
        ],
    )
    .await;
    let offered = pool(&cluster, &[], Some(&["said.orders"]), Policy::default());
    let open = cluster.read_only();
    for sql in [
        "select query_to_xml($$select set_config(email, 'x', true) from said.users$$, \
         true, false, '')",
        "select id, query_to_xml($$select email::regclass from said.users$$, true, false, '') \
         from said.orders",
        "select query_to_xml($$select set_config(most_common_vals::text, 'x', true) \
         from pg_stats where schemaname = 'said' and attname = 'email'$$, true, false, '')",
        "select said.tell()",
        "explain select * from said.orders where id = said.tell()",
    ] {
        gives_nothing(&offered, sql).await;
        // The control.
        let failure = run(&open, sql, Params::None).await.unwrap_err();
        assert!(failure.to_json().to_string().contains("ada@example"), "{sql}: {failure}");
    }
    let query = "select * from said.orders where id = said.tell()";
    let failure = explain(offered.lease().await.unwrap(), query, &LIMITS).await.unwrap_err();
    let text = failure.to_json().to_string();
    assert!(!text.contains("example"), "{text}");
    // What the server says before anything runs is of the statement itself.
    let failure = run(&offered, "select idd from said.orders", Params::None).await.unwrap_err();
    let text = failure.to_json().to_string();
    assert!(text.contains("idd"), "{text}");
}

/// The server takes no lock for them.
#[tokio::test]
async fn nothing_is_granted_on_a_table_that_is_not_offered() {
    let cluster = Cluster::get();
    prepare(
        &cluster.pool(),
        &["create schema granted", "create table granted.a (n int4)", "create table granted.b ()"],
    )
    .await;
    let pool = pool(&cluster, &[], Some(&["granted.b"]), Policy::read_write());
    for sql in ["grant select on granted.a to public", "/**/ revoke all on granted.a from app"] {
        let failure = run(&pool, sql, Params::None).await.unwrap_err();
        assert_eq!(failure.code(), Code::AccessDenied, "{sql}: {failure}");
    }
    let acl = "select relacl is null from pg_class where oid = 'granted.a'::regclass";
    assert_eq!(rows(run(&pool, acl, Params::None).await.unwrap()), [serde_json::json!([true])]);
}

/// A constraint trigger runs when its transaction ends.
#[tokio::test]
async fn what_runs_at_the_end_is_looked_at_too() {
    let cluster = Cluster::get();
    prepare(
        &cluster.pool(),
        &[
            "create schema later",
            "create table later.users (email text)",
            "insert into later.users values ('ada@example.com')",
            "create table later.orders (note text)",
            "create function later.copy() returns trigger language plpgsql as $$ begin \
             if new.note = 'go' then insert into later.orders select email from later.users; \
             end if; return null; end $$",
            "create constraint trigger copy after insert on later.orders \
             deferrable initially deferred for each row execute function later.copy()",
        ],
    )
    .await;
    let pool = pool(&cluster, &[], Some(&["later.orders"]), Policy::read_write());
    let failure = run(&pool, "insert into later.orders values ('go')", Params::None).await;
    assert_eq!(failure.unwrap_err().code(), Code::AccessDenied);
    gives_nothing(&pool, "select note from later.orders").await;
    run(&pool, "insert into later.orders values ('stay')", Params::None).await.unwrap();
}
