//! Reading the configuration again: whole or not at all, and what is no longer allowed is dead
//! when the answer comes.

use std::fs::{self, Permissions};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::{Broker, Grant, Setup, Via};
use credbroker_e2e::frontend::Session;
use credbroker_e2e::identity::{Identity, give, several_or_say};
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::proxy::LoginProxy;
use rustix::process::Signal;

/// A peer whose grants come and go.
fn guest() -> Identity {
    Identity::numbered(64_120)
}

fn operator() -> Identity {
    Identity::own()
}

fn guest_grant(connection: &str) -> Grant {
    Grant::to(&guest(), &["issue", "open"], &[connection]).with("name", "guest")
}

fn backend(session: &mut Session) -> String {
    session.query("SELECT pg_backend_pid()").expect("the session lives")[0][0].clone()
}

fn is_cut(session: &mut Session) -> bool {
    !matches!(session.query_or_end("SELECT 1"), Some(Ok(_)))
}

/// The gauge of the last reload.
fn last_reload_successful(broker: &Broker) -> String {
    let log = broker.log();
    let (_, rest) = log.split_once("metrics at http://").expect("the broker says where");
    let mut stream = TcpStream::connect(rest.split('/').next().expect("an address")).expect("open");
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").expect("a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let gauge = "\ncredbroker_config_last_reload_successful ";
    let (_, rest) = answer.split_once(gauge).expect("the gauge is there");
    rest.lines().next().unwrap_or_default().to_owned()
}

/// Reloads by a signal, and waits for its record.
fn hang_up(broker: &mut Broker) {
    let before = broker.audit().of("broker.reloaded").len();
    broker.process().signal(Signal::HUP);
    assert_eventually!(
        broker.audit().of("broker.reloaded").len() > before,
        "no reload after SIGHUP: {}",
        broker.log()
    );
}

#[test]
fn a_reload_gives_and_takes_and_leaves_the_rest_alone() {
    if !several_or_say("peers with grants of their own") {
        return;
    }
    let (database, new) = (Server::shared().database(), Server::shared().database());
    let client = Identity::client();
    let mut broker = Broker::usual_setup(&database, Via::Tls).start();
    let admin = broker.admin(&operator());
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    let mut kept = broker.session(&client, "main_db", &token);
    let pid = backend(&mut kept);
    let told = broker.handles(&guest()).issue("new_db").expect_err("there is none yet");
    assert_eq!(told.reason, "ACCESS_DENIED");

    // By the signal: a new connection and a grant for it.
    broker.reconfigure(|setup| {
        setup.connection("new_db", &new, Via::Tls).grant(guest_grant("new_db"))
    });
    hang_up(&mut broker);
    let service = broker.handles(&guest());
    let guest_token = service.issue("new_db").expect("it is there now").token;
    let mut of_guest = broker.session(&guest(), "new_db", &guest_token);
    of_guest.query("SELECT 1").expect("a query");
    assert_eq!(backend(&mut kept), pid, "what has not changed goes on");

    // By the RPC: the grant goes, and with it its handles and sessions.
    broker.reconfigure(|setup| setup.without_grant("guest"));
    let reloaded = admin.reload().expect("a good configuration");
    assert_eq!((reloaded.sessions_cut, reloaded.handles_revoked), (1, 1), "{reloaded:?}");
    assert_eq!(new.backends(), 0, "backends when the answer came");
    assert!(is_cut(&mut of_guest));
    let gone = service.describe(&guest_token).expect_err("revoked");
    assert_eq!(gone.reason, "HANDLE_INVALID");
    assert_eq!(service.issue("new_db").expect_err("no grant").reason, "ACCESS_DENIED");
    assert_eq!(backend(&mut kept), pid, "what has not changed goes on");

    // A file of conf.d comes and goes.
    let directory = broker.setup().path("etc/conf.d");
    fs::create_dir(&directory).expect("a directory");
    fs::set_permissions(&directory, Permissions::from_mode(0o700)).expect("chmod");
    give(&directory, &Identity::broker()).expect("chown");
    let text = format!(
        "[[grants]]\nname = \"guest\"\npeer = {{ uid = {} }}\nconnections = [\"new_db\"]\n\
         may = [\"issue\", \"open\"]\n",
        guest().uid()
    );
    let file = broker.setup().broker_file("etc/conf.d/guest.toml", &text);
    let reloaded = admin.reload().expect("a good configuration");
    assert_eq!((reloaded.sessions_cut, reloaded.handles_revoked), (0, 0), "{reloaded:?}");
    let token = service.issue("new_db").expect("conf.d grants it").token;
    let mut of_guest = broker.session(&guest(), "new_db", &token);
    fs::remove_file(file).expect("it goes");
    let reloaded = admin.reload().expect("a good configuration");
    assert_eq!((reloaded.sessions_cut, reloaded.handles_revoked), (1, 1), "{reloaded:?}");
    assert!(is_cut(&mut of_guest));

    // A connection goes: so does what was open on it, and its name.
    broker.reconfigure(|setup| setup.without("connections.new_db").grant(guest_grant("main_db")));
    let reloaded = admin.reload().expect("a good configuration");
    assert!(reloaded.changes.iter().any(|line| line == "connection new_db is gone"));
    let token = service.issue("main_db").expect("a grant").token;
    let _session = broker.session(&guest(), "main_db", &token);
    assert_eq!(backend(&mut kept), pid, "what has not changed goes on");
    broker.audit().assert_chained();
}

