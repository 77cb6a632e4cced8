//! Warm spares: logged in before the client comes, for one client, under the same rights.

use std::collections::BTreeSet;
use std::time::Duration;

use credbroker_e2e::assert_eventually;
use credbroker_e2e::audit::disk::Disk;
use credbroker_e2e::broker::{Broker, Via};
use credbroker_e2e::canary::Canary;
use credbroker_e2e::frontend::{LoginError, Session, startup};
use credbroker_e2e::identity::{Identity, several_or_say};
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::proxy::{LoginProxy, Step};
use credbroker_e2e::wait::{PATIENCE, holds_for};

/// Longer than the pause before a spare is replaced.
const SETTLED: Duration = Duration::from_millis(500);

fn warm(database: &Database, spares: i64) -> Broker {
    Broker::usual_setup(database, Via::Tls).set("connections.main_db.warm", spares).start()
}

fn log_in(broker: &Broker, token: &str, application: &str) -> Result<Session, LoginError> {
    let mut frontend = broker.knock(&Identity::client());
    let message = startup(&[("user", "main_db"), ("application_name", application)]);
    frontend.send(&message).expect("the door reads");
    frontend.authenticate(token)
}

fn session(broker: &Broker, token: &str, application: &str) -> Session {
    log_in(broker, token, application).expect("a session")
}

fn one(session: &mut Session, sql: &str) -> String {
    session.query(sql).expect(sql)[0][0].clone()
}

/// The backends of the role, by process id, but for the broker's own.
fn backends(database: &Database) -> BTreeSet<i32> {
    let query =
        "SELECT pid FROM pg_stat_activity WHERE usename = $1 AND application_name <> 'credbroker'";
    let rows = database.admin().query(query, &[&database.name()]).expect("pg_stat_activity");
    rows.iter().map(|row| row.get(0)).collect()
}

#[test]
fn a_client_gets_the_link_that_waited_for_it_and_nobody_gets_it_again() {
    let database = Server::shared().database();
    let broker = warm(&database, 2);
    let token = broker.handles(&Identity::client()).issue("main_db").expect("a grant").token;
    let mut first = session(&broker, &token, "shop");
    let first_pid: i32 = one(&mut first, "SELECT pg_backend_pid()").parse().expect("a number");
    assert_eventually!(backends(&database).len() == 3, "two spares beside the session");
    let audit = broker.audit();
    assert_eq!(audit.of("upstream.dialled").len(), 2);
    assert!(holds_for(SETTLED, || backends(&database).len() == 3), "no more than two");

    let waiting = backends(&database);
    let mut second = session(&broker, &token, "shop");
    let pid: i32 = one(&mut second, "SELECT pg_backend_pid()").parse().expect("a number");
    assert!(waiting.contains(&pid) && pid != first_pid, "{pid} of {waiting:?}");
    assert_eq!(one(&mut second, "SHOW application_name"), "shop");
    assert_eq!(second.parameters.get("application_name").map(String::as_str), Some("shop"));
    // Its own cancel key, not the one of the link.
    assert_ne!(second.cancel_key[..4], pid.to_be_bytes());
    second.query("SET application_name = 'changed'").expect("a setting");
    second.query("CREATE TEMPORARY TABLE mine (n int)").expect("a table");
    drop(second);
    assert_eventually!(!backends(&database).contains(&pid), "what was used is closed");

    // Another message is another login.
    let waiting = backends(&database);
    let mut other = session(&broker, &token, "other");
    let pid: i32 = one(&mut other, "SELECT pg_backend_pid()").parse().expect("a number");
    assert!(!waiting.contains(&pid));
    let mut third = session(&broker, &token, "shop");
    assert_eq!(one(&mut third, "SHOW application_name"), "shop");
    assert_eq!(one(&mut third, "SELECT count(*) FROM pg_class WHERE relname = 'mine'"), "0");
    let opened = audit.of("session.opened").len();
    assert_eq!(opened, 4, "each session is recorded as any other");
    audit.assert_chained();
}

#[test]
fn what_the_server_said_meanwhile_is_heard_and_a_link_that_died_is_not_given() {
    let database = Server::shared().database();
    let broker = warm(&database, 1);
    let token = broker.handles(&Identity::client()).issue("main_db").expect("a grant").token;
    let first = session(&broker, &token, "shop");
    assert_eventually!(backends(&database).len() == 2, "a spare");
    drop(first);
    assert_eventually!(backends(&database).len() == 1, "the spare alone");
    let pid = *backends(&database).first().expect("the spare");
    let ended = database.admin().execute("SELECT pg_terminate_backend($1)", &[&pid]);
    assert_eq!(ended.expect("an administrator"), 1);
    assert_eventually!(!backends(&database).contains(&pid), "the spare is gone");
    let mut second = session(&broker, &token, "shop");
    let own: i32 = one(&mut second, "SELECT pg_backend_pid()").parse().expect("a number");
    assert_ne!(own, pid);
}

