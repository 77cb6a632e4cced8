//! Where the password is not: in no worker, no client, no log, and once in the broker.

use std::collections::HashSet;
use std::fs;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::{Broker, Grant, Setup, Via};
use credbroker_e2e::canary::{Canary, Pattern};
use credbroker_e2e::holder::Holder;
use credbroker_e2e::identity::{Identity, several_or_say};
use credbroker_e2e::memory::{self, Scan};
use credbroker_e2e::packet::{Packets, memfd};
use credbroker_e2e::postgres::{Database, Method, Server};
use credbroker_e2e::process::{Process, output, transcript};
use credbroker_e2e::worker::Worker;
use credbroker_proto::v1::{PutRequest, RegisterRequest, ValidateConnectionRequest};
use serde_json::json;

fn all_patterns(database: &Database) -> Vec<Pattern> {
    [database.canary().patterns(), database.derived_patterns()].concat()
}

/// Asserts that the process and what surrounds it hold none of the patterns.
pub(crate) fn assert_clean(name: &str, pid: u32, patterns: &[Pattern]) {
    let found = memory::scan(pid, patterns).expect("the process can be read");
    assert!(found.hits.is_empty(), "{name}: {:?}", found.hits);
    assert!(found.bytes_read > 1 << 20, "{name}: hardly anything was read: {found:?}");
    assert!(found.unreadable.is_empty(), "{name}: {:?}", found.unreadable);
    let around = memory::scan_surroundings(pid, patterns).expect("the process is there");
    assert!(around.is_empty(), "{name}: {around:?}");
}

/// Asserts that the broker holds the patterns in its arena at most.
fn assert_only_in_arena(broker: &Broker, patterns: &[Pattern]) -> Scan {
    let found = memory::scan(broker.pid(), patterns).expect("the broker can be read");
    assert!(found.outside_arena().is_empty(), "{:?}", found.outside_arena());
    assert!(found.bytes_read > 1 << 20, "hardly anything was read: {found:?}");
    assert!(found.unreadable.is_empty(), "{:?}", found.unreadable);
    assert!(
        found.unreadable_arena > 0 || found.in_arena() > 0,
        "no arena, or nothing in it: is this the process that logged in? {found:?}"
    );
    found
}

/// Asserts that no log and no other file of the run has the password.
fn assert_files_clean(broker: &Broker, database: &Database) {
    let patterns = database.canary().patterns();
    let places: Vec<PathBuf> = vec![
        broker.setup().path("logs"),
        broker.setup().path("run"),
        broker.setup().path("state"),
        database.server().log.clone(),
    ];
    let hits = memory::scan_files(&places, &patterns);
    assert!(hits.is_empty(), "{hits:?}");
    // The one place where it must be: the file that the operator gave.
    let given = memory::scan_files(&[broker.setup().path("etc")], &patterns);
    assert!(!given.is_empty(), "the search finds what is there");
}

#[test]
fn g1_no_worker_ever_holds_a_secret() {
    if !several_or_say("memory of other processes can be read") {
        return;
    }
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let mut worker = Worker::start(&broker, &Identity::worker());
    let sql = |text: &str| json!({ "database": "main_db", "sql": text });
    for _round in 0..20 {
        let row = worker.call("execute_sql", &sql("SELECT count(*) AS n FROM pg_class"));
        assert!(!row.is_error, "{}", row.raw);
    }
    let wrong = worker.call("execute_sql", &sql("SELECT * FROM pg_authid"));
    assert!(wrong.is_error, "{}", wrong.raw);
    worker.call("list_connections", &json!({}));
    let connected = worker.call("connect_named_storage", &json!({ "connection_name": "main_db" }));
    let id = connected.text("/connection_id").to_owned();
    let row = worker.call("execute_query", &json!({ "connection_id": id, "query": "SELECT 1" }));
    assert!(!row.is_error, "{}", row.raw);

    let mut psql = broker.cli(&Identity::client());
    psql.args(["exec", "main_db", "--", "psql", "-X", "-c", "SELECT pg_sleep(300)"]);
    let exec = Process::start("exec", &mut psql, &broker.setup().path("logs"));
    assert_eventually!(database.running("pg_sleep") == 1, "{}", exec.stderr());

    let patterns = all_patterns(&database);
    assert_clean("worker", worker.pid(), &patterns);
    assert_clean("credbroker exec", exec.pid(), &patterns);
    for child in children(exec.pid()) {
        assert_clean("psql", child, &patterns);
    }
    let transcript = worker.transcript();
    assert!(patterns.iter().all(|pattern| !pattern.is_in(transcript.as_bytes())));
    assert_files_clean(&broker, &database);
}

