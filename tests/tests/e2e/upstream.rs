//! The database at the other end: who it must be, and what happens when it is not.

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::{Broker, Setup, Via};
use credbroker_e2e::canary::Canary;
use credbroker_e2e::frontend::ServerError;
use credbroker_e2e::identity::Identity;
use credbroker_e2e::postgres::{Database, Server, TlsIdentity};

/// What the door says to a granted client.
fn refusal(broker: &Broker) -> ServerError {
    let client = Identity::client();
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    broker.login(&client, "main_db", &token).expect_err("no session").refusal()
}

/// Asserts a refusal of this reason: to the client without a detail, in the audit log by name.
fn assert_refused(setup: Setup, database: &Database, reason: &str) {
    let broker = setup.start();
    let refusal = refusal(&broker);
    assert_eq!(refusal.sqlstate(), "08006", "{refusal}");
    let text = refusal.to_string();
    for leak in [database.name(), database.canary().reveal(), "127.0.0", "localhost"] {
        assert!(!text.contains(leak), "{leak} stands in {text}");
    }
    let log = broker.log();
    let audit = || -> Vec<String> { broker.audit().records().iter().map(|r| r.line()).collect() };
    // What is refused is written down without waiting for the disk.
    assert_eventually!(
        audit().iter().any(|line| line.to_uppercase().contains(reason)),
        "no {reason} in the audit log:\n{}\nthe broker said:\n{log}",
        audit().join("\n")
    );
    assert!(!log.contains(database.canary().reveal()));
    assert_eq!(database.backends(), 0);
}

#[test]
fn the_link_to_the_database_is_encrypted() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let client = Identity::client();
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    let mut session = broker.session(&client, "main_db", &token);
    let query = "SELECT ssl, version FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    let rows = session.query(query).expect("a query");
    assert_eq!(rows[0][0], "t", "{rows:?}");
    assert!(rows[0][1].starts_with("TLSv1."), "{rows:?}");
    assert!(session.parameters.contains_key("server_version"), "{:?}", session.parameters);
}

#[test]
fn a_server_of_another_ca_is_not_trusted() {
    let database = Server::shared().database();
    let setup = Broker::usual_setup(&database, Via::Tls);
    let ca_file = setup.broker_file("etc/other-ca.pem", &TlsIdentity::generate().ca);
    let ca_file = ca_file.to_str().expect("an ASCII path").to_owned();
    let setup = setup.set("connections.main_db.tls.ca_file", ca_file.as_str());
    assert_refused(setup, &database, "UPSTREAM_UNTRUSTED");
}

#[test]
fn a_server_of_another_name_is_not_trusted() {
    let database = Server::shared().database();
    let setup = Broker::usual_setup(&database, Via::Tls);
    // PostgreSQL listens there too; its certificate does not say so.
    let setup = setup.set("connections.main_db.host", "127.0.0.2");
    assert_refused(setup, &database, "UPSTREAM_UNTRUSTED");
}

/// Mode × server, with libpq's outcome: `None` is a session.
#[test]
fn modes_accept_what_libpq_accepts() {
    let database = Server::shared().database();
    let other = TlsIdentity::generate().ca;
    let ours = std::fs::read_to_string(&Server::shared().ca_file).expect("the CA");
    // PostgreSQL listens on 127.0.0.2 too; its certificate does not say so.
    let table: [(&str, &str, Option<bool>, Option<&str>); 6] = [
        ("verify-full", "localhost", Some(true), None),
        ("verify-full", "127.0.0.1", Some(true), None),
        ("verify-ca", "127.0.0.2", Some(true), None),
        ("verify-ca", "localhost", Some(false), Some("UPSTREAM_UNTRUSTED")),
        ("require", "localhost", Some(false), Some("UPSTREAM_UNTRUSTED")),
        ("require", "127.0.0.2", None, None),
    ];
    for (mode, host, right_ca, outcome) in table {
        let setup = Broker::usual_setup(&database, Via::Tls).set("connections.main_db.host", host);
        let mut tls = toml::Table::from_iter([("mode".to_owned(), mode.into())]);
        if let Some(right) = right_ca {
            let ca = if right { &ours } else { &other };
            let file = setup.broker_file("etc/mode-ca.pem", ca);
            tls.insert("ca_file".into(), file.to_str().expect("an ASCII path").into());
        }
        let setup = setup.set("connections.main_db.tls", tls);
        match outcome {
            Some(reason) => assert_refused(setup, &database, reason),
            None => {
                let broker = setup.start();
                let client = Identity::client();
                let token = broker.handles(&client).issue("main_db").expect("a grant").token;
                let mut session = broker.session(&client, "main_db", &token);
                let query = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
                assert_eq!(session.query(query).expect("a query")[0][0], "t", "{mode} {host}");
            }
        }
    }
}

#[test]
fn a_refused_credential_is_told_without_it() {
    let database = Server::shared().database();
    database.set_server_password(&Canary::random());
    let setup = Broker::usual_setup(&database, Via::Tls);
    assert_refused(setup, &database, "UPSTREAM_REFUSED");
}

#[test]
fn a_server_that_is_not_there_is_told() {
    let database = Server::shared().database();
    // Port 1 of the loopback interface: nobody listens there.
    let setup = Broker::usual_setup(&database, Via::Tls).set("connections.main_db.port", 1);
    assert_refused(setup, &database, "UPSTREAM_UNREACHABLE");
}

#[test]
fn an_error_of_an_authenticated_server_is_relayed_unchanged() {
    let database = Server::shared().database();
    let broker = Broker::usual_setup(&database, Via::Tls)
        .set("connections.main_db.database", "cb_no_such_database")
        .start();
    let refusal = refusal(&broker);
    assert_eq!(refusal.sqlstate(), "3D000", "{refusal}");
}
