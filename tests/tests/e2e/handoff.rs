//! Authenticated sockets, handed over: who gets one, what it is good for, and when it is dead.

use std::time::{Duration, Instant};

use credbroker_client::{
    ClientBuilder, Error, IssueRequest, OpenRequest, PacketClient, Stream, Token,
};
use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::{Broker, Grant, Setup, Via};
use credbroker_e2e::crowd::Crowd;
use credbroker_e2e::frontend::{Session, cancel_request};
use credbroker_e2e::identity::{Identity, several_or_say};
use credbroker_e2e::packet::{Packets, open, reason};
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::proxy::{LoginProxy, Step};
use credbroker_e2e::wait::PATIENCE;
use credbroker_proto::v1::packet_request::Request;
use credbroker_proto::v1::{Reason, StartupParameter};
use futures_util::{SinkExt as _, StreamExt as _, TryStreamExt as _};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;
use tokio_postgres::config::SslMode;
use tokio_postgres::{AsyncMessage, Config, NoTls};

#[path = "handoff/bounds.rs"]
mod bounds;
#[path = "handoff/unread.rs"]
mod unread;

const MAY: [&str; 3] = ["issue", "open", "handoff"];

fn granted(setup: Setup, identity: &Identity, may: &[&str]) -> Setup {
    setup.grant(Grant::to(identity, may, &["main_db"]).with("name", "taker"))
}

/// A broker whose server is on a Unix socket.
fn unix(database: &Database) -> Setup {
    let dir = database.server().socket_dir.to_str().expect("ASCII").to_owned();
    Setup::new()
        .connection("main_db", database, Via::Plain(database.server().port))
        .set("connections.main_db.host", dir.as_str())
}

/// A broker whose server is a proxy on plain TCP.
fn plain(database: &Database, proxy: &LoginProxy) -> Setup {
    Setup::new().connection("main_db", database, Via::Plain(proxy.port()))
}

fn take(packets: &Packets, token: &str) -> Session {
    packets.open(token).expect("a grant").session()
}

#[test]
fn a_socket_that_was_handed_over_is_a_session_and_shutting_it_down_ends_it() {
    let database = Server::shared().database();
    let proxy = LoginProxy::start(database.server());
    for setup in [unix(&database), plain(&database, &proxy)] {
        let client = Identity::client();
        let broker = granted(setup, &client, &MAY).start();
        let packets = broker.packets(&client);
        let token = packets.issue("main_db").expect("a grant").token;
        let mut session = take(&packets, &token);
        assert_eq!(session.query("SELECT 6 * 7").expect("a row"), [["42"]]);
        let opened = &broker.audit().of("session.opened")[0];
        assert_eq!(opened.text("detail.mode"), Some("handoff"));
        // The real key of the server stays with the broker, whose own works at the door.
        session.start_query("SELECT pg_sleep(300)");
        assert_eventually!(database.running("pg_sleep") == 1, "the query does not run");
        let mut cancel = broker.knock(&client);
        cancel.send(&cancel_request(&session.cancel_key)).expect("the door reads");
        cancel.receive_rest().expect("it is answered by its end");
        let cancelled = session.finish_query().expect("an answer").expect_err("cancelled");
        assert_eq!(cancelled.sqlstate(), "57014");
        session.frontend.stream().shutdown(std::net::Shutdown::Both).expect("it is open");
        assert_eventually!(database.backends() == 0, "the backend lives on");
        assert_eventually!(broker.audit().of("session.closed").len() == 1, "it is recorded");
        broker.audit().assert_chained();
    }
}

#[test]
fn only_who_may_take_a_socket_gets_one_and_others_are_told_nothing() {
    if !several_or_say("whose grants differ are other uids") {
        return;
    }
    let database = Server::shared().database();
    let (client, worker) = (Identity::client(), Identity::worker());
    // Over TLS nothing is handed over, which only those who could have it are told.
    let setup = Broker::usual_setup(&database, Via::Tls);
    let setup = setup.without_grant("client").grant(Grant::to(&client, &MAY, &["main_db"]));
    let broker = setup.start();
    let (taker, other) = (broker.packets(&client), broker.packets(&worker));
    let own = taker.issue("main_db").expect("a grant").token;
    let others = other.issue("main_db").expect("a grant").token;
    let refused = |packets: &Packets, token: &str| packets.open(token).expect_err("not for it");
    let tls = refused(&taker, &own);
    assert_eq!(reason(&tls), Reason::HandoffUnsupported, "{tls:?}");
    assert!(tls.message.contains("TLS"), "{tls:?}");
    assert_eq!(reason(&refused(&other, &others)), Reason::AccessDenied);
    let foreign = refused(&other, &own);
    assert_eq!(reason(&foreign), Reason::HandleInvalid);
    assert_eq!(reason(&refused(&other, "cbh_nonsense")), Reason::HandleInvalid);
    assert_eq!(database.backends(), 0, "nothing was dialled");
    assert!(broker.audit().of("session.opened").is_empty());
}

