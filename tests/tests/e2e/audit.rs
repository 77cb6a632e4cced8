//! Nothing is granted before it is audited, and what cannot be audited is refused.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::{Broker, Via};
use credbroker_e2e::frontend::Session;
use credbroker_e2e::identity::{Identity, several_or_say};
use credbroker_e2e::postgres::Server;
use credbroker_e2e::process::{output, transcript};
use credbroker_e2e::proxy::{LoginProxy, Step};
use credbroker_e2e::wait::PATIENCE;
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
    let records = broker.audit().of("access.denied");
    assert_eq!(records.len(), 1);
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

/// A tiny filesystem, unmounted on drop.
struct TinyDisk(PathBuf);

impl TinyDisk {
    fn mount(path: &Path, owner: &Identity) -> Self {
        let options = format!("size=2m,mode=0700,uid={},gid={}", owner.uid(), owner.gid());
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(path);
        let done = output(&mut mount, PATIENCE);
        assert!(done.status.success(), "{}", transcript(&done));
        Self(path.into())
    }

    /// Takes all the room that is left.
    fn fill(&self) {
        let mut file = fs::File::create(self.0.join("filler")).expect("a filler");
        for size in [4096, 1] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
    }

    fn free(&self) {
        fs::remove_file(self.0.join("filler")).expect("the filler is ours");
    }
}

impl Drop for TinyDisk {
    fn drop(&mut self) {
        let _lazily = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn g4_a_full_disk_refuses_grants_and_still_revokes() {
    if !several_or_say("a full filesystem needs a mount") {
        return;
    }
    let database = Server::shared().database();
    let setup = Broker::usual_setup(&database, Via::Tls);
    let disk = TinyDisk::mount(&setup.path("state"), &Identity::broker());
    let broker = setup.start();
    // Unmounted before the broker's directories are removed.
    let disk = disk;
    let client = Identity::client();
    let service = broker.handles(&client);
    let issued = service.issue("main_db").expect("there is room yet");
    let mut session = broker.session(&client, "main_db", &issued.token);
    session.start_query("SELECT pg_sleep(300)");
    assert_eventually!(database.running("pg_sleep") == 1, "the query does not run");

    disk.fill();
    // The last page of the file has room for a few records yet.
    let mut granted = 1;
    let refused = loop {
        match service.issue("main_db") {
            Ok(_issued) => granted += 1,
            Err(refusal) => break refusal,
        }
        assert!(granted < 100, "nothing is refused on a full disk");
    };
    assert_eq!((refused.code, refused.reason.as_str()), (Code::Unavailable, "AUDIT_UNAVAILABLE"));
    let login = broker.login(&client, "main_db", &issued.token).expect_err("no room");
    assert_eq!(login.refusal().sqlstate(), "08006");
    assert_eq!(service.list().expect("a list").len(), granted, "no handle was made");
    assert_eq!(broker.audit().of("handle.issued").len(), granted, "each has its record");
    assert_eq!(database.backends(), 1, "no session was made");

    assert_eq!(service.revoke(&issued.token), Ok(1), "revoking always works");
    assert!(!matches!(session.finish_query(), Some(Ok(_))));
    assert_eventually!(database.backends() == 0, "the query lives on");

    disk.free();
    assert_eventually!(service.issue("main_db").is_ok(), "the service does not resume");
    assert_eventually!(
        broker.audit().of("handle.revoked").len() == 1,
        "the revoke is recorded in the end"
    );
    broker.audit().assert_chained();
}

#[test]
fn a_deleted_audit_file_is_noticed() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let service = broker.handles(&Identity::client());
    service.issue("main_db").expect("a grant");
    fs::remove_file(broker.audit().path()).expect("the log is there");
    let refused = service.issue("main_db").expect_err("the record would go nowhere");
    assert_eq!(refused.reason, "AUDIT_UNAVAILABLE", "{refused:?}");
    assert_eventually!(service.issue("main_db").is_ok(), "the service does not resume");
    // The new file shows by its first number that something is missing before it.
    assert!(broker.audit().records()[0].number("seq") > Some(1));
    broker.audit().assert_chained();
}