#[test]
fn g5_a_suspension_a_rotation_and_a_reload_end_spares_too() {
    let database = Server::shared().database();
    let broker = warm(&database, 2);
    let (service, admin) = (broker.handles(&Identity::client()), broker.operator());
    let waits = || {
        let token = service.issue("main_db").expect("a grant").token;
        drop(session(&broker, &token, "shop"));
        assert_eventually!(backends(&database).len() == 2, "two spares");
        backends(&database)
    };
    waits();
    admin.suspend(Some("main_db")).expect("an operator");
    assert_eventually!(backends(&database).is_empty(), "a spare outlived a suspension");
    assert!(holds_for(SETTLED, || backends(&database).is_empty()), "none is dialled meanwhile");
    admin.resume(Some("main_db")).expect("an operator");

    let before = waits();
    admin.reload().expect("an operator");
    assert_eventually!(backends(&database).is_disjoint(&before), "a spare outlived a reload");

    let before = waits();
    let path = broker.setup().path("etc/main_db.secret");
    let password = Canary::random();
    database.set_server_password(&password);
    let fresh = format!("{}:{}", database.name(), password.reveal());
    std::fs::write(&path, fresh).expect("the secret is replaced");
    assert_eventually!(backends(&database).is_disjoint(&before), "a spare outlived a rotation");
    let token = service.issue("main_db").expect("a grant").token;
    let mut next = session(&broker, &token, "shop");
    one(&mut next, "SELECT 1");
}

#[test]
fn a_spare_is_recorded_as_the_brokers_own_act() {
    let database = Server::shared().database();
    let broker =
        Broker::usual_setup(&database, Via::Tls).set("connections.main_db.warm", 1_i64).start();
    let token = broker.handles(&Identity::client()).issue("main_db").expect("a grant").token;
    drop(session(&broker, &token, "shop"));
    assert_eventually!(backends(&database).len() == 1, "a spare");
    let dialled = broker.audit().of("upstream.dialled");
    assert_eq!(dialled.len(), 1);
    assert_eq!(dialled[0].text("connection"), Some("main_db"));
    assert_eq!(dialled[0].text("outcome"), Some("allowed"));
    assert_eq!(dialled[0].text("peer.uid"), None, "it is the broker's own act");
}

#[test]
fn g4_no_spare_is_dialled_while_it_cannot_be_recorded() {
    if !several_or_say("a full filesystem needs a mount") {
        return;
    }
    let database = Server::shared().database();
    let proxy = LoginProxy::start(database.server());
    let setup = Broker::usual_setup(&database, Via::Plain(proxy.port()))
        .set("connections.main_db.warm", 1_i64);
    let disk = Disk::tiny(&setup.path("state"), &Identity::broker());
    let broker = setup.start();
    // Unmounted before the broker's directories are removed.
    let disk = disk;
    let service = broker.handles(&Identity::client());
    let token = service.issue("main_db").expect("a grant").token;
    // It comes in, and would have a spare dialled, when nothing can be recorded any more.
    proxy.hold_at(Step::ReadyForQuery);
    let mut first = std::thread::scope(|scope| {
        let login = scope.spawn(|| session(&broker, &token, "shop"));
        proxy.wait_until_held(PATIENCE);
        disk.fill();
        let mut more = 0..1000;
        while service.issue("main_db").is_ok() {
            assert!(more.next().is_some(), "nothing is refused");
        }
        proxy.release();
        login.join().expect("a session")
    });
    one(&mut first, "SELECT 1");
    assert!(holds_for(SETTLED, || proxy.accepted() == 1), "a spare was dialled");
    assert!(broker.audit().of("upstream.dialled").is_empty());
    disk.free();
    assert_eventually!(service.issue("main_db").is_ok(), "the service does not resume");
    let mut second = session(&broker, &token, "shop");
    one(&mut second, "SELECT 1");
    assert_eventually!(proxy.accepted() == 3, "now there is one beside the two sessions");
    assert_eq!(broker.audit().of("upstream.dialled").len(), 1);
}
