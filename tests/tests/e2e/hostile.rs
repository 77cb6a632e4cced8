//! Clients that lie, stall or flood: bounded time, bounded memory, and the broker goes on.

use std::fs;
use std::io::Write as _;
use std::thread;
use std::time::{Duration, Instant};

use credbroker_e2e::broker::{Broker, Via};
use credbroker_e2e::frontend::{
    Frontend, ServerError, cancel_request, gssenc_request, packet, ssl_request, startup,
};
use credbroker_e2e::identity::Identity;
use credbroker_e2e::postgres::Server;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// A startup message must be complete within five seconds.
const STARTUP: Duration = Duration::from_secs(5);
const SLACK: Duration = Duration::from_secs(3);
/// What hostile clients together may make the broker grow by.
const GROWTH_KB: u64 = 64 << 10;

/// Sends bytes as the uid without a grant, and waits until the door hangs up. Gives how long
/// that took, and the error that it told, if it told one.
fn offend(broker: &Broker, bytes: &[u8]) -> (Duration, Option<ServerError>) {
    let started = Instant::now();
    let mut frontend = broker.knock(&Identity::attacker());
    let _hung_up_already = frontend.send(bytes);
    let answers = frontend.receive_rest().expect("the door hangs up in the end");
    let error = answers.iter().find(|m| m.tag == b'E').map(ServerError::from_message);
    (started.elapsed(), error)
}

fn assert_still_serving(broker: &Broker) {
    let client = Identity::client();
    let token = broker.handles(&client).issue("main_db").expect("still issuing").token;
    let mut session = broker.session(&client, "main_db", &token);
    session.query("SELECT 1").expect("still serving");
}

fn resident_kb(broker: &Broker) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", broker.pid())).expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn g7_lengths_that_lie_are_refused_at_once() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let before = resident_kb(&broker);
    for length in [0, 3, 4, 7, 10_001, 0x00ff_ffff, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
        let bytes = [length.to_be_bytes(), 0x0003_0000_u32.to_be_bytes()].concat();
        let (took, _error) = offend(&broker, &bytes);
        assert!(took < SLACK, "length {length:#x} took {took:?}");
    }
    assert!(resident_kb(&broker) < before + GROWTH_KB, "{before} kB before");
    assert_still_serving(&broker);
}

#[test]
fn g7_malformed_startup_messages_are_refused() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let version = 0x0003_0000_u32.to_be_bytes();
    let with_version = |rest: &[u8]| packet(&[&version, rest].concat());
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("without a user", startup(&[])),
        ("an empty user", startup(&[("user", "")])),
        ("no end of the list", with_version(b"user\0main_db\0")),
        ("a key without a value", with_version(b"user\0main_db\0database\0\0\0")),
        ("no zero at all", with_version(b"user")),
        ("bytes after the end", with_version(b"user\0main_db\0\0user\0other\0\0")),
        ("a user twice", startup(&[("user", "main_db"), ("user", "other")])),
        ("not UTF-8", with_version(b"user\0\xff\xfe\0\0")),
        ("line breaks", startup(&[("user", "main_db\r\nFORGED=1")])),
        ("a long name", startup(&[("user", &"x".repeat(9_000))])),
        ("protocol 2.0", packet(&[0, 2, 0, 0])),
        ("protocol 4.0", packet(&[0, 4, 0, 0, 0])),
        ("HTTP", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("TLS without a request", b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03".to_vec()),
        ("a cancel of nothing", cancel_request(&[0; 8])),
        ("a cancel without a key", cancel_request(&[])),
        ("a cancel with a long key", cancel_request(&[7; 300])),
    ];
    thread::scope(|scope| {
        for (name, bytes) in &cases {
            let broker = &broker;
            scope.spawn(move || {
                let (took, error) = offend(broker, bytes);
                assert!(took < STARTUP + SLACK, "{name} took {took:?}");
                if let Some(error) = error {
                    assert!(
                        ["08P01", "28000", "0A000"].contains(&error.sqlstate()),
                        "{name}: {error}"
                    );
                    assert!(!error.to_string().contains("FORGED"), "{name}: {error}");
                }
            });
        }
    });
    assert!(!broker.log().contains("panicked"), "{}", broker.log());
    assert_still_serving(&broker);
    // Its grant was written after every refusal.
    assert!(broker.audit().records().iter().all(|record| !record.line().contains("FORGED")));
    broker.audit().assert_chained();
}

