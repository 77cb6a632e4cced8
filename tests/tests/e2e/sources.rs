//! Where credentials come from: every kind of source, the keeper that runs programs for some of
//! them, and what happens when they change, fail, or say too much.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::{Broker, Grant, Setup, Via};
use credbroker_e2e::canary::{Canary, random_word};
use credbroker_e2e::identity::{Identity, give, several_or_say};
use credbroker_e2e::memory;
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::process::{output, transcript};
use credbroker_e2e::wait::{PATIENCE, holds_for};
use rustix::process::{Pid, Signal, kill_process};
use toml::{Table, Value};

/// sysexits(3): the same start may succeed later.
const UNAVAILABLE: i32 = 69;
/// What a broker logs when a source gave another credential.
const ROTATED: &str = "the source has another credential";

/// A connection whose secret comes from elsewhere than the usual file.
fn connection(setup: Setup, name: &str, database: &Database, secret: Table) -> Setup {
    setup
        .connection(name, database, Via::Tls)
        .set(&format!("connections.{name}.secret"), secret)
        .grant(Grant::to(&Identity::client(), &["ambient"], &[name]))
}

fn one(key: &str, value: impl Into<Value>) -> Table {
    Table::from_iter([(key.to_owned(), value.into())])
}

fn exec(script: &Path) -> Table {
    one("exec", vec![Value::from(text(script))])
}

fn text(path: &Path) -> &str {
    path.to_str().expect("the harness makes its paths of ASCII")
}

/// A shell script that the broker can run.
fn script(setup: &Setup, name: &str, body: &str) -> PathBuf {
    let path = setup.broker_file(&format!("etc/{name}.sh"), &format!("#!/bin/sh\n{body}\n"));
    fs::set_permissions(&path, Permissions::from_mode(0o700)).expect("chmod");
    path
}

fn directory(setup: &Setup, name: &str) -> PathBuf {
    let path = setup.path(&format!("etc/{name}"));
    fs::create_dir_all(&path).expect("a directory");
    give(&path, &Identity::broker()).expect("chown");
    path
}

/// Logs in and asks who that is.
fn logs_in(broker: &Broker, name: &str) -> String {
    let mut session = broker.session(&Identity::client(), name, "");
    let rows = session.query("SELECT current_user").expect("a query");
    rows[0][0].clone()
}

fn can_log_in(broker: &Broker, name: &str) -> bool {
    broker.login(&Identity::client(), name, "").is_ok()
}

/// The processes whose command line has `marker`.
fn running(marker: &str) -> Vec<u32> {
    let all = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|argument| argument == marker.as_bytes())
    })
    .collect()
}

/// A time to sleep that nobody else sleeps.
fn marker() -> String {
    let word = random_word(12);
    let digits: String = word.bytes().map(|byte| char::from(b'0' + byte % 10)).collect();
    format!("9{digits}")
}

fn keeper_of(broker: &Broker) -> u32 {
    let pid = broker.pid();
    let path = format!("/proc/{pid}/task/{pid}/children");
    let children = fs::read_to_string(path).expect("the broker is there");
    let children: Vec<u32> =
        children.split_whitespace().map(|child| child.parse().expect("a pid")).collect();
    assert_eq!(children.len(), 1, "one keeper and nothing else: {children:?}");
    let name = fs::read_to_string(format!("/proc/{}/comm", children[0])).expect("it is there");
    assert_eq!(name, "credbroker-keep\n");
    children[0]
}

fn kill(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a pid");
    kill_process(pid, signal).expect("it is there");
}

fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with('Z'))
}

fn status(pid: u32, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("it is there");
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{key}:")));
    line.unwrap_or_else(|| panic!("no {key} in {text}")).trim().to_owned()
}

