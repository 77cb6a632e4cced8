//! Servers that have proved themselves and go bad, and clients that do: what the relay does.

use std::io::{ErrorKind, Read as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::{Broker, Grant};
use credbroker_e2e::frontend::{Session, cancel_request, message};
use credbroker_e2e::identity::Identity;
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::rogue::{Authority, Evidence, Greeting, Place, Rogue, Script, Verifier, Wire};

use super::{GROWTH_KB, connect, modes, serve, setup, status_kb};

/// Nobody reads for so long.
const STALL: Duration = Duration::from_secs(2);
/// How soon a client is dead, on a loaded machine. The promise is measured elsewhere.
const DEAD: Duration = Duration::from_secs(2);
const FLOOD: usize = 100 << 20;
const MIB: usize = 1 << 20;

/// A broker with a connection to a rogue in each mode, all of the same script.
struct Stage {
    database: Database,
    broker: Broker,
    rogues: Vec<(&'static str, String, Rogue)>,
}

/// The script of a server that lets the broker in and then does `what`; a cancel request does
/// nothing.
fn bad_after_login(
    database: &Database,
    what: impl Fn(&mut Wire) -> std::io::Result<()> + Send + Sync + 'static,
) -> Script {
    let verifier = Verifier::of(database.canary().reveal());
    Arc::new(move |wire| match wire.greet()? {
        Greeting::Startup(_) => {
            wire.let_in(&verifier)?;
            what(wire)
        }
        Greeting::Cancel => Ok(()),
    })
}

impl Stage {
    fn new(script: impl Fn(&Database) -> Script) -> Self {
        let database = Server::shared().database();
        let authority = Authority::generate();
        let mut setup = setup(&database, &authority).grant(Grant::to(
            &Identity::client(),
            &["issue", "open"],
            &["bad-*"],
        ));
        let mut rogues = Vec::new();
        for mode in modes(&authority) {
            let name = format!("bad-{}", mode.name);
            let place = if mode.unix { Place::Unix(setup.path("rogues"), 1) } else { Place::Tcp };
            let rogue = Rogue::start(&place, mode.tls.clone(), script(&database));
            setup = connect(setup, &name, &database, &rogue, &mode);
            rogues.push((mode.name, name, rogue));
        }
        Self { database, broker: setup.start(), rogues }
    }

    /// A session to a rogue, and the token that it can be ended with.
    fn open(&self, connection: &str) -> (Session, String) {
        let client = Identity::client();
        let token = self.broker.handles(&client).issue(connection).expect("a grant").token;
        (self.broker.session(&client, connection, &token), token)
    }

    /// Ends a session by revoking its handle, and gives what its client still reads, and how
    /// soon it reads the end: before the answer to who revokes, which waits for the server too.
    fn cut(&self, session: &Session, token: &str) -> (Vec<u8>, Duration) {
        let service = self.broker.handles(&Identity::client());
        let revoked = Instant::now();
        thread::scope(|scope| {
            scope.spawn(|| service.revoke(token).expect("it is ours"));
            let mut rest = Vec::new();
            match session.frontend.stream().read_to_end(&mut rest) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
                Err(error) => panic!("the client still waits: {error}"),
            }
            (rest, revoked.elapsed())
        })
    }

    /// Runs `attack` while another session works, and gives the slowest query of that one.
    fn meanwhile<T: Send>(&self, attack: impl FnOnce() -> T + Send) -> (T, Duration, usize) {
        let token =
            self.broker.handles(&Identity::client()).issue("main_db").expect("a grant").token;
        let mut other = self.broker.session(&Identity::client(), "main_db", &token);
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let working = scope.spawn(|| {
                let (mut slowest, mut queries) = (Duration::ZERO, 0);
                while !over.load(Ordering::SeqCst) {
                    let asked = Instant::now();
                    other.query("SELECT 1").expect("the other session is unhurt");
                    slowest = slowest.max(asked.elapsed());
                    queries += 1;
                }
                (slowest, queries)
            });
            let attacked = scope.spawn(attack).join();
            over.store(true, Ordering::SeqCst);
            let (slowest, queries) = working.join().expect("the other session is unhurt");
            (attacked.expect("the attack is carried out"), slowest, queries)
        })
    }
}

/// Takes a server's bytes apart: the types of its messages, and of the one that is not whole.
fn take_apart(bytes: &[u8]) -> (Vec<u8>, Option<u8>) {
    let (mut tags, mut rest) = (Vec::new(), bytes);
    while let Some(([tag, length @ ..], body)) = rest.split_first_chunk::<5>() {
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        let Some((_, next)) = body.split_at_checked(length.saturating_sub(4)) else {
            return (tags, Some(*tag));
        };
        tags.push(*tag);
        rest = next;
    }
    let half = rest.first().copied();
    (tags, half)
}

