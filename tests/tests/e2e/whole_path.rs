//! From a handle to rows: with psql, with the command line, with the SQL worker.

use std::os::unix::process::ExitStatusExt as _;

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::{Broker, Grant, Via};
use credbroker_e2e::frontend::packet;
use credbroker_e2e::identity::Identity;
use credbroker_e2e::postgres::Server;
use credbroker_e2e::process::{Process, output, transcript};
use credbroker_e2e::wait::PATIENCE;
use credbroker_e2e::worker::Worker;
use rustix::process::Signal;
use serde_json::json;

#[test]
fn psql_unmodified_goes_through_the_door() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let client = Identity::client();
    let issued = broker.handles(&client).issue("main_db").expect("the client has a grant");

    // The database by its own name, and by the connection's.
    for name in [database.name(), "main_db"] {
        let door = broker.runtime_dir().join("postgres");
        let url = format!(
            "postgresql:///{name}?host={}&user=main_db&password={}",
            door.display(),
            issued.token
        );
        let mut psql = client.command("psql");
        psql.args(["--no-psqlrc", "-At", &url, "-c", "SELECT current_user, current_database()"]);
        let done = output(&mut psql, PATIENCE);
        assert!(done.status.success(), "{}", transcript(&done));
        let row = format!("{0}|{0}\n", database.name());
        assert_eq!(String::from_utf8_lossy(&done.stdout), row);
    }
}

/// PostgreSQL takes the values of a startup message as bytes, and 15 writes a question mark for
/// each that is not ASCII (`pg_clean_ascii`).
#[test]
fn what_a_client_sets_at_startup_may_be_in_any_encoding() {
    let database = Server::shared().database();
    for warm in [0, 1] {
        let broker =
            Broker::usual_setup(&database, Via::Tls).set("connections.main_db.warm", warm).start();
        let token = broker.handles(&Identity::client()).issue("main_db").expect("a grant").token;
        for _twice in 0..2 {
            let mut frontend = broker.knock(&Identity::client());
            let version = (3_u32 << 16).to_be_bytes();
            let said = b"user\0main_db\0application_name\0tavern\xe9\0\0";
            frontend.send(&packet(&[&version[..], said].concat())).expect("the door reads");
            let mut session = frontend.authenticate(&token).expect("a session");
            let name = session.query("SHOW application_name").expect("a row");
            assert_eq!(name, [["tavern?"]], "warm = {warm}");
        }
        assert!(!broker.log().contains("tavern"), "{}", broker.log());
        let records = broker.audit().records();
        assert!(records.iter().all(|record| !record.line().contains("tavern")));
    }
}

#[test]
fn psql_copies_in_and_out_and_prepares() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let client = Identity::client();
    let issued = broker.handles(&client).issue("main_db").expect("the client has a grant");
    let script = "CREATE TABLE numbers AS SELECT generate_series(1, 100000) AS n;
        COPY numbers TO STDOUT;
        PREPARE sum AS SELECT sum(n) FROM numbers WHERE n <= $1; EXECUTE sum(4);";
    let mut psql = broker.psql(&client, "main_db", &issued.token);
    let done = output(psql.args(["--quiet", "-c", script]), PATIENCE);
    assert!(done.status.success(), "{}", transcript(&done));
    let text = String::from_utf8_lossy(&done.stdout);
    assert_eq!(text.lines().count(), 100_001);
    assert_eq!(text.lines().last(), Some("10"));
}

/// Both directions full at once, over TLS: every byte arrives, and none of them twice.
#[test]
fn a_long_pipeline_arrives_whole_and_once() {
    let database = Server::shared().database();
    let broker = Broker::usual_setup(&database, Via::Tls).start();
    let client = Identity::client();
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    let mut session = broker.session(&client, "main_db", &token);
    session.query("CREATE SEQUENCE runs").expect("the role may create sequences");
    let padding = "x".repeat(20_000);
    let queries: Vec<String> = (0..400)
        .map(|number| format!("SELECT {number} || ':' || nextval('runs') || '{padding}'"))
        .collect();
    let answers = session.pipeline(&queries);
    for (number, answer) in answers.iter().enumerate() {
        assert_eq!(answer.trim_end_matches('x'), format!("{number}:{}", number + 1));
    }
}

