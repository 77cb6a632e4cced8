//! Handles: how often, how many at once, how long, by whom, and what their holders are told.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use credbroker_e2e::broker::{Broker, Grant, Via};

use credbroker_e2e::handles::{Handles, Refusal};
use credbroker_e2e::identity::{Identity, several_or_say};
use credbroker_e2e::packet::{Packets, memfd, reason};
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::wait::{PATIENCE, holds_for};
use credbroker_e2e::{assert_eventually, binaries};
use credbroker_proto::v1::handle_event::Event;
use credbroker_proto::v1::packet_reply::Reply;
use credbroker_proto::v1::packet_request::Request;
use credbroker_proto::v1::{
    HandleEvent, IssueHandleRequest, PutRequest, Reason, RegisterRequest, ResolveConnectionRequest,
};
use rustix::process::Signal;
use std::os::fd::AsFd as _;
use tonic::{Code, Streaming};

const MADE_UP: &str = "cbh_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

fn request() -> IssueHandleRequest {
    IssueHandleRequest { connection: "main_db".into(), ..Default::default() }
}

fn proto(span: Duration) -> prost_types::Duration {
    prost_types::Duration::try_from(span).expect("a short time")
}

fn wall(time: Option<prost_types::Timestamp>) -> SystemTime {
    SystemTime::try_from(time.expect("a time")).expect("a time of this age")
}

fn sqlstate(broker: &Broker, identity: &Identity, token: &str) -> String {
    match broker.login(identity, "main_db", token) {
        Ok(_session) => "let in".to_owned(),
        Err(error) => error.refusal().sqlstate().to_owned(),
    }
}

#[test]
fn max_uses_is_exact_under_a_race() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let client = Identity::client();
    let service = broker.handles(&client);
    for (round, uses) in [1_u32, 5, 11].into_iter().enumerate() {
        let request = IssueHandleRequest { max_uses: Some(uses), ..request() };
        let token = service.issue_with(request).expect("a grant").token;
        let start = Barrier::new(16);
        let race = |_: usize| {
            start.wait();
            broker.login(&client, "main_db", &token)
        };
        let answers: Vec<_> = thread::scope(|scope| {
            let race = &race;
            let racers: Vec<_> = (0..16).map(|n| scope.spawn(move || race(n))).collect();
            racers.into_iter().map(|racer| racer.join().expect("no panic")).collect()
        });
        let let_in = answers.iter().filter(|answer| answer.is_ok()).count();
        println!("round {round}: {let_in} of 16 let in with max_uses = {uses}");
        assert_eq!(u32::try_from(let_in), Ok(uses));
        for refused in answers.into_iter().filter_map(Result::err) {
            assert_eq!(refused.refusal().sqlstate(), "28P01");
        }
    }
}

#[test]
fn max_sessions_counts_what_is_open_and_a_queue_waits_for_room() {
    let database = Server::shared().database();
    let broker = Broker::usual_setup(&database, Via::Tls).set("limits.queue_timeout", "2s").start();
    let client = Identity::client();
    let request = IssueHandleRequest { max_sessions: Some(2), ..request() };
    let token = broker.handles(&client).issue_with(request).expect("a grant").token;
    let first = broker.session(&client, "main_db", &token);
    let _second = broker.session(&client, "main_db", &token);

    let started = Instant::now();
    assert_eq!(sqlstate(&broker, &client, &token), "53300");
    let waited = started.elapsed();
    assert!(waited >= Duration::from_secs(2), "refused after {waited:?}");
    println!("no room: refused after {waited:?} of a queue_timeout of 2 s");

    let started = Instant::now();
    let waiting = thread::scope(|scope| {
        let waiting = scope.spawn(|| broker.login(&client, "main_db", &token));
        assert!(holds_for(Duration::from_millis(300), || !waiting.is_finished()), "it waits");
        drop(first);
        waiting.join().expect("no panic")
    });
    waiting.expect("there was room in time").query("SELECT 1").expect("a query");
    println!("room after 300 ms: let in after {:?}", started.elapsed());
}