#[test]
fn g6_a_message_of_two_gib_is_carried_and_not_kept() {
    let stage = Stage::new(|database| {
        bad_after_login(database, |wire| {
            wire.receive()?;
            wire.send(&[b"D".as_slice(), &0x7fff_ffff_u32.to_be_bytes()].concat())?;
            wire.drip(std::iter::repeat(b'x'))
        })
    });
    let before = status_kb(&stage.broker, "VmRSS:");
    for (mode, name, _rogue) in &stage.rogues {
        let (mut session, token) = stage.open(name);
        session.start_query("SELECT 1");
        // What came is passed on without the rest.
        let mut begun = [0; 8];
        session.frontend.stream().read_exact(&mut begun).expect("it is carried as it comes");
        assert_eq!(begun, *b"D\x7f\xff\xff\xffxxx");
        let (rest, took) = stage.cut(&session, &token);
        assert!(rest.iter().all(|byte| *byte == b'x'), "{mode}: told in the middle of a message");
        assert!(took < DEAD, "{mode}: {took:?}");
        println!("{mode}: dead after {took:.1?}");
    }
    assert!(status_kb(&stage.broker, "VmRSS:") < before + GROWTH_KB);
    serve(&stage.broker);
}

#[test]
fn g6_a_server_that_never_reads_fills_no_memory() {
    let stage = Stage::new(|database| bad_after_login(database, Wire::ignore));
    for (mode, name, _rogue) in &stage.rogues {
        let (session, token) = stage.open(name);
        let before = status_kb(&stage.broker, "VmRSS:");
        let (taken, slowest, queries) = stage.meanwhile(|| flood_with_queries(&session));
        let grown = status_kb(&stage.broker, "VmRSS:").saturating_sub(before);
        assert!(taken < FLOOD, "{mode}: all of it went somewhere");
        assert!(grown < GROWTH_KB, "{mode}: {grown} kB");
        let (rest, took) = stage.cut(&session, &token);
        assert!(took < DEAD, "{mode}: {took:?}");
        // The server stands between two messages, so the client is told.
        assert!(String::from_utf8_lossy(&rest).contains("57P01"), "{mode}: {rest:?}");
        println!(
            "{mode}: {} kB were taken, the broker grew by {grown} kB, of {queries} queries of \
             another session the slowest took {slowest:.1?}, dead after {took:.1?}",
            taken >> 10
        );
    }
    serve(&stage.broker);
}

