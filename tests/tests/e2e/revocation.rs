//! Revoked means dead now: in the client, in the broker, in the database.

use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use credbroker_e2e::broker::{Broker, Grant, Setup, Via};
use credbroker_e2e::canary::Canary;
use credbroker_e2e::crowd::Crowd;
use credbroker_e2e::frontend::{Frontend, Message, Session, startup};
use credbroker_e2e::handles::Handles;
use credbroker_e2e::identity::{Identity, several_or_say, take_descriptor};
use credbroker_e2e::packet::{Packets, memfd};
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::process::Process;
use credbroker_e2e::proxy::{LoginProxy, Step};
use credbroker_e2e::wait::{PATIENCE, holds_for};
use credbroker_e2e::{assert_eventually, binaries};
use credbroker_proto::v1::{Bind, IssueHandleRequest, PutRequest};
use rustix::process::Signal;

/// The server has stopped within this time of a cut.
const STOPPED: Duration = Duration::from_secs(1);
/// What a loaded machine may add to any promise about time.
const SLACK: Duration = Duration::from_secs(2);

/// A session in which the database sleeps for five minutes.
fn sleeper(broker: &Broker, database: &Database, token: &str) -> Session {
    let mut session = broker.session(&Identity::client(), "main_db", token);
    session.start_query("SELECT pg_sleep(300)");
    assert_eventually!(database.running("pg_sleep") == 1, "the query does not run");
    session
}

/// Asserts that a session is cut, and its query gone from the database.
fn assert_cut(mut session: Session, database: &Database) {
    let started = Instant::now();
    match session.finish_query() {
        None => {}
        Some(Err(error)) => assert_eq!(error.sqlstate(), "57P01", "{error}"),
        Some(Ok(rows)) => panic!("the query ended by itself: {rows:?}"),
    }
    assert!(started.elapsed() < SLACK, "cut after {:?}", started.elapsed());
    assert_eventually!(within STOPPED + SLACK, database.backends() == 0, "the backend lives on");
}

#[test]
fn a_revoke_cuts_a_running_query_and_ends_it_in_the_database() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let service = broker.handles(&Identity::client());
    let issued = service.issue("main_db").expect("a grant");
    let session = sleeper(&broker, &database, &issued.token);
    assert_eq!(service.revoke(&issued.token), Ok(1));
    assert_cut(session, &database);

    let again = broker.login(&Identity::client(), "main_db", &issued.token);
    assert_eq!(again.expect_err("revoked").refusal().sqlstate(), "28P01");
    assert_eventually!(
        broker.audit().of("session.closed").len() == 1,
        "the end of the session is recorded"
    );
    let audit = broker.audit();
    assert_eventually!(audit.of("handle.revoked").len() == 1, "the revoke is recorded");
    let handle = Some(issued.handle.id.as_str());
    assert_eq!(audit.of("handle.revoked")[0].text("handle"), handle);
    audit.assert_chained();
}

#[test]
fn g5_what_was_pipelined_does_not_run_after_a_revoke() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let service = broker.handles(&Identity::client());
    let issued = service.issue("main_db").expect("a grant");
    let mut session = broker.session(&Identity::client(), "main_db", &issued.token);
    session.query("CREATE TABLE marks (n int)").expect("the role may create tables");
    // The server has both statements; a cancellation of the first would let the second begin.
    session.start_query(
        "DO $$ BEGIN PERFORM pg_sleep(300); EXCEPTION WHEN query_canceled THEN NULL; END $$",
    );
    session.start_query("INSERT INTO marks VALUES (1)");
    assert_eventually!(database.running("pg_sleep") == 1, "the block does not run");

    assert_eq!(service.revoke(&issued.token), Ok(1));
    assert_cut(session, &database);
    let marks: i64 =
        database.admin().query_one("SELECT count(*) FROM marks", &[]).expect("the table").get(0);
    assert_eq!(marks, 0, "a statement ran after the revoke");
}

