//! Start, stop, crash, and activation by systemd.

use std::fs::{self, DirBuilder};
use std::ops::Not as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::process::Command;
use std::time::{Duration, Instant};

use credbroker_e2e::assert_eventually;
use credbroker_e2e::binaries;
use credbroker_e2e::broker::{Broker, Via};
use credbroker_e2e::handles::Handles;
use credbroker_e2e::identity::{Identity, SOCKET_GROUP, several, several_or_say};
use credbroker_e2e::postgres::Server;
use credbroker_e2e::process::{output, transcript};
use credbroker_e2e::wait::PATIENCE;
use rustix::process::Signal;

#[test]
fn sigterm_drains_and_then_ends_what_is_left() {
    let database = Server::shared().database();
    let mut broker = Broker::usual_setup(&database, Via::Tls).set("broker.drain", "2s").start();
    let client = Identity::client();
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    let mut session = broker.session(&client, "main_db", &token);

    let started = Instant::now();
    broker.process().signal(Signal::TERM);
    session.query("SELECT 1").expect("open sessions go on while the broker drains");
    session.start_query("SELECT pg_sleep(300)");
    // Cut at the deadline while a query runs: at a message boundary, so the reason is told.
    let ended = session.finish_query().expect("a reason").expect_err("the drain is over");
    assert_eq!(ended.sqlstate(), "57P01", "{ended}");
    let status = broker.process().wait(PATIENCE);
    assert_eq!(status.code(), Some(0), "{}", broker.log());
    assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
    assert_eventually!(database.backends() == 0, "the backend lives on");
    assert_eq!(broker.audit().of("session.closed").len(), 1);
    broker.audit().assert_chained();
}

#[test]
fn sigterm_without_sessions_ends_at_once() {
    let database = Server::shared().database();
    let mut broker = Broker::usual_setup(&database, Via::Tls).set("broker.drain", "30s").start();
    let started = Instant::now();
    assert_eq!(broker.end_with(Signal::TERM).code(), Some(0), "{}", broker.log());
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[test]
fn a_second_sigterm_ends_a_drain() {
    let database = Server::shared().database();
    let mut broker = Broker::usual_setup(&database, Via::Tls).set("broker.drain", "60s").start();
    let client = Identity::client();
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    let mut session = broker.session(&client, "main_db", &token);
    broker.process().signal(Signal::TERM);
    session.query("SELECT 1").expect("the drain has begun");
    assert_eventually!(turned_away(&broker, &client), "the broker does not stop accepting");
    let asked = Instant::now();
    broker.process().signal(Signal::TERM);
    let _status = broker.process().wait(PATIENCE);
    assert!(asked.elapsed() < Duration::from_secs(3), "{:?}\n{}", asked.elapsed(), broker.log());
    assert_eventually!(database.backends() == 0, "the backend lives on");
}

#[test]
fn a_second_broker_on_the_same_directory_does_not_start() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let second = output(&mut broker.setup().command("run"), PATIENCE);
    assert!(!second.status.success());
    let said = transcript(&second);
    assert!(said.contains("another broker"), "{said}");
    // The first is none the worse for it.
    broker.handles(&Identity::client()).issue("main_db").expect("the first still serves");
    assert!(broker.login(&Identity::client(), "main_db", "x").is_err());
}

#[test]
fn a_stale_socket_is_taken_over_after_a_crash() {
    let database = Server::shared().database();
    let mut broker = Broker::usual(&database);
    let old = broker.handles(&Identity::client()).issue("main_db").expect("a grant").token;
    broker.restart_after(Signal::KILL);
    let client = Identity::client();
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    drop(broker.session(&client, "main_db", &token));
    // Handles live in the memory of one broker process.
    let gone = broker.login(&client, "main_db", &old).expect_err("an old handle").refusal();
    assert_eq!(gone.sqlstate(), "28P01", "{gone}");
}

#[test]
fn sockets_have_the_modes_that_the_documentation_says() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let check = |path: std::path::PathBuf, with_group: u32, alone: u32| {
        let metadata = fs::metadata(&path).expect("it exists");
        let mode = metadata.permissions().mode() & 0o7777;
        if several() {
            assert_eq!((mode, metadata.gid()), (with_group, SOCKET_GROUP), "{}", path.display());
            assert_eq!(metadata.uid(), Identity::broker().uid(), "{}", path.display());
        } else {
            assert_eq!(mode, alone, "{}", path.display());
        }
    };
    check(broker.socket(), 0o660, 0o600);
    check(broker.packet_socket(), 0o660, 0o600);
    check(broker.door(), 0o660, 0o600);
    check(broker.runtime_dir(), 0o2750, 0o700);
    check(broker.runtime_dir().join("postgres"), 0o2750, 0o700);
    if several_or_say("a uid outside the group cannot connect") {
        let outsider = Identity::attacker().without_groups();
        assert!(outsider.connect(&broker.socket()).is_err());
        assert!(outsider.connect(&broker.door()).is_err());
    }
}

#[test]
fn the_broker_hides_its_memory_from_its_own_uid() {
    if !several_or_say("a reader that is not root") {
        return;
    }
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let memory = format!("/proc/{}/mem", broker.pid());
    let opened = Identity::broker().act(|| fs::File::open(&memory).map(|_file| ()));
    assert!(opened.expect("the thread runs").is_err(), "the broker is dumpable");
    let status = fs::read_to_string(format!("/proc/{}/status", broker.pid())).expect("status");
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    let limits = fs::read_to_string(format!("/proc/{}/limits", broker.pid())).expect("limits");
    let core = limits.lines().find(|line| line.starts_with("Max core")).expect("a core limit");
    assert!(core.split_whitespace().filter(|word| *word == "0").count() == 2, "{core}");
}

#[test]
fn systemd_can_pass_the_sockets_on() {
    let database = Server::shared().database();
    let setup = Broker::usual_setup(&database, Via::Tls);
    let _config = setup.write();
    // systemd makes the directories of its sockets as root, with DirectoryMode=0755.
    for name in ["run/credbroker", "run/credbroker/postgres"] {
        let path = setup.path(name);
        DirBuilder::new().create(&path).expect("a directory");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
    }
    let run = setup.path("run/credbroker");
    let daemon = setup.command("run");
    let mut launcher = Command::new(binaries::helper());
    launcher.arg("activate");
    if several() {
        launcher.arg("--group").arg(SOCKET_GROUP.to_string());
    }
    launcher.args([
        format!("--socket=broker={}/broker.sock", run.display()),
        format!("--socket=packet={}/packet.sock", run.display()),
        format!("--socket=postgres={}/postgres/.s.PGSQL.5432", run.display()),
    ]);
    launcher.arg("--").arg(daemon.get_program()).args(daemon.get_args());
    launcher.env_clear();
    for (key, value) in daemon.get_envs() {
        launcher.env(key, value.unwrap_or_default());
    }
    let broker = setup.start_by(launcher);
    let client = Identity::client();
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    let mut session = broker.session(&client, "main_db", &token);
    session.query("SELECT 1").expect("a query");
    broker.packets(&client).describe(&token).expect("its own handle");
    // The sockets are systemd's: made by it, and left in place.
    assert_eq!(fs::metadata(broker.socket()).expect("a socket").uid(), Identity::own().uid());
}

/// Whether the sockets of a draining broker turn newcomers away.
fn turned_away(broker: &Broker, identity: &Identity) -> bool {
    Handles::connect(identity, &broker.socket())
        .is_ok_and(|handles| handles.issue("main_db").is_ok())
        .not()
}
