//! What bounds a socket that is handed over: the handle's time and uses, the credential's version,
//! the session's age, and who it is that takes it.

use std::cell::Cell;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd as _;

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::{Broker, Grant, Setup};
use credbroker_e2e::frontend::Session;
use credbroker_e2e::identity::{Identity, several_or_say};
use credbroker_e2e::packet::{Packets, memfd, reason};
use credbroker_e2e::postgres::Server;
use credbroker_e2e::proxy::LoginProxy;
use credbroker_proto::v1::{IssueHandleRequest, PutRequest, Reason};

use super::{MAY, assert_none_left, ended, granted, plain, take, unix};

/// How many spares the broker says it keeps.
fn warm_spares(broker: &Broker) -> usize {
    let log = broker.log();
    let (_, rest) = log.split_once("metrics at http://").expect("the broker says where");
    let address = rest.split('/').next().expect("an address");
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").expect("a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let gauge = "credbroker_warm_spares{connection=\"main_db\"} ";
    let (_, count) = answer.split_once(gauge).expect("the gauge is there");
    count.lines().next().and_then(|count| count.parse().ok()).expect("a number")
}

#[test]
fn g5_handed_off_an_expiry_during_login_leaves_no_session() {
    let database = Server::shared().database();
    let proxy = LoginProxy::start(database.server());
    let setup = plain(&database, &proxy).set("handles.default_ttl", "2s");
    let broker = granted(setup, &Identity::client(), &MAY).start();
    let expired = || broker.audit().of("handle.expired").len();
    let before = Cell::new(0);
    let expire = |_token: &str| {
        assert_eventually!(expired() > before.get(), "it does not expire");
        before.set(expired());
    };
    assert_none_left(&broker, &proxy, &database, expire, || {});
}

#[test]
fn g5_handed_off_a_rotation_during_login_leaves_no_session() {
    let database = Server::shared().database();
    let proxy = LoginProxy::start(database.server());
    let disable = toml::Table::from_iter([("mode".into(), "disable".into())]);
    let setup = Setup::new()
        .stored_connection("main_db", &database)
        .set("connections.main_db.host", "127.0.0.1")
        .set("connections.main_db.port", i64::from(proxy.port()))
        .set("connections.main_db.tls", disable);
    let broker = granted(setup, &Identity::client(), &MAY).start();
    let operator = Packets::connect(&Identity::own(), &broker.admin_packet_socket());
    let operator = operator.expect("root may connect");
    let put = || {
        let request = PutRequest { connection: "main_db".into(), ..Default::default() };
        let secret = memfd(database.secret().as_bytes());
        operator.put(request, &[secret.as_fd()]).expect("an operator");
    };
    put();
    assert_none_left(&broker, &proxy, &database, |_token| put(), || {});
}

#[test]
fn a_socket_that_was_handed_over_too_long_ago_is_shut_down() {
    let database = Server::shared().database();
    let client = Identity::client();
    let setup = unix(&database).set("connections.main_db.max_session_age", "2s");
    let broker = granted(setup, &client, &MAY).start();
    let packets = broker.packets(&client);
    let token = packets.issue("main_db").expect("a grant").token;
    let mut session = take(&packets, &token);
    session.start_query("SELECT pg_sleep(300)");
    assert_eventually!(database.running("pg_sleep") == 1, "the query does not run");
    let session = [session];
    assert_eventually!(ended(&session) == 1, "the socket lives on");
    assert_eventually!(database.backends() == 0, "the backend lives on");
    let closed = || broker.audit().of("session.closed");
    assert_eventually!(closed().len() == 1, "its end is recorded");
    assert_eq!(closed()[0].text("reason"), Some("aged"));
    take(&packets, &token).query("SELECT 1").expect("the handle lives on");
}

