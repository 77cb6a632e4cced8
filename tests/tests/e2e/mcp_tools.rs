//! The worker's tools through a real broker: what a role may see, who must help, and that no
//! failure of any tool carries what it should not.

use std::os::fd::AsFd as _;

use credbroker_e2e::broker::{Broker, Grant, Setup, Via};
use credbroker_e2e::canary::random_word;
use credbroker_e2e::identity::Identity;
use credbroker_e2e::packet::{Packets, memfd};
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::worker::{ToolResult, Worker};
use credbroker_proto::v1::PutRequest;
use serde_json::{Value, json};

const CORE: [&str; 4] = ["list_connections", "execute_sql", "describe_schema", "explain_query"];
const MORE: [&str; 6] = [
    "create_credential_token",
    "revoke_credential_token",
    "connect_storage",
    "connect_named_storage",
    "execute_query",
    "disconnect",
];

fn code(result: &ToolResult) -> &str {
    result.text("/error/code")
}

#[test]
fn the_list_is_the_one_that_was_asked_for() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let all = [CORE.as_slice(), &MORE].concat();
    assert_eq!(Worker::start(&broker, &Identity::worker()).tools(), all);
    let with = |set| Worker::start_with(&broker, &Identity::worker(), &["--tools", set]).tools();
    assert_eq!(with("full"), all);
    assert_eq!(with("core"), CORE);
    let mut core = Worker::start_with(&broker, &Identity::worker(), &["--tools", "core"]);
    let call = json!({ "name": "connect_named_storage", "arguments": {} });
    assert_eq!(core.request("tools/call", &call)["error"]["code"], -32602);
}

#[test]
fn a_schema_is_what_the_role_may_see() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let role = database.name();
    let mut admin = database.admin();
    admin
        .batch_execute(&format!(
            "CREATE SCHEMA closed; CREATE TABLE closed.secrets (a int);
             GRANT ALL ON closed.secrets TO {role};
             CREATE SCHEMA half; GRANT USAGE ON SCHEMA half TO {role};
             CREATE TABLE half.hidden (a int primary key);
             CREATE TABLE half.shown (a int REFERENCES half.hidden, b int, c int);
             GRANT SELECT (b) ON half.shown TO {role};"
        ))
        .expect("a superuser may");
    let mut worker = Worker::start(&broker, &Identity::worker());
    let all = worker.call("describe_schema", &json!({ "database": "main_db" }));
    let schemas = all.content["schemas"].as_array().expect("schemas");
    let half = schemas.iter().find(|schema| schema["name"] == "half").expect("half is there");
    assert_eq!(*half, json!({ "name": "half", "table_count": 1, "tables": ["shown"] }));
    let ask = |table: &str| json!({ "database": "main_db", "table": table });
    let shown = worker.call("describe_schema", &ask("half.shown"));
    assert_eq!(
        shown.content["table"]["columns"],
        json!([{ "name": "b", "type": "integer", "nullable": true }])
    );
    // Whether a table is there that may not be seen, nobody is told.
    let hidden = worker.call("describe_schema", &ask("half.hidden")).content;
    assert_eq!(hidden["error"]["code"], "INVALID_REQUEST");
    assert_eq!(worker.call("describe_schema", &ask("half.nowhere")).content, hidden);
    for result in [all.content, shown.content] {
        let text = result.to_string();
        assert!(!text.contains("hidden") && !text.contains("closed"), "{text}");
    }
}

