//! CancelRequest: broker-made keys, for the same uid only.

use std::thread;
use std::time::{Duration, Instant};

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::Broker;
use credbroker_e2e::frontend::{Session, cancel_request, startup_of};
use credbroker_e2e::identity::{Identity, several_or_say};
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::process::Process;
use credbroker_e2e::wait::{PATIENCE, holds_for};
use rustix::process::Signal;

/// Long enough for a cancel to arrive, if it were passed on.
const SETTLED: Duration = Duration::from_millis(500);

fn sleeper(broker: &Broker, database: &Database) -> Session {
    let token = broker.handles(&Identity::client()).issue("main_db").expect("a grant").token;
    let mut session = broker.session(&Identity::client(), "main_db", &token);
    session.start_query("SELECT pg_sleep(300)");
    assert_eventually!(database.running("pg_sleep") == 1, "the query does not run");
    session
}

/// Sends a cancel request and waits until the door hangs up, as libpq does.
fn cancel(broker: &Broker, identity: &Identity, key: &[u8]) {
    let mut frontend = broker.knock(identity);
    frontend.send(&cancel_request(key)).expect("the door reads");
    assert_eq!(frontend.receive_rest().expect("the door hangs up"), []);
}

#[test]
fn a_cancel_request_ends_the_query_and_not_the_session() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let mut session = sleeper(&broker, &database);
    let key = session.cancel_key.clone();
    cancel(&broker, &Identity::client(), &key);
    let ended = session.finish_query().expect("the session lives on");
    assert_eq!(ended.expect_err("cancelled").sqlstate(), "57014");
    session.query("SELECT 1").expect("the session lives on");
}

#[test]
fn a_cancel_request_of_another_uid_or_with_a_wrong_key_does_nothing() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let session = sleeper(&broker, &database);
    let mut wrong = session.cancel_key.clone();
    if let Some(last) = wrong.last_mut() {
        *last ^= 1;
    }
    cancel(&broker, &Identity::client(), &wrong);
    if several_or_say("a cancel key is bound to a uid") {
        cancel(&broker, &Identity::attacker(), &session.cancel_key);
        cancel(&broker, &Identity::worker(), &session.cancel_key);
    }
    assert!(holds_for(SETTLED, || database.running("pg_sleep") == 1), "the query was cancelled");
}

#[test]
fn psql_cancels_on_interrupt() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let client = Identity::client();
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    let mut psql = broker.psql(&client, "main_db", &token);
    psql.args(["-v", "VERBOSITY=verbose", "-c", "SELECT pg_sleep(300)"]);
    let mut psql = Process::start("psql", &mut psql, &broker.setup().path("logs"));
    assert_eventually!(database.running("pg_sleep") == 1, "{}", psql.stderr());
    psql.signal(Signal::INT);
    let _status = psql.wait(PATIENCE);
    assert!(psql.stderr().contains("57014"), "{}", psql.stderr());
    assert_eventually!(database.backends() == 0, "psql is gone");
}

#[test]
fn a_client_of_protocol_3_2_gets_a_longer_key_that_works() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let token = broker.handles(&Identity::client()).issue("main_db").expect("a grant").token;
    let mut frontend = broker.knock(&Identity::client());
    frontend.send(&startup_of(2, &[("user", "main_db")])).expect("the door reads");
    let mut session = frontend.authenticate(&token).expect("protocol 3.2 is spoken");
    assert_eq!(session.cancel_key.len(), 4 + 32);
    session.start_query("SELECT pg_sleep(300)");
    assert_eventually!(database.running("pg_sleep") == 1, "the query does not run");
    // What a client of 3.0 would send is not enough.
    cancel(&broker, &Identity::client(), &session.cancel_key[..8]);
    assert!(holds_for(SETTLED, || database.running("pg_sleep") == 1), "half a key is none");
    let key = session.cancel_key.clone();
    cancel(&broker, &Identity::client(), &key);
    let ended = session.finish_query().expect("the session lives on");
    assert_eq!(ended.expect_err("cancelled").sqlstate(), "57014");
}

#[test]
fn storms_of_cancels_leave_the_broker_serving() {
    const STORMS: usize = 24;
    const AT_ONCE: usize = 200;
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let service = broker.handles(&Identity::client());
    let mut session = sleeper(&broker, &database);
    let (mut slowest, mut cancelled) = (Duration::ZERO, 0);
    let started = Instant::now();
    for storm in 0..STORMS {
        thread::scope(|scope| {
            for _ in 0..AT_ONCE {
                scope.spawn(|| cancel(&broker, &Identity::client(), &session.cancel_key));
            }
        });
        // The door hangs up when a request has been acted on: what begins now is not hit.
        let ended = session.finish_query().expect("the session lives on");
        cancelled += usize::from(ended.expect_err("cancelled").sqlstate() == "57014");
        let asked = Instant::now();
        let token = service.issue("main_db").expect("the broker serves").token;
        let mut other = broker.session(&Identity::client(), "main_db", &token);
        other.query("SELECT 1").expect("another session is not hit");
        slowest = slowest.max(asked.elapsed());
        if storm + 1 < STORMS {
            session.start_query("SELECT pg_sleep(300)");
            assert_eventually!(database.running("pg_sleep") == 1, "the query does not run");
        }
    }
    assert_eq!(cancelled, STORMS);
    println!(
        "{STORMS} storms of {AT_ONCE} cancels: {:.1?}; a handle, a login and a query meanwhile took at most {slowest:.1?}",
        started.elapsed()
    );
}