#[test]
fn another_destination_cuts_what_leads_to_the_old_one() {
    let database = Server::shared().database();
    let (first, second) =
        (LoginProxy::start(database.server()), LoginProxy::start(database.server()));
    let client = Identity::client();
    // Both ports are in the sandbox from the start.
    let mut broker = Broker::usual_setup(&database, Via::Plain(first.port()))
        .connection("other_db", &database, Via::Plain(second.port()))
        .grant(Grant::to(&client, &["issue", "open"], &["other_db"]))
        .start();
    let (admin, service) = (broker.admin(&operator()), broker.handles(&client));
    let token = service.issue("main_db").expect("a grant").token;
    let other = service.issue("other_db").expect("a grant").token;
    let mut kept = broker.session(&client, "other_db", &other);
    let pid = backend(&mut kept);
    let port = i64::from(second.port());
    let changes: [(&str, &dyn Fn(Setup) -> Setup); 2] = [
        ("host", &|setup: Setup| setup.set("connections.main_db.host", "localhost")),
        ("port", &|setup: Setup| setup.set("connections.main_db.port", port)),
    ];
    let mut token = token;
    for (what, change) in changes {
        let mut session = broker.session(&client, "main_db", &token);
        broker.reconfigure(change);
        let reloaded = admin.reload().expect("a good configuration");
        assert_eq!(reloaded.sessions_cut, 1, "{what}: {reloaded:?}");
        assert!(is_cut(&mut session), "{what}");
        assert_eq!(database.backends(), 1, "{what}: backends when the answer came");
        assert_eq!(backend(&mut kept), pid, "{what}: the other connection goes on");
        assert!(reloaded.changes.iter().any(|line| line.contains("main_db leads to")), "{what}");
        token = service.issue("main_db").expect("a grant").token;
    }
    broker.session(&client, "main_db", &token).query("SELECT 1").expect("the new destination");
    let unchanged = admin.reload().expect("the same again");
    assert_eq!((unchanged.sessions_cut, unchanged.handles_revoked), (0, 0), "{unchanged:?}");
    assert!(unchanged.changes.is_empty(), "{unchanged:?}");
}

