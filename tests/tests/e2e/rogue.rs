//! G6: rogue servers get nothing. Whatever a server says or does not say, the client is told in
//! the broker's own words, in bounded time and memory, and no form of the password has been sent.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::{Broker, Grant, Setup, Via};
use credbroker_e2e::frontend::{LoginError, ssl_request};
use credbroker_e2e::identity::Identity;
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::rogue::{
    Authority, Case, Choice, Evidence, Expected, Mode, Place, Rogue, ServerTls, Verifier, cases,
};

#[path = "rogue/configured.rs"]
mod configured;
#[path = "rogue/middle.rs"]
mod middle;
#[path = "rogue/plus.rs"]
mod plus;
#[path = "rogue/relayed.rs"]
mod relayed;

/// For what the broker refuses by itself, on a loaded machine.
const AT_ONCE: Duration = Duration::from_secs(8);
/// For what its clocks end: ten seconds to reach a server, fifteen to log in to it.
const IN_TIME: Duration = Duration::from_secs(30);
/// What all rogues together may make the broker grow by.
const GROWTH_KB: u64 = 64 << 10;
const PLUS: &str = "SCRAM-SHA-256-PLUS";
/// Clients that are at it at once.
const CLIENTS: usize = 12;

/// A connection of the broker's, and the rogue at its end.
struct Bout {
    connection: String,
    mode: Mode,
    case: Case,
    rogue: Rogue,
}

/// How a bout ended.
struct Outcome {
    answer: String,
    took: Duration,
}

fn modes(authority: &Authority) -> Vec<Mode> {
    let trusted = || Some(authority.sign("localhost"));
    vec![
        mode("disable", None),
        Mode { unix: true, ..mode("unix", None) },
        mode("require", trusted()),
        mode("verify-ca", trusted()),
        mode("verify-full", trusted()),
        optional("prefer", "prefer", Choice::First),
        optional("allow", "allow", Choice::First),
    ]
}

/// The modes, and in them what a rogue may choose beside: to refuse the way that is tried first,
/// and to bind SCRAM to its channel.
fn all_modes(authority: &Authority) -> Vec<Mode> {
    let own = || Some(ServerTls::self_signed("localhost"));
    let bound = |name, tls, tls_mode: &str, binding: &str, offers| {
        let keys = vec![("tls.mode", tls_mode.into()), ("channel_binding", binding.into())];
        let (authority, verified) = (tls_mode != "require", tls_mode == "verify-full");
        Mode { keys, offers, authority, verified, ..mode(name, tls) }
    };
    let trusted = Some(authority.sign("localhost"));
    let (plus, both): (&[_], &[_]) = (&[PLUS], &["SCRAM-SHA-256", PLUS]);
    let mut modes = modes(authority);
    modes.extend([
        optional("prefer, told N", "prefer", Choice::Second),
        optional("allow, refused", "allow", Choice::Second),
        bound("require, PLUS", own(), "require", "require", plus),
        bound("require, either", own(), "require", "prefer", both),
        bound("verify-full, PLUS", trusted, "verify-full", "require", plus),
    ]);
    modes
}

/// A mode that leaves a choice, by a server that can speak in both ways.
fn optional(name: &'static str, tls_mode: &str, choice: Choice) -> Mode {
    let keys = vec![("tls.mode", tls_mode.into()), ("tls.insecure", true.into())];
    let asks_tls = (tls_mode == "prefer") == (choice == Choice::First);
    let tls = Some(ServerTls::self_signed("localhost"));
    Mode { keys, choice, asks_tls, ..mode(name, tls) }
}

fn mode(name: &'static str, tls: Option<ServerTls>) -> Mode {
    let tls_mode = if name == "unix" { "disable" } else { name };
    Mode {
        name,
        keys: vec![("tls.mode", tls_mode.into())],
        unix: false,
        asks_tls: tls.is_some(),
        choice: Choice::None,
        offers: &["SCRAM-SHA-256"],
        authority: ["verify-ca", "verify-full"].contains(&name),
        verified: name == "verify-full",
        tls,
    }
}