#[test]
fn every_kind_of_source_logs_in() {
    let database = Server::shared().database();
    let setup = Setup::new();
    let (user, password) = (database.name(), database.canary().reveal());
    let file = setup.secret_file("given", &database.secret());
    let password_file = setup.secret_file("password", password);
    let user_file = setup.secret_file("user", &format!("{user}\n"));
    let dir = directory(&setup, "dir");
    let _written = setup.broker_file("etc/dir/username", &format!("{user}\n"));
    let _written = setup.broker_file("etc/dir/password", &format!("{password}\n"));
    let credentials = directory(&setup, "credentials");
    let _written = setup.broker_file("etc/credentials/main-db", &database.secret());
    // It runs only if its environment is what it ought to be, and takes its time.
    let program = script(
        &setup,
        "program",
        &format!(
            "sleep 1
             found=$(env | grep -v '^\\(PWD\\|OLDPWD\\|SHLVL\\|_\\)=' | sort | tr '\\n' ' ')
             [ \"$found\" = 'LANG=C.UTF-8 PATH=/usr/local/bin:/usr/bin:/bin ' ] || exit 9
             setsid sleep 86400 & echo noise >&2; exec cat {}",
            file.display()
        ),
    );
    let word = script(&setup, "word", &format!("cat {}", password_file.display()));

    let names = ["file", "dir", "env", "systemd", "program", "with_user", "with_user_file"];
    let setup = setup
        .environment("CREDENTIALS_DIRECTORY", text(&credentials))
        .environment("MAIN_DB_CREDENTIALS", &database.secret())
        .environment("UNRELATED", "not for programs");
    let setup = connection(setup, "file", &database, one("file", text(&file)));
    let setup = connection(setup, "dir", &database, one("dir", text(&dir)));
    let setup = connection(setup, "env", &database, one("env", "MAIN_DB_CREDENTIALS"));
    let setup = connection(setup, "systemd", &database, one("systemd", "main-db"));
    let setup = connection(setup, "program", &database, exec(&program));
    let setup = connection(setup, "with_user", &database, exec(&word))
        .set("connections.with_user.username", user);
    let setup = connection(setup, "with_user_file", &database, exec(&word))
        .set("connections.with_user_file.username", one("file", text(&user_file)));
    // Nothing yet, which is no reason not to start.
    let setup = connection(setup, "store", &database, one("store", true));
    let broker = setup.start();
    for name in names {
        assert_eq!(logs_in(&broker, name), user, "{name}");
    }
    assert!(!can_log_in(&broker, "store"));
    println!("{} kinds of source log in", names.len());
}

/// Starts a broker whose only secret comes from `body`, which is expected to fail.
fn refused(body: &str, timeout: &str) -> (Output, Duration) {
    let database = Server::shared().database();
    let setup = Setup::new();
    let program = script(&setup, "program", body);
    let mut secret = exec(&program);
    secret.insert("timeout".into(), timeout.into());
    let setup = connection(setup, "main_db", &database, secret);
    let _config = setup.write();
    let began = Instant::now();
    let done = output(&mut setup.command("run"), PATIENCE);
    (done, began.elapsed())
}

#[test]
fn a_program_that_fails_ends_the_start_and_nothing_it_said_is_told() {
    let canary = Canary::random();
    let word = canary.reveal();
    let patterns = canary.patterns();
    let (hung, escaped) = (marker(), marker());
    let cases = [
        (format!("echo app:{word}; exit 3"), "ended with status 3", 10),
        (format!("echo {word} >&2; exit 1"), "ended with status 1", 10),
        (format!("echo app:{word}; kill -KILL $$"), "was ended by signal 9", 10),
        (format!("exec yes {word}"), "printed more than 16384 bytes", 10),
        (format!("trap '' PIPE TERM; while :; do echo {word}; done"), "more than 16384", 10),
        ("echo nocolonhere".to_owned(), "username:password", 10),
        (
            format!("sleep {hung} & setsid sleep {escaped} & echo app:{word}; wait"),
            "longer than 2s",
            15,
        ),
    ];
    for (body, says, within) in &cases {
        let (done, took) = refused(body, "2s");
        let said = transcript(&done);
        assert!(said.contains(says), "{says}: {said}");
        assert!(took < Duration::from_secs(*within), "{says}: {took:?}");
        assert!(patterns.iter().all(|pattern| !pattern.is_in(said.as_bytes())), "{said}");
        let expected = if says.contains(':') { 78 } else { UNAVAILABLE };
        assert_eq!(done.status.code(), Some(expected), "{said}");
    }
    assert_eventually!(
        running(&hung).is_empty() && running(&escaped).is_empty(),
        "what a program started outlives it"
    );
    println!("{} bad programs refused; 0 of their processes left", cases.len());
}

/// A broker whose program hangs from its second run on, with children in and out of its group.
fn hanging(database: &Database, markers: [&str; 3]) -> Broker {
    let setup = Setup::new();
    let file = setup.secret_file("given", &database.secret());
    let flag = setup.path("etc/hang");
    let [own, child, escaped] = markers;
    let program = script(
        &setup,
        "program",
        &format!(
            "[ -e {} ] || exec cat {}
             sleep {child} & setsid sleep {escaped} & exec sleep {own}",
            flag.display(),
            file.display()
        ),
    );
    let mut secret = exec(&program);
    secret.insert("refresh".into(), "1s".into());
    secret.insert("timeout".into(), "5m".into());
    let broker = connection(setup, "main_db", database, secret).start();
    assert_eq!(logs_in(&broker, "main_db"), database.name());
    let _written = broker.setup().broker_file("etc/hang", "");
    assert_eventually!(
        markers.iter().all(|marker| running(marker).len() == 1),
        "the program does not run: {}",
        broker.log()
    );
    broker
}

#[test]
fn a_killed_broker_takes_keeper_and_programs_with_it() {
    let database = Server::shared().database();
    let markers = [marker(), marker(), marker()];
    let mut broker = hanging(&database, markers.each_ref().map(String::as_str));
    let keeper = keeper_of(&broker);
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        kill(keeper, signal);
    }
    assert!(holds_for(Duration::from_millis(300), || is_running(keeper)), "a signal ended it");
    assert!(can_log_in(&broker, "main_db"), "a program that hangs holds nobody up");

    let killed = Instant::now();
    let _status = broker.end_with(Signal::KILL);
    assert_eventually!(!is_running(keeper), "the keeper outlives the broker");
    assert_eventually!(
        markers.iter().all(|marker| running(marker).is_empty()),
        "a program outlives the broker"
    );
    println!("keeper and 3 processes gone {:?} after SIGKILL of the broker", killed.elapsed());
}