#[test]
fn g5_a_role_cannot_keep_its_backend_with_settings_of_its_own() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let service = broker.handles(&Identity::client());
    let issued = service.issue("main_db").expect("a grant");
    let mut session = broker.session(&Identity::client(), "main_db", &issued.token);
    for statement in [
        "CREATE SCHEMA evil",
        "CREATE FUNCTION evil.never(int, int) RETURNS bool LANGUAGE sql AS 'SELECT false'",
        "CREATE OPERATOR evil.= (LEFTARG = int, RIGHTARG = int, FUNCTION = evil.never)",
        "ALTER ROLE CURRENT_USER SET search_path = evil, pg_catalog",
        "ALTER ROLE CURRENT_USER SET statement_timeout = '1ms'",
    ] {
        session.query(statement).expect(statement);
    }
    session.start_query(
        "DO $$ BEGIN LOOP BEGIN PERFORM pg_sleep(300); \
         EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP; END $$",
    );
    assert_eventually!(database.running("pg_sleep") == 1, "the block does not run");

    assert_eq!(service.revoke(&issued.token), Ok(1));
    assert_cut(session, &database);
    let audit = broker.audit();
    assert_eventually!(audit.of("session.closed").len() == 1, "the end is recorded");
    assert!(
        audit.of("session.closed").iter().all(|record| record.text("reason") == Some("revoked"))
    );
}

#[test]
fn expiry_cuts_a_running_query_and_ends_it_in_the_database() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let service = broker.handles(&Identity::client());
    let issued = service.issue_for("main_db", Duration::from_secs(2)).expect("a grant");
    let mut session = sleeper(&broker, &database, &issued.token);
    let ended = session.finish_query();
    assert!(!matches!(ended, Some(Ok(_))), "{ended:?}");
    assert_eventually!(within STOPPED + SLACK, database.backends() == 0, "the backend lives on");
    assert_eventually!(broker.audit().of("handle.expired").len() == 1, "expiry is recorded");
    let late = broker.login(&Identity::client(), "main_db", &issued.token);
    assert_eq!(late.expect_err("expired").refusal().sqlstate(), "28P01");
}

#[test]
fn a_session_that_has_become_too_old_is_cut_and_the_handle_lives_on() {
    let database = Server::shared().database();
    let broker = Broker::usual_setup(&database, Via::Tls)
        .set("connections.main_db.max_session_age", "2s")
        .start();
    let token = broker.handles(&Identity::client()).issue("main_db").expect("a grant").token;
    let mut session = sleeper(&broker, &database, &token);
    let told = session.finish_query();
    assert!(!matches!(told, Some(Ok(_))), "{told:?}");
    assert_eventually!(within STOPPED + SLACK, database.backends() == 0, "the backend lives on");
    assert_recorded(&broker, "aged", 1);
    let mut session = broker.session(&Identity::client(), "main_db", &token);
    session.query("SELECT 1").expect("a new one");
}

#[test]
fn a_renewed_handle_lives_on() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let service = broker.handles(&Identity::client());
    let issued = service.issue_for("main_db", Duration::from_secs(3)).expect("a grant");
    let mut session = broker.session(&Identity::client(), "main_db", &issued.token);
    for _second in 0..4 {
        service.renew(&issued.token).expect("the holder renews");
        session.query("SELECT pg_sleep(1)").expect("the session lives");
    }
}

#[test]
fn others_cannot_revoke_and_an_operator_can() {
    if !several_or_say("an operator and a stranger are other uids") {
        return;
    }
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let issued = broker.handles(&Identity::client()).issue("main_db").expect("a grant");
    let session = sleeper(&broker, &database, &issued.token);

    let stranger = broker.handles(&Identity::attacker());
    let refused = stranger.revoke_id(&issued.handle.id).expect_err("not his handle");
    let unknown = stranger.revoke_id("hdl_aaaaaaaaaaaaaaaa").expect_err("no such handle");
    assert_eq!(refused.without_reference(), unknown.without_reference());
    assert_eq!(database.running("pg_sleep"), 1);

    let operator = broker.handles(&Identity::own());
    assert_eq!(operator.revoke_id(&issued.handle.id), Ok(1));
    assert_cut(session, &database);
}

/// Starts a login and reads everything that comes, to its end.
fn login_to_the_end(broker: &Broker, token: &str) -> Vec<Message> {
    let mut frontend = broker.knock(&Identity::client());
    frontend.send(&startup(&[("user", "main_db")])).expect("the door reads");
    let mut messages = Vec::new();
    while let Ok(Some(message)) = frontend.receive() {
        if message.tag == b'R' && message.body == [0, 0, 0, 3] {
            let password = [token.as_bytes(), b"\0"].concat();
            frontend.send_message(b'p', &password).expect("the door reads");
        }
        messages.push(message);
    }
    messages
}