#[test]
fn g2_the_broker_holds_the_secret_in_its_arena_only() {
    if !several_or_say("memory of other processes can be read") {
        return;
    }
    let database = Server::shared().database();
    for backend in ["auto", "memfd"] {
        let broker = Broker::usual_setup(&database, Via::Tls).set("arena.backend", backend).start();
        let client = Identity::client();
        let token = broker.handles(&client).issue("main_db").expect("a grant").token;
        let mut sessions = Vec::new();
        for round in 0..40 {
            let mut session = broker.session(&client, "main_db", &token);
            session.query("SELECT 1").expect("a query");
            session.query("SELECT nothing").expect_err("an error");
            if round % 10 == 0 {
                sessions.push(session);
            }
        }
        let found = assert_only_in_arena(&broker, &all_patterns(&database));
        assert_files_clean(&broker, &database);
        if backend == "memfd" {
            // The control: where the arena can be read, the search finds what it looks for.
            let forms: HashSet<&str> = found.hits.iter().map(|hit| hit.form.as_str()).collect();
            assert!(forms.contains("raw"), "{forms:?}");
        }
    }
}

/// Runs `each` on eight threads, `times` times in all.
fn crowd(times: usize, each: impl Fn() + Sync) {
    const THREADS: usize = 8;
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| (0..times.div_ceil(THREADS)).for_each(|_| each()));
        }
    });
}

/// The forms of the patterns that a core dump of the process holds.
fn in_a_core(broker: &Broker, pid: u32, patterns: &[Pattern]) -> Vec<String> {
    let core = broker.setup().path("logs/core");
    let mut gcore = Identity::own().command("gcore");
    gcore.arg("-o").arg(&core).arg(pid.to_string());
    let done = output(&mut gcore, Duration::from_secs(60));
    let written = core.with_extension(pid.to_string());
    let size = fs::metadata(&written).map(|core| core.len()).unwrap_or_default();
    assert!(size > 1 << 20, "no core: {}", transcript(&done));
    let hits = memory::scan_files(std::slice::from_ref(&written), patterns);
    fs::remove_file(written).expect("the core");
    hits
}

#[test]
fn g2_a_thousand_logins_leave_one_copy() {
    assert_one_copy_after("auto", 1000);
}

/// A tenth of it, where the arena can be read: the control.
#[test]
fn g2_where_the_arena_can_be_read_the_copies_in_it_are_found() {
    assert_one_copy_after("memfd", 100);
}

#[allow(clippy::print_stdout, reason = "a proof prints its number")]
fn assert_one_copy_after(backend: &str, times: usize) {
    if !several_or_say("memory of other processes can be read") {
        return;
    }
    let database = Server::shared().database();
    let client = Identity::client();
    let broker = Broker::usual_setup(&database, Via::Tls)
        .set("arena.backend", backend)
        .set("limits.rate_per_second", 10_000_i64)
        .bare_connection("bare_db", &database)
        .stored_connection("stored_db", &database)
        .grant(Grant::to(&client, &["register", "open", "reveal"], &["bare_db"]))
        .grant(Grant::to(&client, &["issue", "open"], &["stored_db"]))
        .start();
    let service = broker.handles(&client);
    let (token, stored) = (service.issue("main_db").expect("a grant").token, || {
        broker.handles(&client).issue("stored_db").expect("a grant").token
    });
    let operator = Packets::connect(&Identity::own(), &broker.admin_packet_socket());
    let operator = operator.expect("root may connect");
    let put = |text: &str| {
        let request = PutRequest { connection: "stored_db".into(), ..Default::default() };
        operator.put(request, &[memfd(text.as_bytes()).as_fd()]).expect("an operator");
    };

    crowd(times, || {
        broker.session(&client, "main_db", &token).query("SELECT 1").expect("a query");
    });
    let made_up = format!("cbh_{}", "x".repeat(43));
    crowd(times / 2, || {
        broker.login(&client, "main_db", &made_up).expect_err("nobody's token");
    });
    let wrong = Canary::random();
    put(&format!("{}:{}", database.name(), wrong.reveal()));
    broker.login(&client, "stored_db", &stored()).expect_err("the server says no");
    // A client would be held back after the first; an operator is not.
    crowd(times / 2, || {
        let request = ValidateConnectionRequest { connection: "stored_db".into() };
        let admin = broker.operator();
        let refused = admin.call(async |mut client| client.validate_connection(request).await);
        refused.expect_err("the server says no");
    });
    let (packets, brought) = (broker.packets(&client), Canary::random());
    let registered: Vec<_> = (0..100)
        .map(|_| {
            let request = RegisterRequest {
                connection: "bare_db".into(),
                username: database.name().into(),
                ..Default::default()
            };
            let secret = memfd(brought.reveal().as_bytes());
            packets.register(request, &[secret.as_fd()]).expect("a grant").token
        })
        .collect();
    broker.login(&client, "bare_db", &registered[0]).expect_err("it is made up");
    let (_, shown) = packets.reveal(&registered[1]).expect("a grant");
    drop(shown);
    put(&database.secret());
    broker.session(&client, "stored_db", &stored()).query("SELECT 1").expect("the right one");
    broker.operator().reload().expect("nothing has changed");

    let mut patterns = all_patterns(&database);
    for other in [&wrong, &brought] {
        patterns.extend([other.patterns(), database.derived_patterns_of(other)].concat());
    }
    let found = assert_only_in_arena(&broker, &patterns);
    println!(
        "G2, {backend}: {times} logins, {times} failed ones, 100 registers, 2 puts, a reload: 0 of {} patterns in {} MiB outside the arena",
        patterns.len(),
        found.bytes_read >> 20,
    );
    if backend == "memfd" {
        assert!(found.in_arena() > 100, "the control: {} copies in the arena", found.in_arena());
    }
    let in_core = in_a_core(&broker, broker.pid(), &patterns);
    assert!(in_core.is_empty(), "{in_core:?}");
    let holder = Holder::of(database.canary().reveal());
    let control = in_a_core(&broker, holder.pid(), &patterns);
    assert!(!control.is_empty(), "the control: a core of who has the password holds it");
    println!(
        "G2, {backend}: {} copies in a core of the broker, {} in one of who has the password",
        in_core.len(),
        control.len()
    );
    assert_files_clean(&broker, &database);
}

