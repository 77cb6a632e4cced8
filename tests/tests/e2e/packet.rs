//! The packet sockets: the verbs, secrets in memfds, and peers that lie with both hands.

use std::fs::{self, File};
use std::io::{Seek as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::{Broker, Grant, Via};
use credbroker_e2e::canary::Canary;
use credbroker_e2e::identity::{Identity, several_or_say};
use credbroker_e2e::memory;
use credbroker_e2e::packet::{MAX_DESCRIPTORS, Packets, describe, issue, memfd, reason, revoke};
use credbroker_e2e::postgres::{Database, Server};
use credbroker_proto::v1::packet_reply::Reply;
use credbroker_proto::v1::packet_request::Request;
use credbroker_proto::v1::{PutRequest, Reason, Refused, RegisterRequest};
use credbroker_proto::{MAX_PACKET, MAX_SECRET};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::net::{AddressFamily, SendFlags, Shutdown, SocketFlags, SocketType, shutdown};

/// The form of a token, with nothing behind it.
const MADE_UP: &str = "cbh_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
/// What hostile peers together may make the broker grow by.
const GROWTH_KB: u64 = 64 << 10;

/// `main_db` has a credential; `bare_db` has none, and the client may bring one.
fn broker(database: &Database) -> Broker {
    let client = Identity::client();
    Broker::usual_setup(database, Via::Tls)
        .bare_connection("bare_db", database)
        .stored_connection("stored_db", database)
        .grant(Grant::to(&client, &["issue", "open"], &["stored_db"]))
        .grant(Grant::to(&client, &["register", "open", "reveal"], &["bare_db"]))
        .grant(Grant::to(&client, &["reveal"], &["main_db"]))
        .start()
}

fn operator(broker: &Broker) -> Packets {
    Packets::connect(&Identity::own(), &broker.admin_packet_socket()).expect("root may connect")
}

fn register(database: &Database) -> RegisterRequest {
    RegisterRequest {
        connection: "bare_db".into(),
        username: database.name().into(),
        ..Default::default()
    }
}

fn put(username: &str) -> PutRequest {
    PutRequest { connection: "stored_db".into(), username: username.into(), ..Default::default() }
}

/// A refusal's text without its reference.
fn text(refused: &Refused) -> &str {
    refused.message.split(" (ref=").next().unwrap_or_default()
}

fn descriptors(broker: &Broker) -> usize {
    fs::read_dir(format!("/proc/{}/fd", broker.pid())).expect("descriptors").count()
}

fn resident_kb(broker: &Broker) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", broker.pid())).expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

fn assert_no_panic(broker: &Broker) {
    assert!(!broker.log().contains("panicked"), "{}", broker.log());
}

#[test]
fn the_fast_path_has_the_verbs_of_the_service() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let client = Identity::client();
    let packets = broker.packets(&client);
    let issued = packets.issue("main_db").expect("a grant");
    let handle = issued.handle.expect("described");
    assert_eq!(packets.describe(&issued.token).expect("its own").id, handle.id);
    // One table behind both edges.
    let service = broker.handles(&client);
    assert_eq!(service.describe(&issued.token).expect("its own").id, handle.id);
    let renewed = packets.renew(&issued.token).expect("the holder");
    assert!(renewed.expires.expect("a time").seconds >= handle.expires.expect("a time").seconds);
    let mut session = broker.session(&client, "main_db", &issued.token);
    session.query("SELECT 1").expect("a query");
    assert_eq!(packets.revoke(&issued.token).expect("the holder"), 1);
    let gone = packets.describe(&issued.token).expect_err("it is gone");
    assert_eq!(reason(&gone), Reason::HandleInvalid);
    let open = packets.open(&issued.token).expect_err("it is gone");
    assert_eq!(reason(&open), Reason::HandleInvalid, "{open:?}");
    let wrong = packets.issue("no_such_db").expect_err("no such connection");
    assert_eq!(reason(&wrong), Reason::AccessDenied);
    let last = || broker.audit().of("access.denied").pop().and_then(|last| last.number("seq"));
    assert_eventually!(last() == Some(wrong.r#ref), "{:?}", last());
    broker.audit().assert_chained();
}

#[test]
fn g3_a_foreign_token_gets_the_answer_of_an_unknown_one_on_the_packet_socket() {
    if !several_or_say("a token of another uid tells nothing") {
        return;
    }
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let token = broker.packets(&Identity::client()).issue("main_db").expect("a grant").token;
    let thief = broker.packets(&Identity::attacker());
    for ask in [describe as fn(&str) -> Request, revoke] {
        let stolen = thief.call(ask(&token), &[]).expect_err("not theirs");
        let unknown = thief.call(ask(MADE_UP), &[]).expect_err("nobody's");
        assert_eq!((stolen.reason, text(&stolen)), (unknown.reason, text(&unknown)));
    }
}

#[test]
fn replies_come_in_the_order_of_the_requests() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let packets = broker.packets(&Identity::client());
    const AHEAD: u64 = 120;
    for id in 1..=AHEAD {
        match id % 4 {
            0 => packets.send(id, describe(MADE_UP), &[]),
            1 => packets.send(id, issue("main_db"), &[]),
            2 => packets.send_raw(&[0xff; 16], &[]),
            _ => packets.send(id, revoke(MADE_UP), &[]),
        }
        .expect("the socket takes it");
    }
    for id in 1..=AHEAD {
        let received = packets.receive().expect("a reply").expect("a reply");
        let malformed = id % 4 == 2;
        assert_eq!(received.reply.id, if malformed { 0 } else { id });
        match received.reply.reply {
            Some(Reply::Issued(_)) => assert_eq!(id % 4, 1),
            Some(Reply::Refused(refused)) if malformed => {
                assert_eq!(reason(&refused), Reason::InvalidRequest);
                assert_eq!(refused.field, "packet");
            }
            Some(Reply::Refused(refused)) => assert_eq!(reason(&refused), Reason::HandleInvalid),
            other => panic!("{id}: {other:?}"),
        }
    }
    println!("{AHEAD} requests sent before the first reply was read: all answered in order");
}

#[test]
fn what_belongs_to_operators_is_for_operators() {
    let database = Server::shared().database();
    // Not the default, which would have the broker's own uid too.
    let root =
        toml::Table::from_iter([("uid".to_owned(), i64::from(Identity::own().uid()).into())]);
    let broker = Broker::usual_setup(&database, Via::Tls)
        .stored_connection("stored_db", &database)
        .set("broker.operators", toml::Value::Array(vec![root.into()]))
        .start();
    let secret = memfd(b"new");
    let refused = broker
        .packets(&Identity::client())
        .put(put("app"), &[secret.as_fd()])
        .expect_err("not on this socket");
    assert_eq!(reason(&refused), Reason::AccessDenied);
    let mut left = [0; 3];
    secret.read_exact_at(&mut left, 0).expect("three bytes");
    assert_eq!(&left, b"new", "what is refused by policy is not looked at");

    if several_or_say("who is no operator is denied everything on the operators' socket") {
        // Only the broker's own uid can enter its directory; here it is no operator.
        let outsider = Packets::connect(&Identity::attacker(), &broker.admin_packet_socket());
        assert!(outsider.is_err(), "the directory keeps others out");
        let own = Packets::connect(&Identity::broker(), &broker.admin_packet_socket());
        let own = own.expect("its own directory");
        for request in [issue("main_db"), describe(MADE_UP), Request::Put(put("app"))] {
            let refused = own.call(request, &[]).expect_err("no operator");
            assert_eq!(reason(&refused), Reason::AccessDenied);
        }
    }
    let stored = operator(&broker).put(put("app"), &[secret.as_fd()]).expect("an operator");
    assert_eq!((stored.version, stored.persistent), (1, false));
    let describe = operator(&broker).call(describe(MADE_UP), &[]).expect_err("no such handle");
    assert_eq!(reason(&describe), Reason::HandleInvalid, "workload verbs are there too");
}

#[test]
fn put_replaces_the_password_that_the_broker_logs_in_with() {
    let database = Server::shared().database();
    let broker = broker(&database);
    let client = Identity::client();
    let token = broker.packets(&client).issue("stored_db").expect("a grant").token;
    let none = broker.login(&client, "stored_db", &token).expect_err("nothing was put").refusal();
    assert!(none.to_string().contains("an operator must put one"), "{none}");
    let taken = broker
        .packets(&Identity::own())
        .put(PutRequest { connection: "main_db".into(), ..put("app") }, &[memfd(b"x").as_fd()])
        .expect_err("not on this socket");
    assert_eq!(reason(&taken), Reason::AccessDenied);
    let elsewhere = PutRequest { connection: "main_db".into(), ..put("app") };
    let refused = operator(&broker).put(elsewhere, &[memfd(b"x").as_fd()]).expect_err("a file");
    assert_eq!((reason(&refused), refused.field.as_str()), (Reason::InvalidRequest, "connection"));

    let first = memfd(database.secret().as_bytes());
    operator(&broker).put(put(""), &[first.as_fd()]).expect("an operator");
    broker.session(&client, "stored_db", &token).query("SELECT 1").expect("the first one");
    let next = Canary::random();
    database.set_server_password(&next);
    broker.login(&client, "stored_db", &token).expect_err("the broker has the old one");
    let text = format!("{}:{}\n", database.name(), next.reveal());
    let secret = memfd(text.as_bytes());
    operator(&broker).put(put(""), &[secret.as_fd()]).expect("an operator");
    let mut session = broker.session(&client, "stored_db", &token);
    session.query("SELECT 1").expect("the new one");
    let mut left = vec![1; text.len()];
    secret.read_exact_at(&mut left, 0).expect("as long as it was");
    assert!(left.iter().all(|byte| *byte == 0), "the broker wipes what it has read");
    assert_eq!(broker.audit().of("secret.put").len(), 2);
}

#[test]
fn a_registered_password_belongs_to_its_handle_alone() {
    let database = Server::shared().database();
    let broker = broker(&database);
    let client = Identity::client();
    let packets = broker.packets(&client);
    let secret = memfd(database.canary().reveal().as_bytes());
    let issued = packets.register(register(&database), &[secret.as_fd()]).expect("a grant");
    let mut left = [1; 8];
    secret.read_exact_at(&mut left, 0).expect("as long as it was");
    assert_eq!(left, [0; 8], "the broker wipes what it has read");
    let mut session = broker.session(&client, "bare_db", &issued.token);
    session.query("SELECT 1").expect("logged in with it");
    let wrong = memfd(b"not the password");
    let other = packets.register(register(&database), &[wrong.as_fd()]).expect("a grant");
    broker.login(&client, "bare_db", &other.token).expect_err("its own is wrong");
    assert_eq!(packets.revoke(&issued.token).expect("the holder"), 1);
    broker.login(&client, "bare_db", &issued.token).expect_err("gone with its handle");
    let main = RegisterRequest { connection: "main_db".into(), ..register(&database) };
    let refused = packets.register(main, &[memfd(b"x").as_fd()]).expect_err("it has its own");
    assert_eq!(reason(&refused), Reason::AccessDenied, "no grant for that one");
    assert_eq!(broker.audit().of("secret.registered").len(), 2);
}

#[test]
fn a_secret_is_revealed_to_its_holder_once() {
    let database = Server::shared().database();
    let broker = broker(&database);
    let packets = broker.packets(&Identity::client());
    let token = packets.issue("main_db").expect("a grant").token;
    if several_or_say("others are not shown it") {
        let thief = broker.packets(&Identity::attacker());
        let refused = thief.reveal(&token).expect_err("not theirs");
        assert_eq!(reason(&refused), Reason::HandleInvalid);
    }
    let (revealed, mut file) = packets.reveal(&token).expect("a grant");
    assert_eq!(revealed.username, database.name());
    let content = {
        use std::io::Read as _;
        let mut content = String::new();
        file.rewind().expect("a file");
        file.read_to_string(&mut content).expect("text");
        content
    };
    assert_eq!(content, database.canary().reveal());
    assert_eq!(usize::try_from(revealed.length).expect("small"), content.len());
    assert!(file.set_len(1).is_err() && file.set_len(1 << 20).is_err(), "sealed");
    assert!(fcntl_add_seals(&file, SealFlags::WRITE).is_err(), "and so are the seals");
    file.write_all_at(&vec![0; content.len()], 0).expect("the receiver can wipe it");
    let again = packets.reveal(&token).expect_err("once");
    assert_eq!(reason(&again), Reason::HandleInvalid);
    assert_eq!(broker.audit().of("secret.revealed").len(), 1);
}

/// Descriptors that are not what a request needs, by name.
fn hostile() -> Vec<(&'static str, OwnedFd)> {
    let sized = |len| {
        let file = memfd(b"");
        ftruncate(&file, len).expect("sparse");
        OwnedFd::from(file)
    };
    let sealed = |seal| {
        let file = memfd(b"secret");
        fcntl_add_seals(&file, seal).expect("a seal");
        OwnedFd::from(file)
    };
    let again = |flags| {
        let file = memfd(b"secret");
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        rustix::fs::open(path, flags, Mode::empty()).expect("opened again")
    };
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let (unix, _) = std::os::unix::net::UnixStream::pair().expect("a pair");
    let open = |path: &str| {
        OwnedFd::from(File::options().read(true).write(true).open(path).expect("opened"))
    };
    let mut all = vec![
        ("sparse, 2^60 bytes", sized(1 << 60)),
        ("sparse, one byte too long", sized(MAX_SECRET as u64 + 1)),
        ("empty", sized(0)),
        ("write-sealed", sealed(SealFlags::WRITE)),
        ("future-write-sealed", sealed(SealFlags::FUTURE_WRITE)),
        ("read only", again(OFlags::RDONLY)),
        ("write only", again(OFlags::WRONLY)),
        ("append only", again(OFlags::RDWR | OFlags::APPEND)),
        ("O_PATH", again(OFlags::PATH)),
        ("a regular file", tempfile::tempfile().expect("a file").into()),
        ("a file of a tmpfs", tempfile::tempfile_in("/dev/shm").expect("a file").into()),
        ("a directory", File::open("/").expect("opened").into()),
        ("/dev/zero", open("/dev/zero")),
        ("/dev/null", open("/dev/null")),
        ("the reading end of a pipe", reader.into()),
        ("the writing end of a pipe", writer.into()),
        ("a Unix socket", unix.into()),
        ("a TCP socket", TcpListener::bind("127.0.0.1:0").expect("a socket").into()),
        (
            "an epoll instance",
            rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC)
                .expect("epoll"),
        ),
        (
            "an eventfd",
            rustix::event::eventfd(1, rustix::event::EventfdFlags::CLOEXEC).expect("eventfd"),
        ),
    ];
    let huge = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB;
    if let Ok(huge) = memfd_create("huge", huge) {
        all.push(("a memfd of huge pages", huge));
    }
    all
}