#[test]
fn no_renewal_goes_past_max_lifetime() {
    let database = Server::shared().database();
    let broker = Broker::usual_setup(&database, Via::Tls)
        .set("handles.default_ttl", "2s")
        .set("handles.max_ttl", "2s")
        .set("handles.max_lifetime", "3s")
        .start();
    let service = broker.handles(&Identity::client());
    let begun = Instant::now();
    let issued = service.issue("main_db").expect("a grant");
    let never_after = wall(issued.handle.never_after);
    assert_eq!(never_after, wall(issued.handle.issued) + Duration::from_secs(3));
    let mut renewals = 0;
    let ended = loop {
        match service.renew(&issued.token) {
            Ok(handle) => {
                assert!(wall(handle.expires) <= never_after, "{handle:?}");
                renewals += 1;
            }
            Err(refused) => break refused,
        }
        assert!(begun.elapsed() < PATIENCE, "it is renewed for ever");
        thread::sleep(Duration::from_millis(100));
    };
    let lived = begun.elapsed();
    assert_eq!(ended.reason, "HANDLE_EXPIRED", "{ended:?}");
    assert!(lived >= Duration::from_secs(3), "{lived:?}");
    println!("{renewals} renewals, dead after {lived:?} of a max_lifetime of 3 s");
}

/// Another process of the client's uid that holds a bound handle and a session.
struct Holder {
    child: Child,
    token: String,
}