/// Lets `cut` land at each step of a login, and asserts that neither client nor server has a
/// session then. `mend` undoes what stands in the way of the next login.
#[allow(clippy::print_stdout, reason = "a proof prints its number")]
fn assert_none_left(
    broker: &Broker,
    proxy: &LoginProxy,
    database: &Database,
    name: &str,
    cut: impl Fn(&str),
    mend: impl Fn(),
) {
    let service = broker.handles(&Identity::client());
    for step in Step::ALL {
        let token = service.issue("main_db").expect("a grant").token;
        proxy.hold_at(step);
        let messages = thread::scope(|scope| {
            let login = scope.spawn(|| login_to_the_end(broker, &token));
            proxy.wait_until_held(PATIENCE);
            let started = Instant::now();
            cut(&token);
            let took = started.elapsed();
            assert!(took < STOPPED + SLACK, "{name} at {step:?}: {took:?}");
            proxy.release();
            login.join().expect("the login ends")
        });
        let let_in = Message { tag: b'R', body: vec![0, 0, 0, 0] };
        assert!(!messages.contains(&let_in), "{name} at {step:?}: let in: {messages:?}");
        assert_eventually!(
            within STOPPED + SLACK,
            database.backends() == 0,
            "{name} at {step:?}: a backend was left"
        );
        mend();
    }
    let opened = broker.audit().of("session.opened").len();
    assert_eventually!(
        broker.audit().of("session.closed").len() == opened,
        "{name}: each session that was recorded as opened is recorded as closed"
    );
    broker.audit().assert_chained();

    // The broker is none the worse for it.
    let token = service.issue("main_db").expect("a grant").token;
    let mut session = broker.session(&Identity::client(), "main_db", &token);
    session.query("SELECT 1").expect("a query");
    println!("{name}: no session left after a cut at each of {} steps", Step::ALL.len());
}

#[test]
fn g5_a_revoke_that_lands_during_login_leaves_no_session() {
    let database = Server::shared().database();
    let proxy = LoginProxy::start(database.server());
    let broker = Broker::usual_setup(&database, Via::Plain(proxy.port())).start();
    let service = broker.handles(&Identity::client());
    let revoke = |token: &str| {
        service.revoke(token).expect("the holder revokes");
    };
    assert_none_left(&broker, &proxy, &database, "revoke", revoke, || {});
}

#[test]
fn g5_a_suspension_that_lands_during_login_leaves_no_session() {
    let database = Server::shared().database();
    let proxy = LoginProxy::start(database.server());
    let broker = Broker::usual_setup(&database, Via::Plain(proxy.port())).start();
    let admin = broker.operator();
    let suspend = |_token: &str| drop(admin.suspend(Some("main_db")).expect("an operator"));
    let resume = || drop(admin.resume(Some("main_db")).expect("an operator"));
    assert_none_left(&broker, &proxy, &database, "suspend", suspend, resume);
}

#[test]
fn g5_a_reload_that_lands_during_login_leaves_no_session() {
    let database = Server::shared().database();
    let proxy = LoginProxy::start(database.server());
    let broker = Broker::usual_setup(&database, Via::Plain(proxy.port())).start();
    let (admin, setup) = (broker.operator(), broker.setup());
    let reload = |_token: &str| {
        setup.without_grants();
        admin.reload().expect("an operator");
    };
    let mend = || {
        let _path = setup.write();
        admin.reload().expect("an operator");
    };
    assert_none_left(&broker, &proxy, &database, "reload", reload, mend);
}

#[test]
fn g5_a_rotation_that_lands_during_login_leaves_no_session() {
    let database = Server::shared().database();
    let proxy = LoginProxy::start(database.server());
    let broker = Setup::new()
        .bare_connection("main_db", &database)
        .set("connections.main_db.host", "127.0.0.1")
        .set("connections.main_db.port", i64::from(proxy.port()))
        .set("connections.main_db.tls", toml::Table::from_iter([("mode".into(), "disable".into())]))
        .set("connections.main_db.secret.store", true)
        .set("connections.main_db.rotation_grace", "0s")
        .grant(Grant::to(&Identity::client(), &["issue", "open"], &["main_db"]))
        .start();
    let operator = Packets::connect(&Identity::own(), &broker.admin_packet_socket());
    let operator = operator.expect("root may connect");
    let put = || {
        let request = PutRequest { connection: "main_db".into(), ..Default::default() };
        let secret = memfd(database.secret().as_bytes());
        operator.put(request, &[secret.as_fd()]).expect("an operator");
    };
    put();
    assert_none_left(&broker, &proxy, &database, "rotation", |_token| put(), || {});
}

