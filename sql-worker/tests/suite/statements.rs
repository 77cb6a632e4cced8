//! Limits, sessions, and how statements end.

use std::time::Duration;

use credbroker_sql_worker::error::Code;
use credbroker_sql_worker::sql::{
    Answer, Body, Cut, Format, Limits, Params, Pool, PoolSettings, ResultSet,
};
use serde_json::json;

use crate::cluster::{Cluster, LIMITS, SETTINGS, rows, run, run_within};

async fn set(pool: &Pool, sql: &str, format: Format, limits: Limits) -> ResultSet {
    match run_within(pool, sql, Params::None, format, &limits).await {
        Ok(Answer::Rows(set)) => set,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn rows_are_bounded_and_said_to_be() {
    let cluster = Cluster::get();
    let pool = cluster.pool();
    let limits = Limits { max_rows: 3, ..LIMITS };
    let all = set(&pool, "select generate_series(1, 3)", Format::Json, limits).await;
    assert_eq!((all.row_count, all.cut), (3, None));
    // Endless, so it ends only because it is stopped.
    let endless = "with recursive r(n) as (select 1 union all select n + 1 from r) select n from r";
    let some = set(&pool, endless, Format::Json, limits).await;
    assert_eq!((some.row_count, some.cut), (3, Some(Cut::Rows)));
    cluster.wait_running("recursive r(n)", 0, Duration::from_secs(1)).await;
}

#[tokio::test]
async fn bytes_and_cells_are_bounded() {
    let cluster = Cluster::get();
    let pool = cluster.pool();
    let limits = Limits { max_bytes: 2048, max_cell_bytes: 100, ..LIMITS };
    let sql = "select repeat('x', 90) from generate_series(1, 1000)";
    let wide = set(&pool, sql, Format::Json, limits).await;
    assert_eq!(wide.cut, Some(Cut::Bytes));
    assert_eq!(wide.row_count, 2048 / 95);
    let long = set(&pool, "select repeat('é', 1000), 1", Format::Json, limits).await;
    assert_eq!(long.cut, Some(Cut::Cell));
    let Body::Rows(cells) = long.body else { panic!("csv") };
    assert_eq!(cells, [json!(["é".repeat(50), 1])]);
    let csv = set(&pool, sql, Format::Csv, limits).await;
    let Body::Csv(text) = csv.body else { panic!("rows") };
    assert!(text.starts_with("repeat\r\nxxx") && text.len() <= 2048 + 8, "{}", text.len());
    assert_eq!(text.lines().count(), csv.row_count + 1);
}

#[tokio::test]
async fn a_write_completes_although_its_rows_do_not_fit() {
    let cluster = Cluster::get();
    let pool = cluster.pool();
    run(&pool, "create table written (n int4)", Params::None).await.unwrap();
    let limits = Limits { max_rows: 2, ..LIMITS };
    let sql = "insert into written select generate_series(1, 500) returning n";
    let cut = set(&pool, sql, Format::Json, limits).await;
    assert_eq!((cut.row_count, cut.cut), (2, Some(Cut::Rows)));
    let count = run(&pool, "select count(*)::int4 from written", Params::None).await.unwrap();
    assert_eq!(rows(count), [json!([500])]);
}

#[tokio::test]
async fn only_one_statement_and_no_open_transaction() {
    let cluster = Cluster::get();
    let pool = cluster.pool();
    let failure = run(&pool, "select 1; drop table written", Params::None).await.unwrap_err();
    assert_eq!(failure.sqlstate(), Some("42601"));
    for sql in ["begin", "start transaction read only"] {
        let failure = run(&pool, sql, Params::None).await.unwrap_err();
        assert_eq!(failure.code(), Code::InvalidRequest, "{failure}");
    }
    let answer =
        run(&pool, "select pg_current_xact_id_if_assigned() is null;", Params::None).await.unwrap();
    assert_eq!(rows(answer), [json!([true])]);
}

#[tokio::test]
async fn nothing_of_a_call_is_left_in_the_session() {
    let cluster = Cluster::get();
    let pool = Pool::new(cluster.target(), PoolSettings { size: 1, ..SETTINGS });
    let pid = async || rows(run(&pool, "select pg_backend_pid()", Params::None).await.unwrap());
    let before = pid().await;
    for sql in [
        "set work_mem = '1234kB'",
        "select set_config('client_encoding', 'LATIN1', false)",
        "create temp table left_over (a int)",
        "select pg_advisory_lock(42)",
        "prepare p as select 1",
        "listen news",
    ] {
        run(&pool, sql, Params::None).await.unwrap();
    }
    run(&pool, "select 1 / 0", Params::None).await.unwrap_err();
    let sql = "select current_setting('work_mem') = '1234kB', current_setting('client_encoding'), \
               to_regclass('left_over') is null, \
               (select count(*)::int4 from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()), \
               (select count(*)::int4 from pg_prepared_statements where name = 'p')";
    let answer = run(&pool, sql, Params::None).await.unwrap();
    assert_eq!(rows(answer), [json!([false, "UTF8", true, 0, 0])]);
    assert_eq!(pid().await, before, "the session was not reused");
}

#[tokio::test]
async fn a_slow_statement_is_stopped_in_the_database() {
    let cluster = Cluster::get();
    let limits = Limits { statement_timeout: Duration::from_millis(300), ..LIMITS };
    let sql = "select pg_sleep(60) as slow_marker";
    let failure =
        run_within(&cluster.pool(), sql, Params::None, Format::Json, &limits).await.unwrap_err();
    assert_eq!(failure.code(), Code::Timeout);
    cluster.wait_running("as slow_marker", 0, Duration::from_secs(1)).await;
}

#[tokio::test]
async fn a_dropped_call_is_stopped_in_the_database() {
    let cluster = Cluster::get();
    let pool = cluster.pool();
    let call = run(&pool, "select pg_sleep(60) as dropped_marker", Params::None);
    tokio::select! {
        answer = call => panic!("{answer:?}"),
        () = cluster.wait_running("as dropped_marker", 1, Duration::from_secs(5)) => {}
    }
    cluster.wait_running("as dropped_marker", 0, Duration::from_secs(1)).await;
}

#[tokio::test]
async fn a_full_pool_is_not_a_slow_statement() {
    let cluster = Cluster::get();
    let settings = PoolSettings { size: 1, wait: Duration::from_millis(100), ..SETTINGS };
    let pool = Pool::new(cluster.target(), settings);
    let held = pool.lease().await.unwrap();
    assert_eq!(pool.lease().await.unwrap_err().code(), Code::PoolTimeout);
    drop(held);
    assert!(pool.lease().await.is_ok());
    pool.close();
    assert_eq!(pool.lease().await.unwrap_err().code(), Code::Cancelled);
}

#[tokio::test]
async fn closing_the_pool_ends_its_statements() {
    let cluster = Cluster::get();
    let pool = cluster.pool();
    let call = run(&pool, "select pg_sleep(60) as closed_marker", Params::None);
    let close = async {
        cluster.wait_running("as closed_marker", 1, Duration::from_secs(5)).await;
        pool.close();
    };
    let (answer, ()) = tokio::join!(call, close);
    assert_eq!(answer.unwrap_err().code(), Code::Cancelled);
    cluster.wait_running("as closed_marker", 0, Duration::from_secs(1)).await;
}

#[tokio::test]
async fn a_cut_session_is_said_and_replaced() {
    let cluster = Cluster::get();
    let pool = Pool::new(cluster.target(), PoolSettings { size: 1, ..SETTINGS });
    let sql = "select pg_terminate_backend(pg_backend_pid())";
    let failure = run(&pool, sql, Params::None).await.unwrap_err();
    assert_eq!((failure.code(), failure.sqlstate()), (Code::Cancelled, Some("57P01")));
    assert!(run(&pool, "select 1", Params::None).await.is_ok());
}

#[tokio::test]
async fn copy_and_empty_statements() {
    let cluster = Cluster::get();
    let pool = cluster.pool();
    for sql in ["copy pg_class to stdout", "COPY t FROM STDIN"] {
        let failure = run(&pool, sql, Params::None).await.unwrap_err();
        assert_eq!(failure.code(), Code::Unsupported, "{sql}");
    }
    let answer = run(&pool, "-- nothing", Params::None).await;
    assert!(matches!(answer, Ok(Answer::Done { affected_rows: 0, .. })), "{answer:?}");
}
