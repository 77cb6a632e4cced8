//! Metrics: what a scrape says after real sessions, read by a parser that lets nothing pass, and
//! what the socket does to those who hold it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use credbroker_e2e::broker::{Broker, Via};
use credbroker_e2e::canary::Canary;
use credbroker_e2e::identity::{Identity, several_or_say};
use credbroker_e2e::postgres::Server;
use credbroker_e2e::{assert_eventually, wait};
use rustix::process::Signal;

/// What a caller types and nobody configured.
const TYPED: &str = "typed-by-a-caller";

/// One family of a scrape.
#[derive(Debug, Default)]
struct Family {
    kind: String,
    /// The sample's own name and its labels, sorted.
    samples: BTreeMap<(String, Labels), f64>,
}

type Labels = BTreeMap<String, String>;

/// OpenMetrics 1.0 text, strictly: families in one piece with HELP and TYPE before them, samples
/// with the suffixes of their type, no series twice, cumulative buckets, and `# EOF` at the end.
fn parse(text: &str) -> BTreeMap<String, Family> {
    let body = text.strip_suffix("# EOF\n").expect("ends with # EOF");
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let (mut current, mut helped) = (String::new(), String::new());
    for line in body.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').expect("a help text");
            assert!(!help.is_empty() && !families.contains_key(name), "{line}");
            helped = name.to_owned();
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a type");
            assert_eq!(name, helped, "HELP stands before TYPE");
            let family = Family { kind: kind.to_owned(), ..Family::default() };
            assert!(families.insert(name.to_owned(), family).is_none(), "{name} stands twice");
            current = name.to_owned();
        } else {
            let (name, labels, value) = sample(line);
            let family = families.get_mut(&current).unwrap_or_else(|| panic!("alone: {line}"));
            let suffix = name.strip_prefix(&current).unwrap_or_else(|| panic!("astray: {line}"));
            let suffixes: &[&str] = match family.kind.as_str() {
                "counter" => &["_total"],
                "gauge" => &[""],
                "info" => &["_info"],
                "histogram" => &["_bucket", "_sum", "_count"],
                other => panic!("no type of ours: {other}"),
            };
            assert!(suffixes.contains(&suffix), "{line}");
            assert!(family.samples.insert((name, labels), value).is_none(), "twice: {line}");
        }
    }
    families.iter().filter(|(_, family)| family.kind == "histogram").for_each(check_histogram);
    families
}

/// `name{label="value",…} number`. None of our values needs an escape, so none may be there.
fn sample(line: &str) -> (String, Labels, f64) {
    let (series, value) = line.rsplit_once(' ').expect("a value");
    let value: f64 = value.parse().unwrap_or_else(|_| panic!("no number: {line}"));
    let (name, labels) = match series.split_once('{') {
        None => (series, ""),
        Some((name, labels)) => (name, labels.strip_suffix('}').expect("a closing brace")),
    };
    let label = |text: &str| {
        let (key, value) = text.split_once('=').expect("a label");
        let value = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
        let value = value.expect("a quoted value");
        let plain = |c: char| c.is_ascii_alphanumeric() || "_.+-".contains(c);
        assert!(!value.is_empty() && value.chars().all(plain), "a strange value: {line}");
        (key.to_owned(), value.to_owned())
    };
    let labels: Vec<_> = labels.split(',').filter(|text| !text.is_empty()).map(label).collect();
    let count = labels.len();
    let labels = Labels::from_iter(labels);
    assert_eq!(labels.len(), count, "a label twice: {line}");
    (name.to_owned(), labels, value)
}

fn check_histogram((name, family): (&String, &Family)) {
    let mut series: BTreeMap<Labels, Vec<(f64, f64)>> = BTreeMap::new();
    for ((sample, labels), value) in &family.samples {
        if sample.ends_with("_bucket") {
            let mut labels = labels.clone();
            let bound = labels.remove("le").expect("a bucket has a bound").parse().expect("le");
            series.entry(labels).or_default().push((bound, *value));
        }
    }
    for (labels, mut buckets) in series {
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        assert!(buckets.windows(2).all(|pair| pair[0].1 <= pair[1].1), "{name}: {buckets:?}");
        let last = buckets.last().expect("a bucket");
        assert!(last.0.is_infinite(), "{name}: {buckets:?}");
        assert_eq!(Some(&last.1), family.samples.get(&(format!("{name}_count"), labels)));
    }
}