#[test]
fn g7_hostile_memfds_are_refused_and_the_connection_goes_on() {
    let database = Server::shared().database();
    let broker = broker(&database);
    let before = descriptors(&broker);
    let (packets, admin) = (broker.packets(&Identity::client()), operator(&broker));
    let hostile = hostile();
    for (name, descriptor) in &hostile {
        let refusals = [
            packets.register(register(&database), &[descriptor.as_fd()]).expect_err(name),
            admin.put(put("app"), &[descriptor.as_fd()]).expect_err(name),
        ];
        for refused in refusals {
            assert_eq!(reason(&refused), Reason::InvalidRequest, "{name}: {refused:?}");
            assert_eq!(refused.field, "descriptor", "{name}: {refused:?}");
        }
    }
    // Judged by what is in them, once they are in the arena.
    for content in [&[0; 100][..], b"\n", b"a\0b"] {
        let refused = admin.put(put("app"), &[memfd(content).as_fd()]).expect_err("no secret");
        assert_eq!((reason(&refused), refused.field.as_str()), (Reason::InvalidRequest, "secret"));
    }
    let long = memfd(&[b'x'; MAX_SECRET]);
    admin.put(put("app"), &[long.as_fd()]).expect("the longest that there may be");
    // Two connections, each with its peer's process.
    assert_eventually!(descriptors(&broker) <= before + 4, "descriptors are left open");
    assert_no_panic(&broker);
    println!("{} kinds of hostile descriptors refused, on both sockets", hostile.len());
}