#[test]
fn a_connection_is_found_by_its_destination_and_by_nothing_else() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let mut worker = Worker::start(&broker, &Identity::worker());
    let port = database.server().port;
    let name = database.name();
    let strings = [
        format!("postgresql://localhost:{port}/{name}?sslmode=require"),
        format!("host=localhost port={port} dbname={name} user=somebody"),
    ];
    for string in strings {
        let open = worker.call("connect_storage", &json!({ "connection_string": string }));
        assert!(!open.is_error, "{}\n{}", open.raw, broker.log());
        assert!(open.text("/connection_string").contains("****"), "{}", open.raw);
        let id = open.text("/connection_id");
        let query = json!({ "connection_id": id, "query": "SELECT current_user" });
        assert_eq!(worker.call("execute_query", &query).content["rows"], json!([[name]]));
    }
    // The database listens there too, but nobody has configured it.
    for string in [
        format!("postgresql://127.0.0.1:{port}/{name}"),
        format!("postgresql://localhost:{port}/postgres"),
        "postgresql://localhost:1/x".to_owned(),
    ] {
        let refused = worker.call("connect_storage", &json!({ "connection_string": string }));
        assert_eq!(code(&refused), "ACCESS_DENIED", "{}", refused.raw);
    }
}

#[test]
fn a_missing_credential_names_the_command_that_a_person_runs() {
    let database = Server::shared().database();
    let broker = Setup::new()
        .stored_connection("empty_db", &database)
        .grant(Grant::to(&Identity::worker(), &["issue", "open"], &["empty_db"]))
        .start();
    let mut worker = Worker::start(&broker, &Identity::worker());
    let listed = worker.call("list_connections", &json!({}));
    assert_eq!(listed.content["connections"][0]["needs_credential"], true, "{}", listed.raw);
    let port = database.server().port;
    let string = format!("postgresql://localhost:{port}/{}", database.name());
    let calls = [
        ("execute_sql", json!({ "database": "empty_db", "sql": "SELECT 1" })),
        ("describe_schema", json!({ "database": "empty_db" })),
        ("explain_query", json!({ "database": "empty_db", "query": "SELECT 1" })),
        ("create_credential_token", json!({ "database": "empty_db" })),
        ("connect_storage", json!({ "connection_string": string })),
        ("connect_named_storage", json!({ "connection_name": "empty_db" })),
    ];
    for (tool, arguments) in &calls {
        let refused = worker.call(tool, arguments);
        assert_eq!(code(&refused), "UPSTREAM_REFUSED", "{tool}: {}\n{}", refused.raw, broker.log());
        let hint = refused.text("/error/hint");
        assert!(hint.contains("`credbroker put empty_db`"), "{tool}: {}", refused.raw);
        assert!(hint.contains("`credbroker entry empty_db`"), "{tool}: {}", refused.raw);
    }
    let read = json!({ "uri": "schema://connection/empty_db" });
    let read = worker.request("resources/read", &read);
    assert!(read["error"]["data"].to_string().contains("credbroker put empty_db"), "{read}");

    // A person has put it: nothing has to be started again.
    let operator = Packets::connect(&Identity::own(), &broker.admin_packet_socket());
    let request = PutRequest { connection: "empty_db".into(), ..Default::default() };
    let secret = memfd(database.secret().as_bytes());
    operator.expect("root may connect").put(request, &[secret.as_fd()]).expect("an operator");
    for (tool, arguments) in &calls {
        let done = worker.call(tool, arguments);
        assert!(!done.is_error, "{tool}: {}\n{}", done.raw, broker.log());
    }
}

#[test]
fn a_cursor_ends_with_the_token_it_was_made_under() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let mut worker = Worker::start(&broker, &Identity::worker());
    let made = worker.call("create_credential_token", &json!({ "database": "main_db" }));
    let token = made.text("/credential_token").to_owned();
    let mut ask = json!({ "database": "main_db", "credential_token": token, "max_rows": 2,
        "sql": "SELECT n FROM generate_series(1, 5) n ORDER BY n" });
    let first = worker.call("execute_sql", &ask);
    ask["cursor"] = first.content["next_cursor"].clone();
    assert_eq!(worker.call("execute_sql", &ask).content["rows"], json!([[3], [4]]));

    // Under the worker's own handle it is another statement.
    let mut without = ask.clone();
    without.as_object_mut().expect("an object").remove("credential_token");
    assert_eq!(code(&worker.call("execute_sql", &without)), "INVALID_REQUEST");
    // Another process has not heard of it.
    let mut sibling = Worker::start(&broker, &Identity::worker());
    let unknown = sibling.call("execute_sql", &ask);
    assert_eq!(unknown.text("/error/message"), "cursor is unknown or has expired");

    worker.call("revoke_credential_token", &json!({ "credential_token": token }));
    assert_eq!(code(&worker.call("execute_sql", &ask)), "HANDLE_INVALID");
}