/// The names of 02 and their types, and which values each label may have.
fn assert_contract(families: &BTreeMap<String, Family>) {
    let types = [
        ("credbroker_handles", "gauge"),
        ("credbroker_sessions", "gauge"),
        ("credbroker_requests", "counter"),
        ("credbroker_request_duration_seconds", "histogram"),
        ("credbroker_upstream_connect_duration_seconds", "histogram"),
        ("credbroker_upstream_errors", "counter"),
        ("credbroker_session_bytes", "counter"),
        ("credbroker_denied", "counter"),
        ("credbroker_arena_bytes", "gauge"),
        ("credbroker_audit_records", "counter"),
        ("credbroker_audit_writable", "gauge"),
        ("credbroker_config_last_reload_successful", "gauge"),
        ("credbroker_build", "info"),
    ];
    let found: BTreeMap<&str, &str> =
        families.iter().map(|(name, family)| (name.as_str(), family.kind.as_str())).collect();
    assert_eq!(found, BTreeMap::from(types));

    let mut seen: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (_, labels) in families.values().flat_map(|family| family.samples.keys()) {
        for (label, value) in labels {
            seen.entry(label).or_default().insert(value);
        }
    }
    let only = |label: &str, allowed: &[&str]| {
        let found = &seen[label];
        assert!(found.iter().all(|value| allowed.contains(value)), "{label}: {found:?}");
    };
    only("verb", &["issue", "renew", "revoke", "describe", "open"]);
    only("outcome", &["ok", "refused"]);
    only("connection", &["main_db", "broken_db"]);
    only("direction", &["from_client", "from_server"]);
    only("state", &["own", "registered", "free"]);
    let reasons = ["no_grant", "HANDLE_INVALID", "UPSTREAM_REFUSED", "upstream_refused"];
    only("reason", &reasons);
    only("version", &[env!("CARGO_PKG_VERSION")]);
    let names = ["verb", "outcome", "connection", "direction", "state", "reason", "version", "le"];
    assert!(seen.keys().all(|label| names.contains(label)), "{:?}", seen.keys());
}

/// One request as it stands, and the whole answer.
fn ask(stream: &mut (impl Read + Write), request: &str) -> io::Result<(u16, String, String)> {
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    Ok((status.ok_or(io::ErrorKind::InvalidData)?, head.to_owned(), body.to_owned()))
}

const SCRAPE: &str = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";

fn scrape(stream: &mut (impl Read + Write)) -> BTreeMap<String, Family> {
    let (status, head, body) = ask(stream, SCRAPE).expect("an answer");
    assert_eq!(status, 200, "{head}");
    assert!(head.to_lowercase().contains("content-type: application/openmetrics-text"), "{head}");
    parse(&body)
}

/// Where the kernel put a listener of port 0.
fn address(broker: &Broker) -> SocketAddr {
    let log = broker.log();
    let (_, rest) = log.split_once("metrics at http://").expect("the broker says where");
    rest.split('/').next().and_then(|text| text.parse().ok()).expect("an address")
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("the port is open");
    stream.set_read_timeout(Some(wait::PATIENCE)).expect("a time-out");
    stream
}

#[test]
fn a_scrape_after_real_sessions_says_what_happened_and_nothing_that_was_typed() {
    if !several_or_say("the attacker is somebody else") {
        return;
    }
    let (database, broken) = (Server::shared().database(), Server::shared().database());
    let broker = Broker::usual_setup(&database, Via::Tls)
        .connection("broken_db", &broken, Via::Tls)
        .grant(credbroker_e2e::broker::Grant::to(
            &Identity::client(),
            &["issue", "open"],
            &["broken_db"],
        ))
        .set("metrics.listen", "127.0.0.1:0")
        .start();
    broken.set_server_password(&Canary::random());
    let client = Identity::client();
    let handles = broker.handles(&client);
    let token = handles.issue("main_db").expect("a grant").token;
    let short = handles.issue("main_db").expect("a grant").token;
    handles.renew(&token).expect("renewed");
    handles.describe(&token).expect("described");
    handles.revoke(&short).expect("revoked");
    let mut open = broker.session(&client, "main_db", &token);
    for _round in 0..3 {
        let mut session = broker.session(&client, "main_db", &token);
        session.query("SELECT repeat('x', 100000)").expect("a query");
    }
    // What is refused: a name that is typed, a token that is typed, a uid without a grant, and a
    // database that refuses the broker.
    handles.issue(TYPED).expect_err("no such connection");
    broker.login(&client, TYPED, &token).expect_err("no such connection");
    broker.login(&client, "main_db", TYPED).expect_err("no such handle");
    broker.handles(&Identity::attacker()).issue("main_db").expect_err("no grant");
    let other = handles.issue("broken_db").expect("a grant").token;
    broker.login(&client, "broken_db", &other).expect_err("the server says no");

    let at = address(&broker);
    // A session is counted out when it has been taken down, shortly after its client went.
    assert_eventually!(
        scrape(&mut connect(at))["credbroker_sessions"].samples.values().eq(&[1.0]),
        "one session is open"
    );
    let families = scrape(&mut connect(at));
    assert_contract(&families);
    let value = |name: &str, labels: &[(&str, &str)]| {
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let key = (name.to_owned(), labels.collect::<Labels>());
        let mut all = families.values().filter_map(|family| family.samples.get(&key));
        *all.next().unwrap_or_else(|| panic!("no {key:?} in {families:#?}"))
    };
    let requests =
        |verb, outcome| value("credbroker_requests_total", &[("verb", verb), ("outcome", outcome)]);
    assert_eq!(requests("issue", "ok"), 3.0);
    assert_eq!(requests("issue", "refused"), 2.0);
    assert_eq!(requests("renew", "ok"), 1.0);
    assert_eq!(requests("describe", "ok"), 1.0);
    assert_eq!(requests("revoke", "ok"), 1.0);
    assert_eq!(requests("open", "ok"), 5.0, "one of them met a server that said no");
    assert_eq!(requests("open", "refused"), 1.0);
    let denied = |reason| value("credbroker_denied_total", &[("reason", reason)]);
    assert_eq!(denied("no_grant"), 3.0);
    assert_eq!(denied("HANDLE_INVALID"), 1.0);
    assert_eq!(denied("UPSTREAM_REFUSED"), 1.0);
    let errors = [("connection", "broken_db"), ("reason", "upstream_refused")];
    assert_eq!(value("credbroker_upstream_errors_total", &errors), 1.0);
    let dialled = "credbroker_upstream_connect_duration_seconds_count";
    assert_eq!(value(dialled, &[("connection", "main_db")]), 4.0);
    let bytes = |direction| {
        let labels = [("connection", "main_db"), ("direction", direction)];
        value("credbroker_session_bytes_total", &labels)
    };
    assert!(bytes("from_server") > 300_000.0, "{}", bytes("from_server"));
    assert!((1.0..10_000.0).contains(&bytes("from_client")), "{}", bytes("from_client"));
    assert_eq!(value("credbroker_handles", &[]), 2.0);
    assert_eq!(value("credbroker_audit_writable", &[]), 1.0);
    assert_eq!(value("credbroker_config_last_reload_successful", &[]), 1.0);
    assert!(value("credbroker_arena_bytes", &[("state", "own")]) > 0.0);
    assert_eq!(value("credbroker_arena_bytes", &[("state", "registered")]), 0.0);
    let records = broker.audit().records().len();
    assert_eq!(value("credbroker_audit_records_total", &[]), records as f64);

    // The bytes of a session that is still open are counted as they go, each piece just after the
    // client may have read it.
    let before = bytes("from_server");
    open.query("SELECT repeat('y', 50000)").expect("a query");
    let from_both = || -> f64 {
        let families = scrape(&mut connect(at));
        families["credbroker_session_bytes"].samples.values().sum()
    };
    assert_eventually!(from_both() > before + 50_000.0, "{} after {before}", from_both());
    let (_, _, text) = ask(&mut connect(at), SCRAPE).expect("an answer");
    assert!(!text.contains(TYPED) && !text.contains(database.name()), "{text}");
    assert!(!text.contains(&token) && !text.contains(database.canary().reveal()));
}