#[test]
fn who_may_not_ask_learns_nothing_of_the_descriptor() {
    if !several_or_say("a uid without a grant") {
        return;
    }
    let database = Server::shared().database();
    let broker = broker(&database);
    let attacker = broker.packets(&Identity::attacker());
    let fine = memfd(b"secret");
    let denied = attacker.register(register(&database), &[fine.as_fd()]).expect_err("no grant");
    assert_eq!(reason(&denied), Reason::AccessDenied);
    for (name, descriptor) in &hostile() {
        let refused =
            attacker.register(register(&database), &[descriptor.as_fd()]).expect_err(name);
        assert_eq!((refused.reason, text(&refused)), (denied.reason, text(&denied)), "{name}");
    }
    let none = attacker.register(register(&database), &[]).expect_err("no grant");
    assert_eq!((none.reason, text(&none)), (denied.reason, text(&denied)));
}

#[test]
fn g7_memfds_that_change_while_they_are_read_fault_nobody() {
    let database = Server::shared().database();
    let broker = broker(&database);
    let admin = operator(&broker);
    let resize: fn(&File) = |file| {
        let _ = ftruncate(file, 0);
        let _ = ftruncate(file, 1 << 40);
        let _ = ftruncate(file, 8192);
    };
    let mutate: fn(&File) = |file| {
        let _ = file.write_all_at(&[b'a'; 8192], 0);
        let _ = file.write_all_at(&[b'b'; 8192], 0);
    };
    for (name, change) in [("resized", resize), ("mutated", mutate)] {
        let file = memfd(&[b'x'; 8192]);
        let stop = AtomicBool::new(false);
        let (mut taken, mut refused) = (0, 0);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    change(&file);
                }
            });
            for _ in 0..400 {
                match admin.put(put("app"), &[file.as_fd()]) {
                    Ok(_) => taken += 1,
                    Err(no) => {
                        assert_eq!(reason(&no), Reason::InvalidRequest, "{no:?}");
                        refused += 1;
                    }
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        println!("{name} by another thread: {taken} taken whole, {refused} refused");
        assert!(if name == "mutated" { taken > 0 } else { refused > 0 });
    }
    assert_no_panic(&broker);
    broker.packets(&Identity::client()).issue("main_db").expect("still serving");
}