#[test]
fn a_redeemer_takes_the_socket_if_it_may_take_sockets() {
    if !several_or_say("holder and redeemers are three uids") {
        return;
    }
    let database = Server::shared().database();
    let (holder, taker) = (Identity::numbered(64_130), Identity::numbered(64_131));
    let other = Identity::numbered(64_132);
    let uid = |identity: &Identity| {
        toml::Value::from(toml::Table::from_iter([(
            "uid".into(),
            i64::from(identity.uid()).into(),
        )]))
    };
    let redeemers = toml::Value::Array(vec![uid(&taker), uid(&other)]);
    let setup = unix(&database)
        .grant(Grant::to(&holder, &["issue", "open"], &["main_db"]).with("redeemers", redeemers))
        .grant(Grant::to(&taker, &["handoff"], &["main_db"]));
    let broker = setup.start();
    let service = broker.handles(&holder);
    let issue = |redeemer: &Identity| {
        let redeemer = Some(redeemer.uid());
        let connection = "main_db".into();
        let request = IssueHandleRequest { connection, redeemer, ..Default::default() };
        service.issue_with(request).expect("a redeemer that may be named").token
    };
    let (for_taker, for_other) = (issue(&taker), issue(&other));
    let mut session = take(&broker.packets(&taker), &for_taker);
    session.query("SELECT 1").expect("a session");
    let opened = &broker.audit().of("session.opened")[0];
    assert_eq!(opened.number("peer.uid"), Some(taker.uid().into()), "{}", opened.line());
    for (who, token, expected) in [
        (&other, &for_other, Reason::AccessDenied),
        (&other, &for_taker, Reason::HandleInvalid),
        (&holder, &for_taker, Reason::HandleInvalid),
    ] {
        let refused = broker.packets(who).open(token).expect_err("not for it");
        assert_eq!(reason(&refused), expected, "uid {}: {refused:?}", who.uid());
    }
    assert_eq!(service.revoke(&for_taker), Ok(1), "by the holder");
    assert_eq!(ended(&[session]), 1);
    assert_eventually!(database.backends() == 0, "the backend lives on");
}

#[test]
fn a_link_that_waited_is_handed_over() {
    let database = Server::shared().database();
    let proxy = LoginProxy::start(database.server());
    let client = Identity::client();
    let warm = |setup: Setup| {
        setup.set("connections.main_db.warm", 1_i64).set("metrics.listen", "127.0.0.1:0")
    };
    for setup in [unix(&database), plain(&database, &proxy)] {
        let broker = granted(warm(setup), &client, &MAY).start();
        let packets = broker.packets(&client);
        let token = packets.issue("main_db").expect("a grant").token;
        let pid = |session: &mut Session| {
            let rows = session.query("SELECT pg_backend_pid()").expect("a row");
            rows[0][0].parse::<i32>().expect("a number")
        };
        let mut first = take(&packets, &token);
        let own = pid(&mut first);
        let waiting = || -> Vec<i32> {
            let query = "SELECT pid FROM pg_stat_activity WHERE usename = $1 AND pid <> $2";
            let rows = database.admin().query(query, &[&database.name(), &own]);
            rows.expect("pg_stat_activity").iter().map(|row| row.get(0)).collect()
        };
        assert_eventually!(broker.audit().of("upstream.dialled").len() == 1, "none is dialled");
        assert_eventually!(waiting().len() == 1, "none waits");
        let spare = waiting();
        // The server has it a moment before the broker is done with it.
        assert_eventually!(warm_spares(&broker) == 1, "none is kept");
        let mut second = take(&packets, &token);
        assert_eq!([pid(&mut second)], spare[..]);
        for session in [first, second] {
            session.frontend.stream().shutdown(Shutdown::Both).expect("it is open");
        }
        drop(broker);
        assert_eventually!(database.backends() == 0, "a backend was left");
    }
}

#[test]
fn a_socket_that_turns_out_not_to_be_handed_over_costs_no_use() {
    let database = Server::shared().database();
    let client = Identity::client();
    let broker = granted(unix(&database), &client, &MAY).start();
    let packets = broker.packets(&client);
    let connection = "main_db".into();
    let once = IssueHandleRequest { connection, max_uses: Some(1), ..Default::default() };
    let issue = || broker.handles(&client).issue_with(once.clone()).expect("a grant").token;
    let token = issue();
    take(&packets, &token).query("SELECT 1").expect("its one use");
    assert_eq!(reason(&packets.open(&token).expect_err("spent")), Reason::HandleInvalid);

    // Settings that no session can have: the server says so at length, each time.
    let nonsense = "n".repeat(25_000);
    let name = database.name();
    let mut admin = database.admin();
    for whose in [
        format!("ROLE {name}"),
        format!("DATABASE {name}"),
        format!("ROLE {name} IN DATABASE {name}"),
    ] {
        let set = format!("ALTER {whose} SET default_text_search_config = '{nonsense}'");
        admin.batch_execute(&set).expect("an administrator");
    }
    let token = issue();
    let refused = packets.open(&token).expect_err("it fits into no packet");
    assert_eq!(reason(&refused), Reason::HandoffUnsupported, "{refused:?}");
    assert!(refused.message.contains("says more"), "{refused:?}");
    let mut session = broker.session(&client, "main_db", &token);
    session.query("SELECT 1").expect("by the door instead, with the same use");
    let spent = broker.login(&client, "main_db", &token).expect_err("there was one");
    assert_eq!(spent.refusal().reason(), "HANDLE_INVALID");
}