#[test]
fn only_get_metrics_is_answered_and_only_on_the_unix_socket_that_is_configured() {
    let database = Server::shared().database();
    let setup = Broker::usual_setup(&database, Via::Tls);
    let path = setup.path("state/metrics.sock");
    let listen = format!("unix:{}", path.display());
    let broker = setup.set("metrics.listen", listen.as_str()).start();
    let mode = path.metadata().expect("the socket is there").permissions().mode() & 0o7777;
    assert_eq!(mode, 0o660);
    let connect = || {
        let stream = UnixStream::connect(&path).expect("the socket takes connections");
        stream.set_read_timeout(Some(wait::PATIENCE)).expect("a time-out");
        stream
    };
    let families = scrape(&mut connect());
    assert!(families.contains_key("credbroker_build"));
    for (request, expected) in [
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        ("GET /metrics/x HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        ("POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 405),
        ("HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        ("NONSENSE\r\n\r\n", 400),
    ] {
        let (status, head, _) = ask(&mut connect(), request).expect("an answer");
        assert_eq!(status, expected, "{request}: {head}");
    }
    let long =
        format!("GET /metrics HTTP/1.1\r\nHost: x\r\nX-Long: {}\r\n\r\n", "a".repeat(1 << 20));
    if let Ok((status, ..)) = ask(&mut connect(), &long) {
        assert_eq!(status, 431);
    }
    drop(scrape(&mut connect()));
    if several_or_say("another uid") {
        Identity::attacker().connect(&path).expect_err("the directory is the broker's alone");
    }
    drop(broker);
}

#[test]
fn slow_clients_cannot_hold_it() {
    let database = Server::shared().database();
    let mut broker =
        Broker::usual_setup(&database, Via::Tls).set("metrics.listen", "127.0.0.1:0").start();
    let at = address(&broker);
    let mut silent: Vec<TcpStream> = (0..100).map(|_| connect(at)).collect();
    for stream in &mut silent {
        // Some have been turned away already.
        let _ = stream.write_all(b"GET /met");
    }
    let asked = Instant::now();
    drop(scrape(&mut connect(at)));
    assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
    // All are let go, the last after its time.
    for stream in &mut silent {
        let mut rest = Vec::new();
        let ended = match stream.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        };
        assert!(ended, "it is still open");
        assert!(!String::from_utf8_lossy(&rest).contains("credbroker_"));
    }
    let elapsed = asked.elapsed();
    assert!(elapsed < Duration::from_secs(12), "{elapsed:?}");

    // And none holds up the end.
    let _slow = connect(at);
    let told = Instant::now();
    let status = broker.end_with(Signal::TERM);
    assert!(status.success() && told.elapsed() < Duration::from_secs(4), "{:?}", told.elapsed());
}
