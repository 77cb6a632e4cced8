//! Secrets that come in or go out while the right to them ends.

use std::fs;
use std::os::fd::AsFd as _;
use std::thread;
use std::time::Duration;

use credbroker_e2e::assert_eventually;
use credbroker_e2e::audit::disk::Disk;
use credbroker_e2e::broker::{Broker, Grant, Setup, Via};
use credbroker_e2e::identity::{Identity, several_or_say};
use credbroker_e2e::packet::{Packets, memfd, reason};
use credbroker_e2e::postgres::Server;
use credbroker_e2e::proxy::LoginProxy;
use credbroker_proto::v1::{PutRequest, Reason, RegisterRequest};

/// Whether a thread of the broker's is in a write that hangs.
fn hangs(broker: &Broker) -> bool {
    let threads = fs::read_dir(format!("/proc/{}/task", broker.pid())).expect("a process");
    let states = threads.filter_map(|thread| {
        let status = fs::read_to_string(thread.ok()?.path().join("status")).ok()?;
        status.lines().find_map(|line| line.strip_prefix("State:").map(str::to_owned))
    });
    states.into_iter().any(|state| state.trim_start().starts_with('D'))
}

#[test]
fn g4_a_secret_whose_handle_is_revoked_while_its_record_is_written_stays_inside() {
    if !several_or_say("a filesystem that hangs needs a mount") {
        return;
    }
    let database = Server::shared().database();
    let client = Identity::client();
    let setup = Broker::usual_setup(&database, Via::Tls);
    let setup = setup.grant(Grant::to(&client, &["reveal"], &["main_db"]));
    let image = setup.path("logs/disk.img");
    let disk = Disk::ext4(&image, &setup.path("state"), &Identity::broker());
    let broker = setup.start();
    // Unmounted before the broker's directories are removed.
    let disk = disk;
    let (packets, service) = (broker.packets(&client), broker.handles(&client));
    let token = packets.issue("main_db").expect("a grant").token;
    disk.freeze();
    let revealed = thread::scope(|scope| {
        let reveal = scope.spawn(|| packets.reveal(&token));
        assert_eventually!(hangs(&broker), "the record is not being written");
        assert_eq!(service.revoke(&token), Ok(0), "revoking waits for no disk");
        disk.thaw();
        reveal.join().expect("no panic")
    });
    let refused = revealed.expect_err("a secret left after its handle had been revoked");
    assert_eq!(reason(&refused), Reason::HandleInvalid, "{refused:?}");
    let audit = broker.audit();
    assert_eq!(audit.of("secret.revealed").len(), 1, "its record was written by then");
    assert_eventually!(audit.of("handle.revoked").len() == 1, "the revoke is recorded");
    audit.assert_chained();
}

#[test]
fn what_a_peer_brought_is_sent_to_no_other_destination() {
    let database = Server::shared().database();
    let (first, second) =
        (LoginProxy::start(database.server()), LoginProxy::start(database.server()));
    let client = Identity::client();
    let disable = || toml::Table::from_iter([("mode".into(), "disable".into())]);
    // Both ports are in the sandbox from the start.
    let mut broker = Setup::new()
        .connection("other_db", &database, Via::Plain(second.port()))
        .bare_connection("bare_db", &database)
        .set("connections.bare_db.host", "127.0.0.1")
        .set("connections.bare_db.port", i64::from(first.port()))
        .set("connections.bare_db.tls", disable())
        .grant(Grant::to(&client, &["register", "open"], &["bare_db"]))
        .start();
    let packets = broker.packets(&client);
    let request = RegisterRequest {
        connection: "bare_db".into(),
        username: database.name().into(),
        ..Default::default()
    };
    let secret = memfd(database.canary().reveal().as_bytes());
    let token = packets.register(request, &[secret.as_fd()]).expect("a grant").token;
    let mut session = broker.session(&client, "bare_db", &token);
    session.query("SELECT 1").expect("logged in with it");

    let port = i64::from(second.port());
    broker.reconfigure(|setup| setup.set("connections.bare_db.port", port));
    let reloaded = broker.operator().reload().expect("a good configuration");
    assert_eq!((reloaded.handles_revoked, reloaded.sessions_cut), (1, 1), "{reloaded:?}");
    assert_eq!(database.backends(), 0, "backends when the answer came");
    let refused = broker.login(&client, "bare_db", &token).expect_err("gone with its handle");
    assert_eq!(refused.refusal().reason(), "HANDLE_INVALID");
    assert_eq!(second.accepted(), 0, "nobody was even asked there");
}

#[test]
fn a_put_without_grace_answers_when_what_the_old_version_opened_is_dead() {
    const OPEN: usize = 10;
    let database = Server::shared().database();
    let client = Identity::client();
    let broker = Setup::new()
        .stored_connection("stored_db", &database)
        .set("connections.stored_db.rotation_grace", "1h")
        .grant(Grant::to(&client, &["issue", "open"], &["stored_db"]))
        .start();
    let operator = Packets::connect(&Identity::own(), &broker.admin_packet_socket());
    let operator = operator.expect("root may connect");
    let put = |grace: Option<Duration>| {
        let grace = grace.map(|grace| grace.try_into().expect("a short time"));
        let request = PutRequest { connection: "stored_db".into(), grace, ..Default::default() };
        let secret = memfd(database.secret().as_bytes());
        operator.put(request, &[secret.as_fd()]).expect("an operator")
    };
    put(None);
    let token = broker.handles(&client).issue("stored_db").expect("a grant").token;
    let mut sessions: Vec<_> =
        (0..OPEN).map(|_| broker.session(&client, "stored_db", &token)).collect();
    for session in &mut sessions {
        session.start_query("SELECT pg_sleep(300)");
    }
    let open = i64::try_from(OPEN).expect("a few");
    assert_eventually!(database.running("pg_sleep") == open, "they are not at work");
    // Connected before, so that nothing has time to die between the answer and the look.
    let mut admin = database.admin();
    let mut at_work = || -> i64 {
        let query =
            "SELECT count(*) FROM pg_stat_activity WHERE usename = $1 AND query LIKE '%pg_sleep%'";
        admin.query_one(query, &[&database.name()]).expect("pg_stat_activity").get(0)
    };
    assert_eq!(put(None).version, 2);
    assert_eq!(at_work(), open, "within the grace that is configured");
    assert_eq!(put(Some(Duration::ZERO)).version, 3);
    assert_eq!(at_work(), 0, "alive when the answer came");
    for session in &mut sessions {
        assert!(!matches!(session.finish_query(), Some(Ok(_))), "cut");
    }
    let closed = || broker.audit().of("session.closed");
    assert_eventually!(closed().len() == OPEN, "each end is recorded");
    assert!(closed().iter().all(|record| record.text("reason") == Some("rotated")));
}