#[test]
fn a_killed_keeper_is_told_of_and_credentials_stay() {
    let database = Server::shared().database();
    let markers = [marker(), marker(), marker()];
    let broker = hanging(&database, markers.each_ref().map(String::as_str));
    let keeper = keeper_of(&broker);
    kill(keeper, Signal::KILL);
    assert_eventually!(broker.log().contains("the keeper process is gone"), "{}", broker.log());
    assert_eventually!(running(&markers[0]).is_empty(), "the program outlives the keeper");
    assert_eventually!(
        broker.log().contains("cannot be run, because the keeper process is gone"),
        "the refresh does not fail: {}",
        broker.log()
    );
    let remains = format!("/proc/{keeper}");
    assert_eventually!(!Path::new(&remains).exists(), "it was not reaped");
    assert_eq!(logs_in(&broker, "main_db"), database.name());
    for stray in markers.iter().flat_map(|marker| running(marker)) {
        kill(stray, Signal::KILL);
    }
}

#[test]
fn the_keeper_holds_no_secret_and_nothing_else() {
    if !several_or_say("memory of other processes can be read") {
        return;
    }
    let database = Server::shared().database();
    let unrelated = Canary::random();
    let setup = Setup::new();
    let file = setup.secret_file("given", &database.secret());
    let program = script(&setup, "program", &format!("cat {}", file.display()));
    let setup = setup
        .set("arena.backend", "memfd")
        .environment("MAIN_DB_CREDENTIALS", &database.secret())
        .environment("UNRELATED", unrelated.reveal());
    let setup = connection(setup, "env", &database, one("env", "MAIN_DB_CREDENTIALS"));
    let setup = connection(setup, "file", &database, one("file", text(&file)));
    let broker = connection(setup, "program", &database, exec(&program)).start();
    for name in ["env", "file", "program"] {
        assert_eq!(logs_in(&broker, name), database.name());
    }
    let keeper = keeper_of(&broker);
    let patterns = [database.canary().patterns(), unrelated.patterns()].concat();
    let found = memory::scan(keeper, &patterns).expect("the keeper can be read");
    assert!(found.hits.is_empty() && found.bytes_read > 1 << 20, "{found:?}");
    assert!(found.unreadable.is_empty() && found.unreadable_arena == 0, "{found:?}");
    let around = memory::scan_surroundings(keeper, &patterns).expect("the keeper is there");
    assert!(around.is_empty(), "{around:?}");
    let maps = fs::read_to_string(format!("/proc/{keeper}/maps")).expect("its maps");
    assert!(!maps.contains("memfd") && !maps.contains("secretmem"), "{maps}");
    // The control: the same search finds them where they are.
    let control = memory::scan(broker.pid(), &patterns).expect("the broker can be read");
    assert!(control.in_arena() > 0, "{control:?}");

    let open = fs::read_dir(format!("/proc/{keeper}/fd")).expect("its descriptors").count();
    assert_eq!(open, 5, "nothing, nothing, standard error, the socket, the channel");
    assert_eq!(status(keeper, "Threads"), "2", "for programs, and for sockets");
    for pid in [keeper, broker.pid()] {
        assert_eq!(status(pid, "NoNewPrivs"), "1");
        assert_eq!(status(pid, "Seccomp"), "2");
        assert_eq!(status(pid, "CapEff"), "0000000000000000");
        assert_eq!(status(pid, "CapPrm"), "0000000000000000");
    }
    println!(
        "0 copies in {} bytes of the keeper; RSS {}, of it anonymous {}",
        found.bytes_read,
        status(keeper, "VmRSS"),
        status(keeper, "RssAnon")
    );
}

