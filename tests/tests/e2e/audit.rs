//! Nothing is granted before it is audited, and what cannot be audited is refused.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use credbroker_e2e::assert_eventually;
use credbroker_e2e::audit::disk::Disk;
use credbroker_e2e::audit::{AuditLog, Record, verify};
use credbroker_e2e::broker::{Broker, Setup, Via};
use credbroker_e2e::frontend::Session;
use credbroker_e2e::handles::{Handles, Refusal};
use credbroker_e2e::identity::{Identity, several_or_say};
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::proxy::{LoginProxy, Step};
use credbroker_e2e::wait::{PATIENCE, holds_for};
use rustix::fs::OFlags;
use rustix::process::Signal;
use tonic::Code;

#[test]
fn records_stand_before_their_effects() {
    let database = Server::shared().database();
    let proxy = LoginProxy::start(database.server());
    let broker = Broker::usual_setup(&database, Via::Plain(proxy.port())).start();
    let audit = broker.audit();
    assert_eq!(audit.of("broker.started").len(), 1);

    // Issued: the record is there when the answer is.
    let client = Identity::client();
    let issued = broker.handles(&client).issue("main_db").expect("a grant");
    let records = audit.of("handle.issued");
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].text("handle"), Some(issued.handle.id.as_str()));
    assert_eq!(records[0].text("connection"), Some("main_db"));
    assert_eq!(records[0].number("peer.uid"), Some(client.uid().into()));

    // Opened: the record is there before a byte has reached PostgreSQL.
    proxy.hold_at(Step::Connect);
    thread::scope(|scope| {
        let login = scope.spawn(|| broker.login(&client, "main_db", &issued.token));
        proxy.wait_until_held(PATIENCE);
        let opened = audit.of("session.opened");
        assert_eq!(opened.len(), 1);
        assert_eq!(opened[0].text("handle"), Some(issued.handle.id.as_str()));
        assert!(opened[0].text("session").is_some(), "{}", opened[0].line());
        assert_eq!(database.backends(), 0);
        proxy.release();
        let session: Session = login.join().expect("no panic").expect("a session");
        drop(session);
    });
    assert_eventually!(audit.of("session.closed").len() == 1, "the end is recorded");
    audit.assert_chained();
}

#[test]
fn a_refusal_refers_to_its_record() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let client = Identity::client();
    let refused = broker.handles(&client).issue("no_such_db").expect_err("no such connection");
    let reference = refused.reference.expect("a reference");
    // A refusal waits for no disk, and so its answer not for its record.
    assert_eventually!(broker.audit().of("access.denied").len() == 1, "it is recorded");
    let records = broker.audit().of("access.denied");
    assert_eq!(records[0].number("seq"), Some(reference));
    assert_eq!(records[0].number("peer.uid"), Some(client.uid().into()));
    // Only configured names are written, never what a caller typed.
    assert!(!records[0].line().contains("no_such_db"), "{}", records[0].line());
    let log = broker.log();
    assert!(log.contains(&format!("ref={reference}")), "{log}");
}

#[test]
fn the_chain_runs_through_restarts() {
    let database = Server::shared().database();
    let mut broker = Broker::usual(&database);
    let issue = |broker: &Broker| {
        broker.handles(&Identity::client()).issue("main_db").expect("a grant");
    };
    issue(&broker);
    broker.restart_after(Signal::TERM);
    issue(&broker);
    broker.restart_after(Signal::KILL);
    issue(&broker);
    assert_eq!(broker.audit().of("broker.started").len(), 3);
    broker.audit().assert_chained();
}

#[test]
fn a_torn_last_line_is_repaired() {
    let database = Server::shared().database();
    let mut broker = Broker::usual(&database);
    let _status = broker.end_with(Signal::KILL);
    let path = broker.audit().path().to_owned();
    let mut file = fs::File::options().append(true).open(&path).expect("the log opens");
    file.write_all(b"{\"v\":1,\"seq\":").expect("the log is written");
    drop(file);
    broker.restart_after(Signal::KILL);
    assert_eq!(broker.audit().of("audit.repaired").len(), 1);
    broker.audit().assert_chained();
}

/// For the run's log.
#[expect(clippy::print_stdout, reason = "each proof prints its number")]
fn say(number: &str) {
    println!("{number}");
}