#[test]
fn g2_a_password_that_is_sent_leaves_no_copy() {
    if !several_or_say("memory of other processes can be read") {
        return;
    }
    for (method, named) in [(Method::Md5, "md5"), (Method::Password, "password")] {
        let database = Server::shared().database();
        database.ask_for(method);
        let patterns = [database.canary().patterns(), database.md5_patterns()].concat();
        for backend in ["auto", "memfd"] {
            let broker = Broker::usual_setup(&database, Via::Tls)
                .set("arena.backend", backend)
                .set("limits.rate_per_second", 10_000_i64)
                .set("connections.main_db.require_auth", [named])
                .start();
            let client = Identity::client();
            let token = broker.handles(&client).issue("main_db").expect("a grant").token;
            crowd(100, || {
                broker.session(&client, "main_db", &token).query("SELECT 1").expect("a query");
            });
            let _open = broker.session(&client, "main_db", &token);
            let found = assert_only_in_arena(&broker, &patterns);
            if backend == "memfd" {
                assert!(found.in_arena() > 0, "the control: it is in the arena");
            }
            let in_core = in_a_core(&broker, broker.pid(), &patterns);
            assert!(in_core.is_empty(), "{named}: {in_core:?}");
        }
    }
}

#[test]
fn g2_a_secret_from_the_environment_does_not_stay_there() {
    if !several_or_say("memory of other processes can be read") {
        return;
    }
    let database = Server::shared().database();
    let client = Identity::client();
    let setup = Setup::new();
    let connections = json!({ "connections": { "main_db": {
        "type": "postgresql",
        "host": "localhost",
        "port": database.server().port,
        "database": database.name(),
        "credentialsEnv": "MAIN_DB_CREDENTIALS",
        "tls": { "mode": "verify-full", "ca_file": database.server().ca_file },
    } } });
    let _path = setup.broker_file("etc/connections.json", &connections.to_string());
    let broker = setup
        .set("broker.connections_file", "connections.json")
        .environment("MAIN_DB_CREDENTIALS", &database.secret())
        .grant(Grant::to(&client, &["issue", "open"], &["main_db"]))
        .start();
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    let mut session = broker.session(&client, "main_db", &token);
    session.query("SELECT 1").expect("a query");
    let patterns = all_patterns(&database);
    assert_only_in_arena(&broker, &patterns);
    let around = memory::scan_surroundings(broker.pid(), &patterns).expect("the broker is there");
    assert!(around.is_empty(), "{around:?}");
}

#[test]
fn a_wrong_password_is_not_kept_either() {
    if !several_or_say("memory of other processes can be read") {
        return;
    }
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    database.set_server_password(&Canary::random());
    let client = Identity::client();
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    for _round in 0..3 {
        broker.login(&client, "main_db", &token).expect_err("the server says no");
    }
    assert_only_in_arena(&broker, &database.canary().patterns());
    assert_files_clean(&broker, &database);
}

fn children(pid: u32) -> Vec<u32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().filter_map(|child| child.parse().ok()).collect()
}
