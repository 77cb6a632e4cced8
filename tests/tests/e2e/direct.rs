//! TLS from the first byte (`tls.negotiation = "direct"`).

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::{Broker, Setup, Via};
use credbroker_e2e::front::Front;
use credbroker_e2e::frontend::cancel_request;
use credbroker_e2e::identity::Identity;
use credbroker_e2e::postgres::{Database, Server};

/// A broker that dials this proxy, in this mode.
fn setup(database: &Database, front: &Front, mode: &str) -> Setup {
    let setup = Broker::usual_setup(database, Via::Tls);
    let ca = setup.broker_file("etc/front-ca.pem", &front.ca);
    let setup = setup
        .set("connections.main_db.port", i64::from(front.port))
        .set("connections.main_db.tls.mode", mode)
        .set("connections.main_db.tls.negotiation", "direct")
        .set("connections.main_db.tls.ca_file", ca.to_str().expect("an ASCII path"));
    if mode == "require" { setup.without("connections.main_db.tls.ca_file") } else { setup }
}

/// The reason in the client's refusal.
fn refusal(setup: Setup) -> (String, String) {
    let broker = setup.start();
    let client = Identity::client();
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    let refusal = broker.login(&client, "main_db", &token).expect_err("no session").refusal();
    (refusal.reason().to_owned(), broker.log())
}

#[test]
fn direct_tls_carries_sessions_and_cancel_requests() {
    let database = Server::shared().database();
    for mode in ["verify-full", "verify-ca", "require"] {
        let front = Front::start(database.server(), &["postgresql"]);
        let broker = setup(&database, &front, mode).start();
        let client = Identity::client();
        let token = broker.handles(&client).issue("main_db").expect("a grant").token;
        let mut session = broker.session(&client, "main_db", &token);
        assert_eq!(front.handshakes(), 1, "{mode}");
        session.start_query("SELECT pg_sleep(300)");
        assert_eventually!(database.running("pg_sleep") == 1, "the query does not run");
        let mut knock = broker.knock(&client);
        knock.send(&cancel_request(&session.cancel_key)).expect("the door reads");
        assert_eq!(knock.receive_rest().expect("the door hangs up"), []);
        let ended = session.finish_query().expect("the session lives on");
        assert_eq!(ended.expect_err("cancelled").sqlstate(), "57014", "{mode}");
        assert_eq!(front.handshakes(), 2, "{mode}: the cancel request was not direct");
    }
}

/// A block that traps a cancellation is ended by a login of its own, which finds the same server.
#[test]
fn direct_tls_carries_the_end_of_a_session_that_is_busy() {
    let database = Server::shared().database();
    let front = Front::start(database.server(), &["postgresql"]);
    let broker = setup(&database, &front, "verify-full").start();
    let client = Identity::client();
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    let mut session = broker.session(&client, "main_db", &token);
    session.start_query(
        "DO $$ BEGIN LOOP BEGIN PERFORM pg_sleep(300); \
         EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP; END $$",
    );
    assert_eventually!(database.running("pg_sleep") == 1, "the block does not run");
    assert_eq!(broker.handles(&client).revoke(&token), Ok(1));
    assert_eventually!(database.backends() == 0, "the backend lives on");
    assert_eq!(front.handshakes(), 2, "the session, and the login that ends it");
    assert_eventually!(broker.audit().of("session.closed").len() == 1, "it is recorded");
    let closed = broker.audit().of("session.closed")[0].line();
    assert!(!closed.contains("server_stopped"), "{closed}");
}

#[test]
fn a_server_that_does_not_select_the_protocol_is_not_trusted() {
    let database = Server::shared().database();
    // Without ALPN; one that knows another protocol only breaks the handshake off itself.
    for protocols in [&[][..], &["h2"]] {
        let front = Front::start(database.server(), protocols);
        let (reason, log) = refusal(setup(&database, &front, "verify-full"));
        assert_eq!(reason, "UPSTREAM_UNTRUSTED", "{protocols:?}: {log}");
        assert!(log.contains("ALPN") == protocols.is_empty(), "{protocols:?}: {log}");
    }
    assert_eq!(database.backends(), 0);
}

#[test]
fn a_server_that_wants_to_be_asked_is_not_spoken_to_in_plaintext() {
    let database = Server::shared().database();
    // PostgreSQL 15 takes the handshake for a startup message.
    let setup = Broker::usual_setup(&database, Via::Tls)
        .set("connections.main_db.tls.negotiation", "direct");
    let (reason, log) = refusal(setup);
    let told = ["UPSTREAM_UNREACHABLE", "UPSTREAM_UNTRUSTED"];
    assert!(told.contains(&reason.as_str()), "{reason}: {log}");
    assert_eq!(database.backends(), 0);
}