/// Calls that fail, for every reason that there is, with a word in every argument that nobody
/// but the caller knows.
fn failures(
    word: &str,
    token: &str,
    database: &Database,
) -> Vec<(&'static str, Value, &'static str)> {
    let port = database.server().port;
    let sql = format!("SELECT '{word}' FROM no_such_table");
    let divide = format!("SELECT 1 / 0, $1 -- {word}");
    let mut calls = vec![
        ("list_connections", json!({ word: word }), "INVALID_REQUEST"),
        ("revoke_credential_token", json!({ "credential_token": word }), "HANDLE_INVALID"),
        ("revoke_credential_token", json!({ "credential_token": token }), "HANDLE_INVALID"),
        ("connect_named_storage", json!({ "connection_name": word }), "ACCESS_DENIED"),
        ("disconnect", json!({ "connection_id": word }), "INVALID_REQUEST"),
        ("execute_query", json!({ "connection_id": word, "query": word }), "INVALID_REQUEST"),
        ("create_credential_token", json!({ "database": word }), "ACCESS_DENIED"),
        (
            "create_credential_token",
            json!({ "database": "main_db", "username": word, "password": word }),
            "UNSUPPORTED",
        ),
        (
            "create_credential_token",
            json!({ "database": "main_db", "expiry_minutes": word }),
            "INVALID_REQUEST",
        ),
        (
            "connect_storage",
            json!({ "connection_string": format!("postgresql://{word}:{word}@localhost:{port}/x") }),
            "UNSUPPORTED",
        ),
        (
            "connect_storage",
            json!({ "connection_string": format!("host={word} dbname={word} user={word}") }),
            "ACCESS_DENIED",
        ),
        ("connect_storage", json!({ "connection_string": word }), "INVALID_REQUEST"),
        (
            "connect_storage",
            json!({ "storage_type": word, "host": word, "database": word }),
            "UNSUPPORTED",
        ),
        ("describe_schema", json!({ "database": "main_db", "table": word }), "INVALID_REQUEST"),
        ("describe_schema", json!({ "database": word }), "ACCESS_DENIED"),
        ("explain_query", json!({ "database": "main_db", "query": sql }), "SQL_ERROR"),
        ("explain_query", json!({ "database": "main_db", "query": word }), "INVALID_REQUEST"),
        ("execute_sql", json!({ "database": "main_db", "sql": sql }), "SQL_ERROR"),
        (
            "execute_sql",
            json!({ "database": "main_db", "sql": divide, "params": [word] }),
            "SQL_ERROR",
        ),
        (
            "execute_sql",
            json!({ "database": "main_db", "sql": "SELECT $1::int4", "params": [word] }),
            "SQL_ERROR",
        ),
        // Of the statement, and of a row.
        (
            "execute_sql",
            json!({ "database": "main_db", "sql": format!("SELECT '{word}'::int4") }),
            "SQL_ERROR",
        ),
        (
            "execute_sql",
            json!({ "database": "main_db", "sql": "SELECT private::int4 FROM people" }),
            "SQL_ERROR",
        ),
        (
            "execute_sql",
            json!({ "database": "main_db", "sql": sql, "params": { word: word } }),
            "INVALID_REQUEST",
        ),
        (
            "execute_sql",
            json!({ "database": "main_db", "sql": sql, "cursor": word }),
            "INVALID_REQUEST",
        ),
        (
            "execute_sql",
            json!({ "database": "main_db", "sql": sql, "credential_token": token }),
            "HANDLE_INVALID",
        ),
        ("execute_sql", json!({ "database": "main_db", "sql": { word: word } }), "INVALID_REQUEST"),
    ];
    for (connection, code) in [
        ("dead_db", "UPSTREAM_UNREACHABLE"),
        ("empty_db", "UPSTREAM_REFUSED"),
        ("held_db", "SUSPENDED"),
    ] {
        calls.extend([
            ("execute_sql", json!({ "database": connection, "sql": sql }), code),
            ("describe_schema", json!({ "database": connection, "pattern": word }), code),
            ("explain_query", json!({ "database": connection, "query": sql }), code),
            ("connect_named_storage", json!({ "connection_name": connection }), code),
        ]);
    }
    calls
}