#[test]
fn g7_too_many_descriptors_or_too_few_refuse_the_request_only() {
    let database = Server::shared().database();
    let broker = broker(&database);
    let before = descriptors(&broker);
    let packets = broker.packets(&Identity::client());
    let file = memfd(b"secret");
    let many = vec![file.as_fd(); MAX_DESCRIPTORS];
    let mut refusals = 0;
    let mut refuse = |request: Request, descriptors: &[BorrowedFd<'_>]| {
        let refused = packets.call(request, descriptors).expect_err("not so many");
        assert_eq!(reason(&refused), Reason::InvalidRequest, "{refused:?}");
        assert_eq!(refused.field, "descriptor");
        refusals += 1;
    };
    for _ in 0..20 {
        for count in [1, 2, 17, MAX_DESCRIPTORS] {
            refuse(issue("main_db"), &many[..count]);
            refuse(describe(MADE_UP), &many[..count]);
        }
        for count in [0, 2, MAX_DESCRIPTORS] {
            refuse(Request::Register(register(&database)), &many[..count]);
        }
    }
    assert!(packets.issue("main_db").is_ok(), "the connection goes on");
    // The connection, and its peer's process.
    assert_eventually!(descriptors(&broker) <= before + 2, "descriptors are left open");
    println!("{refusals} packets with up to {MAX_DESCRIPTORS} wrong descriptors: none left open");
}

