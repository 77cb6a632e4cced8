//! Faults of the configuration: each ends the start with one line that names file and key and
//! says what to do. `tests/faults/*.toml` has one a file, with what is expected in its head.

use std::fs::{self, DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Output;

use credbroker_e2e::broker::{Broker, Setup, Via};
use credbroker_e2e::canary::Canary;
use credbroker_e2e::identity::{Identity, give, several_or_say};
use credbroker_e2e::postgres::{Server, TlsIdentity};
use credbroker_e2e::process::{output, transcript};
use credbroker_e2e::wait::PATIENCE;

/// sysexits(3).
const USAGE: i32 = 64;
const NO_PERMISSION: i32 = 77;
const CONFIGURATION: i32 = 78;

/// Asserts the exit status, and one line of the output that has all the words.
fn assert_refused(name: &str, done: &Output, exit: &[i32], words: &[&str]) {
    let said = transcript(done);
    let code = done.status.code().unwrap_or_default();
    assert!(exit.contains(&code), "{name}: exit {:?}, not {exit:?}:\n{said}", done.status);
    let told = said.lines().any(|line| words.iter().all(|word| line.contains(word)));
    assert!(told, "{name}: no line has all of {words:?}:\n{said}");
    assert!(!said.contains("panicked"), "{name}: {said}");
}

fn start(setup: &Setup) -> Output {
    output(&mut setup.command("run"), PATIENCE)
}

#[test]
fn every_fault_ends_the_start_with_a_line_that_helps() {
    let password = Canary::random();
    let faults = Path::new(env!("CARGO_MANIFEST_DIR")).join("faults");
    let mut seen = 0;
    let mut wrong = Vec::new();
    for fault in fs::read_dir(faults).expect("the faults are there").flatten() {
        let name = fault.file_name().to_string_lossy().into_owned();
        let text = fs::read_to_string(fault.path()).expect("a fault is a text");
        let head = |key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key));
            line.unwrap_or_else(|| panic!("{name} lacks the line {key}")).trim().to_owned()
        };
        let exit: i32 = head("# exit:").parse().expect("a number");
        if exit == NO_PERMISSION && !several_or_say(&name) {
            continue;
        }

        let setup = Setup::new();
        let _secret = setup.secret_file("main_db", &format!("app:{}", password.reveal()));
        let _secret = setup.secret_file("no-colon", "thereisnocolonhere");
        fs::create_dir(setup.path("etc/half")).expect("a directory");
        give(&setup.path("etc/half"), &Identity::broker()).expect("chown");
        let _half = setup.broker_file("etc/half/password", password.reveal());
        fs::write(setup.path("etc/unreadable.secret"), password.reveal()).expect("a file");
        let unreadable = Permissions::from_mode(0o000);
        fs::set_permissions(setup.path("etc/unreadable.secret"), unreadable).expect("chmod");
        // A certificate, the key of another one, and one that is encrypted.
        let _certificate =
            setup.broker_file("etc/client.pem", &TlsIdentity::generate().certificate);
        let _key = setup.broker_file("etc/client.key", TlsIdentity::generate().key());
        let encrypted = "-----BEGIN ENCRYPTED PRIVATE KEY-----\n\
                         AAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
        let _encrypted = setup.broker_file("etc/encrypted.key", encrypted);
        let json = r#"{"connections": {"main_db": {"type": "postgresql", "host": "localhost",
            "database": "mydb", "credentialsEnv": "MAIN_DB"}}}"#;
        let _json = setup.broker_file("etc/connections.json", json);
        let root = setup.path("").display().to_string();
        let config = text.replace("@ROOT@", root.trim_end_matches('/'));
        let _config = setup.broker_file("etc/broker.toml", &config);

        let done = start(&setup);
        let said = transcript(&done);
        let words = head("# says:");
        let told = said.lines().any(|line| words.split(' ').all(|word| line.contains(word)));
        if done.status.code() != Some(exit) || !told || said.contains(password.reveal()) {
            wrong.push(format!("{name}: {}, wanted {exit} and {words:?}:\n{said}", done.status));
        }
        seen += 1;
    }
    assert!(wrong.is_empty(), "{} of {seen} faults:\n{}", wrong.len(), wrong.join("\n"));
    assert!(seen > 20, "only {seen} faults were tried");
}