/// Adds a connection to a rogue: with the true user and password of `main_db`.
fn connect(setup: Setup, name: &str, database: &Database, rogue: &Rogue, mode: &Mode) -> Setup {
    let key = |key: &str| format!("connections.{name}.{key}");
    let secret = setup.path("etc/main_db.secret");
    let ca_file = setup.path("etc/rogue-ca.pem");
    let setup = setup
        .set(&key("type"), "postgresql")
        .set(&key("database"), database.name())
        .set(&key("host"), rogue.host())
        .set(&key("port"), i64::from(rogue.port()))
        .set(&key("secret.file"), secret.to_str().expect("an ASCII path"));
    let setup = if mode.authority {
        setup.set(&key("tls.ca_file"), ca_file.to_str().expect("an ASCII path"))
    } else {
        setup
    };
    mode.keys.iter().fold(setup, |setup, (name, value)| setup.set(&key(name), value.clone()))
}

/// A setup with the authority that rogues have certificates of, and a place for their sockets.
fn setup(database: &Database, authority: &Authority) -> Setup {
    let setup = Broker::usual_setup(database, Via::Tls);
    let _ca_file = setup.broker_file("etc/rogue-ca.pem", &authority.pem());
    DirBuilder::new().mode(0o755).create(setup.path("rogues")).expect("a directory");
    setup.grant(Grant::to(&Identity::client(), &["ambient"], &["rogue-*"]))
}

fn status_kb(broker: &Broker, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", broker.pid())).expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a line of it");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// One login to the real server and one query: how long it takes.
fn serve(broker: &Broker) -> Duration {
    let asked = Instant::now();
    let client = Identity::client();
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    let mut session = broker.session(&client, "main_db", &token);
    session.query("SELECT 1").expect("the broker serves");
    asked.elapsed()
}

fn fight(broker: &Broker, bout: &Bout) -> Outcome {
    let started = Instant::now();
    let answer = match broker.login(&Identity::client(), &bout.connection, "") {
        Ok(_session) => "a session".to_owned(),
        Err(LoginError::Refused(error)) => error.to_string(),
        Err(LoginError::Broken(error)) => format!("broken: {error}"),
    };
    Outcome { answer, took: started.elapsed() }
}

/// What is wrong with an outcome.
fn fault(bout: &Bout, outcome: &Outcome, evidence: &Evidence) -> Option<String> {
    let answer = &outcome.answer;
    let (expected, connections) = bout.case.outcome(&bout.mode);
    let reason = match (expected, bout.mode.verified) {
        (Expected::Untrusted, _) => Some("UPSTREAM_UNTRUSTED"),
        (Expected::Refused | Expected::NoEntry, _) => Some("UPSTREAM_REFUSED"),
        (Expected::Unreachable, _) | (Expected::ItsWordsIfNamed, false) => {
            Some("UPSTREAM_UNREACHABLE")
        }
        (Expected::ItsWordsIfNamed, true) | (Expected::ItsWords, _) => None,
    };
    let limit = if bout.case.is_slow() { IN_TIME } else { AT_ONCE };
    if let Some(reason) = reason {
        if !answer.contains(&format!("[R]{reason}")) || !answer.contains("[C]08006") {
            return Some(format!("not {reason}: {answer}"));
        }
        if answer.contains(cases::WORDS) {
            return Some(format!("the rogue's words: {answer}"));
        }
    } else if answer.contains("UPSTREAM_") || answer.contains("broken") || answer == "a session" {
        return Some(format!("not the server's own words: {answer}"));
    }
    if outcome.took > limit {
        return Some(format!("it took {:?}", outcome.took));
    }
    let record = bout.rogue.record();
    let found = evidence.found_in(&record);
    if !found.is_empty() {
        return Some(format!("the rogue was sent {found:?}"));
    }
    // Before TLS there is SSLRequest.
    if bout.case.nothing_in.contains(&bout.mode.name) && record.opened.len() > ssl_request().len() {
        return Some("something was sent to a server with that certificate".to_owned());
    }
    if record.dropped > 0 {
        return Some(format!("the rogue was sent {} bytes too many", record.dropped));
    }
    let came = bout.rogue.accepted();
    (came != connections).then(|| format!("the broker came {came} times, not {connections}"))
}