#[test]
fn g7_a_full_descriptor_table_refuses_what_it_cannot_take() {
    let database = Server::shared().database();
    let setup = Broker::usual_setup(&database, Via::Tls);
    let _config = setup.write();
    let daemon = setup.command("run");
    // The limit of the process that the command becomes.
    let mut limited = std::process::Command::new("prlimit");
    limited.arg("--nofile=64").arg("--").arg(daemon.get_program()).args(daemon.get_args());
    limited.env_clear();
    for (key, value) in daemon.get_envs() {
        limited.env(key, value.unwrap_or_default());
    }
    let broker = setup.start_by(limited);
    let packets = broker.packets(&Identity::client());
    let file = memfd(b"secret");
    let many = vec![file.as_fd(); MAX_DESCRIPTORS];
    for _ in 0..100 {
        let refused = packets.call(issue("main_db"), &many).expect_err("no room for so many");
        assert_eq!(reason(&refused), Reason::InvalidRequest, "{refused:?}");
    }
    assert_eventually!(packets.issue("main_db").is_ok(), "the connection goes on");
    assert_no_panic(&broker);
}

/// A TCP socket whose close waits five seconds: its peer reads nothing, and it lingers.
fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a socket");
    let mut sender =
        TcpStream::connect(listener.local_addr().expect("an address")).expect("connected");
    let (receiver, _) = listener.accept().expect("accepted");
    sender.set_nonblocking(true).expect("non-blocking");
    while sender.write(&[0; 65536]).is_ok() {}
    let linger = Some(Duration::from_secs(5));
    rustix::net::sockopt::set_socket_linger(&sender, linger).expect("SO_LINGER");
    (sender.into(), receiver)
}