#[test]
fn a_good_configuration_is_shown_without_its_secret() {
    let database = Server::shared().database();
    let setup = Broker::usual_setup(&database, Via::Tls);
    let _config = setup.write();
    let done = output(&mut setup.command("check-config"), PATIENCE);
    let said = transcript(&done);
    assert!(done.status.success(), "{said}");
    assert!(said.contains("main_db"), "{said}");
    assert!(!said.contains(database.canary().reveal()), "{said}");
}

#[test]
fn a_configuration_that_others_can_write_is_refused() {
    let setup = Setup::new();
    let config = setup.write();
    for mode in [0o620, 0o602] {
        fs::set_permissions(&config, Permissions::from_mode(mode)).expect("chmod");
        let words = ["broker.toml", "write", "chmod"];
        assert_refused("writable", &start(&setup), &[NO_PERMISSION], &words);
    }
}

#[test]
fn a_configuration_of_somebody_else_is_refused() {
    if !several_or_say("a file of another uid") {
        return;
    }
    let setup = Setup::new();
    let config = setup.write();
    fs::set_permissions(&config, Permissions::from_mode(0o644)).expect("chmod");
    give(&config, &Identity::attacker()).expect("chown");
    assert_refused("foreign", &start(&setup), &[NO_PERMISSION], &["broker.toml", "uid", "chown"]);
}

#[test]
fn an_absent_configuration_is_named() {
    let setup = Setup::new();
    assert_refused("absent", &start(&setup), &[CONFIGURATION], &["broker.toml"]);
}

#[test]
fn a_runtime_directory_of_somebody_else_is_refused() {
    if !several_or_say("a directory of another uid") {
        return;
    }
    let setup = Setup::new();
    let _config = setup.write();
    let runtime = setup.path("run/credbroker");
    DirBuilder::new().mode(0o755).create(&runtime).expect("a directory");
    give(&runtime, &Identity::attacker()).expect("chown");
    let runtime = runtime.display().to_string();
    let words = [runtime.as_str(), "uid"];
    assert_refused("foreign", &start(&setup), &[NO_PERMISSION, CONFIGURATION], &words);
}

#[test]
fn a_runtime_directory_that_others_can_write_is_refused() {
    let setup = Setup::new();
    let _config = setup.write();
    let runtime = setup.path("run/credbroker");
    DirBuilder::new().create(&runtime).expect("a directory");
    give(&runtime, &Identity::broker()).expect("chown");
    fs::set_permissions(&runtime, Permissions::from_mode(0o777)).expect("chmod");
    let runtime = runtime.display().to_string();
    let words = [runtime.as_str(), "others", "chmod"];
    assert_refused("writable", &start(&setup), &[NO_PERMISSION, CONFIGURATION], &words);
}

#[test]
fn a_state_directory_that_cannot_be_written_is_refused() {
    if !several_or_say("a directory of another uid") {
        return;
    }
    let setup = Setup::new();
    let _config = setup.write();
    let state = setup.path("state");
    give(&state, &Identity::attacker()).expect("chown");
    let state = state.display().to_string();
    let done = start(&setup);
    assert_refused("foreign", &done, &[NO_PERMISSION, CONFIGURATION], &[state.as_str()]);
}

#[test]
fn wrong_options_are_a_usage_error() {
    let mut command = Identity::broker().command(credbroker_e2e::binaries::credbrokerd());
    let done = output(command.args(["run", "--no-such-option"]), PATIENCE);
    assert_eq!(done.status.code(), Some(USAGE), "{}", transcript(&done));
}

#[test]
fn the_own_uid_is_no_boundary_and_is_denied_unless_allowed() {
    let database = Server::shared().database();
    let own = Identity::broker();
    let setup = |allowed: bool| {
        Broker::usual_setup(&database, Via::Tls)
            .grant(credbroker_e2e::broker::Grant::to(&own, &["issue", "open"], &["main_db"]))
            .set("broker.allow_own_uid", allowed)
    };
    let broker = setup(false).start();
    let refused = broker.handles(&own).issue("main_db").expect_err("the broker's own uid");
    assert_eq!(refused.reason, "ACCESS_DENIED");
    drop(broker);

    let broker = setup(true).start();
    broker.handles(&own).issue("main_db").expect("it is allowed");
    let whoami = broker.handles(&own).whoami().expect("an answer");
    assert!(!whoami.warnings.is_empty(), "a peer of the broker's own uid is told so");
}
