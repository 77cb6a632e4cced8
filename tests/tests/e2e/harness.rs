//! The instruments themselves: a proof is worth as much as its positive control.

use credbroker_e2e::canary::{Canary, Pattern};
use credbroker_e2e::holder::Holder;
use credbroker_e2e::identity::{Identity, several_or_say};
use credbroker_e2e::memory;
use credbroker_e2e::postgres::Server;
use postgres::{Config, NoTls};

#[test]
fn positive_control_the_scan_finds_a_secret_in_a_heap() {
    let canary = Canary::random();
    let holder = Holder::of(canary.reveal());
    let found = memory::scan(holder.pid(), &canary.patterns()).expect("the holder can be read");
    assert!(found.hits.iter().any(|hit| hit.form == "raw"), "{found:?}");
    assert!(found.bytes_read > 1 << 20, "{found:?}");
    assert!(found.unreadable.is_empty(), "{found:?}");
}

#[test]
fn the_scan_finds_nothing_where_nothing_is() {
    let holder = Holder::of("something else");
    let patterns = Canary::random().patterns();
    let found = memory::scan(holder.pid(), &patterns).expect("the holder can be read");
    let around = memory::scan_surroundings(holder.pid(), &patterns).expect("the holder is there");
    assert!(found.hits.is_empty(), "{found:?}");
    assert!(around.is_empty(), "{around:?}");
}

#[test]
fn the_environment_and_the_command_line_are_searched() {
    let canary = Canary::random();
    let mut child = Identity::worker()
        .command("sleep")
        .arg("60")
        .env("DATABASE_URL", format!("postgres://app:{}@db/x", canary.reveal()))
        .spawn()
        .expect("sleep starts");
    let found = credbroker_e2e::wait::until(credbroker_e2e::wait::PATIENCE, || {
        let hits = memory::scan_surroundings(child.id(), &canary.patterns()).ok()?;
        hits.iter().any(|hit| hit.contains("environ")).then_some(hits)
    });
    child.kill().expect("sleep is ours");
    child.wait().expect("sleep is ours");
    assert!(found.is_some());
}

#[test]
fn sockets_and_commands_have_the_uid_they_claim() {
    if !several_or_say("processes of several uids") {
        return;
    }
    let identity = Identity::client();
    let (uid, groups) = identity
        .act(|| (rustix::process::geteuid(), rustix::process::getgroups().expect("groups")))
        .expect("the thread takes the identity");
    assert_eq!(uid.as_raw(), identity.uid());
    let groups: Vec<u32> = groups.iter().map(|gid| gid.as_raw()).collect();
    assert_eq!(groups, [credbroker_e2e::identity::SOCKET_GROUP]);
    assert!(rustix::process::geteuid().is_root(), "no other thread changed");
    let printed = identity.command("id").arg("-u").output().expect("id runs");
    assert_eq!(String::from_utf8_lossy(&printed.stdout).trim(), identity.uid().to_string());
}

#[test]
fn the_database_takes_scram_only_and_tls_only() {
    let database = Server::shared().database();
    let server = database.server();
    let login = |config: &mut Config| {
        config.user(database.name()).dbname(database.name()).connect(NoTls).map(|_client| ())
    };
    let password = database.canary().reveal();
    login(Config::new().host_path(&server.socket_dir).port(server.port).password(password))
        .expect("SCRAM over the Unix socket");
    let wrong = Canary::random();
    login(Config::new().host_path(&server.socket_dir).port(server.port).password(wrong.reveal()))
        .expect_err("another password");
    let plain = login(Config::new().host("127.0.0.1").port(server.port).password(password))
        .expect_err("TCP without TLS");
    assert!(plain.to_string().contains("28000") || format!("{plain:?}").contains("28000"));
    assert_eq!(database.backends(), 0);
}

#[test]
fn what_is_equal_to_the_password_is_computed_as_the_server_does() {
    let database = Server::shared().database();
    let patterns = database.derived_patterns();
    let forms: Vec<&str> = patterns.iter().map(Pattern::form).collect();
    assert!(forms.contains(&"SaltedPassword") && forms.contains(&"ClientKey"), "{forms:?}");
}