#[test]
fn g7_lingering_sockets_delay_nobody_else() {
    let database = Server::shared().database();
    let broker = broker(&database);
    let attacker = broker.packets(&Identity::attacker());
    let client = broker.packets(&Identity::client());
    let mut peers = Vec::new();
    // In requests, and in a connection that nobody reads before it is closed.
    for id in 0..24 {
        let (socket, peer) = lingering();
        peers.push(peer);
        attacker.send(id, describe(MADE_UP), &[socket.as_fd()]).expect("sent");
    }
    for _ in 0..8 {
        let (socket, peer) = lingering();
        peers.push(peer);
        let unread = broker.packets(&Identity::attacker());
        for id in 0..4 {
            unread.send(id, issue("main_db"), &[socket.as_fd()]).expect("sent");
        }
    }
    for id in 0..24 {
        let received = attacker.receive().expect("a reply").expect("a reply");
        assert_eq!(received.reply.id, id);
    }
    let mut slowest = Duration::ZERO;
    let mut count = 0;
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(6) {
        let asked = Instant::now();
        let token = client.issue("main_db").expect("a grant").token;
        let secret = memfd(b"secret");
        let own = client.register(register(&database), &[secret.as_fd()]).expect("a grant");
        client.revoke(&own.token).expect("its own");
        client.revoke(&token).expect("its own");
        drop(broker.packets(&Identity::worker()));
        slowest = slowest.max(asked.elapsed());
        count += 1;
        thread::sleep(Duration::from_millis(5));
    }
    println!(
        "32 sockets linger 5 s each; another peer's {count} rounds of 4 requests: slowest {slowest:?}"
    );
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    drop(peers);
}

/// Packets that are no requests: made of good ones, by a generator that always does the same.
fn garbage(count: usize) -> Vec<Vec<u8>> {
    use prost::Message as _;
    let good: Vec<Vec<u8>> = [
        issue("main_db"),
        describe(MADE_UP),
        revoke(MADE_UP),
        Request::Put(put("app")),
        Request::Register(RegisterRequest { connection: "bare_db".into(), ..Default::default() }),
    ]
    .into_iter()
    .map(|request| {
        credbroker_proto::v1::PacketRequest { id: 1, request: Some(request) }.encode_to_vec()
    })
    .collect();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below as u64).unwrap_or_default()
    };
    (0..count)
        .map(|_| match random(4) {
            0 => (0..random(300)).map(|_| random(256).to_le_bytes()[0]).collect(),
            1 => {
                let mut packet = good[random(good.len())].clone();
                packet.truncate(random(packet.len()));
                packet
            }
            2 => {
                let mut packet = good[random(good.len())].clone();
                for _ in 0..=random(4) {
                    let place = random(packet.len());
                    packet[place] = random(256).to_le_bytes()[0];
                }
                packet
            }
            // A length that promises more than there is, of something that nests.
            _ => [&[0x12, 0xff, 0xff, 0xff, 0xff, 0x0f][..], &vec![0x0a; random(2000)]].concat(),
        })
        .collect()
}