#[test]
fn plaintext_to_another_machine_is_not_handed_over_unasked() {
    let database = Server::shared().database();
    let client = Identity::client();
    let setup = Setup::new().connection("main_db", &database, Via::Plain(database.server().port));
    let setup = granted(setup.set("connections.main_db.host", "192.0.2.1"), &client, &MAY);
    let broker = setup.start();
    let packets = broker.packets(&client);
    let token = packets.issue("main_db").expect("a grant").token;
    let refused = packets.open(&token).expect_err("it would leave the machine");
    assert_eq!(reason(&refused), Reason::HandoffUnsupported);
    assert!(refused.message.contains("insecure_handoff"), "{refused:?}");
}

#[test]
fn the_servers_own_refusal_and_a_wrong_setting_are_told() {
    let database = Server::shared().database();
    let client = Identity::client();
    let setup = unix(&database).set("connections.main_db.databases", ["no_such_*"]);
    let broker = granted(setup, &client, &MAY).start();
    let packets = broker.packets(&client);
    let token = packets.issue("main_db").expect("a grant").token;
    let Request::Open(mut request) = open(&token) else { panic!("an open request") };
    request.startup = vec![StartupParameter { name: "role".into(), value: "postgres".into() }];
    let refused = packets.call(Request::Open(request.clone()), &[]).expect_err("not allowed");
    assert_eq!(reason(&refused), Reason::InvalidRequest, "{refused:?}");
    assert!(refused.message.starts_with("the startup parameter role must be"), "{refused:?}");
    assert_eq!(refused.field, "startup parameters");
    request.startup.clear();
    request.database = "no_such_db".into();
    let (reply, descriptors) = packets.call(Request::Open(request), &[]).expect("it was let in");
    assert!(descriptors.is_empty());
    assert!(format!("{reply:?}").contains("51, 68, 48, 48, 48"), "3D000: {reply:?}");
}

#[test]
fn the_exit_of_the_process_that_took_it_ends_it() {
    let database = Server::shared().database();
    let client = Identity::client();
    let broker = granted(unix(&database), &client, &MAY).start();
    let (socket, mut holder, _line) = taken_by_a_process(&broker, &client);
    assert_eventually!(database.backends() == 1, "the session is open");
    holder.kill().expect("it runs");
    holder.wait().expect("it is a child");
    let started = Instant::now();
    assert_eventually!(database.backends() == 0, "the backend lives on");
    assert_eq!(ended(&socket), 1, "and so does the socket");
    println_proof(&format!("the taker was killed: backend gone after {:.1?}", started.elapsed()));
    assert_eventually!(
        broker.audit().of("session.closed").iter().any(|r| r.text("reason") == Some("client_gone")),
        "it is recorded"
    );
}

/// A process of its own takes a socket, and passes it on to this one.
fn taken_by_a_process(
    broker: &Broker,
    identity: &Identity,
) -> (Vec<Session>, std::process::Child, std::os::unix::net::UnixStream) {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a pair");
    let child = identity
        .command(credbroker_e2e::binaries::helper())
        .arg("take")
        .arg("main_db")
        .arg(broker.packet_socket())
        .stdin(std::os::fd::OwnedFd::from(theirs))
        .spawn()
        .expect("the helper starts");
    let socket = credbroker_e2e::identity::take_descriptor(&ours).expect("a socket");
    let opened = credbroker_proto::v1::OpenResponse::default();
    let mut session = credbroker_e2e::packet::Taken { opened, socket }.session();
    session.query("SELECT 1").expect("it is alive");
    // Its end must not be what ends the child.
    (vec![session], child, ours)
}

/// How many of these are at their end.
fn ended(sessions: &[Session]) -> usize {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let sockets = sessions.iter().map(|session| session.frontend.stream());
    let mut sockets: Vec<PollFd<'_>> =
        sockets.map(|socket| PollFd::new(socket, PollFlags::RDHUP)).collect();
    let _count = poll(&mut sockets, Some(&now)).expect("sockets can be polled");
    let closed = PollFlags::HUP | PollFlags::RDHUP;
    sockets.iter().filter(|socket| socket.revents().intersects(closed)).count()
}

