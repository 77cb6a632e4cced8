//! Principals who share a worker: what one of them takes, the others are not short of.

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::{Broker, Grant, Setup, Via};
use credbroker_e2e::identity::Identity;
use credbroker_e2e::postgres::Server;
use credbroker_e2e::worker::Era;
use credbroker_e2e::worker::served::Served;
use serde_json::json;

#[test]
fn sessions_that_nobody_uses_keep_nobody_out() {
    let database = Server::shared().database();
    let worker = Identity::worker();
    let broker = Setup::new()
        .connection("main_db", &database, Via::Tls)
        .set("limits.queue_timeout", "100ms")
        .grant(Grant::to(&worker, &["issue", "open"], &["main_db"]).with("max_sessions", 3))
        .start();
    let served = Served::http(&broker, &worker, &["alice", "bob"], "");
    let mut alice = served.client(Era::Stateless, "alice");
    let mut bob = served.client(Era::Stateless, "bob");
    for _ in 0..3 {
        let opened = alice.call("connect_named_storage", &json!({ "connection_name": "main_db" }));
        assert!(!opened.is_error, "{}", opened.raw);
    }
    assert_eventually!(database.backends() == 3, "alice has no sessions");
    let select = json!({ "database": "main_db", "sql": "SELECT 1" });
    let answer = bob.call("execute_sql", &select);
    assert!(!answer.is_error, "{}", answer.raw);
    let opened = bob.call("connect_named_storage", &json!({ "connection_name": "main_db" }));
    assert!(!opened.is_error, "{}", opened.raw);
}

#[test]
fn one_principal_does_not_have_all_turns() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let limits = "[limits]\nconcurrency = 4\n";
    let served = Served::http(&broker, &Identity::worker(), &["alice", "bob"], limits);
    let mut alice = served.client(Era::Stateless, "alice");
    let mut bob = served.client(Era::Stateless, "bob");
    let sleep = json!({ "database": "main_db", "sql": "SELECT pg_sleep(60) AS turn" });
    let sleeping: Vec<_> = (0..8).map(|_| alice.start_call("execute_sql", &sleep)).collect();
    assert_eventually!(database.running("AS turn") == 3, "alice has other than three turns");
    let answer = bob.call("execute_sql", &json!({ "database": "main_db", "sql": "SELECT 1" }));
    assert!(!answer.is_error, "{}", answer.raw);
    // Alice's went on meanwhile: nobody had to end for Bob.
    assert_eq!(database.running("AS turn"), 3);
    drop(sleeping);
}