#[test]
fn g7_ten_thousand_packets_of_garbage_leave_nothing_behind() {
    const COUNT: usize = 10_000;
    let database = Server::shared().database();
    let broker = broker(&database);
    let packets = broker.packets(&Identity::attacker());
    let file = memfd(b"secret");
    let corpus = garbage(COUNT);
    let mut answered = 0;
    let mut talk = |packets: &Packets, range: &[Vec<u8>]| {
        for (number, packet) in range.iter().enumerate() {
            let with = [file.as_fd(); 3];
            packets.send_raw(packet, &with[..number % 4]).expect("the broker reads");
            let received = packets.receive().expect("a reply").expect("the connection goes on");
            let Some(Reply::Refused(_)) = received.reply.reply else {
                panic!("{received:?} to {packet:?}")
            };
            answered += 1;
        }
    };
    talk(&packets, &corpus[..500]);
    let (fds, kb) = (descriptors(&broker), resident_kb(&broker));
    talk(&packets, &corpus[500..]);
    assert_eventually!(
        descriptors(&broker) <= fds,
        "{} descriptors, before {fds}",
        descriptors(&broker)
    );
    let grown = resident_kb(&broker).saturating_sub(kb);
    println!("{answered} packets of garbage refused; grown by {grown} kB and 0 descriptors");
    assert!(grown < GROWTH_KB / 4, "{grown} kB");
    assert_no_panic(&broker);
    broker.audit().assert_chained();
    broker.packets(&Identity::client()).issue("main_db").expect("still serving");
}

#[test]
fn odd_sizes_and_half_closed_peers_are_answered() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let packets = broker.packets(&Identity::client());
    let field = |packets: &Packets| {
        let received = packets.receive().expect("a reply").expect("the connection goes on");
        match received.reply.reply {
            Some(Reply::Refused(refused)) => (received.reply.id, refused.field),
            other => panic!("{other:?}"),
        }
    };
    packets.send_raw(b"", &[]).expect("an empty packet");
    assert_eq!(field(&packets), (0, "request".to_owned()));
    packets.send_raw(b"", &[memfd(b"x").as_fd()]).expect("an empty packet with a descriptor");
    assert_eq!(field(&packets), (0, "request".to_owned()));
    packets.send_raw(&vec![0; MAX_PACKET + 1], &[]).expect("too long");
    assert_eq!(field(&packets), (0, "packet".to_owned()));
    packets.send_raw(&vec![0; 150_000], &[]).expect("much too long");
    assert_eq!(field(&packets), (0, "packet".to_owned()));
    let long = describe(&"x".repeat(MAX_PACKET - 100));
    packets.send(9, long, &[]).expect("as long as may be");
    let received = packets.receive().expect("a reply").expect("a reply");
    assert_eq!(received.reply.id, 9);
    // Asks, and closes its side: the answers come all the same, and then the end.
    packets.send_raw(b"", &[]).expect("sent");
    packets.send(1, issue("main_db"), &[]).expect("sent");
    packets.send(2, describe(MADE_UP), &[]).expect("sent");
    shutdown(packets.socket(), Shutdown::Write).expect("half closed");
    let ids: Vec<u64> = std::iter::from_fn(|| packets.receive().expect("a reply"))
        .map(|received| received.reply.id)
        .collect();
    assert_eq!(ids, [0, 1, 2]);
}

/// Whether there is room for another packet, now or soon.
fn becomes_writable(socket: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::OUT)];
    let soon = Timespec { tv_sec: 0, tv_nsec: 300_000_000 };
    poll(&mut fds, Some(&soon)).is_ok_and(|ready| ready > 0) && fds[0].revents() == PollFlags::OUT
}

#[test]
fn g7_who_does_not_read_its_replies_is_dropped() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let (idle, kb) = (descriptors(&broker), resident_kb(&broker));
    let deaf: Vec<Packets> = (0..8).map(|_| broker.packets(&Identity::attacker())).collect();
    let long = describe(&"x".repeat(1000));
    let started = Instant::now();
    let mut sent = 0;
    for packets in &deaf {
        use prost::Message as _;
        let bytes = credbroker_proto::v1::PacketRequest { id: 1, request: Some(long.clone()) }
            .encode_to_vec();
        // Until the broker reads no more: a queue that is full for a moment says nothing of that.
        while becomes_writable(packets.socket()) {
            if rustix::net::send(packets.socket(), &bytes, SendFlags::DONTWAIT).is_ok() {
                sent += 1;
            }
        }
    }
    broker.packets(&Identity::client()).issue("main_db").expect("others are served");
    let grown = resident_kb(&broker).saturating_sub(kb);
    assert_eventually!(descriptors(&broker) <= idle + 1, "they are kept");
    println!(
        "8 deaf peers took {sent} requests, grew the broker by {grown} kB, and were dropped after {:?}",
        started.elapsed()
    );
    assert!(grown < GROWTH_KB);
}

