//! The command line, `exec` aside.

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::broker::{Broker, Event};

pub(crate) fn credbroker(broker: &Broker) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_credbroker"));
    command.arg("--runtime-dir").arg(broker.runtime_dir());
    for variable in ["CREDBROKER_SERVER_UID", "CREDBROKER_RUNTIME_DIR", "CREDBROKER_ADMIN_DIR"] {
        command.env_remove(variable);
    }
    command.stdin(Stdio::null());
    command
}

pub(crate) fn run(broker: &Broker, arguments: &[&str]) -> Output {
    credbroker(broker).args(arguments).output().unwrap()
}

pub(crate) fn json(broker: &Broker, arguments: &[&str]) -> Value {
    let output = credbroker(broker).args(["--output", "json"]).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stderr(&output), "");
    serde_json::from_slice(&output.stdout).unwrap()
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn whoami_is_told_to_people_and_to_programs() {
    let broker = Broker::start();
    let text = stdout(&run(&broker, &["whoami"]));
    assert!(text.contains("grants       worker\n"), "{text}");
    assert!(text.contains("warning      You and the broker"), "{text}");

    let who = json(&broker, &["whoami"]);
    assert_eq!(who["uid"], rustix::process::geteuid().as_raw());
    assert_eq!(who["groups"], serde_json::json!([7, 8]));
    assert_eq!(who["broker_version"], "0.0.0-test");
}

#[test]
fn connections_are_a_table() {
    let broker = Broker::start();
    let text = stdout(&run(&broker, &["list"]));
    let expected = "NAME     TYPE        TARGET                 MAY         CREDENTIAL\n\
                    main_db  postgresql  db.internal:5432/mydb  issue,open  yes\n";
    assert_eq!(text, expected);

    let connections = json(&broker, &["list"]);
    assert_eq!(connections["connections"][0]["type"], "postgresql");
    assert_eq!(connections["connections"][0]["has_credential"], true);
}

#[test]
fn an_issued_handle_outlives_the_command() {
    let broker = Broker::start();
    let arguments = ["handle", "issue", "main_db", "--ttl", "10m", "--purpose", "report"];
    let issued = json(&broker, &arguments);
    assert_eq!(broker.live_handles(), 1);
    assert_eq!(issued["handle"]["connection"], "main_db");
    assert_eq!(issued["handle"]["purpose"], "report");
    assert_eq!(issued["handle"]["bind"], "none");
    let door = broker.runtime_dir().join("postgres");
    assert_eq!(issued["endpoint"]["door"], door.to_str().unwrap());
    let token = issued["token"].as_str().unwrap();
    assert!(issued["url"].as_str().unwrap().ends_with(&format!("&password={token}")));

    let id = issued["handle"]["id"].as_str().unwrap();
    let listed = stdout(&run(&broker, &["handle", "list"]));
    assert!(listed.contains(id) && !listed.contains("cbh_"), "{listed}");
    let revoked = json(&broker, &["handle", "revoke", id]);
    assert_eq!(revoked, serde_json::json!({ "revoked": true, "sessions_cut": 2 }));
    assert_eq!(broker.live_handles(), 0);
}

#[test]
fn an_issued_handle_comes_with_a_line_for_psql() {
    let broker = Broker::start();
    let text = stdout(&run(&broker, &["handle", "issue", "main_db"]));
    let door = broker.runtime_dir().join("postgres");
    let line = format!(" psql -h {} -U main_db -d mydb\n", door.display());
    assert!(text.contains("\npsql        PGPASSWORD=cbh_"), "{text}");
    assert!(text.ends_with(&line), "{text}");
}

#[test]
fn everything_that_can_be_asked_of_a_handle_is_sent() {
    let broker = Broker::start();
    let mut arguments = vec!["handle", "issue", "main_db", "--subject", "alice"];
    arguments.extend(["--redeemer", "71", "--max-uses", "3", "--max-sessions", "2"]);
    assert!(run(&broker, &arguments).status.success());
    let log = broker.log();
    let [Event::Issued { request, .. }] = log.as_slice() else { panic!("{log:?}") };
    assert_eq!(request.subject, "alice");
    assert_eq!(request.redeemer, Some(71));
    assert_eq!(request.max_uses, Some(3));
    assert_eq!(request.max_sessions, Some(2));
}

