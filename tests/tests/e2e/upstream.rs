//! The database at the other end: who it must be, and what happens when it is not.

use std::sync::Arc;

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::{Broker, Grant, Setup, Via};
use credbroker_e2e::canary::Canary;
use credbroker_e2e::frontend::{ServerError, Session, message};
use credbroker_e2e::identity::Identity;
use credbroker_e2e::postgres::{Database, Server, TlsIdentity};
use credbroker_e2e::rogue::{Authority, Middle, Place, Rogue, Script, prelude};

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

/// How a login ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Plain,
    Tls,
    Untrusted,
}

/// Mode × server, with libpq's outcome (PostgreSQL 34.19.3).
#[test]
fn modes_accept_what_libpq_accepts() {
    use Outcome::{Plain, Tls, Untrusted};
    let database = Server::shared().database();
    let (ours, other) = (Authority::generate(), Authority::named("somebody else's authority"));
    let fronts = [
        None,
        Some(ours.sign("localhost")),
        Some(ours.sign("db2.internal")),
        Some(other.sign("localhost")),
        Some(ours.sign_expired("localhost")),
        Some(ours.sign_common_name("localhost")),
    ]
    .map(|tls| Rogue::start(&Place::Tcp, tls, Middle::new().script(Server::shared())));
    // Plain only, good, of another name, of another CA, expired, without a subjectAltName.
    let table: [(&str, bool, [Outcome; 6]); 7] = [
        ("disable", false, [Plain; 6]),
        ("allow", false, [Plain; 6]),
        ("prefer", false, [Plain, Tls, Tls, Tls, Tls, Tls]),
        ("require", false, [Untrusted, Tls, Tls, Tls, Tls, Tls]),
        ("require", true, [Untrusted, Tls, Tls, Untrusted, Untrusted, Tls]),
        ("verify-ca", true, [Untrusted, Tls, Tls, Untrusted, Untrusted, Tls]),
        ("verify-full", true, [Untrusted, Tls, Untrusted, Untrusted, Untrusted, Untrusted]),
    ];
    let client = Identity::client();
    let mut setup = Setup::new().grant(Grant::to(&client, &["issue", "open"], &["c-*"]));
    let ca_file = setup.broker_file("etc/ca.pem", &ours.pem());
    let name = |row: usize, column: usize| format!("c-{row}-{column}");
    for (row, (mode, has_ca, _)) in table.iter().enumerate() {
        for (column, front) in fronts.iter().enumerate() {
            let mut tls = toml::Table::from_iter([("mode".to_owned(), (*mode).into())]);
            if *has_ca {
                tls.insert("ca_file".into(), ca_file.to_str().expect("ASCII").into());
            }
            if ["allow", "prefer"].contains(mode) {
                tls.insert("insecure".into(), true.into());
            }
            let name = name(row, column);
            setup = setup
                .connection(&name, &database, Via::Plain(front.port()))
                .set(&format!("connections.{name}.host"), "localhost")
                .set(&format!("connections.{name}.tls"), tls);
        }
    }
    let broker = setup.start();
    let service = broker.handles(&client);
    for (row, (mode, has_ca, expected)) in table.iter().enumerate() {
        for (column, front) in fronts.iter().enumerate() {
            let name = name(row, column);
            let token = service.issue(&name).expect("a grant").token;
            let sent = || (front.record().raw.len(), front.record().opened.len());
            let before = sent();
            let outcome = match broker.login(&client, &name, &token) {
                Ok(mut session) => {
                    assert_eq!(session.query("SELECT 6 * 7").expect("a query"), [["42"]]);
                    let (raw, opened) = sent();
                    if raw - before.0 == opened - before.1 { Plain } else { Tls }
                }
                Err(error) => {
                    assert_eq!(error.refusal().reason(), "UPSTREAM_UNTRUSTED");
                    Untrusted
                }
            };
            assert_eq!(outcome, expected[column], "{mode} {has_ca} {column}");
        }
    }
    let log = broker.log();
    for words in [
        "it refuses TLS",
        "its certificate is not for localhost, but for db2.internal",
        "its certificate is of no root that is trusted here",
        "its certificate has expired",
        "add a subjectAltName for localhost",
    ] {
        assert!(log.contains(words), "no {words:?} in\n{log}");
    }
    let weak: Vec<&str> = log.lines().filter(|line| line.contains("unverified_tls")).collect();
    assert!(weak.iter().any(|line| line.contains("c-1-0")), "{weak:?}\n{log}");
}

/// A connection in this mode, with `insecure = true` where that must stand beside it.
fn weak(setup: Setup, mode: &str) -> Setup {
    let tls = [("mode".to_owned(), mode.into()), ("insecure".to_owned(), true.into())];
    setup.set("connections.main_db.tls", toml::Table::from_iter(tls))
}

fn session(broker: &Broker) -> Session {
    let client = Identity::client();
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    broker.session(&client, "main_db", &token)
}

/// `pg_hba.conf` of this server has `hostssl` lines only.
#[test]
fn allow_turns_to_tls_where_plaintext_may_not_log_in() {
    let database = Server::shared().database();
    let broker = weak(Broker::usual_setup(&database, Via::Tls), "allow").start();
    let query = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    assert_eq!(session(&broker).query(query).expect("a query"), [["t"]]);
    // The other way round: over plain TCP it is refused, and that is told.
    drop(broker);
    let broker = Broker::usual_setup(&database, Via::Plain(Server::shared().port)).start();
    assert_eq!(refusal(&broker).reason(), "UPSTREAM_REFUSED");
}