#[test]
fn a_file_that_is_replaced_and_a_volume_that_is_swapped_are_read_again() {
    let database = Server::shared().database();
    let setup = Setup::new();
    let file = setup.secret_file("given", &database.secret());
    // As Kubernetes lays a volume out: the files are links through a link that is swapped.
    let volume = directory(&setup, "volume");
    let user = database.name().to_owned();
    let lay = |setup: &Setup, version: &str, password: &str| {
        directory(setup, &format!("volume/..{version}"));
        let _written = setup.broker_file(&format!("etc/volume/..{version}/username"), &user);
        let _written = setup.broker_file(&format!("etc/volume/..{version}/password"), password);
    };
    lay(&setup, "1", database.canary().reveal());
    symlink("..1", volume.join("..data")).expect("a link");
    for name in ["username", "password"] {
        symlink(format!("..data/{name}"), volume.join(name)).expect("a link");
    }
    let linked = setup.path("etc/linked");
    symlink(&file, &linked).expect("a link");
    let setup = connection(setup, "file", &database, one("file", text(&file)));
    let setup = connection(setup, "linked", &database, one("file", text(&linked)));
    let broker = connection(setup, "volume", &database, one("dir", text(&volume))).start();
    let names = ["file", "linked", "volume"];
    for name in names {
        assert_eq!(logs_in(&broker, name), user);
    }
    let kept = broker.session(&Identity::client(), "file", "");

    let mut slowest = Duration::ZERO;
    for (turn, version) in (1..).zip(["2", "3"]) {
        let password = Canary::random();
        database.set_server_password(&password);
        let secret = format!("{user}:{}", password.reveal());
        let new = broker.setup().broker_file("etc/new", &secret);
        lay(broker.setup(), version, password.reveal());
        symlink(format!("..{version}"), volume.join("..new")).expect("a link");
        let changed = Instant::now();
        fs::rename(new, &file).expect("a replacement");
        fs::rename(volume.join("..new"), volume.join("..data")).expect("a swap");
        assert_eventually!(
            broker.log().matches(ROTATED).count() == turn * names.len(),
            "not read again: {}",
            broker.log()
        );
        slowest = slowest.max(changed.elapsed());
        for name in names {
            assert_eq!(logs_in(&broker, name), user, "{name}");
        }
    }
    let mut kept = kept;
    kept.query("SELECT 1").expect("nothing is cut by the change itself");
    assert!(slowest < Duration::from_secs(10), "{slowest:?}");
    println!("2 rotations of {} sources picked up, the slowest after {slowest:?}", names.len());
}

#[test]
fn a_source_that_goes_bad_keeps_what_was_good() {
    let database = Server::shared().database();
    let setup = Setup::new();
    let file = setup.secret_file("given", &database.secret());
    let broker = connection(setup, "main_db", &database, one("file", text(&file))).start();
    for (bad, says) in [(Some("nocolon"), "username:password"), (None, "No such file")] {
        match bad {
            Some(content) => fs::write(&file, content).expect("written"),
            None => fs::remove_file(&file).expect("removed"),
        }
        assert_eventually!(
            broker
                .log()
                .lines()
                .any(|line| line.contains("stays as it was") && line.contains(says)),
            "{says} is not told: {}",
            broker.log()
        );
        assert_eq!(logs_in(&broker, "main_db"), database.name());
    }
    let password = Canary::random();
    database.set_server_password(&password);
    let secret = format!("{}:{}", database.name(), password.reveal());
    let _written = broker.setup().broker_file("etc/given.secret", &secret);
    assert_eventually!(broker.log().contains("can be read again"), "{}", broker.log());
    assert_eventually!(broker.log().contains(ROTATED), "{}", broker.log());
    assert_eq!(logs_in(&broker, "main_db"), database.name());
    let hits = memory::scan_files(&[broker.setup().path("logs")], &password.patterns());
    assert!(hits.is_empty(), "{hits:?}");
}