#[test]
fn one_uid_cannot_take_all_connections() {
    if !several_or_say("a uid that hoards connections shuts no other out") {
        return;
    }
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let hoard: Vec<Packets> = (0..300).map(|_| broker.packets(&Identity::attacker())).collect();
    let open = hoard.iter().filter(|packets| {
        packets.send(1, describe(MADE_UP), &[]).is_ok()
            && packets.receive().is_ok_and(|received| received.is_some())
    });
    let open = open.count();
    println!("of 300 connections of one uid {open} are served");
    assert!((1..=128).contains(&open), "{open}");
    broker.packets(&Identity::client()).issue("main_db").expect("others are served");
}

#[test]
fn a_connection_that_is_passed_on_keeps_its_first_identity() {
    if !several_or_say("identity belongs to who connected") {
        return;
    }
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let connected = broker.packets(&Identity::client());
    // Another uid gets the descriptor over a socket, and speaks on it.
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .expect("a pair");
    Packets::over(ours).send_raw(b"take it", &[connected.as_fd()]).expect("sent");
    let (served, own) = Identity::attacker()
        .act(|| {
            let passed = Packets::over(theirs).receive_descriptor();
            let served = Packets::over(passed).issue("main_db");
            (served, broker.packets(&Identity::attacker()).issue("main_db"))
        })
        .expect("the thread runs");
    let issued = served.expect("as the client");
    assert_eq!(issued.handle.expect("described").holder, Identity::client().uid());
    assert_eq!(reason(&own.expect_err("no grant of its own")), Reason::AccessDenied);
    let record = broker.audit().of("handle.issued").pop().expect("a record");
    assert_eq!(record.number("peer.uid"), Some(Identity::client().uid().into()));
}

#[test]
fn g2_what_peers_bring_and_take_stays_in_the_arena() {
    if !several_or_say("memory of other processes can be read") {
        return;
    }
    let database = Server::shared().database();
    for backend in ["auto", "memfd"] {
        let client = Identity::client();
        let broker = Broker::usual_setup(&database, Via::Tls)
            .set("arena.backend", backend)
            .bare_connection("bare_db", &database)
            .stored_connection("stored_db", &database)
            .grant(Grant::to(&client, &["register", "open", "reveal"], &["bare_db"]))
            .start();
        let (packets, admin) = (broker.packets(&client), operator(&broker));
        let canary = Canary::random();
        let mut kept = Vec::new();
        for _ in 0..100 {
            let secret = memfd(canary.reveal().as_bytes());
            let issued = packets.register(register(&database), &[secret.as_fd()]).expect("a grant");
            let (_, file) = packets.reveal(&issued.token).expect("a grant");
            drop(file);
            kept.push(issued);
        }
        for text in [canary.reveal().to_owned(), format!("app:{}", canary.reveal())] {
            let username = if text.contains(':') && text.starts_with("app:") { "" } else { "app" };
            admin.put(put(username), &[memfd(text.as_bytes()).as_fd()]).expect("an operator");
        }
        let patterns = canary.patterns();
        let found = memory::scan(broker.pid(), &patterns).expect("the broker can be read");
        println!(
            "{backend}: 100 registers, 100 reveals, 2 puts: {} copies outside the arena",
            found.outside_arena().len()
        );
        assert!(found.outside_arena().is_empty(), "{:?}", found.outside_arena());
        assert!(found.bytes_read > 1 << 20, "hardly anything was read: {found:?}");
        if backend == "memfd" {
            assert!(found.in_arena() >= 100, "the control: {}", found.in_arena());
        } else {
            assert!(found.unreadable_arena > 0 || found.in_arena() >= 100, "{found:?}");
        }
        let hits = memory::scan_files(
            &[broker.setup().path("logs"), broker.setup().path("state")],
            &patterns,
        );
        assert!(hits.is_empty(), "{hits:?}");
        drop(kept);
    }
}