#[test]
fn a_bound_handle_is_held_until_the_command_is_told_to_end() {
    let broker = Broker::start();
    let mut command = credbroker(&broker);
    command.args(["handle", "issue", "main_db", "--bind", "lifetime"]).stdout(Stdio::null());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let (id, pid) = broker.wait_for_issue();
    let mut line = String::new();
    let stderr = child.stderr.take().unwrap();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stderr), &mut line).unwrap();
    assert!(line.contains("Ctrl-C"), "{line}");
    assert_eq!(broker.live_handles(), 1);
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    broker.wait_for_revocation(&id);
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_token_is_taken_from_standard_input_and_never_from_the_command_line() {
    let broker = Broker::start();
    let issued = json(&broker, &["handle", "issue", "main_db"]);
    let token = issued["token"].as_str().unwrap();

    let refused = run(&broker, &["handle", "revoke", token]);
    assert_eq!(refused.status.code(), Some(64));
    assert!(stderr(&refused).contains("every user can read"), "{}", stderr(&refused));
    assert!(!stderr(&refused).contains(token));
    assert_eq!(broker.live_handles(), 1);

    let mut command = credbroker(&broker);
    command.args(["handle", "revoke", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    writeln!(child.stdin.take().unwrap(), "{token}").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(stdout(&output), "revoked, sessions cut: 2\n");
    assert_eq!(broker.live_handles(), 0);
}

#[test]
fn exit_codes_are_those_of_sysexits() {
    let broker = Broker::start();
    for (arguments, code) in [
        (&["--help"][..], 0),
        (&["completions", "bash"], 0),
        (&[], 64),
        (&["handle", "revoke", "main_db"], 64),
        (&["handle", "issue", "main_db", "--ttl", "soon"], 64),
        (&["handle", "issue", "busy"], 69),
        (&["handle", "issue", "denied"], 77),
        (&["handle", "revoke", "hdl_aaaaaaaaaaaaaaaa"], 77),
        (&["--runtime-dir", "/nonexistent", "whoami"], 69),
    ] {
        // The last --runtime-dir would be a usage error if given twice.
        let mut command = if arguments.first() == Some(&"--runtime-dir") {
            Command::new(env!("CARGO_BIN_EXE_credbroker"))
        } else {
            credbroker(&broker)
        };
        let output = command.args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", stderr(&output));
    }
    let output = credbroker(&broker).env("CREDBROKER_SERVER_UID", "root").arg("list").output();
    assert_eq!(output.unwrap().status.code(), Some(78));
    let stranger = (rustix::process::geteuid().as_raw() + 1).to_string();
    let output = credbroker(&broker).env("CREDBROKER_SERVER_UID", stranger).arg("list").output();
    assert_eq!(output.unwrap().status.code(), Some(77));
}

#[test]
fn errors_are_one_line_or_one_document() {
    let broker = Broker::start();
    let text = stderr(&run(&broker, &["handle", "issue", "denied"]));
    assert!(
        text.starts_with("credbroker: as the test wants it (ACCESS_DENIED, ref=81); "),
        "{text}"
    );
    assert_eq!(text.lines().count(), 1, "{text}");

    let output = run(&broker, &["--output", "json", "handle", "issue", "denied"]);
    assert_eq!(stdout(&output), "");
    let error: Value = serde_json::from_str(&stderr(&output)).unwrap();
    assert_eq!(error["error"]["reason"], "ACCESS_DENIED");
    assert_eq!(error["error"]["ref"], 81);
    assert!(error["error"]["message"].is_string());
}

#[test]
fn the_runtime_dir_is_taken_from_the_environment() {
    let broker = Broker::start();
    let mut command = Command::new(env!("CARGO_BIN_EXE_credbroker"));
    command.arg("whoami").env("CREDBROKER_RUNTIME_DIR", broker.runtime_dir());
    assert!(command.output().unwrap().status.success());
}