#[test]
fn a_configuration_that_cannot_be_taken_over_changes_nothing() {
    let database = Server::shared().database();
    let client = Identity::client();
    let mut broker =
        Broker::usual_setup(&database, Via::Tls).set("metrics.listen", "127.0.0.1:0").start();
    let admin = broker.admin(&operator());
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    let mut session = broker.session(&client, "main_db", &token);
    let pid = backend(&mut session);
    let good = fs::read_to_string(broker.setup().path("etc/broker.toml")).expect("it is there");
    assert_eq!(last_reload_successful(&broker), "1");

    let port = database.server().port;
    let new_port = format!("port = {port}");
    assert!(good.contains(&new_port), "{good}");
    let table = |name: &str, rest: &str| good.replace(&format!("[{name}]\n"), rest);
    let with = |more: &str| format!("{good}\n{more}\n");
    let no_grants = |more: &str| {
        let (head, _) = good.split_once("[[grants]]").expect("grants");
        format!("{head}\n{more}\n")
    };
    let exec = format!(
        "[connections.exec_db]\ntype = \"postgresql\"\nhost = \"localhost\"\nport = {port}\n\
         database = \"x\"\nsecret = {{ exec = [\"/bin/echo\", \"a:b\"] }}\n"
    );
    let cases = [
        ("syntax", "[broker".to_owned(), "broker.toml"),
        ("empty secret", no_grants("[connections.main_db.secret]\nfile = \"/nowhere\"\n"), ""),
        ("unknown key", with("[limits]\nno_such = 1"), "no_such"),
        (
            "grant of nothing",
            with("[[grants]]\npeer = { uid = 1 }\nconnections = [\"no_such\"]\nmay = [\"open\"]"),
            "no_such",
        ),
        (
            "runtime_dir",
            table("broker", "[broker]\nadmin_dir = \"/tmp/elsewhere\"\n"),
            "restart required: broker.admin_dir",
        ),
        ("arena", with("[arena]\ncapacity = \"128KiB\""), "restart required: [arena]"),
        ("audit", table("audit", "[audit]\nkeep = 3\n"), "restart required: [audit]"),
        ("metrics", good.replace("127.0.0.1:0", "127.0.0.1:1"), "restart required: [metrics]"),
        ("port", good.replace(&new_port, "port = 1"), "restart required: "),
        ("exec", with(&exec), "restart required"),
    ];
    let mut shown = Vec::new();
    for (name, text, words) in &cases {
        let _written = broker.setup().broker_file("etc/broker.toml", text);
        let refused = admin.reload().expect_err(name);
        assert!(refused.message.contains(words), "{name}: {}", refused.message);
        let problem = admin.status().expect("an answer").last_reload_problem;
        assert!(!problem.is_empty() && refused.message.contains(&problem), "{name}: {problem}");
        assert_eq!(last_reload_successful(&broker), "0", "{name}");
        assert_eq!(backend(&mut session), pid, "{name}");
        broker.handles(&client).issue("main_db").expect(name);
        shown.push(problem);
    }
    println!("{} refused:\n{}", shown.len(), shown.join("\n"));

    // The signal is no other way round.
    hang_up(&mut broker);
    assert_eq!(backend(&mut session), pid);

    let _written = broker.setup().broker_file("etc/broker.toml", &good);
    admin.reload().expect("it is good again");
    assert_eq!(admin.status().expect("an answer").last_reload_problem, "");
    assert_eq!(last_reload_successful(&broker), "1");
    assert_eq!(backend(&mut session), pid);
    broker.reconfigure(|setup| setup);
    admin.reload().expect("a file that was renamed into its place is read");
}

/// Opens sessions one after the other until it is told to stop, and counts them; gives how many
/// were refused.
fn open_sessions(
    broker: &Broker,
    identity: &Identity,
    until: &AtomicBool,
    opened: &AtomicU32,
) -> u32 {
    let service = broker.handles(identity);
    let mut refused = 0;
    while !until.load(Ordering::Relaxed) {
        let session =
            service.issue("main_db").map_err(|refusal| refusal.reason).and_then(|issued| {
                match broker.login(identity, "main_db", &issued.token) {
                    Ok(session) => Ok(session),
                    Err(_refused) => Err("at the door".to_owned()),
                }
            });
        match session {
            Ok(mut session) => {
                // It may be cut at any moment.
                let _cut = session.query_or_end("SELECT 1");
                opened.fetch_add(1, Ordering::Relaxed);
            }
            Err(reason) => {
                assert!(["ACCESS_DENIED", "at the door"].contains(&&*reason), "{reason}");
                refused += 1;
            }
        }
    }
    refused
}