/// A broker with a handle that was issued and a session that runs a statement, before something
/// happens to its log.
struct AtWork<'a> {
    broker: &'a Broker,
    database: &'a Database,
    service: Handles,
    token: String,
    session: Session,
    log: AuditLog,
    granted: usize,
}

impl<'a> AtWork<'a> {
    fn begin(broker: &'a Broker, database: &'a Database) -> Self {
        let client = Identity::client();
        let service = broker.handles(&client);
        let token = service.issue("main_db").expect("the log is well").token;
        let mut session = broker.session(&client, "main_db", &token);
        session.start_query("SELECT pg_sleep(300)");
        assert_eventually!(database.running("pg_sleep") == 1, "the query does not run");
        let log = broker.audit();
        Self { broker, database, service, token, session, log, granted: 1 }
    }

    /// What was in the air, or fits where it should not, may be granted still; then nothing is.
    fn assert_refused(&mut self) {
        let refused = loop {
            match self.service.issue("main_db") {
                Ok(_issued) => self.granted += 1,
                Err(refusal) => break refusal,
            }
            assert!(self.granted < 1000, "nothing is refused");
        };
        assert_eq!(refused.reason, "AUDIT_UNAVAILABLE", "{refused:?}");
        assert_eq!(refused.code, Code::Unavailable);
        let login = self.broker.login(&Identity::client(), "main_db", &self.token);
        assert_eq!(login.expect_err("no record, no session").refusal().sqlstate(), "08006");
        let made = self.service.list().expect("a list").len();
        assert_eq!(made, self.granted.min(100), "no handle was made");
        assert_eq!(self.database.backends(), 1, "no session was made");
        let serving = || self.service.serving("").is_ok_and(|serving| !serving);
        assert_eventually!(serving(), "health says that it serves");
    }

    /// Revoking works all the same, and kills.
    fn assert_revokes(&mut self) {
        assert_eq!(self.service.revoke(&self.token), Ok(1), "revoking always works");
        assert!(!matches!(self.session.finish_query(), Some(Ok(_))));
        assert_eventually!(self.database.backends() == 0, "the query lives on");
    }

    /// It comes back by itself, and the log tells all.
    fn assert_resumes(&self) {
        assert_eventually!(self.service.issue("main_db").is_ok(), "the service does not resume");
        let audit = &self.log;
        assert_eventually!(audit.of("handle.revoked").len() == 1, "the revoke is recorded");
        assert_eventually!(audit.of("session.closed").len() == 1, "the cut is recorded");
        let again = |record: &Record| record.text("reason") == Some("writable_again");
        assert_eventually!(audit.of("audit.repaired").iter().any(again), "the outage is recorded");
        audit.assert_chained();
        let verified = verify(&[], &audit.files());
        assert_eq!(verified.message(), "", "{}", verified.report);
        let records = verified.number("records");
        say(&format!("granted {}, {records} records verified", self.granted));
    }
}

#[test]
fn g4_a_full_disk_refuses_grants_and_still_revokes() {
    if !several_or_say("a full filesystem needs a mount") {
        return;
    }
    let database = Server::shared().database();
    let setup = Broker::usual_setup(&database, Via::Tls);
    let disk = Disk::tiny(&setup.path("state"), &Identity::broker());
    let broker = setup.start();
    // Unmounted before the broker's directories are removed.
    let disk = disk;
    let mut work = AtWork::begin(&broker, &database);
    disk.fill();
    work.assert_refused();
    assert_eq!(broker.audit().of("handle.issued").len(), work.granted, "each has its record");
    work.assert_revokes();
    // In the room kept for it, on a disk that is full.
    assert_eventually!(broker.audit().of("handle.revoked").len() == 1, "the revoke is recorded");
    assert_eventually!(broker.audit().of("session.closed").len() == 1, "the cut is recorded");
    let refused = || work.service.issue("main_db").is_err();
    assert!(holds_for(Duration::from_secs(3), refused), "it is still full");
    disk.free();
    work.assert_resumes();
}