#[allow(clippy::print_stdout, reason = "a proof prints its number")]
fn println_proof(line: &str) {
    println!("{line}");
}

fn crowd(broker: &Broker, database: &Database, size: usize) -> (Crowd, String) {
    let client = Identity::client();
    let packets = broker.packets(&client);
    let token = packets.issue("main_db").expect("a grant").token;
    let mut first = take(&packets, &token);
    first.query("CREATE TABLE marks (n int)").expect("the role may create tables");
    first.frontend.stream().shutdown(std::net::Shutdown::Both).expect("it is open");
    assert_eventually!(database.backends() == 0, "the first is over");
    let connections: Vec<_> = (0..8).map(|_| broker.packets(&client)).collect();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let connections: Vec<_> = connections.into_iter().map(std::sync::Mutex::new).collect();
    let crowd = Crowd::gather(database, size, || {
        let turn = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let packets = connections[turn % connections.len()].lock().expect("no door panics");
        take(&packets, &token)
    });
    // The sessions are the process's, not the connection's.
    drop(connections);
    (crowd, token)
}

fn for_a_crowd(setup: Setup, may: &[&str]) -> Setup {
    granted(setup, &Identity::client(), may)
        .set("limits.sessions", 2000)
        .set("limits.rate_per_second", 10_000)
        .set("limits.queue_timeout", "30s")
}

#[test]
fn g5_handed_off_a_thousand_sessions_are_dead_when_a_revoke_returns() {
    let database = Server::shared().database();
    let broker = for_a_crowd(unix(&database), &MAY).start();
    let (crowd, token) = crowd(&broker, &database, 1000);
    let packets = broker.packets(&Identity::client());
    let deaths = crowd.see_die(&database, true, || {
        assert_eq!(packets.revoke(&token).expect("the holder"), 1000);
    });
    println_proof(&format!("handed off, revoked: {deaths}"));
    assert_eventually!(broker.audit().of("session.closed").len() == 1001, "all are recorded");
}

#[test]
fn g5_handed_off_sessions_die_with_a_broker_that_is_killed() {
    let database = Server::shared().database();
    let proxy = LoginProxy::start(database.server());
    for (name, setup) in [("Unix socket", unix(&database)), ("TCP", plain(&database, &proxy))] {
        let mut broker = for_a_crowd(setup, &MAY).start();
        let client = Identity::client();
        let packets = broker.packets(&client);
        let token = packets.issue("main_db").expect("a grant").token;
        let mut sessions: Vec<Session> = (0..50).map(|_| take(&packets, &token)).collect();
        for session in sessions.iter_mut().skip(25) {
            session.start_query("SELECT pg_sleep(3)");
        }
        assert_eventually!(database.running("pg_sleep") == 25, "they are not at work");
        let started = Instant::now();
        broker.signal(Signal::KILL);
        let mut ends = Vec::new();
        while ends.len() < sessions.len() {
            assert!(started.elapsed() < PATIENCE, "{} are dead", ends.len());
            let (now, gone) = (started.elapsed(), ended(&sessions));
            ends.resize(gone, now);
        }
        assert_eventually!(database.backends() <= 25, "idle backends live on");
        let idle = started.elapsed();
        assert_eventually!(database.backends() == 0, "busy backends live on");
        println_proof(&format!(
            "{name}: broker killed: 50 clients at their end after p50 {:.1?}, p99 {:.1?}; idle \
             backends gone after {idle:.1?}, those in a sleep of 3 s after {:.1?}",
            ends[25],
            ends[49],
            started.elapsed()
        ));
        assert!(ends[49] < Duration::from_millis(500), "{ends:?}");
        let _status = broker.process().wait(PATIENCE);
    }
}

#[test]
fn g5_handed_off_nothing_outlives_the_keeper() {
    let database = Server::shared().database();
    let client = Identity::client();
    let broker = granted(unix(&database), &client, &MAY).start();
    let packets = broker.packets(&client);
    let token = packets.issue("main_db").expect("a grant").token;
    let session = [take(&packets, &token)];
    let children = format!("/proc/{0}/task/{0}/children", broker.pid());
    let children = std::fs::read_to_string(children).expect("a process");
    let keeper: i32 = children.trim().parse().expect("one child");
    let keeper = rustix::process::Pid::from_raw(keeper).expect("a process");
    rustix::process::kill_process(keeper, Signal::KILL).expect("it runs");
    assert_eventually!(ended(&session) == 1, "the session outlives the keeper");
    assert_eventually!(database.backends() == 0, "the backend lives on");
    let refused = packets.open(&token).expect_err("nothing would end it");
    assert_eq!(reason(&refused), Reason::HandoffUnsupported, "{refused:?}");
}