#[test]
fn an_expiry_that_lands_during_login_leaves_no_session() {
    let database = Server::shared().database();
    let proxy = LoginProxy::start(database.server());
    let broker = Broker::usual_setup(&database, Via::Plain(proxy.port())).start();
    let service = broker.handles(&Identity::client());
    let issued = service.issue_for("main_db", Duration::from_secs(1)).expect("a grant");
    proxy.hold_at(Step::ReadyForQuery);
    let messages = thread::scope(|scope| {
        let login = scope.spawn(|| login_to_the_end(&broker, &issued.token));
        proxy.wait_until_held(PATIENCE);
        assert_eventually!(broker.audit().of("handle.expired").len() == 1, "it expires");
        proxy.release();
        login.join().expect("the login ends")
    });
    assert!(messages.iter().all(|message| message.body != [0, 0, 0, 0]), "{messages:?}");
    assert_eventually!(database.backends() == 0, "a backend was left");
}

#[test]
fn a_client_that_dies_takes_its_query_with_it() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let client = Identity::client();
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    let mut psql = broker.psql(&client, "main_db", &token);
    psql.args(["-c", "SELECT pg_sleep(300)"]);
    let mut psql = Process::start("psql", &mut psql, &broker.setup().path("logs"));
    assert_eventually!(database.running("pg_sleep") == 1, "{}", psql.stderr());
    psql.signal(Signal::KILL);
    let _status = psql.wait(PATIENCE);
    assert_eventually!(within STOPPED + SLACK, database.backends() == 0, "the query lives on");
}

#[test]
fn a_lifetime_handle_dies_with_its_holder() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let client = Identity::client();
    let mut exec = broker.cli(&client);
    exec.args(["exec", "main_db", "--", "psql", "-X", "-c", "SELECT pg_sleep(300)"]);
    let mut exec = Process::start("exec", &mut exec, &broker.setup().path("logs"));
    assert_eventually!(database.running("pg_sleep") == 1, "{}", exec.stderr());
    // It cannot revoke anything any more; the broker sees its end through the pidfd.
    exec.signal(Signal::KILL);
    let _status = exec.wait(PATIENCE);
    assert_eventually!(within STOPPED + SLACK, database.backends() == 0, "the query lives on");
    assert_eventually!(
        broker.handles(&client).list().is_ok_and(|handles| handles.is_empty()),
        "the handle lives on"
    );
}

#[test]
fn the_death_of_the_broker_ends_its_sessions() {
    let database = Server::shared().database();
    let mut broker = Broker::usual(&database);
    let token = broker.handles(&Identity::client()).issue("main_db").expect("a grant").token;
    let mut session = broker.session(&Identity::client(), "main_db", &token);
    session.query("SELECT 1").expect("a query");
    let _status = broker.end_with(Signal::KILL);
    assert!(session.finish_query().is_none(), "the socket is closed");
    assert_eventually!(database.backends() == 0, "the backend lives on");
}

#[test]
fn a_session_that_nobody_cuts_lives_on() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let service = broker.handles(&Identity::client());
    let kept = service.issue("main_db").expect("a grant").token;
    let revoked = service.issue("main_db").expect("a grant").token;
    let mut session = broker.session(&Identity::client(), "main_db", &kept);
    service.revoke(&revoked).expect("the holder revokes");
    assert!(holds_for(Duration::from_millis(200), || database.backends() == 1));
    session.query("SELECT 1").expect("only the other handle was revoked");
}

/// How many sessions the smaller crowds have.
const SOME: usize = 50;

/// A setup whose limits a crowd does not meet, without a connection.
fn for_a_crowd() -> Setup {
    let client = Identity::client();
    Setup::new()
        .set("limits.rate_per_second", 100_000)
        .grant(Grant::to(&client, &["issue", "open"], &["main_db"]).with("max_sessions", 1200))
}