#[test]
fn encryption_is_declined_and_the_login_goes_on() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let client = Identity::client();
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    let mut frontend = broker.knock(&client);
    for request in [gssenc_request(), ssl_request()] {
        frontend.send(&request).expect("the door reads");
        assert_eq!(frontend.receive_byte().expect("an answer"), b'N');
    }
    let mut session = frontend.login("main_db", None, &token).expect("a session");
    session.query("SELECT 1").expect("a query");
}

#[test]
fn newer_protocol_versions_are_negotiated_down() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let client = Identity::client();
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    let mut frontend = broker.knock(&client);
    // Protocol grease: 3.9999 and an option that nobody knows.
    let mut body = ((3_u32 << 16) + 9999).to_be_bytes().to_vec();
    body.extend_from_slice(b"user\0main_db\0_pq_.test_protocol_negotiation\0\0\0");
    frontend.send(&packet(&body)).expect("the door reads");
    let first = frontend.receive().expect("an answer").expect("an answer");
    assert_eq!(first.tag, b'v', "NegotiateProtocolVersion comes first: {first:?}");
    assert_eq!(first.body[..8], [0, 3, 0, 2, 0, 0, 0, 1], "3.2, and one option that means nothing");
    let mut session = frontend.authenticate(&token).expect("a session");
    session.query("SELECT 1").expect("a query");
}

#[test]
fn g7_stalling_clients_are_dropped_and_do_not_stand_in_the_way() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let whole = startup(&[("user", "main_db")]);
    let started = Instant::now();
    let mut stalled: Vec<Frontend> = (0..3).map(|_| broker.knock(&Identity::attacker())).collect();
    // Nothing; half a length; half a message.
    stalled[1].send(&whole[..2]).expect("the door reads");
    stalled[2].send(&whole[..12]).expect("the door reads");
    assert_still_serving(&broker);
    for frontend in &mut stalled {
        frontend.receive_rest().expect("the door hangs up");
    }
    assert!(started.elapsed() < STARTUP + SLACK, "{:?}", started.elapsed());
}

#[test]
fn g7_a_client_that_drips_bytes_does_not_reset_the_clock() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let started = Instant::now();
    let frontend = broker.knock(&Identity::attacker());
    let mut stream = frontend.stream();
    let dripped = startup(&[("user", &"x".repeat(400))]);
    for byte in dripped {
        if stream.write_all(&[byte]).is_err() {
            break;
        }
        thread::sleep(Duration::from_millis(50));
    }
    assert!(started.elapsed() < STARTUP + SLACK, "{:?}", started.elapsed());
}

#[test]
fn g7_a_flood_of_connections_leaves_the_broker_serving() {
    const FLOOD: usize = 3_000;
    let wanted = Rlimit { current: Some(8_192), maximum: getrlimit(Resource::Nofile).maximum };
    if getrlimit(Resource::Nofile).current < wanted.current {
        setrlimit(Resource::Nofile, wanted).expect("room for the flood's descriptors");
    }
    let database = Server::shared().database();
    let broker = Broker::usual_setup(&database, Via::Tls).start();
    let before = resident_kb(&broker);
    let attacker = Identity::attacker();
    let door = broker.door();
    // Held open, all at once, by a uid that has no grant.
    let flood = attacker.act(|| {
        (0..FLOOD).filter_map(|_| std::os::unix::net::UnixStream::connect(&door).ok()).count()
    });
    assert!(flood.expect("the thread runs") > FLOOD / 2);
    let held = attacker
        .act(|| {
            let connect = |_| std::os::unix::net::UnixStream::connect(&door).ok();
            (0..FLOOD).filter_map(connect).collect::<Vec<_>>()
        })
        .expect("the thread runs");
    credbroker_e2e::assert_eventually!(
        within STARTUP * 3,
        broker
            .login(&Identity::client(), "main_db", "cbh_nothing")
            .is_err_and(|error| matches!(error, credbroker_e2e::frontend::LoginError::Refused(_))),
        "the door does not answer"
    );
    assert_still_serving(&broker);
    assert!(resident_kb(&broker) < before + GROWTH_KB, "{before} kB before");
    drop(held);
    assert_still_serving(&broker);
}