#[test]
fn no_failure_tells_a_secret_a_host_a_statement_or_a_value() {
    let database = Server::shared().database();
    let connections = ["main_db", "dead_db", "empty_db", "held_db"];
    let broker = connections
        .iter()
        .fold(Setup::new(), |setup, name| match *name {
            // Nothing listens there.
            "dead_db" => setup.connection(name, &database, Via::Plain(1)),
            "empty_db" => setup.stored_connection(name, &database),
            _ => setup.connection(name, &database, Via::Tls),
        })
        .grant(Grant::to(&Identity::worker(), &["issue", "open"], &connections))
        .start();
    broker.admin(&Identity::own()).suspend(Some("held_db")).expect("an operator");
    let mut worker = Worker::start(&broker, &Identity::worker());
    let word = format!("canary{}", random_word(12));
    let people = format!(
        "CREATE TABLE people AS SELECT '{word}' AS private; GRANT SELECT ON people TO {}",
        database.name()
    );
    database.admin().batch_execute(&people).expect("a superuser may");
    let made = worker.call("create_credential_token", &json!({ "database": "main_db" }));
    let token = made.text("/credential_token").to_owned();
    worker.call("revoke_credential_token", &json!({ "credential_token": token }));

    let port = format!(":{}", database.server().port);
    let secrets = database.canary().patterns();
    let check = |tool: &str, arguments: &Value, text: &str| {
        let forbidden = [word.as_str(), token.as_str(), "localhost", "127.0.0.1", "postgresql:"];
        for leak in forbidden.iter().chain([&port.as_str(), &"no_such_table'", &"/run/"]) {
            assert!(!text.contains(leak), "{tool} {arguments}: {leak} stands in {text}");
        }
        assert!(secrets.iter().all(|secret| !secret.is_in(text.as_bytes())), "{tool}: {text}");
    };
    let mut tools = Vec::new();
    for (tool, arguments, expected) in failures(&word, &token, &database) {
        let failed = worker.call(tool, &arguments);
        let log = broker.log();
        assert!(failed.is_error, "{tool} {arguments}: {}", failed.raw);
        assert_eq!(code(&failed), expected, "{tool} {arguments}: {}\n{log}", failed.raw);
        check(tool, &arguments, &failed.raw.to_string());
        tools.push(tool);
    }
    assert!([CORE.as_slice(), &MORE].concat().iter().all(|tool| tools.contains(tool)));

    // And when nobody is there who could answer.
    drop(broker);
    for (tool, arguments) in [
        ("list_connections", json!({})),
        ("create_credential_token", json!({ "database": word })),
        ("connect_named_storage", json!({ "connection_name": word })),
    ] {
        let failed = worker.call(tool, &arguments);
        assert_eq!(code(&failed), "BROKER_UNREACHABLE", "{}", failed.raw);
        check(tool, &arguments, &failed.raw.to_string());
    }
    // Its log has neither: not of what failed, and not of what did not.
    check("log", &Value::Null, &worker.process().stderr());
}