#[test]
fn fifty_reloads_under_load_leave_nothing_behind() {
    if !several_or_say("a peer with a grant that comes and goes") {
        return;
    }
    let database: Database = Server::shared().database();
    let client = Identity::client();
    let mut broker = Broker::usual_setup(&database, Via::Tls).start();
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    let mut kept = broker.session(&client, "main_db", &token);
    let pid = backend(&mut kept);
    let with = broker.setup().path("etc/broker.toml");
    let without_guest = fs::read_to_string(&with).expect("it is there");
    broker.reconfigure(|setup| setup.grant(guest_grant("main_db")));
    let with_guest = fs::read_to_string(&with).expect("it is there");

    let (stop, cut) = (AtomicBool::new(false), AtomicU32::new(0));
    let (opened, guest_opened) = (AtomicU32::new(0), AtomicU32::new(0));
    let broker = &broker;
    let guest_refused = thread::scope(|scope| {
        let steady = scope.spawn(|| open_sessions(broker, &client, &stop, &opened));
        let flapping = scope.spawn(|| open_sessions(broker, &guest(), &stop, &guest_opened));
        let reloads = panic::catch_unwind(AssertUnwindSafe(|| {
            let admin = broker.admin(&operator());
            for round in 0..50 {
                let text = if round % 2 == 0 { &with_guest } else { &without_guest };
                let _written = broker.setup().broker_file("etc/broker.toml", text);
                let reloaded = admin.reload().expect("both are good");
                cut.fetch_add(reloaded.sessions_cut, Ordering::Relaxed);
                // At first it gets in each time, and then reloads outrun logins.
                let before = guest_opened.load(Ordering::Relaxed);
                if round % 2 == 0 && round < 10 {
                    assert_eventually!(
                        guest_opened.load(Ordering::Relaxed) > before,
                        "round {round}: the grant is of no use"
                    );
                }
                if round % 2 == 1 {
                    let sessions = admin.sessions().expect("an answer").sessions;
                    let alien = sessions.iter().find(|session| session.uid == guest().uid());
                    assert!(alien.is_none(), "round {round}: {alien:?}");
                }
            }
        }));
        // Whatever came of it: the others wait for this.
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = reloads {
            panic::resume_unwind(panic);
        }
        let _none = steady.join().expect("no panic");
        flapping.join().expect("no panic")
    });
    let (opened, guest_opened) = (opened.into_inner(), guest_opened.into_inner());
    println!(
        "50 reloads: {opened} sessions of a steady peer, {guest_opened} of a flapping one \
         ({guest_refused} refusals), {} cut by a reload",
        cut.load(Ordering::Relaxed)
    );
    assert!(opened > 0 && guest_opened > 0);
    assert_eq!(backend(&mut kept), pid, "what no reload concerned goes on");
    drop(kept);
    let admin = broker.admin(&operator());
    assert_eventually!(admin.status().expect("an answer").sessions == 0, "a session was left");
    assert_eventually!(database.backends() == 0, "a backend was left");
    assert_eq!(admin.connection("main_db").expect("it is there").sessions, 0);
    assert_eq!(broker.audit().of("broker.reloaded").len(), 50);
    let (opened, closed) =
        (broker.audit().of("session.opened").len(), broker.audit().of("session.closed").len());
    assert_eq!(opened, closed, "each end is recorded");
    broker.audit().assert_chained();
    assert!(!broker.log().contains("panicked"), "{}", broker.log());
}
