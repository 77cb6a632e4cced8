//! Where the database is: several hosts in order, and the user that a Unix socket must be of.

use std::fs::{self, DirBuilder};
use std::net::{SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use credbroker_e2e::broker::{Broker, Setup, Via};
use credbroker_e2e::identity::{Identity, several};
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::rogue::{Place, Rogue, Script, ask, prelude};
use credbroker_proto::v1::ResolveConnectionRequest;
use rustix::net::{AddressFamily, SocketType, bind, getsockname, listen, socket};
use toml::Value;

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