#[test]
fn g6_no_server_gets_anything_by_asking_lying_or_stalling() {
    let database = Server::shared().database();
    let evidence = Evidence::of(&database);
    let authority = Authority::generate();
    let mut setup = setup(&database, &authority);
    let bad = cases::BadCertificates {
        wrong_name: authority.sign("elsewhere.example"),
        unknown_authority: Authority::generate().sign("localhost"),
        self_signed: ServerTls::self_signed("localhost"),
    };
    let verifier = Verifier::of(database.canary().reveal());
    let mut bouts = Vec::new();
    for mode in all_modes(&authority) {
        for case in cases::of(&mode, &bad) {
            let connection = format!("rogue-{}", bouts.len());
            let place = if mode.unix {
                Place::Unix(setup.path("rogues"), u16::try_from(bouts.len()).expect("a port") + 1)
            } else {
                Place::Tcp
            };
            let tls = case.tls.clone().or_else(|| mode.tls.clone());
            let rogue = Rogue::start(&place, tls, case.script(&verifier, &mode));
            setup = connect(setup, &connection, &database, &rogue, &mode);
            bouts.push(Bout { connection, mode: mode.clone(), case, rogue });
        }
    }
    let broker = setup.start();
    let quiet = serve(&broker);
    let before = status_kb(&broker, "VmHWM:");

    let outcomes = Mutex::new(Vec::new());
    let (over, next) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (slow, fast): (Vec<&Bout>, Vec<&Bout>) = bouts.iter().partition(|b| b.case.is_slow());
    let note = |bout, outcome| outcomes.lock().expect("no panic").push((bout, outcome));
    let began = Instant::now();
    let (served, slowest) = thread::scope(|scope| {
        let serving = scope.spawn(|| {
            let (mut served, mut slowest) = (0, Duration::ZERO);
            while !over.load(Ordering::SeqCst) {
                slowest = slowest.max(serve(&broker));
                served += 1;
            }
            (served, slowest)
        });
        let (broker, note, next, fast) = (&broker, &note, &next, &fast);
        let waiting: Vec<_> =
            slow.iter().map(|bout| scope.spawn(move || note(*bout, fight(broker, bout)))).collect();
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                scope.spawn(move || {
                    while let Some(bout) = fast.get(next.fetch_add(1, Ordering::SeqCst)) {
                        note(*bout, fight(broker, bout));
                    }
                })
            })
            .collect();
        for thread in clients.into_iter().chain(waiting) {
            thread.join().expect("a client");
        }
        over.store(true, Ordering::SeqCst);
        serving.join().expect("the broker serves all the time")
    });
    let took = began.elapsed();
    let after = serve(&broker);
    let grown = status_kb(&broker, "VmHWM:").saturating_sub(before);

    let outcomes = outcomes.into_inner().expect("no panic");
    println!("{}", table(&outcomes));
    println!(
        "{} bouts in {took:.1?}; the broker's peak grew by {grown} kB; meanwhile {served} logins \
         with a query took at most {slowest:.1?} (before {quiet:.1?}, after {after:.1?})",
        outcomes.len()
    );
    let faults: Vec<String> = outcomes
        .iter()
        .filter_map(|(bout, outcome)| {
            let fault = fault(bout, outcome, &evidence)?;
            Some(format!("{} ({}): {fault}", bout.case.name, bout.mode.name))
        })
        .collect();
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
    assert_eq!(outcomes.len(), bouts.len());
    assert!(grown < GROWTH_KB, "{grown} kB");
    assert!(served > 0);
    for bout in &bouts {
        assert_eventually!(bout.rogue.open() == 0, "{} is held", bout.case.name);
    }
    let log = broker.log();
    assert!(!log.contains("panicked") && !log.contains(cases::WORDS), "{log}");
    // The instrument finds what is there.
    let mut record = bouts[0].rogue.record();
    record.opened.extend_from_slice(database.canary().reveal().as_bytes());
    assert!(!evidence.found_in(&record).is_empty());
}

/// Case by case, what the client was told in each mode, and when.
fn table(outcomes: &[(&Bout, Outcome)]) -> String {
    let mut rows: BTreeMap<&str, BTreeMap<&str, String>> = BTreeMap::new();
    for (bout, outcome) in outcomes {
        let reason = outcome.answer.split_once("[R]").map_or(outcome.answer.as_str(), |(_, r)| r);
        let reason = reason.split('[').next().unwrap_or_default().trim_start_matches("UPSTREAM_");
        let told = if reason.is_empty() { "its own words" } else { reason };
        let cell = format!("{}: {told} {:.0?}", bout.mode.name, outcome.took);
        rows.entry(&bout.case.name).or_default().insert(bout.mode.name, cell);
    }
    let row = |(case, cells): (&str, BTreeMap<&str, String>)| {
        format!("{case:<44} {}", cells.into_values().collect::<Vec<_>>().join(" | "))
    };
    rows.into_iter().map(row).collect::<Vec<_>>().join("\n")
}