/// Makes the table of marks, and shows that a statement behind a sleep marks it if nobody cuts.
fn make_marks(broker: &Broker, token: &str) {
    let mut session = broker.session(&Identity::client(), "main_db", token);
    session.query("CREATE TABLE marks (n int)").expect("the role may create tables");
    session.start_query("SELECT pg_sleep(0)");
    session.start_query("INSERT INTO marks VALUES (0)");
    assert!(matches!(session.finish_query(), Some(Ok(_))), "the sleep");
    assert!(matches!(session.finish_query(), Some(Ok(_))), "the pipelined statement");
    let marks = session.query("SELECT count(*) FROM marks").expect("the table");
    assert_eq!(marks, [["1"]], "what is pipelined runs when nobody cuts");
}

/// A crowd under a handle of its own, and the handle's token.
fn crowd(broker: &Broker, database: &Database, size: usize) -> (Crowd, String) {
    let token = broker.handles(&Identity::client()).issue("main_db").expect("a grant").token;
    let login = || broker.session(&Identity::client(), "main_db", &token);
    (Crowd::gather(database, size, login), token)
}

/// Asserts that as many sessions as are in a crowd were recorded as closed for this reason.
fn assert_recorded(broker: &Broker, reason: &str, size: usize) {
    let closed = || {
        let closed = broker.audit().of("session.closed");
        closed.iter().filter(|record| record.text("reason") == Some(reason)).count()
    };
    assert_eventually!(closed() == size, "{} of {size} closed as {reason}", closed());
}

#[test]
fn g5_a_thousand_sessions_die_at_once() {
    const MANY: usize = 1000;
    let database = Server::shared().database();
    let broker = for_a_crowd().connection("main_db", &database, Via::Tls).start();
    let service = broker.handles(&Identity::client());
    make_marks(&broker, &service.issue("main_db").expect("a grant").token);
    let started = Instant::now();
    let (crowd, token) = crowd(&broker, &database, MANY);
    let gathered = started.elapsed();
    let deaths = crowd.see_die(&database, true, || {
        assert_eq!(service.revoke(&token).map(|cut| cut as usize), Ok(MANY));
    });
    println!("revoke: {deaths} (logged in within {gathered:.1?})");
    assert_recorded(&broker, "revoked", MANY);
    broker.audit().assert_chained();
}

#[test]
fn g5_every_end_of_a_right_ends_its_sessions_at_once() {
    let database = Server::shared().database();
    let broker = for_a_crowd().connection("main_db", &database, Via::Tls).start();
    let (service, admin) = (broker.handles(&Identity::client()), broker.operator());
    make_marks(&broker, &service.issue("main_db").expect("a grant").token);

    let (sleepers, token) = crowd(&broker, &database, SOME);
    service.renew_for(&token, Duration::from_secs(1)).expect("the holder moves the end");
    let expires = service.describe(&token).expect("its own").expires.expect("a time");
    let expires = SystemTime::try_from(expires).expect("a time");
    let deaths = sleepers.see_die(&database, false, || {});
    let left = expires.duration_since(SystemTime::now()).unwrap_or_default();
    println!("expiry, from about a second before it (early by {left:?}): {deaths}");
    assert_recorded(&broker, "expired", SOME);

    let (sleepers, _token) = crowd(&broker, &database, SOME);
    let deaths = sleepers.see_die(&database, true, || {
        let suspended = admin.suspend(Some("main_db")).expect("an operator");
        assert_eq!(suspended.sessions_cut as usize, SOME);
    });
    println!("suspend: {deaths}");
    assert_recorded(&broker, "suspended", SOME);
    admin.resume(Some("main_db")).expect("an operator");

    let (sleepers, _token) = crowd(&broker, &database, SOME);
    let deaths = sleepers.see_die(&database, true, || {
        let revoked = admin.revoke_all("main_db").expect("an operator");
        assert_eq!(revoked.sessions_cut as usize, SOME);
    });
    println!("an operator's RevokeHandles: {deaths}");
    assert_recorded(&broker, "revoked", SOME);

    let (sleepers, _token) = crowd(&broker, &database, SOME);
    let sessions = admin.sessions_of("main_db").expect("an operator");
    assert_eq!(sessions.len(), SOME);
    let deaths = sleepers.see_die(&database, true, || {
        sessions.iter().for_each(|session| admin.close_session(&session.id).expect("an operator"));
    });
    println!("an operator's CloseSession, one by one: {deaths}");
    assert_recorded(&broker, "closed", SOME);

    let (sleepers, _token) = crowd(&broker, &database, SOME);
    broker.setup().without_grants();
    let deaths = sleepers.see_die(&database, false, || broker.signal(Signal::HUP));
    println!("SIGHUP, and no grant any more: {deaths}");
    assert_recorded(&broker, "reloaded", SOME);
    let _path = broker.setup().write();
    admin.reload().expect("the grants are back");

    broker.audit().assert_chained();
}

