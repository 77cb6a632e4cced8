//! The library and the command line of operators, `put` aside.

use std::process::Command;

use credbroker_client::{AdminClient, Client, Error, HandleFilter, PeerDescription, Reason, Scope};
use serde_json::json;

use crate::broker::{Broker, Event, REFERENCE};
use crate::commands::{credbroker, json, run, stderr, stdout};

async fn connect(broker: &Broker) -> AdminClient {
    Client::builder().runtime_dir(broker.runtime_dir()).connect_admin().await.unwrap()
}

/// What operators asked, oldest first.
fn asked(broker: &Broker) -> Vec<String> {
    let log = broker.log().into_iter();
    log.filter_map(|event| if let Event::Asked(text) = event { Some(text) } else { None }).collect()
}

#[tokio::test]
async fn everything_that_is_asked_is_sent_and_everything_answered_is_told() {
    let broker = Broker::start();
    let admin = connect(&broker).await;
    assert!(admin.who_am_i().await.unwrap().operator);
    let connections = admin.list_connections().await.unwrap();
    assert_eq!(connections, [admin.connection("main_db").await.unwrap()]);
    let credential = connections[0].credential.clone().unwrap();
    assert_eq!((credential.version, credential.persistent), (3, false));

    let handles = admin.list_handles(HandleFilter::All, 1).await.unwrap();
    assert_eq!((handles.handles.len(), handles.total), (1, 7));
    let cut = admin.revoke_handles(HandleFilter::Id("hdl_a".into())).await.unwrap();
    assert_eq!((cut.handles, cut.sessions), (5, 2));
    let suspension = admin.suspend(Scope::Connection("main_db".into())).await.unwrap();
    assert!(suspension.persistent && suspension.problem.is_empty());
    assert_eq!(admin.resume(Scope::All).await.unwrap(), [""; 0]);

    let mut steps = admin.rotate_master_key().await.unwrap();
    let mut done = Vec::new();
    while let Some(step) = steps.next().await {
        done.push(step.unwrap().done);
    }
    assert_eq!(done, [1, 2]);
    let explanation =
        admin.explain_peer(PeerDescription::default(), "open", "main_db").await.unwrap();
    assert_eq!(explanation.considered[0].grant, "worker");

    let log = asked(&broker);
    let expected = [
        r#"GetConnectionRequest { connection: "main_db" }"#,
        "AdminListHandlesRequest { filter: Some(HandleFilter { connection: None, holder: None, \
         subject: None, id: None, all: true }), limit: 1 }",
        "RevokeHandlesRequest { filter: Some(HandleFilter { connection: None, holder: None, \
         subject: None, id: Some(\"hdl_a\"), all: false }) }",
        r#"SuspendRequest { scope: Some(Connection("main_db")) }"#,
        "ResumeRequest { scope: Some(All(true)) }",
        "RotateMasterKeyRequest",
    ];
    assert_eq!(&log[..6], expected);
}

#[tokio::test]
async fn operators_are_refused_and_disconnected_like_everybody() {
    let mut broker = Broker::start();
    let admin = connect(&broker).await;
    let denied = admin.connection("denied").await.unwrap_err();
    assert_eq!(denied.reason(), Some(Reason::AccessDenied));
    assert!(
        matches!(denied, Error::Refused { reference, .. } if reference == Some(REFERENCE)),
        "{denied:?}"
    );
    broker.kill();
    let error = admin.status().await.unwrap_err();
    assert!(matches!(error, Error::Connect { .. } | Error::Disconnected), "{error:?}");
    broker.resume();
    assert_eq!(admin.status().await.unwrap().sessions, 2);

    let own = rustix::process::geteuid().as_raw();
    let builder = Client::builder().runtime_dir(broker.runtime_dir()).server_uid(own + 1);
    let error = builder.connect_admin().await.unwrap_err();
    assert!(matches!(error, Error::ServerUntrusted { .. }), "{error:?}");
}

#[test]
fn status_is_told_to_people_and_to_programs() {
    let broker = Broker::start();
    let text = stdout(&run(&broker, &["status"]));
    for line in [
        "version          0.0.0-test\n",
        "suspended        reports\n",
        "audit head       81:ab12\n",
        "arena            128 of 65536 bytes, 28 of them registered\n",
        "arena            memfd_secret\n",
        "warning          The audit log is on a full disk.\n",
    ] {
        assert!(text.contains(line), "{line:?} is not in\n{text}");
    }
    assert!(text.contains("started          2026-11-24T05:38:09.000Z ("), "{text}");
    assert!(!text.contains("last reload"), "{text}");

    let status = json(&broker, &["status"]);
    assert_eq!(
        status["audit"],
        json!({"writable": true, "seq": 81, "hash": "ab12", "signed_to": 80})
    );
    assert_eq!(status["posture"], json!({"arena": "memfd_secret"}));
    assert_eq!(status["last_reload_problem"], json!(null));
}

