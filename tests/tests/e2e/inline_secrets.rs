//! Passwords as tool arguments of the SQL worker: refused, or taken by an open decision.

use credbroker_e2e::broker::{Broker, Grant, Setup};
use credbroker_e2e::canary::Pattern;
use credbroker_e2e::identity::Identity;
use credbroker_e2e::memory;
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::worker::Worker;
use serde_json::{Value, json};

fn broker(database: &Database) -> Broker {
    Setup::new()
        .bare_connection("bare_db", database)
        .grant(Grant::to(&Identity::worker(), &["register", "open"], &["bare_db"]))
        .start()
}

fn login(database: &Database) -> Value {
    json!({
        "database": "bare_db",
        "username": database.name(),
        "password": database.canary().reveal(),
    })
}

fn is_in(patterns: &[Pattern], text: &str) -> bool {
    patterns.iter().any(|pattern| pattern.is_in(text.as_bytes()))
}

/// The broker and what it wrote: the password is in the arena at most.
fn assert_only_in_arena(broker: &Broker, patterns: &[Pattern]) {
    let found = memory::scan(broker.pid(), patterns).expect("the broker can be read");
    assert!(found.outside_arena().is_empty(), "{:?}", found.outside_arena());
    let files = ["run", "state"].map(|name| broker.setup().path(name));
    let hits = memory::scan_files(&files, patterns);
    assert!(hits.is_empty() && !is_in(patterns, &broker.log()), "{hits:?}");
}

#[test]
fn without_the_flag_a_password_is_refused_and_comes_back_in_no_answer() {
    let database = Server::shared().database();
    let broker = broker(&database);
    let patterns = database.canary().patterns();
    let mut worker = Worker::start(&broker, &Identity::worker());
    let mut wrong = login(&database);
    wrong["password"] = json!({ "value": database.canary().reveal() });
    for arguments in [login(&database), wrong] {
        let refused = worker.call("create_credential_token", &arguments);
        assert!(refused.is_error, "{}", refused.raw);
        assert!(!is_in(&patterns, &refused.raw.to_string()), "{}", refused.raw);
    }
    let refused = worker.call("create_credential_token", &login(&database));
    assert_eq!(refused.text("/error/code"), "UNSUPPORTED");
    for way in ["credbroker put NAME", "credbroker entry NAME"] {
        assert!(refused.text("/error/hint").contains(way), "{}", refused.raw);
    }
    let log = worker.process().stderr();
    assert!(!is_in(&patterns, &log) && !log.contains("inline_secrets"), "{log}");
    assert!(broker.audit().of("secret.registered").is_empty());
    assert_only_in_arena(&broker, &patterns);
}

#[test]
fn with_the_flag_a_login_is_registered_for_the_caller_and_logged_nowhere() {
    let database = Server::shared().database();
    let broker = broker(&database);
    let patterns = database.canary().patterns();
    let mut worker = Worker::start_with(&broker, &Identity::worker(), &["--allow-inline-secrets"]);
    let created = worker.call("create_credential_token", &login(&database));
    assert!(!created.is_error, "{}\n{}", created.raw, worker.process().stderr());
    assert!(!is_in(&patterns, &created.raw.to_string()), "{}", created.raw);
    let token = created.text("/credential_token").to_owned();
    let sql = json!({
        "database": "bare_db",
        "credential_token": token,
        "sql": "SELECT current_user::text AS who",
    });
    let row = worker.call("execute_sql", &sql);
    assert_eq!(row.content["rows"], json!([[database.name()]]), "{}", row.raw);

    // Half a login is none, and a wrong one is the database's to refuse.
    let mut half = login(&database);
    half.as_object_mut().expect("an object").remove("username");
    let refused = worker.call("create_credential_token", &half);
    assert_eq!(refused.text("/error/code"), "INVALID_REQUEST", "{}", refused.raw);

    let records = broker.audit().of("secret.registered");
    assert_eq!(records.len(), 1);
    assert_eq!(
        records[0].text("subject"),
        Some(format!("stdio:uid={}", Identity::worker().uid())).as_deref()
    );
    let log = worker.process().stderr();
    assert!(log.contains("\"inline_secrets\":\"allowed\""), "{log}");
    assert!(!is_in(&patterns, &log), "{log}");
    assert_only_in_arena(&broker, &patterns);

    let revoked = worker.call("revoke_credential_token", &json!({ "credential_token": token }));
    assert!(!revoked.is_error, "{}", revoked.raw);
    let dead = worker.call("execute_sql", &sql);
    assert_eq!(dead.text("/error/code"), "HANDLE_INVALID", "{}", dead.raw);
}