#[test]
fn g4_a_disk_that_turns_read_only_refuses_grants_and_still_revokes() {
    if !several_or_say("a filesystem that turns read-only needs a mount") {
        return;
    }
    let database = Server::shared().database();
    let setup = Broker::usual_setup(&database, Via::Tls);
    let image = setup.path("logs/disk.img");
    // Below the state directory: the sandbox is about directories, and another filesystem in the
    // place of one that it names is another directory.
    let directory = setup.path("state/log");
    fs::create_dir(&directory).expect("a directory");
    let path = directory.join("audit.jsonl");
    let setup = setup.set("audit.path", path.to_str().expect("ASCII"));
    let disk = Disk::ext4(&image, &directory, &Identity::broker());
    let broker = setup.start();
    let mut disk = disk;
    let mut work = AtWork::begin(&broker, &database);
    work.log = AuditLog::at(path);
    disk.turn_read_only();
    work.assert_refused();
    work.assert_revokes();
    assert!(work.log.of("handle.revoked").is_empty(), "nothing can be written");
    disk.replace();
    work.assert_resumes();
}

#[test]
fn g4_a_disk_that_hangs_refuses_grants_and_still_revokes() {
    if !several_or_say("a filesystem that hangs needs a mount") {
        return;
    }
    let database = Server::shared().database();
    let setup = Broker::usual_setup(&database, Via::Tls);
    let image = setup.path("logs/disk.img");
    let disk = Disk::ext4(&image, &setup.path("state"), &Identity::broker());
    let broker = setup.start();
    let disk = disk;
    let mut work = AtWork::begin(&broker, &database);
    disk.freeze();
    work.assert_refused();
    work.assert_revokes();
    disk.thaw();
    work.assert_resumes();
    let taken_back = |record: &Record| {
        record.number("detail.nothing_came_of").is_some()
            || record.text("detail.instead_of") == Some("handle.issued")
    };
    let denied = broker.audit().of("access.denied");
    assert!(denied.iter().any(taken_back), "what was being written was not granted: {denied:?}");
}

#[test]
fn g4_a_deleted_audit_file_is_noticed() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let mut work = AtWork::begin(&broker, &database);
    fs::remove_file(broker.audit().path()).expect("the log is there");
    work.assert_refused();
    work.assert_revokes();
    work.assert_resumes();
    // The new file shows by its first number that something is missing before it.
    assert!(broker.audit().records()[0].number("seq") > Some(1));
    let repaired = broker.audit().of("audit.repaired");
    assert!(repaired.iter().any(|record| record.text("reason") == Some("deleted")), "{repaired:?}");
}

#[test]
fn g4_a_replaced_audit_file_is_noticed() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let mut work = AtWork::begin(&broker, &database);
    let (path, aside) = (broker.audit().path().to_owned(), broker.setup().path("state/aside"));
    fs::rename(&path, &aside).expect("the log is there");
    let elsewhere = broker.setup().path("state/elsewhere");
    std::os::unix::fs::symlink(&elsewhere, &path).expect("a link in its place");
    work.assert_refused();
    work.assert_revokes();
    let refused = || work.service.issue("main_db").is_err();
    assert!(holds_for(Duration::from_secs(3), refused), "a link is not followed");
    assert!(!elsewhere.exists(), "nothing is written where the link points to");
    fs::remove_file(&path).expect("the link is there");
    fs::rename(&aside, &path).expect("the log is put back");
    work.assert_resumes();
}

/// A broker whose standard output is a pipe that nobody reads until somebody does, small enough
/// to be full soon.
fn with_pipe(setup: Setup) -> (Broker, File) {
    let fifo = setup.path("logs/out.fifo");
    let made = Command::new("mkfifo").arg(&fifo).status().expect("mkfifo is there");
    assert!(made.success());
    let nonblocking = i32::try_from(OFlags::NONBLOCK.bits()).expect("a small number");
    let reader = File::options().read(true).write(true).custom_flags(nonblocking).open(&fifo);
    let reader = reader.expect("the pipe opens");
    rustix::pipe::fcntl_setpipe_size(&reader, 8 * 4096).expect("a small pipe");
    let _written = setup.write();
    let daemon = setup.command("run");
    let mut command = Command::new("sh");
    command.arg("-c").arg("exec \"$@\" >\"$OUT\"").arg("sh").arg(daemon.get_program());
    command.args(daemon.get_args());
    for (key, value) in daemon.get_envs() {
        if let Some(value) = value {
            command.env(key, value);
        }
    }
    command.env("OUT", &fifo);
    (setup.start_by(command), reader)
}

fn drain(reader: &mut File, into: &mut Vec<u8>) {
    match reader.read_to_end(into) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}"),
    }
}