#[test]
fn prefer_turns_to_plaintext_where_tls_may_not_log_in() {
    let database = Server::shared().database();
    let pass_on = Middle::new().script(Server::shared());
    let script: Script = Arc::new(move |wire| {
        if wire.number() > 1 {
            return pass_on(wire);
        }
        wire.greet()?;
        wire.send(&message(b'E', b"SFATAL\0C28000\0Mno pg_hba.conf entry\0\0"))?;
        wire.hold()
    });
    let tls = Authority::generate().sign("localhost");
    let front = Rogue::start(&Place::Tcp, Some(tls), script);
    let broker = weak(Broker::usual_setup(&database, Via::Plain(front.port())), "prefer").start();
    assert_eq!(session(&broker).query("SELECT 6 * 7").expect("a query"), [["42"]]);
    assert_eq!(front.accepted(), 2);
}

/// CVE-2021-23222: what stands behind the answer to SSLRequest in plaintext is never taken for a
/// part of what TLS protects.
#[test]
fn bytes_behind_the_answer_to_ssl_request_end_the_handshake() {
    let database = Server::shared().database();
    let authority = Authority::generate();
    for mode in ["prefer", "require", "verify-ca", "verify-full"] {
        let pass_on = Middle::new().script(Server::shared());
        let script: Script = Arc::new(move |wire| {
            if wire.number() > 1 {
                return pass_on(wire);
            }
            wire.tls_asked()?;
            wire.send(&[b"S".as_slice(), &prelude()].concat())?;
            wire.start_tls()?;
            wire.hold()
        });
        let front = Rogue::start(&Place::Tcp, Some(authority.sign("localhost")), script);
        let setup = Broker::usual_setup(&database, Via::Plain(front.port()));
        let setup = setup.set("connections.main_db.host", "localhost");
        if mode == "prefer" {
            // The next connection is in plaintext, and says so.
            let broker = weak(setup, mode).start();
            assert_eq!(session(&broker).query("SELECT 6 * 7").expect("a query"), [["42"]]);
            continue;
        }
        let ca_file = setup.broker_file("etc/ca.pem", &authority.pem());
        let mut tls = toml::Table::from_iter([("mode".to_owned(), mode.into())]);
        if mode != "require" {
            tls.insert("ca_file".into(), ca_file.to_str().expect("ASCII").into());
        }
        let broker = setup.set("connections.main_db.tls", tls).start();
        assert_eq!(refusal(&broker).reason(), "UPSTREAM_UNTRUSTED", "{mode}");
        assert_eq!(front.accepted(), 1, "{mode}");
    }
}

#[test]
fn an_ipv6_address_is_dialled_and_verified() {
    let database = Server::shared().database();
    let authority = Authority::generate();
    for (name, works) in [("::1", true), ("::2", false), ("localhost", false)] {
        let script = Middle::new().script(Server::shared());
        let front = Rogue::start(&Place::Tcp6, Some(authority.sign(name)), script);
        for host in ["::1", "[::1]"] {
            let setup = Broker::usual_setup(&database, Via::Plain(front.port()));
            let ca_file = setup.broker_file("etc/ca.pem", &authority.pem());
            let tls = [
                ("mode".to_owned(), "verify-full".into()),
                ("ca_file".to_owned(), ca_file.to_str().expect("ASCII").into()),
            ];
            let broker = setup
                .set("connections.main_db.host", host)
                .set("connections.main_db.tls", toml::Table::from_iter(tls))
                .start();
            if works {
                assert_eq!(session(&broker).query("SELECT 6 * 7").expect("a query"), [["42"]]);
            } else {
                assert_eq!(refusal(&broker).reason(), "UPSTREAM_UNTRUSTED", "{name}");
            }
        }
    }
}

/// Few servers say goodbye in TLS.
#[test]
fn a_server_that_closes_without_close_notify_is_no_fault() {
    let database = Server::shared().database();
    let authority = Authority::generate();
    let script = Middle::new().script(Server::shared());
    let front = Rogue::start(&Place::Tcp, Some(authority.sign("localhost")), script);
    let setup = Broker::usual_setup(&database, Via::Plain(front.port()));
    let ca_file = setup.broker_file("etc/ca.pem", &authority.pem());
    let tls = [
        ("mode".to_owned(), "verify-full".into()),
        ("ca_file".to_owned(), ca_file.to_str().expect("ASCII").into()),
    ];
    let broker = setup
        .set("connections.main_db.host", "localhost")
        .set("connections.main_db.tls", toml::Table::from_iter(tls))
        .start();
    let mut session = session(&broker);
    assert_eq!(session.query("SELECT 6 * 7").expect("a query"), [["42"]]);
    session.frontend.send_message(b'X', b"").expect("the door reads");
    let rest = session.frontend.receive_rest().expect("it ends");
    assert!(rest.is_empty(), "{rest:?}");
    assert_eventually!(broker.audit().of("session.closed").len() == 1, "it is recorded");
    let closed = &broker.audit().of("session.closed")[0];
    assert_eq!(closed.text("reason"), Some("client_terminated"), "{}", closed.line());
    let log = broker.log();
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
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