/// What lands while a login is held at each step leaves neither a socket nor a backend.
fn assert_none_left(
    broker: &Broker,
    proxy: &LoginProxy,
    database: &Database,
    cut: impl Fn(&str),
    mend: impl Fn(),
) {
    let client = Identity::client();
    let service = broker.handles(&client);
    for step in Step::ALL {
        let token = service.issue("main_db").expect("a grant").token;
        let packets = broker.packets(&client);
        proxy.hold_at(step);
        std::thread::scope(|scope| {
            let login = scope.spawn(|| packets.open(&token).map(drop));
            proxy.wait_until_held(PATIENCE);
            cut(&token);
            proxy.release();
            let opened = login.join().expect("the login ends");
            assert!(opened.is_err(), "{step:?}: let in");
        });
        assert_eventually!(database.backends() == 0, "{step:?}: a backend was left");
        mend();
    }
    let opened = broker.audit().of("session.opened").len();
    assert_eventually!(broker.audit().of("session.closed").len() == opened, "each is closed");
    broker.audit().assert_chained();
}

#[test]
fn g5_handed_off_a_revoke_during_login_leaves_no_session() {
    let database = Server::shared().database();
    let proxy = LoginProxy::start(database.server());
    let broker = granted(plain(&database, &proxy), &Identity::client(), &MAY).start();
    let service = broker.handles(&Identity::client());
    let revoke = |token: &str| {
        let _cut = service.revoke(token).expect("the holder");
    };
    assert_none_left(&broker, &proxy, &database, revoke, || {});
}

#[test]
fn g5_handed_off_a_suspension_during_login_leaves_no_session() {
    let database = Server::shared().database();
    let proxy = LoginProxy::start(database.server());
    let broker = granted(plain(&database, &proxy), &Identity::client(), &MAY).start();
    let admin = broker.operator();
    let suspend = |_token: &str| drop(admin.suspend(Some("main_db")).expect("an operator"));
    let resume = || drop(admin.resume(Some("main_db")).expect("an operator"));
    assert_none_left(&broker, &proxy, &database, suspend, resume);
}

#[test]
fn g5_handed_off_a_reload_that_takes_the_grant_away_cuts_and_leaves_nothing() {
    let database = Server::shared().database();
    let proxy = LoginProxy::start(database.server());
    let client = Identity::client();
    let mut broker = granted(plain(&database, &proxy), &client, &MAY).start();
    let packets = broker.packets(&client);
    let token = packets.issue("main_db").expect("a grant").token;
    let taken = [take(&packets, &token)];
    let mut through_the_door = broker.session(&client, "main_db", &token);
    broker.reconfigure(|setup| granted(setup.without_grant("taker"), &client, &["issue", "open"]));
    broker.operator().reload().expect("an operator");
    assert_eventually!(ended(&taken) == 1, "the socket lives on without its grant");
    through_the_door.query("SELECT 1").expect("this one may go on");
    let refused = packets.open(&token).expect_err("no grant any more");
    assert_eq!(reason(&refused), Reason::AccessDenied);
}

/// The library, in this process: its uid is that of the tests.
async fn library(broker: &Broker) -> PacketClient {
    ClientBuilder::default()
        .runtime_dir(broker.runtime_dir())
        .server_uid(Identity::broker().uid())
        .connect_packet()
        .await
        .expect("the broker is there")
}

fn config(token: &Token) -> Config {
    let mut config = Config::new();
    config.user("main_db").password(token.expose()).ssl_mode(SslMode::Disable);
    config
}

#[test]
fn tokio_postgres_works_on_a_socket_that_was_handed_over_and_falls_back_to_the_door() {
    let database = Server::shared().database();
    let own = Identity::own();
    for (setup, handed) in [
        (granted(unix(&database), &own, &MAY), true),
        (granted(unix(&database), &own, &["issue", "open"]), false),
        (granted(Setup::new().connection("main_db", &database, Via::Tls), &own, &MAY), false),
    ] {
        let broker = setup.start();
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(drive(&broker, handed));
        assert_eventually!(database.backends() == 0, "the end of the stream is the session's");
    }
}