/// Writes until nobody takes anything for a while. Gives how much was taken.
fn flood_with_queries(session: &Session) -> usize {
    let mut stream = session.frontend.stream();
    stream.set_write_timeout(Some(STALL)).expect("a socket option");
    let query = message(b'Q', &[b"SELECT '".as_slice(), &[b'x'; 16 << 10], b"'\0"].concat());
    let mut taken = 0;
    while taken < FLOOD {
        match stream.write(&query[taken % query.len()..]) {
            Ok(count) => taken += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
    }
    taken
}

#[test]
fn g6_a_client_that_never_reads_what_a_server_floods_it_with_fills_no_memory() {
    let stage = Stage::new(|database| {
        bad_after_login(database, |wire| {
            wire.receive()?;
            let row =
                message(b'D', &[&[0, 1, 0, 0, 0x40, 0], [b'x'; 16 << 10].as_slice()].concat());
            wire.flood(&row)
        })
    });
    for (mode, name, _rogue) in &stage.rogues {
        let (mut session, token) = stage.open(name);
        let before = status_kb(&stage.broker, "VmRSS:");
        session.start_query("SELECT 1");
        let (after, slowest, queries) = stage.meanwhile(|| {
            // The client does nothing: this is what is tested.
            thread::sleep(STALL);
            status_kb(&stage.broker, "VmRSS:")
        });
        let grown = after.saturating_sub(before);
        assert!(grown < GROWTH_KB, "{mode}: {grown} kB");
        let (rest, took) = stage.cut(&session, &token);
        assert!(took < DEAD, "{mode}: {took:?}");
        assert!(rest.len() < 16 * MIB, "{mode}: {} bytes were waiting", rest.len());
        let (tags, half) = take_apart(&rest);
        let told = tags.contains(&b'E');
        assert!(tags.iter().all(|tag| [b'D', b'E'].contains(tag)), "{mode}: {tags:?}");
        assert!(!told || (half.is_none() && tags.last() == Some(&b'E')), "{mode}: {half:?}");
        println!(
            "{mode}: the broker grew by {grown} kB, {} kB were waiting, of {queries} queries of \
             another session the slowest took {slowest:.1?}, dead after {took:.1?}, told: {told}",
            rest.len() >> 10
        );
    }
    serve(&stage.broker);
}

/// The relay looks into nothing: a question after the login reaches the client, who has no
/// password to answer with, and the broker does not answer.
#[test]
fn g6_what_a_server_asks_after_the_login_is_not_answered_by_the_broker() {
    let stage = Stage::new(|database| {
        bad_after_login(database, |wire| {
            wire.receive()?;
            wire.send(&message(b'R', &[0, 0, 0, 3]))?;
            wire.send(&message(b'R', &[b"\0\0\0\x0a".as_slice(), b"SCRAM-SHA-256\0\0"].concat()))?;
            wire.send(&message(b'Z', b"I"))?;
            wire.hold()
        })
    });
    let evidence = Evidence::of(&stage.database);
    for (mode, name, rogue) in &stage.rogues {
        let (mut session, token) = stage.open(name);
        session.start_query("SELECT 1");
        for expected in [b'R', b'R', b'Z'] {
            let message = session.frontend.receive().expect("an answer").expect("an answer");
            assert_eq!(message.tag, expected, "{mode}");
        }
        let (_rest, _took) = stage.cut(&session, &token);
        assert_eventually!(rogue.open() == 0, "{mode}: the link is held");
        let record = rogue.record();
        assert!(record.opened.ends_with(b"SELECT 1\0"), "{mode}: the broker said more");
        assert_eq!(evidence.found_in(&record), [""; 0], "{mode}");
    }
}

#[test]
fn g6_a_server_that_breaks_off_in_a_message_ends_the_session() {
    let stage = Stage::new(|database| {
        bad_after_login(database, |wire| {
            wire.receive()?;
            wire.send(b"D\0\0\x10\0half of it")?;
            wire.reset()
        })
    });
    for (mode, name, _rogue) in &stage.rogues {
        let (mut session, _token) = stage.open(name);
        session.start_query("SELECT 1");
        let mut rest = Vec::new();
        let _reset_or_end = session.frontend.stream().read_to_end(&mut rest);
        assert!(b"D\0\0\x10\0half of it".starts_with(&rest), "{mode}: {rest:?}");
    }
    assert_eventually!(
        stage.broker.operator().sessions().expect("a list").sessions.is_empty(),
        "a session is left"
    );
    serve(&stage.broker);
}

#[test]
fn g6_a_server_that_does_not_answer_cancel_requests_jams_nobody() {
    const SESSIONS: usize = 8;
    const CANCELS: usize = 200;
    /// One on its way and one after it, five seconds each, and what the machine needs.
    const LET_GO: Duration = Duration::from_secs(16);
    let stage = Stage::new(|database| {
        let verifier = Verifier::of(database.canary().reveal());
        Arc::new(move |wire| match wire.greet()? {
            Greeting::Startup(_) => {
                wire.let_in(&verifier)?;
                wire.hold()
            }
            Greeting::Cancel if wire.number() % 2 == 0 => wire.drip(std::iter::repeat(b'?')),
            Greeting::Cancel => wire.ignore(),
        })
    });
    let Stage { broker, database, .. } = &stage;
    let (_mode, name, rogue) = &stage.rogues[0];
    let sessions: Vec<Session> = (0..SESSIONS).map(|_| stage.open(name).0).collect();
    let token = broker.handles(&Identity::client()).issue("main_db").expect("a grant").token;
    let mut real = broker.session(&Identity::client(), "main_db", &token);
    let cancel = |key: &[u8]| {
        let asked = Instant::now();
        let mut frontend = broker.knock(&Identity::client());
        frontend.send(&cancel_request(key)).expect("the door reads");
        assert_eq!(frontend.receive_rest().expect("the door hangs up"), []);
        asked.elapsed()
    };
    let (slowest, took) = thread::scope(|scope| {
        let cancel = &cancel;
        let storm: Vec<_> = (0..CANCELS)
            .map(|number| {
                let key = sessions[number % SESSIONS].cancel_key.clone();
                scope.spawn(move || cancel(&key))
            })
            .collect();
        assert_eventually!(rogue.accepted() > SESSIONS, "no cancel request has come");
        real.start_query("SELECT pg_sleep(300)");
        assert_eventually!(database.running("pg_sleep") == 1, "the query does not run");
        let key = real.cancel_key.clone();
        let took = cancel(&key);
        let ended = real.finish_query().expect("the session lives on");
        assert_eq!(ended.expect_err("cancelled").sqlstate(), "57014");
        let waited = storm.into_iter().map(|thread| thread.join().expect("it is let go"));
        (waited.max().unwrap_or_default(), took)
    });
    println!(
        "of {CANCELS} cancels to a server that does not answer the last was let go after \
         {slowest:.1?}; one to another server took {took:.1?} meanwhile; the rogue saw {}",
        rogue.accepted() - SESSIONS
    );
    assert!(slowest < LET_GO, "{slowest:?}");
    assert!(took < Duration::from_secs(3), "{took:?}");
    serve(broker);
}