#[test]
fn an_ambient_grant_needs_no_handle() {
    let database = Server::shared().database();
    let client = Identity::client();
    let broker = credbroker_e2e::broker::Setup::new()
        .connection("main_db", &database, Via::Tls)
        .grant(Grant::to(&client, &["ambient"], &["main_*"]))
        .start();
    let mut psql = broker.psql(&client, "main_db", "");
    let done = output(psql.args(["-c", "SELECT current_user"]), PATIENCE);
    assert!(done.status.success(), "{}", transcript(&done));
    assert_eq!(String::from_utf8_lossy(&done.stdout).trim(), database.name());
}

#[test]
fn exec_outlives_the_first_lifetime_of_its_handle() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let mut exec = broker.cli(&Identity::client());
    exec.args(["exec", "main_db", "--ttl", "2s", "--", "sh", "-c"]);
    exec.arg("for turn in 1 2 3 4 5; do psql -X -At -c \"SELECT $turn\" || exit 9; sleep 1; done");
    let done = output(&mut exec, PATIENCE);
    assert!(done.status.success(), "{}\n{}", transcript(&done), broker.log());
    assert_eq!(String::from_utf8_lossy(&done.stdout), "1\n2\n3\n4\n5\n");
    assert!(!broker.audit().of("handle.renewed").is_empty());
    assert_eventually!(
        broker.audit().of("handle.revoked").len() == 1,
        "exec revokes its handle at the end"
    );
}

#[test]
fn exec_gives_the_childs_status_and_passes_signals_on() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let client = Identity::client();
    let run = |script: &str| {
        let mut exec = broker.cli(&client);
        exec.args(["exec", "main_db", "--", "sh", "-c", script]);
        output(&mut exec, PATIENCE)
    };
    assert_eq!(run("exit 7").status.code(), Some(7));
    let environment = run("test -n \"$PGPASSWORD\" && test -n \"$DATABASE_URL\" && echo $PGUSER");
    assert_eq!(String::from_utf8_lossy(&environment.stdout), "main_db\n");

    let mut exec = broker.cli(&client);
    exec.args(["exec", "main_db", "--", "sh", "-c"]);
    exec.arg("trap 'echo told; exit 3' TERM; echo ready; while :; do sleep 0.1; done");
    let mut process = Process::start("exec", &mut exec, &broker.setup().path("logs"));
    assert_eventually!(process.stdout().contains("ready"), "{}", process.stderr());
    process.signal(Signal::TERM);
    let status = process.wait(PATIENCE);
    assert_eq!(status.code(), Some(3), "{status} {:?} {}", status.signal(), process.stderr());
    assert!(process.stdout().contains("told"));
}

#[test]
fn the_worker_answers_with_rows() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let mut worker = Worker::start(&broker, &Identity::worker());
    let result = worker.call(
        "execute_sql",
        &json!({ "database": "main_db", "sql": "SELECT 42 AS answer, current_user AS role" }),
    );
    assert!(!result.is_error, "{}\n{}", result.raw, broker.log());
    assert_eq!(result.content["rows"], json!([[42, database.name()]]), "{}", result.raw);
    assert_eq!(result.content["columns"][0]["name"], "answer");
}

#[test]
fn the_worker_makes_uses_and_revokes_a_token() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let mut worker = Worker::start(&broker, &Identity::worker());
    let made = worker.call("create_credential_token", &json!({ "database": "main_db" }));
    assert!(!made.is_error, "{}", made.raw);
    let token = made.content["credential_token"].as_str().expect("a token").to_owned();
    let ask = json!({ "database": "main_db", "credential_token": token, "sql": "SELECT 1 AS one" });
    let row = worker.call("execute_sql", &ask);
    assert_eq!(row.content["rows"], json!([[1]]), "{}", row.raw);

    let revoked = worker.call("revoke_credential_token", &json!({ "credential_token": token }));
    assert!(!revoked.is_error, "{}", revoked.raw);
    let refused = worker.call("execute_sql", &ask);
    assert!(refused.is_error, "{}", refused.raw);
    assert!(!refused.raw.to_string().contains(database.name()), "{}", refused.raw);
}

#[test]
fn sql_errors_have_a_sqlstate_and_no_dsn() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let mut worker = Worker::start(&broker, &Identity::worker());
    let wrong = worker.call(
        "execute_sql",
        &json!({ "database": "main_db", "sql": "SELECT nothing FROM no_such_table" }),
    );
    assert!(wrong.is_error, "{}", wrong.raw);
    assert_eq!(wrong.content["error"]["sqlstate"], "42P01", "{}", wrong.raw);
    let text = wrong.raw.to_string();
    for leak in ["postgres:", "postgresql:", "localhost", "password", "cbh_", "no_such_table FROM"]
    {
        assert!(!text.contains(leak), "{leak} stands in {text}");
    }
}