async fn drive(broker: &Broker, handed: bool) {
    let packets = library(broker).await;
    let handle = packets.issue(IssueRequest::new("main_db")).await.expect("a grant");
    let request = OpenRequest::new().parameter("application_name", "driver");
    let stream = Stream::open(&packets, &handle, request).await.expect("a way");
    assert_eq!(matches!(stream, Stream::Handoff(_)), handed, "{stream:?}");
    let config = config(handle.token());
    let (mut client, mut connection) =
        config.connect_raw(stream, NoTls).await.expect("the driver logs in");
    let (heard, mut notifications) = tokio::sync::mpsc::unbounded_channel();
    let mut driver = tokio::task::JoinSet::new();
    driver.spawn(async move {
        let messages = futures_util::stream::poll_fn(move |cx| connection.poll_message(cx));
        let mut messages = std::pin::pin!(messages);
        while let Some(Ok(message)) = messages.next().await {
            if let AsyncMessage::Notification(notification) = message {
                let _unheard = heard.send(notification.payload().to_owned());
            }
        }
    });
    client
        .batch_execute("DROP TABLE IF EXISTS numbers; CREATE TABLE numbers (n int8)")
        .await
        .expect("a table");
    let transaction = client.transaction().await.expect("a transaction");
    let statement = transaction.prepare("INSERT INTO numbers VALUES ($1)").await.expect("prepared");
    transaction.execute(&statement, &[&7_i64]).await.expect("inserted");
    transaction.commit().await.expect("committed");
    let sink = client.copy_in("COPY numbers FROM STDIN").await.expect("COPY in");
    let mut sink = std::pin::pin!(sink);
    sink.send(futures_util::stream::iter([&b"1\n2\n3\n"[..]]).next().await.expect("bytes"))
        .await
        .expect("copied");
    assert_eq!(sink.finish().await.expect("copied"), 3);
    let out = client.copy_out("COPY numbers TO STDOUT").await.expect("COPY out");
    let out: Vec<_> = out.try_collect().await.expect("copied out");
    assert_eq!(out.iter().map(|row| row.len()).sum::<usize>(), 8);
    client.batch_execute("LISTEN news; NOTIFY news, 'hello'").await.expect("notified");
    assert_eq!(notifications.recv().await.as_deref(), Some("hello"));
    let large: String =
        client.query_one("SELECT repeat('x', 20000000)", &[]).await.expect("a row").get(0);
    assert_eq!(large.len(), 20_000_000);
    let rows =
        client.query("SELECT n, md5(n::text) FROM generate_series(1, 200000) AS n", &[]).await;
    assert_eq!(rows.expect("rows").len(), 200_000);
    drop(client);
    driver.join_next().await.expect("one").expect("the driver ends");
    // Not revoked: what ends the session is the end of the stream.
    let _token = handle.into_token();
    packets.close().await;
}

#[test]
fn the_library_tells_the_databases_own_words() {
    let database = Server::shared().database();
    let setup = unix(&database).set("connections.main_db.databases", ["no_such_*"]);
    let broker = granted(setup, &Identity::own(), &MAY).start();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let packets = library(&broker).await;
        let handle = packets.issue(IssueRequest::new("main_db")).await.expect("a grant");
        let request = OpenRequest::new().database("no_such_db");
        let error = Stream::open(&packets, &handle, request).await.expect_err("no such database");
        let Error::Database { sqlstate, .. } = &error else { panic!("{error:?}") };
        assert_eq!(sqlstate, "3D000");
        packets.close().await;
    });
}

/// P3 and P6 of the design, roughly: on a machine that does other things, for the ratio only.
#[test]
fn measured_open_and_a_loop_of_queries() {
    let database = Server::shared().database();
    let broker = for_a_crowd(unix(&database), &MAY).start();
    let packets = broker.packets(&Identity::client());
    let token = packets.issue("main_db").expect("a grant").token;
    let mut opens: Vec<Duration> = (0..100)
        .map(|_| {
            let started = Instant::now();
            let session = take(&packets, &token);
            let took = started.elapsed();
            session.frontend.stream().shutdown(std::net::Shutdown::Both).expect("it is open");
            took
        })
        .collect();
    opens.sort_unstable();
    let mut handed = take(&packets, &token);
    let mut door = broker.session(&Identity::client(), "main_db", &token);
    let rounds = |session: &mut Session| {
        let started = Instant::now();
        for _ in 0..3000 {
            session.query("SELECT 1").expect("a row");
        }
        started.elapsed()
    };
    let (a, b) = (rounds(&mut handed), rounds(&mut door));
    println_proof(&format!(
        "open p50 {:.1?}, p99 {:.1?}; 3000 queries on the socket {a:.1?}, through the door {b:.1?}",
        opens[50], opens[99]
    ));
}