#[test]
fn g4_a_standard_output_that_nobody_reads_refuses_grants_and_still_revokes() {
    let database = Server::shared().database();
    let setup = Broker::usual_setup(&database, Via::Tls).set("audit.sinks", ["file", "stdout"]);
    let (broker, mut reader) = with_pipe(setup);
    let mut taken = Vec::new();
    let mut work = AtWork::begin(&broker, &database);
    work.assert_refused();
    work.assert_revokes();
    // The file has it; standard output gets it later.
    assert_eventually!(broker.audit().of("handle.revoked").len() == 1, "the revoke is recorded");
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let (over, reader, taken) = (&over, &mut reader, &mut taken);
        scope.spawn(move || {
            while !over.load(Ordering::Relaxed) {
                drain(reader, taken);
                thread::sleep(Duration::from_millis(5));
            }
        });
        work.assert_resumes();
        over.store(true, Ordering::Relaxed);
    });
    assert_eventually!(
        {
            drain(&mut reader, &mut taken);
            fs::read(broker.audit().path()).is_ok_and(|file| file == taken)
        },
        "standard output has what the file has: {}",
        String::from_utf8_lossy(&taken)
    );
}

#[test]
fn g4_standard_output_alone_is_a_log_too() {
    let database = Server::shared().database();
    let setup = Broker::usual_setup(&database, Via::Tls).set("audit.sinks", ["stdout"]);
    let (broker, mut reader) = with_pipe(setup);
    let service = broker.handles(&Identity::client());
    let mut granted = 0;
    let refused = loop {
        match service.issue("main_db") {
            Ok(_issued) => granted += 1,
            Err(refusal) => break refusal,
        }
        assert!(granted < 1000, "nothing is refused");
    };
    assert_eq!(refused.reason, "AUDIT_UNAVAILABLE", "{refused:?}");
    let mut taken = Vec::new();
    assert_eventually!(
        {
            drain(&mut reader, &mut taken);
            service.issue("main_db").is_ok()
        },
        "the service does not resume"
    );
    let copy = broker.setup().path("logs/copy.jsonl");
    assert_eventually!(
        {
            drain(&mut reader, &mut taken);
            fs::write(&copy, &taken).expect("a copy");
            String::from_utf8_lossy(&taken).contains("writable_again")
        },
        "the outage is recorded"
    );
    assert_eq!(verify(&[], &[&copy]).message(), "");
}

#[test]
fn g4_a_flood_of_denials_does_not_fill_the_disk() {
    const FLOOD: usize = 100_000;
    let database = Server::shared().database();
    let mut broker = Broker::usual(&database);
    let attacker = Identity::attacker();
    let refused = thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| broker.handles(&attacker).flood("main_db", FLOOD / 4)))
            .collect();
        let join =
            |thread: thread::ScopedJoinHandle<'_, Vec<Refusal>>| thread.join().expect("no panic");
        threads.into_iter().flat_map(join).collect::<Vec<Refusal>>()
    });
    let unlike: Vec<_> =
        refused.iter().filter(|refusal| refusal.reason != "ACCESS_DENIED").collect();
    assert!(unlike.is_empty(), "{} refused otherwise: {:?}", unlike.len(), unlike.first());
    let mut references: Vec<u64> = refused.iter().filter_map(|refusal| refusal.reference).collect();
    assert_eq!(references.len(), FLOOD, "each refusal has a reference");
    // Whoever is entitled is served all the same.
    broker.handles(&Identity::client()).issue("main_db").expect("a grant");
    let _status = broker.end_with(Signal::TERM);
    let audit = broker.audit();
    let denied = audit.of("access.denied");
    let count = |record: &Record| record.number("detail.count").unwrap_or(1);
    assert_eq!(denied.iter().map(count).sum::<u64>(), FLOOD as u64, "all are counted");
    references.sort_unstable();
    references.dedup();
    let numbers: Vec<_> = denied.iter().filter_map(|record| record.number("seq")).collect();
    assert!(references.iter().all(|number| numbers.contains(number)), "each refers to a denial");
    let size = fs::metadata(audit.path()).expect("the log is there").len();
    println!("{FLOOD} denials: {} records, {size} bytes", denied.len());
    assert!(size < 256 * 1024, "{size}");
    assert_eq!(verify(&[], &audit.files()).message(), "");
}