impl Holder {
    fn start(broker: &Broker, bind: &str) -> Self {
        let mut child = Identity::client()
            .command(binaries::helper())
            .args(["hold-handle", "main_db", bind])
            .args([broker.socket(), broker.door()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the holder starts");
        let mut token = String::new();
        let stdout = child.stdout.as_mut().expect("a pipe");
        BufReader::new(stdout).read_line(&mut token).expect("the holder tells its token");
        let token = token.trim_end().to_owned();
        assert!(token.starts_with("cbh_"), "{token}\n{}", broker.log());
        Self { child, token }
    }

    fn kill(&mut self) {
        self.child.kill().expect("it runs");
        let _status = self.child.wait();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

#[test]
fn a_bound_handle_ends_with_its_process_and_process_means_that_process() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let client = Identity::client();
    for bind in ["lifetime", "process"] {
        let mut holder = Holder::start(&broker, bind);
        assert_eq!(database.backends(), 1, "{bind}: the holder itself redeems");
        let ours = sqlstate(&broker, &client, &holder.token);
        let expected = if bind == "process" { "28P01" } else { "let in" };
        assert_eq!(ours, expected, "{bind}: another process of the same uid");
        let service = broker.handles(&client);
        let mut news = service.watch(&holder.token).expect("of the same uid");

        holder.kill();
        assert_eventually!(database.backends() == 0, "{bind}: a session outlived its holder");
        let token = &holder.token;
        assert_eventually!(service.describe(token).is_err(), "{bind}: the handle lives on");
        assert_eq!(sqlstate(&broker, &client, &holder.token), "28P01");
        assert_eq!(ended(&service, &mut news), "holder_exited");
    }
}

#[test]
fn purpose_and_subject_have_limits() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let service = broker.handles(&Identity::client());
    let mut tried = 0;
    for (purpose, good) in [
        ("a".repeat(64), true),
        ("Report 1_a.b-c".into(), true),
        ("a".repeat(65), false),
        ("line\nbreak".into(), false),
        ("schl\u{f6}sser".into(), false),
        ("a/b".into(), false),
    ] {
        let issued =
            service.issue_with(IssueHandleRequest { purpose: purpose.clone(), ..request() });
        assert_eq!(issued.is_ok(), good, "{purpose:?}");
        tried += 1;
    }
    for (subject, good) in [
        ("~ !\"#".to_owned(), true),
        ("s".repeat(128), true),
        ("s".repeat(129), false),
        ("tab\there".into(), false),
        ("\u{7f}".into(), false),
        ("\u{e9}".into(), false),
    ] {
        let asked = IssueHandleRequest { subject: subject.clone(), ..request() };
        match service.issue_with(asked) {
            Ok(issued) => assert!(good && issued.handle.subject == subject, "{subject:?}"),
            Err(refused) => {
                assert!(!good, "{subject:?}: {refused:?}");
                assert_eq!(refused.reason, "INVALID_REQUEST");
            }
        }
        tried += 1;
    }
    println!("{tried} words tried");
}

fn next(service: &Handles, stream: &mut Streaming<HandleEvent>) -> Event {
    let next = service.next(stream, PATIENCE).expect("news in time").expect("a message");
    next.and_then(|event| event.event).expect("the stream has not ended")
}

/// The reason with which a watched handle ends, and with it the stream.
fn ended(service: &Handles, stream: &mut Streaming<HandleEvent>) -> String {
    let reason = loop {
        match next(service, stream) {
            Event::Ended(ended) => break ended.reason,
            Event::Expiring(_) | Event::Rotated(_) => {}
        }
    };
    let after = service.next(stream, PATIENCE).expect("the stream ends in time");
    assert!(matches!(after, Ok(None)), "{after:?}");
    reason
}

#[test]
fn watchers_are_told() {
    if !several_or_say("a token of another uid") {
        return;
    }
    let database = Server::shared().database();
    let client = Identity::client();
    let mut broker = Broker::usual_setup(&database, Via::Tls)
        .bare_connection("store_db", &database)
        .set("connections.store_db.secret.store", true)
        .grant(Grant::to(&client, &["issue", "open"], &["store_db"]))
        .grant(Grant::to(&client, &["register", "open"], &["store_db"]).with("name", "gone"))
        .grant(Grant::to(&Identity::worker(), &["issue"], &["store_db"]).with("name", "leaves"))
        .start();
    let (service, admin) = (broker.handles(&client), broker.admin(&Identity::own()));

    // Expiring, put off by a renewal, and expired.
    let short = service.issue_for("main_db", Duration::from_secs(2)).expect("a grant");
    let mut news = service.watch(&short.token).expect("its holder");
    let started = Instant::now();
    let Event::Expiring(warning) = next(&service, &mut news) else { panic!("expiring first") };
    assert!(started.elapsed() >= Duration::from_millis(1300), "{:?}", started.elapsed());
    assert_eq!(warning.expires, short.handle.expires);
    let renewed = service.renew(&short.token).expect("the holder");
    let Event::Expiring(warning) = next(&service, &mut news) else { panic!("expiring again") };
    assert_eq!(warning.expires, renewed.expires);
    assert_eq!(ended(&service, &mut news), "expired");

    // Revoked, by the holder.
    let handle = service.issue("main_db").expect("a grant");
    let mut news = service.watch(&handle.token).expect("its holder");
    service.revoke(&handle.token).expect("its holder");
    assert_eq!(ended(&service, &mut news), "revoked");
    // Suspended, by an operator.
    let handle = service.issue("main_db").expect("a grant");
    let mut news = service.watch(&handle.token).expect("its holder");
    admin.suspend(Some("main_db")).expect("an operator");
    assert_eq!(ended(&service, &mut news), "suspended");
    admin.resume(Some("main_db")).expect("an operator");
    // Reloaded: the grant is gone.
    let worker = broker.handles(&Identity::worker());
    let handle = worker.issue("store_db").expect("a grant");
    let mut news = worker.watch(&handle.token).expect("its holder");
    broker.reconfigure(|setup| setup.without_grant("leaves"));
    admin.reload().expect("a good configuration");
    assert_eq!(ended(&worker, &mut news), "reloaded");

    // Rotated: a credential is put.
    let handle = service.issue("store_db").expect("a grant");
    let mut news = service.watch(&handle.token).expect("its holder");
    let operator = Packets::connect(&Identity::own(), &broker.admin_packet_socket()).expect("root");
    let version = put(&operator, &database).expect("an operator");
    let Event::Rotated(rotated) = next(&service, &mut news) else { panic!("rotated") };
    assert_eq!(rotated.credential_version, version);

    // Foreign and unknown tokens alike.
    let stranger = broker.handles(&Identity::attacker());
    let foreign = stranger.watch(&handle.token).expect_err("not his");
    let unknown = stranger.watch(MADE_UP).expect_err("nobody's");
    assert_eq!(foreign.reason, "HANDLE_INVALID");
    assert_eq!(foreign.without_reference(), unknown.without_reference());

    // Sixteen streams on one handle, and room again when one ends.
    // On two connections: one has room for sixteen streams at once, of whatever kind.
    let other = broker.handles(&client);
    let mut streams = vec![news];
    while streams.len() < 16 {
        let service = if streams.len() < 8 { &service } else { &other };
        streams.push(service.watch(&handle.token).expect("up to sixteen"));
    }
    let more = other.watch(&handle.token).expect_err("the seventeenth");
    assert_eq!((more.code, more.reason.as_str()), (Code::ResourceExhausted, "LIMIT_REACHED"));
    drop(streams.pop());
    assert_eventually!(
        other.watch(&handle.token).map(|stream| streams.push(stream)).is_ok(),
        "no room after a stream ended"
    );

    // Draining: all are told.
    broker.process().signal(Signal::TERM);
    for mut stream in streams {
        assert_eq!(ended(&service, &mut stream), "draining");
    }
    let _status = broker.process().wait(PATIENCE);
}

fn put(operator: &Packets, database: &Database) -> Result<u64, Reason> {
    let request = PutRequest {
        connection: "store_db".into(),
        username: database.name().into(),
        ..Default::default()
    };
    let secret = memfd(database.canary().reveal().as_bytes());
    let stored = operator.put(request, &[secret.as_fd()]);
    stored.map(|stored| stored.version).map_err(|refused| reason(&refused))
}

#[test]
fn who_may_renew_revoke_and_describe() {
    if !several_or_say("holder, redeemer, operator and stranger are four uids") {
        return;
    }
    let database = Server::shared().database();
    let (holder, redeemer) = (Identity::numbered(64_130), Identity::numbered(64_131));
    let uid = toml::Table::from_iter([("uid".to_owned(), i64::from(redeemer.uid()).into())]);
    let redeemers = toml::Value::Array(vec![uid.into()]);
    let broker = Broker::usual_setup(&database, Via::Tls)
        .grant(Grant::to(&holder, &["issue", "open"], &["main_db"]).with("redeemers", redeemers))
        .grant(Grant::to(&redeemer, &["open", "issue"], &["main_db"]))
        .start();
    let issue = || {
        let request = IssueHandleRequest { redeemer: Some(redeemer.uid()), ..request() };
        broker.handles(&holder).issue_with(request).expect("a grant").token
    };
    // Who, and whether he renews, describes, revokes.
    let rows = [
        ("holder", &holder, [true, true, true]),
        ("redeemer", &redeemer, [false, true, true]),
        ("operator", &Identity::own(), [false, false, true]),
        ("stranger", &Identity::attacker(), [false, false, false]),
        ("client", &Identity::client(), [false, false, false]),
    ];
    for (who, identity, may) in rows {
        let (service, token) = (broker.handles(identity), issue());
        let done: [Result<(), Refusal>; 3] = [
            service.renew(&token).map(drop),
            service.describe(&token).map(drop),
            service.revoke(&token).map(drop),
        ];
        for (verb, (answer, may)) in
            ["renew", "describe", "revoke"].iter().zip(done.into_iter().zip(may))
        {
            assert_eq!(answer.is_ok(), may, "{who} {verb}: {answer:?}");
            if let Err(refused) = answer {
                assert_eq!(refused.reason, "HANDLE_INVALID", "{who} {verb}");
            }
        }
    }
}

#[test]
fn a_rate_is_kept_and_a_retry_after_the_time_told_works() {
    let database = Server::shared().database();
    let client = Identity::client();
    let broker = Broker::usual_setup(&database, Via::Tls)
        .without_grant("client")
        .grant(Grant::to(&client, &["issue", "open"], &["main_db"]).with("rate_per_second", 2))
        .start();
    let service = broker.handles(&client);
    let mut granted = 0;
    let refused = loop {
        match service.issue("main_db") {
            Ok(_issued) => granted += 1,
            Err(refused) => break refused,
        }
        assert!(granted < 100, "there is no limit");
    };
    assert_eq!((refused.code, refused.reason.as_str()), (Code::ResourceExhausted, "LIMIT_REACHED"));
    let retry = refused.retry.expect("RetryInfo");
    assert!(retry <= Duration::from_millis(500), "{retry:?}");
    thread::sleep(retry);
    service.issue("main_db").expect("after the time that was told");
    println!("{granted} of a burst of 4, then a retry after {retry:?}");
}

#[test]
fn a_full_arena_is_a_limit_for_registrations_only() {
    if !several_or_say("two uids register") {
        return;
    }
    let database = Server::shared().database();
    let (greedy, modest) = (Identity::client(), Identity::numbered(64_132));
    let may = ["register", "open"];
    let broker = Broker::usual_setup(&database, Via::Tls)
        .bare_connection("bare_db", &database)
        .bare_connection("store_db", &database)
        .set("connections.store_db.secret.store", true)
        .set("arena.capacity", "64KiB")
        .set("limits.rate_per_second", 100_000)
        .grant(Grant::to(&greedy, &may, &["bare_db"]))
        .grant(Grant::to(&modest, &may, &["bare_db"]))
        .start();
    let register = |packets: &Packets| {
        let request = RegisterRequest {
            connection: "bare_db".into(),
            username: database.name().into(),
            ..Default::default()
        };
        let secret = memfd(database.canary().reveal().as_bytes());
        packets.register(request, &[secret.as_fd()])
    };
    let packets = broker.packets(&greedy);
    let mut tokens = Vec::new();
    let refused = loop {
        match register(&packets) {
            Ok(issued) => tokens.push(issued.token),
            Err(refused) => break refused,
        }
        assert!(tokens.len() < 10_000, "64 KiB have no end");
    };
    assert_eq!(reason(&refused), Reason::LimitReached, "{refused:?}");
    assert!(!tokens.is_empty());
    println!("64 KiB: {} registrations of one uid, then {}", tokens.len(), refused.message);

    let other = register(&broker.packets(&modest)).expect("another uid has room");
    let operator = Packets::connect(&Identity::own(), &broker.admin_packet_socket()).expect("root");
    assert_eq!(put(&operator, &database), Ok(1));
    let mut session = broker.login(&modest, "bare_db", &other.token).expect("it works");
    session.query("SELECT 1").expect("it works");

    for token in &tokens {
        packets.revoke(token).expect("the holder");
    }
    let again = register(&packets).expect("there is room again");
    let usage = broker.admin(&Identity::own()).status().expect("an answer").arena.expect("told");
    assert!(usage.registered < usage.capacity / 4, "{usage:?}");
    let mut session = broker.login(&greedy, "bare_db", &again.token).expect("it works");
    session.query("SELECT 1").expect("it works");
}

#[test]
fn a_destination_is_resolved_for_whom_it_is_granted() {
    if !several_or_say("a uid without a grant") {
        return;
    }
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let destination = |host: &str, database: &str| ResolveConnectionRequest {
        r#type: "postgresql".into(),
        host: host.into(),
        port: Some(u32::from(Server::shared().port)),
        database: database.into(),
    };
    let there = destination("localhost", database.name());
    let service = broker.handles(&Identity::client());
    assert_eq!(service.resolve(there.clone()), Ok("main_db".to_owned()));
    let stranger = broker.handles(&Identity::attacker());
    let mut refused = vec![stranger.resolve(there.clone()).expect_err("no grant")];
    for (service, unknown) in [
        (&service, destination("db.invalid", database.name())),
        (&service, destination("localhost", "no_such_db")),
        (&service, ResolveConnectionRequest { port: Some(1), ..there }),
        (&stranger, destination("db.invalid", database.name())),
    ] {
        refused.push(service.resolve(unknown).expect_err("no such destination"));
    }
    for refusal in &refused {
        assert_eq!(refusal.reason, "ACCESS_DENIED");
        assert_eq!(refusal.without_reference(), refused[0].without_reference());
    }
}

/// Handles that live at once, if the machine issues them in time.
const MANY: usize = 100_000;
/// How long issuing them may take.
const ISSUING: Duration = Duration::from_secs(9);
/// What is sent ahead of the replies.
const AHEAD: usize = 64;

fn resident_kb(broker: &Broker) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", broker.pid())).expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// Issues handles that all expire at `end`, at most `count` and until `stop`.
fn issue_until(packets: &Packets, end: Instant, count: usize, stop: Instant) -> usize {
    let (mut sent, mut done) = (0, 0);
    while done < sent || (sent < count && Instant::now() < stop) {
        if sent < count && sent - done < AHEAD && Instant::now() < stop {
            let ttl = Some(proto(end.saturating_duration_since(Instant::now())));
            let request = Request::Issue(IssueHandleRequest { ttl, ..request() });
            packets.send(u64::try_from(sent).expect("a number"), request, &[]).expect("it reads");
            sent += 1;
        } else {
            let received = packets.receive().expect("a reply").expect("the connection stays open");
            let reply = received.reply.reply.expect("a reply");
            assert!(matches!(reply, Reply::Issued(_)), "{reply:?}");
            done += 1;
        }
    }
    done
}

/// The median of a hundred single issues.
fn median_issue(packets: &Packets, end: Instant) -> Duration {
    let mut times = VecDeque::new();
    for _ in 0..100 {
        let started = Instant::now();
        assert_eq!(issue_until(packets, end, 1, started + PATIENCE), 1);
        times.push_back(started.elapsed());
    }
    times.make_contiguous().sort();
    times[50]
}

#[test]
fn a_hundred_thousand_handles_live_and_end_at_one_moment() {
    let database = Server::shared().database();
    let broker = Broker::usual_setup(&database, Via::Tls)
        .set("limits.handles", 200_000)
        .set("limits.rate_per_second", 1_000_000)
        .start();
    let (client, admin) = (Identity::client(), broker.admin(&Identity::own()));
    let live = || admin.status().expect("an answer").handles;
    let packets: Vec<_> = (0..4).map(|_| broker.packets(&client)).collect();
    let kept = packets[0].issue("main_db").expect("a grant").token;

    let end = Instant::now() + ISSUING + Duration::from_secs(3);
    let stop = end - Duration::from_secs(3);
    let warm = issue_until(&packets[0], end, 1000, stop);
    let few = median_issue(&packets[0], end);
    let before = (live(), resident_kb(&broker));
    let started = Instant::now();
    let issued: usize = thread::scope(|scope| {
        let issuing: Vec<_> = packets
            .iter()
            .map(|packets| scope.spawn(move || issue_until(packets, end, MANY / 4, stop)))
            .collect();
        issuing.into_iter().map(|issuing| issuing.join().expect("no panic")).sum()
    });
    let took = started.elapsed();
    let after = (live(), resident_kb(&broker));
    assert_eq!(usize::try_from(after.0 - before.0), Ok(issued));
    assert!(Instant::now() < end, "all of them live at once");
    let many = median_issue(&packets[0], end);
    let bytes = (after.1 - before.1) * 1024 / u64::from(after.0 - before.0).max(1);
    println!(
        "{} handles live ({issued} in {took:.1?}, {warm} before): {bytes} B resident for each",
        after.0
    );
    println!(
        "issue p50 {few:?} at 1 000 and {many:?} at {}: x{:.2}",
        after.0,
        many.as_secs_f64() / few.as_secs_f64()
    );

    let mut slowest = Duration::ZERO;
    let mut described = 0;
    let deadline = end + PATIENCE;
    thread::sleep(
        end.saturating_duration_since(Instant::now()).saturating_sub(Duration::from_millis(200)),
    );
    let watching = broker.admin(&Identity::own());
    while watching.status().expect("an answer").handles > 1 {
        for _ in 0..20 {
            let started = Instant::now();
            packets[0].describe(&kept).expect("it lives");
            slowest = slowest.max(started.elapsed());
            described += 1;
        }
        assert!(Instant::now() < deadline, "they live on: {}", live());
    }
    println!(
        "all of them dead {:.1?} after their time; slowest of {described} describes meanwhile: {slowest:?}",
        Instant::now().saturating_duration_since(end)
    );
    assert!(slowest < Duration::from_secs(2), "requests stalled for {slowest:?}");
    packets[0].revoke(&kept).expect("it lived");
    assert_eq!(live(), 0);
    drop(packets);
    assert!(!broker.log().contains("panicked"), "{}", broker.log());
}