#[test]
fn a_connection_is_shown_with_what_may_be_known_of_its_credential() {
    let broker = Broker::start();
    let text = stdout(&run(&broker, &["show", "main_db"]));
    assert!(text.contains("credential  version 3, 2026-11-24T05:38:09.000Z ("), "{text}");
    assert!(text.contains("kept        in memory, until the broker ends\n"), "{text}");
    assert!(text.contains("label       team=a?[2J\n"), "{text}");
    let breaker = "breaker     open: the server has refused it 3 times; the next login tries it\n";
    assert!(text.contains(breaker), "{text}");
    let shown = json(&broker, &["show", "main_db"]);
    assert_eq!(shown["credential"]["version"], 3);
    assert_eq!(shown["credential"]["breaker"]["refusals"], 3);
    assert_eq!(shown["suspended"], true);
}

#[test]
fn what_was_cut_is_told() {
    let broker = Broker::start();
    for (arguments, text) in [
        (&["suspend", "main_db"][..], "suspended, handles revoked: 5, sessions cut: 2\n"),
        (&["handle", "revoke", "--all"], "handles revoked: 5, sessions cut: 2\n"),
        (&["handle", "revoke", "--connection", "main_db"], "handles revoked: 5, sessions cut: 2\n"),
        (&["delete", "main_db"], "deleted, sessions cut: 4\n"),
        (&["sessions", "close", "ses_7"], "closed\n"),
        (&["reload"], "reloaded, handles revoked: 5, sessions cut: 2\n  grant worker: removed\n"),
        (
            &["validate", "main_db"],
            "login    works, in 12 ms\nmethod   scram-sha-256-plus\nserver   17.5\nwarning  The role is a superuser.\n",
        ),
        (&["resume", "--all"], "resumed\n"),
    ] {
        let output = run(&broker, arguments);
        assert_eq!(stdout(&output), text, "{arguments:?}: {}", stderr(&output));
        assert_eq!(stderr(&output), "", "{arguments:?}");
    }
    let log = asked(&broker);
    assert!(log[1].contains("all: true"), "{}", log[1]);
    assert!(log[2].contains(r#"connection: Some("main_db")"#), "{}", log[2]);
    assert!(log[2].contains("all: false"), "{}", log[2]);
    let cut = json!({"handles_revoked": 5, "sessions_cut": 2});
    assert_eq!(json(&broker, &["handle", "revoke", "--all"]), cut);
    assert_eq!(json(&broker, &["suspend", "main_db"])["sessions_cut"], 2);
}

#[test]
fn what_an_operator_must_mend_is_a_warning() {
    let broker = Broker::start();
    let output = run(&broker, &["suspend", "--all"]);
    assert!(output.status.success());
    assert_eq!(
        stderr(&output),
        "credbroker: this will not hold when the broker starts again: \
         the state directory is read-only\n"
    );
    let output = run(&broker, &["resume", "main_db"]);
    assert_eq!(stderr(&output), "credbroker: still suspended: * reports\n");
}

#[test]
fn sessions_are_a_table_in_which_nobody_can_forge_a_row() {
    let broker = Broker::start();
    let output = run(&broker, &["sessions", "--connection", "main_db", "--limit", "1"]);
    let text = stdout(&output);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert!(lines[0].starts_with("ID     CONNECTION  DATABASE  UID   PID  AGE"), "{text}");
    assert!(lines[1].starts_with("ses_7  main_db     mydb      1000  -    "), "{text}");
    let mode = lines[0].find("MODE").and_then(|at| lines[1].get(at..));
    assert!(mode.is_some_and(|rest| rest.starts_with("handoff ")), "{text}");
    assert!(lines[1].ends_with("hdl_aaaaaaaaaaaaaaaa  alice?[2J?ses_8"), "{text}");
    assert_eq!(stderr(&output), "credbroker: there are 9; --limit shows more\n");
    let expected = r#"ListSessionsRequest { connection: Some("main_db"), limit: 1 }"#;
    assert_eq!(asked(&broker), [expected]);
    let text = stdout(&run(&broker, &["--output", "json", "sessions"]));
    assert!(text.contains(r#""mode": "handoff""#), "{text}");
    assert_eq!(json(&broker, &["validate", "main_db"])["method"], "scram-sha-256-plus");
}

#[test]
fn a_refusal_and_an_access_are_explained() {
    let broker = Broker::start();
    let text = stdout(&run(&broker, &["explain", "ref=81"]));
    assert_eq!(
        text,
        "allowed now  no\n\
         refused at   2026-11-24T05:38:09.000Z\n\
         reason       no_grant\n\
         peer         uid 1000, gid 7, groups 8 9\n\
         action       open\n\
         connection   main_db\n\
         considered   worker: uid is 1000, the grant wants 10001\n\
         to do        Add uid 1000 to a grant.\n"
    );
    let arguments = ["explain", "--uid", "1000", "--group", "8", "--group", "9", "main_db", "open"];
    let answer = json(&broker, &arguments);
    assert_eq!(answer["peer"]["groups"], json!([8, 9]));
    assert_eq!(answer["reason"], json!(null));
    let log = asked(&broker);
    assert!(log[0].contains("who: Some(Ref(81))"), "{}", log[0]);
    assert!(log[1].contains("groups: [8, 9]"), "{}", log[1]);
    assert!(log[1].contains(r#"action: "open", connection: "main_db""#), "{}", log[1]);
}

#[test]
fn audit_records_are_lines_and_a_gap_is_told() {
    let broker = Broker::start();
    let output = run(&broker, &["audit", "tail", "--last", "5"]);
    assert_eq!(
        stdout(&output),
        "81 2026-11-24T05:38:09Z access.denied denied peer.uid=1000\n\
         95 2026-11-24T05:38:09Z access.denied denied peer.uid=1000\n"
    );
    assert_eq!(stderr(&output), "credbroker: 13 records came too fast and are left out\n");
    assert_eq!(asked(&broker), ["TailAuditRequest { last: 5 }"]);

    let output = run(&broker, &["--output", "json", "audit", "tail"]);
    let text = stdout(&output);
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[1]["seq"], 95);
    assert_eq!(lines[0]["hash"], "bb", "the record as it stands in the log");
}

#[test]
fn the_admin_dir_is_found_or_told() {
    let broker = Broker::start();
    let elsewhere = tempfile::tempdir().unwrap();
    let admin_dir = broker.admin_dir();
    let program = env!("CARGO_BIN_EXE_credbroker");
    let mut told = Command::new(program);
    told.args(["--runtime-dir", "/nonexistent", "status", "--admin-dir"]).arg(&admin_dir);
    assert!(told.output().unwrap().status.success());

    let mut environment = Command::new(program);
    environment.env("CREDBROKER_ADMIN_DIR", &admin_dir);
    environment.env("CREDBROKER_RUNTIME_DIR", elsewhere.path()).arg("status");
    assert!(environment.output().unwrap().status.success());

    let output = credbroker(&broker).args(["--admin-dir", "/nonexistent", "status"]).output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(69));
    assert!(stderr(&output).contains("/nonexistent/admin.sock"), "{}", stderr(&output));
    assert!(stderr(&output).contains("--admin-dir"), "{}", stderr(&output));
}

#[test]
fn wrong_usage_is_told_before_anybody_is_asked() {
    let broker = Broker::start();
    for arguments in [
        &["suspend"][..],
        &["suspend", "main_db", "--all"],
        &["resume"],
        &["handle", "revoke"],
        &["handle", "revoke", "hdl_aaaaaaaaaaaaaaaa", "--all"],
        &["handle", "revoke", "--all", "--connection", "main_db"],
        &["sessions", "close", "7"],
        &["sessions", "--limit", "1001"],
        &["sessions", "--limit", "5", "close", "ses_7"],
        &["explain"],
        &["explain", "main_db"],
        &["explain", "main_db", "open"],
        &["explain", "--uid", "1000", "81"],
        &["explain", "--gid", "7", "81"],
        &["audit", "tail", "--last", "1001"],
    ] {
        let output = run(&broker, arguments);
        assert_eq!(output.status.code(), Some(64), "{arguments:?}: {}", stderr(&output));
        assert_eq!(stdout(&output), "", "{arguments:?}");
    }
    assert_eq!(asked(&broker), [""; 0]);
    let denied = run(&broker, &["show", "denied"]);
    assert_eq!(denied.status.code(), Some(77), "{}", stderr(&denied));
}
