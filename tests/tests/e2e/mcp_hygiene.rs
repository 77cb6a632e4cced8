//! What one call leaves behind for the next, and one handle for another: nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::{Broker, Via};
use credbroker_e2e::identity::Identity;
use credbroker_e2e::postgres::Server;
use credbroker_e2e::worker::Worker;
use serde_json::{Value, json};

/// What may linger in a session.
const TRACES: &[&str] = &[
    "SET work_mem = '1234kB'",
    "SELECT set_config('search_path', 'evil', false)",
    "SELECT set_config('app.user', 'ada', false)",
    "SET TIME ZONE 'Asia/Tokyo'",
    "CREATE TEMP TABLE left_over AS SELECT 1 AS n",
    "SELECT pg_advisory_lock(7)",
    "PREPARE left_prepared AS SELECT 1",
    "LISTEN left_channel",
    "SELECT nextval('counter')",
];

/// All that can be seen of it from inside; the last column must be an error, so it is apart.
const LOOK: &str = "SELECT current_setting('work_mem') <> '1234kB', \
    current_setting('search_path') <> 'evil', \
    coalesce(current_setting('app.user', true), '') = '', \
    current_setting('TimeZone') = 'UTC', \
    to_regclass('pg_temp.left_over') IS NULL, \
    NOT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory'), \
    NOT EXISTS (SELECT FROM pg_prepared_statements WHERE from_sql), \
    NOT EXISTS (SELECT FROM pg_listening_channels()), \
    NOT EXISTS (SELECT FROM pg_cursors WHERE is_holdable)";

fn setting() -> (credbroker_e2e::postgres::Database, Broker, Worker) {
    let database = Server::shared().database();
    let role = format!("SET ROLE {}; CREATE SEQUENCE counter", database.name());
    database
        .admin()
        .batch_execute(&format!("GRANT ALL ON SCHEMA public TO {}; {role}", database.name()))
        .expect("a sequence");
    let broker = Broker::usual_setup(&database, Via::Tls).start();
    let file = broker.setup().path("worker.toml");
    fs::write(&file, "[connections.main_db]\naccess = \"read-write\"\n").expect("a configuration");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).expect("chmod");
    let options = ["--config", file.to_str().expect("ASCII")];
    let worker = Worker::start_with(&broker, &Identity::worker(), &options);
    (database, broker, worker)
}

fn open(worker: &mut Worker) -> String {
    let opened = worker.call("connect_named_storage", &json!({ "connection_name": "main_db" }));
    opened.text("/connection_id").to_owned()
}

fn query(worker: &mut Worker, id: &str, sql: &str) -> Value {
    worker.call("execute_query", &json!({ "connection_id": id, "query": sql })).content
}

fn nothing_is_left(worker: &mut Worker, id: &str, after: &str) {
    let seen = query(worker, id, LOOK);
    let row = seen["rows"][0].as_array().unwrap_or_else(|| panic!("{seen}"));
    assert!(row.iter().all(|fine| fine == true), "after {after}: {seen}");
    let current = query(worker, id, "SELECT currval('counter')");
    assert_eq!(current["error"]["sqlstate"], "55000", "after {after}: {current}");
}

#[test]
fn nothing_survives_between_calls_and_handles() {
    let (_database, _broker, mut worker) = setting();
    let (first, second) = (open(&mut worker), open(&mut worker));
    let pid = query(&mut worker, &first, "SELECT pg_backend_pid()")["rows"].clone();
    for sql in TRACES {
        let left = query(&mut worker, &first, sql);
        assert_eq!(left["success"], true, "{sql}: {left}");
        nothing_is_left(&mut worker, &first, sql);
        nothing_is_left(&mut worker, &second, sql);
    }
    // It was one session all the time, cleaned and not replaced; the other handle has its own.
    assert_eq!(query(&mut worker, &first, "SELECT pg_backend_pid()")["rows"], pid);
    assert_ne!(query(&mut worker, &second, "SELECT pg_backend_pid()")["rows"], pid);
}

#[test]
fn a_handle_takes_its_sessions_with_it() {
    let (database, _broker, mut worker) = setting();
    let (first, second) = (open(&mut worker), open(&mut worker));
    for id in [&first, &second] {
        assert_eq!(query(&mut worker, id, "SELECT 1 AS x")["rows"], json!([[1]]));
    }
    assert_eq!(database.backends(), 2);
    let closed = worker.call("disconnect", &json!({ "connection_id": first }));
    assert!(!closed.is_error, "{}", closed.raw);
    assert_eventually!(database.backends() == 1, "a session is left");
    assert_eq!(query(&mut worker, &second, "SELECT 1 AS x")["rows"], json!([[1]]));
}