#[test]
fn g5_the_exit_of_a_bound_process_ends_its_sessions_at_once() {
    let database = Server::shared().database();
    let broker = for_a_crowd().connection("main_db", &database, Via::Tls).start();
    let service = broker.handles(&Identity::client());
    make_marks(&broker, &service.issue("main_db").expect("a grant").token);

    // It connects, we speak: to the broker all of it is that process.
    let (near, far) = UnixStream::pair().expect("a pair");
    let mut lend = Identity::client().command(binaries::helper());
    lend.arg("lend").arg(broker.socket()).args(vec![broker.door(); SOME]);
    let child = lend.stdin(Stdio::from(OwnedFd::from(far))).spawn().expect("the lender runs");
    let mut holder = Process::adopt("holder", child, &broker.setup().path("logs"));
    let bound = UnixStream::from(take_descriptor(&near).expect("a connection to broker.sock"));
    let doors: Vec<OwnedFd> =
        (0..SOME).map(|_| take_descriptor(&near).expect("a connection to the door")).collect();
    drop(lend);
    let request = IssueHandleRequest {
        connection: "main_db".into(),
        bind: Bind::Process.into(),
        ..Default::default()
    };
    let bound = Handles::over(bound).expect("a connection");
    let token = bound.issue_with(request).expect("a grant").token;
    let doors = Mutex::new(doors);
    let crowd = Crowd::gather(&database, SOME, || {
        let door = doors.lock().expect("no panic").pop().expect("one for each");
        let frontend = Frontend::over(UnixStream::from(door)).expect("a socket");
        frontend.login("main_db", None, &token).expect("the process that it is bound to")
    });
    let deaths = crowd.see_die(&database, false, || holder.signal(Signal::KILL));
    println!("exit of the process that the handle is bound to: {deaths}");
    assert_recorded(&broker, "holder_exited", SOME);
    let _status = holder.wait(PATIENCE);
}

#[test]
fn g5_a_rotation_without_grace_ends_sessions_at_once() {
    let database = Server::shared().database();
    let broker = for_a_crowd()
        .connection("main_db", &database, Via::Tls)
        .set("connections.main_db.rotation_grace", "0s")
        .start();
    let service = broker.handles(&Identity::client());
    make_marks(&broker, &service.issue("main_db").expect("a grant").token);
    let (sleepers, token) = crowd(&broker, &database, SOME);
    // A newer file, renamed over the old one as a rotator does it. The old password is worth
    // nothing any more, to the broker neither.
    let password = Canary::random();
    let text = format!("{}:{}", database.name(), password.reveal());
    let next = broker.setup().broker_file("etc/next", &text);
    let secret = broker.setup().path("etc/main_db.secret");
    let deaths = sleepers.see_die(&database, false, || {
        database.set_server_password(&password);
        fs::rename(&next, &secret).expect("renamed");
    });
    println!("rotation without grace, from the rename of the file: {deaths}");
    assert_recorded(&broker, "rotated", SOME);
    let mut session = broker.session(&Identity::client(), "main_db", &token);
    session.query("SELECT 1").expect("the handle lives on, with the new version");
}

#[test]
fn g5_the_end_of_the_broker_ends_sessions_at_once() {
    let database = Server::shared().database();
    let broker =
        for_a_crowd().connection("main_db", &database, Via::Tls).set("broker.drain", "1s").start();
    let service = broker.handles(&Identity::client());
    make_marks(&broker, &service.issue("main_db").expect("a grant").token);
    let (sleepers, _token) = crowd(&broker, &database, SOME);
    let deaths = sleepers.see_die(&database, false, || broker.signal(Signal::TERM));
    println!("SIGTERM, with a second to drain: {deaths}");
    assert_recorded(&broker, "draining", SOME);
}
