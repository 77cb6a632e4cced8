//! Where the database is: several hosts in order, and the user that a Unix socket must be of.

use std::fs::{self, DirBuilder};
use std::net::{SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::{Broker, Setup, Via};
use credbroker_e2e::frontend::cancel_request;
use credbroker_e2e::identity::{Identity, several};
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::rogue::{Place, Rogue, Script, ServerTls, ask, prelude, say};
use credbroker_proto::v1::ResolveConnectionRequest;
use rustix::net::{AddressFamily, SocketType, bind, getsockname, listen, socket};
use toml::Value;

/// Ends by pg_terminate_backend only.
const UNCANCELLABLE: &str = "DO $$ BEGIN LOOP BEGIN PERFORM pg_sleep(300); \
     EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP; END $$";

fn token(broker: &Broker) -> String {
    broker.handles(&Identity::client()).issue("main_db").expect("a grant").token
}

fn assert_works(broker: &Broker) {
    let mut session = broker.session(&Identity::client(), "main_db", &token(broker));
    assert_eq!(session.query("SELECT 6 * 7").expect("a query"), [["42"]]);
}

fn refusal(broker: &Broker) -> String {
    let error = broker.login(&Identity::client(), "main_db", &token(broker));
    error.expect_err("no session").refusal().reason().to_owned()
}

/// A connection over TLS with these hosts.
fn hosts(database: &Database, hosts: &[String]) -> Setup {
    let hosts: Vec<Value> = hosts.iter().map(|host| host.as_str().into()).collect();
    Broker::usual_setup(database, Via::Tls)
        .set("connections.main_db.host", Value::from(hosts))
        .set("connections.main_db.connect_timeout", "1s")
}

/// An address that takes no connection and refuses none: its queue is full.
struct BlackHole {
    address: SocketAddr,
    _listener: OwnedFd,
    _first: TcpStream,
}

impl BlackHole {
    fn open() -> Self {
        let listener = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
        bind(&listener, &SocketAddrV4::new([127, 0, 0, 1].into(), 0)).expect("a free port");
        listen(&listener, 0).expect("it can listen");
        let address = getsockname(&listener).expect("its address");
        let address = SocketAddr::try_from(address).expect("an address of IP");
        let first = TcpStream::connect(address).expect("the queue takes one");
        let second = TcpStream::connect_timeout(&address, Duration::from_millis(100));
        assert!(second.is_err(), "the queue takes two");
        Self { address, _listener: listener, _first: first }
    }
}

#[test]
fn a_host_that_refuses_and_one_that_is_silent_are_passed_over() {
    let database = Server::shared().database();
    let port = Server::shared().port;
    let hole = BlackHole::open();
    let dead = hole.address.to_string();
    // Port 1 of the loopback interface: nobody listens there.
    let list = ["127.0.0.1:1".into(), "no-such-host.invalid".into(), dead, "localhost".into()];
    let broker = hosts(&database, &list).start();
    let began = Instant::now();
    assert_works(&broker);
    let took = began.elapsed();
    assert!(took >= Duration::from_secs(1), "{took:?}: the silent one had its second");
    assert!(took < Duration::from_secs(10), "{took:?}");

    let service = broker.handles(&Identity::client());
    for (host, port) in [("127.0.0.1", 1), ("localhost", u32::from(port))] {
        let request = ResolveConnectionRequest {
            r#type: "postgresql".into(),
            host: host.into(),
            port: Some(port),
            database: String::new(),
        };
        assert_eq!(service.resolve(request), Ok("main_db".to_owned()), "{host}:{port}");
    }
    let target = &service.connections().expect("a list")[0].target;
    assert!(target.contains("@127.0.0.1:1,no-such-host.invalid:"), "{target}");
}

#[test]
fn a_host_that_fails_to_prove_itself_is_not_passed_over() {
    let database = Server::shared().database();
    // PostgreSQL listens on 127.0.0.2 too; its certificate does not say so.
    let broker = hosts(&database, &["127.0.0.2".into(), "localhost".into()]).start();
    assert_eq!(refusal(&broker), "UPSTREAM_UNTRUSTED");
    assert_eq!(database.backends(), 0);
    drop(broker);
    let broker = hosts(&database, &["localhost".into(), "127.0.0.2".into()]).start();
    assert_works(&broker);
}

#[test]
fn when_no_host_is_there_that_is_told() {
    let database = Server::shared().database();
    let broker = hosts(&database, &["127.0.0.1:1".into(), "127.0.0.2:1".into()]).start();
    assert_eq!(refusal(&broker), "UPSTREAM_UNREACHABLE");
}

/// A server that ends every login with this SQLSTATE, before it has proved anything.
fn ends_with(sqlstate: &'static str) -> Script {
    Arc::new(move |wire| {
        wire.greet()?;
        wire.send(&say(sqlstate))?;
        wire.hold()
    })
}

/// A connection whose hosts are a rogue and, behind it, the real server: by Unix sockets, or by
/// TLS that checks nothing.
fn behind(database: &Database, sqlstate: &'static str, by_tls: bool) -> (Setup, Rogue) {
    let server = Server::shared();
    if by_tls {
        let tls = Some(ServerTls::self_signed("localhost"));
        let rogue = Rogue::start(&Place::Tcp, tls, ends_with(sqlstate));
        let list = [format!("127.0.0.1:{}", rogue.port()), "localhost".into()];
        let setup = hosts(database, &list)
            .set("connections.main_db.tls.mode", "require")
            .without("connections.main_db.tls.ca_file");
        return (setup, rogue);
    }
    let setup = Broker::usual_setup(database, Via::Plain(server.port));
    let directory = setup.path("upstream");
    DirBuilder::new().mode(0o755).create(&directory).expect("a directory");
    let rogue =
        Rogue::start(&Place::Unix(directory.clone(), server.port), None, ends_with(sqlstate));
    let list: Vec<Value> = [&directory, &server.socket_dir]
        .map(|directory| directory.to_str().expect("ASCII").into())
        .into();
    (setup.set("connections.main_db.host", Value::from(list)), rogue)
}

#[test]
fn a_host_that_takes_nobody_now_is_passed_over() {
    let database = Server::shared().database();
    for by_tls in [false, true] {
        let (setup, rogue) = behind(&database, "57P03", by_tls);
        let broker = setup.start();
        assert_works(&broker);
        assert_eq!(rogue.accepted(), 1, "by TLS: {by_tls}");
        drop(broker);
        // What is said of this login is the answer to it.
        for sqlstate in ["53300", "3D000", "28P01"] {
            let (setup, rogue) = behind(&database, sqlstate, by_tls);
            let broker = setup.start();
            let reason =
                if sqlstate == "28P01" { "UPSTREAM_REFUSED" } else { "UPSTREAM_UNREACHABLE" };
            assert_eq!(refusal(&broker), reason, "{sqlstate}, by TLS: {by_tls}");
            assert_eq!(rogue.accepted(), 1, "{sqlstate}, by TLS: {by_tls}");
        }
        assert_eventually!(database.backends() == 0, "the real server was asked");
    }
}

#[test]
fn when_no_host_takes_anybody_now_that_is_told() {
    let database = Server::shared().database();
    let tls = || Some(ServerTls::self_signed("localhost"));
    let rogues = [0; 2].map(|_| Rogue::start(&Place::Tcp, tls(), ends_with("57P03")));
    let list = rogues.each_ref().map(|rogue| format!("127.0.0.1:{}", rogue.port()));
    // The first alone, both, and one behind which nobody is.
    for (hosts_of, came) in [
        (vec![list[0].clone()], [1, 0]),
        (list.to_vec(), [2, 1]),
        (vec![list[1].clone(), "127.0.0.1:1".into()], [2, 2]),
    ] {
        let broker = hosts(&database, &hosts_of)
            .set("connections.main_db.tls.mode", "require")
            .without("connections.main_db.tls.ca_file")
            .start();
        assert_eq!(refusal(&broker), "UPSTREAM_UNREACHABLE", "{hosts_of:?}");
        assert_eq!(rogues.each_ref().map(Rogue::accepted), came, "{hosts_of:?}");
        let log = broker.log();
        assert!(log.contains("57P03"), "{hosts_of:?}: {log}");
    }
}

/// The session lives where its login came through, and that is where it is cancelled and ended.
#[test]
fn a_cancel_and_a_cut_go_to_the_host_that_the_session_is_on() {
    let database = Server::shared().database();
    for by_tls in [false, true] {
        let (setup, rogue) = behind(&database, "57P03", by_tls);
        let broker = setup.start();
        let client = Identity::client();
        let token = token(&broker);
        let mut session = broker.session(&client, "main_db", &token);
        session.start_query("SELECT pg_sleep(300)");
        assert_eventually!(database.running("pg_sleep") == 1, "the query does not run");
        let mut knock = broker.knock(&client);
        knock.send(&cancel_request(&session.cancel_key)).expect("the door reads");
        assert_eq!(knock.receive_rest().expect("the door hangs up"), []);
        let ended = session.finish_query().expect("the session lives on");
        assert_eq!(ended.expect_err("cancelled").sqlstate(), "57014");

        // What traps a cancellation is terminated, by a login of its own.
        session.start_query(UNCANCELLABLE);
        assert_eventually!(database.running("pg_sleep") == 1, "the block does not run");
        assert_eq!(broker.handles(&client).revoke(&token), Ok(1));
        assert_eventually!(database.backends() == 0, "the backend lives on");
        assert_eq!(rogue.accepted(), 1, "by TLS {by_tls}: the other host was asked again");
        assert_eventually!(broker.audit().of("session.closed").len() == 1, "it is recorded");
        let closed = broker.audit().of("session.closed")[0].line();
        assert!(!closed.contains("server_stopped"), "{closed}");
    }
}

/// A connection to a Unix socket in this directory, whose server must be this user's.
fn socket_of(database: &Database, directory: &str, port: u16, user: impl Into<Value>) -> Setup {
    Broker::usual_setup(database, Via::Plain(port))
        .set("connections.main_db.host", directory)
        .set("connections.main_db.peer_user", user.into())
}

#[test]
fn a_unix_socket_must_be_of_the_named_user() {
    let database = Server::shared().database();
    let server = Server::shared();
    let directory = server.socket_dir.to_str().expect("ASCII");
    let owner = fs::metadata(&server.socket_dir).expect("it is there").uid();
    let mut right = vec![Value::from(i64::from(owner))];
    if several() {
        right.push("postgres".into());
    }
    for user in right {
        assert_works(&socket_of(&database, directory, server.port, user).start());
    }
    let wrong = i64::from(owner) + 1;
    let broker = socket_of(&database, directory, server.port, wrong).start();
    assert_eq!(refusal(&broker), "UPSTREAM_UNTRUSTED");
    let log = broker.log();
    assert!(log.contains(&format!("it is of uid {owner}, and peer_user is {wrong}")), "{log}");
    assert_eq!(database.backends(), 0);
}

/// What a socket's user proves is enough for the methods by which the server proves nothing; a
/// stranger at the same socket gets nothing.
#[test]
fn a_server_that_its_user_proves_may_ask_for_the_password_or_nothing() {
    let database = Server::shared().database();
    let password = database.canary().reveal().to_owned();
    let asks: Script = Arc::new(|wire| {
        wire.greet()?;
        wire.send(&ask(3))?;
        wire.receive()?;
        wire.send(&prelude())?;
        wire.hold()
    });
    let trusts: Script = Arc::new(|wire| {
        wire.greet()?;
        wire.send(&prelude())?;
        wire.hold()
    });
    let own = i64::from(Identity::own().uid());
    for (method, script) in [("password", asks), ("none", trusts)] {
        for (user, proven) in [(own, true), (own + 1, false)] {
            let setup = Broker::usual_setup(&database, Via::Plain(5432));
            let directory = setup.path("upstream");
            DirBuilder::new().mode(0o755).create(&directory).expect("a directory");
            let place = Place::Unix(directory.clone(), 5432);
            let rogue = Rogue::start(&place, None, Arc::clone(&script));
            let broker = setup
                .set("connections.main_db.host", directory.to_str().expect("ASCII"))
                .set("connections.main_db.peer_user", user)
                .set("connections.main_db.require_auth", [method])
                .start();
            if proven {
                let _session = broker.session(&Identity::client(), "main_db", &token(&broker));
                let sent = rogue.record().opened;
                let has_it = sent.windows(password.len()).any(|part| part == password.as_bytes());
                assert_eq!(has_it, method == "password", "{method}");
            } else {
                assert_eq!(refusal(&broker), "UPSTREAM_UNTRUSTED", "{method}");
                assert!(rogue.record().raw.is_empty(), "{method}: not even a startup message");
            }
        }
    }
}
