//! Operators: who they are, what they can stop and start again, what they are told, and the
//! command line in their hands.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::Instant;

use credbroker_e2e::admin::Admin;
use credbroker_e2e::assert_eventually;
use credbroker_e2e::audit::Record;
use credbroker_e2e::broker::{Broker, Grant, Via};
use credbroker_e2e::handles::Refusal;
use credbroker_e2e::identity::{Identity, several_or_say};
use credbroker_e2e::packet::{Packets, memfd, reason};
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::process::{Process, output, transcript};
use credbroker_e2e::wait::PATIENCE;
use credbroker_proto::v1::{
    AdminListConnectionsRequest, AdminListHandlesRequest, CloseSessionRequest,
    DeleteCredentialRequest, ExplainAccessRequest, GetConnectionRequest, GetStatusRequest,
    ListSessionsRequest, PeerDescription, PutRequest, Reason, ReloadRequest, ResumeRequest,
    RevokeHandlesRequest, RotateMasterKeyRequest, SuspendRequest, TailAuditRequest,
    ValidateConnectionRequest, WhoAmIRequest,
};
use rustix::process::Signal;
use serde_json::Value;
use tonic::Code;

/// A uid that the configuration makes an operator.
fn second_operator() -> Identity {
    Identity::numbered(64_110)
}

/// A peer with a grant for sessions without a handle.
fn ambient() -> Identity {
    Identity::numbered(64_111)
}

fn selectors(identities: &[Identity]) -> toml::Value {
    let selector = |identity: &Identity| {
        toml::Table::from_iter([("uid".to_owned(), i64::from(identity.uid()).into())]).into()
    };
    toml::Value::Array(identities.iter().map(selector).collect())
}

/// What each RPC that needs an operator answers.
fn every_rpc(admin: &Admin) -> Vec<(&'static str, Result<(), Refusal>)> {
    macro_rules! ask {
        ($($method:ident($request:ident)),+) => {
            vec![$((stringify!($method), admin.call(async |mut client| {
                client.$method($request::default()).await
            }).map(drop))),+]
        };
    }
    ask!(
        list_connections(AdminListConnectionsRequest),
        get_connection(GetConnectionRequest),
        delete_credential(DeleteCredentialRequest),
        validate_connection(ValidateConnectionRequest),
        suspend(SuspendRequest),
        resume(ResumeRequest),
        list_handles(AdminListHandlesRequest),
        revoke_handles(RevokeHandlesRequest),
        list_sessions(ListSessionsRequest),
        close_session(CloseSessionRequest),
        rotate_master_key(RotateMasterKeyRequest),
        reload(ReloadRequest),
        get_status(GetStatusRequest),
        tail_audit(TailAuditRequest),
        explain_access(ExplainAccessRequest)
    )
}

fn put(packets: &Packets, database: &Database) -> Result<(), Reason> {
    let request = PutRequest {
        connection: "store_db".into(),
        username: database.name().into(),
        ..Default::default()
    };
    let secret = memfd(database.canary().reveal().as_bytes());
    let stored = packets.put(request, &[std::os::fd::AsFd::as_fd(&secret)]);
    stored.map(drop).map_err(|refused| reason(&refused))
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("it is there").mode() & 0o7777
}

#[test]
fn only_operators_are_operators() {
    if !several_or_say("operators are other uids than workloads") {
        return;
    }
    let database = Server::shared().database();
    let broker = Broker::usual_setup(&database, Via::Tls)
        .bare_connection("store_db", &database)
        .set("connections.store_db.secret.store", true)
        .set("broker.operators", selectors(&[Identity::own(), second_operator()]))
        .start();
    let strangers = [Identity::worker(), Identity::client(), Identity::attacker()];

    // The file system lets nobody else near.
    assert_eq!(mode(&broker.admin_dir()), 0o700);
    for socket in [broker.admin_socket(), broker.admin_packet_socket()] {
        assert_eq!(mode(&socket), 0o600, "{}", socket.display());
        for stranger in &strangers {
            let refused = stranger.connect(&socket).expect_err("the directory is closed");
            assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        }
    }
    assert!(broker.admin(&Identity::own()).status().is_ok());

    // Nor does the broker, where somebody has opened the directory.
    fs::set_permissions(broker.admin_dir(), Permissions::from_mode(0o755)).expect("chmod");
    for socket in [broker.admin_socket(), broker.admin_packet_socket()] {
        fs::set_permissions(socket, Permissions::from_mode(0o666)).expect("chmod");
    }
    let mut denied = 0;
    for stranger in &strangers {
        let admin = broker.admin(stranger);
        let who = admin.call(async |mut client| client.who_am_i(WhoAmIRequest {}).await);
        assert!(!who.expect("everybody may ask who he is").operator);
        for (rpc, answer) in every_rpc(&admin) {
            let refused = answer.expect_err(rpc);
            assert_eq!(refused.code, Code::PermissionDenied, "{rpc}: {refused:?}");
            assert_eq!(refused.reason, "ACCESS_DENIED", "{rpc}: {refused:?}");
            denied += 1;
        }
        let packets = Packets::connect(stranger, &broker.admin_packet_socket()).expect("it opens");
        assert_eq!(put(&packets, &database), Err(Reason::AccessDenied));
        let status = packets.issue("main_db").expect_err("not on this socket");
        assert_eq!(reason(&status), Reason::AccessDenied);
    }
    assert_eq!(denied, 3 * 15);

    for operator in [Identity::own(), second_operator()] {
        let admin = broker.admin(&operator);
        let who = admin.call(async |mut client| client.who_am_i(WhoAmIRequest {}).await);
        assert!(who.expect("an answer").operator);
        for (rpc, answer) in every_rpc(&admin) {
            let told = answer.err().map(|refused| (refused.reason, refused.message));
            let ours = told.as_ref().is_none_or(|(reason, message)| {
                // Default requests are wrong ones for most; a name of nothing is no connection.
                ["INVALID_REQUEST", "UNSUPPORTED"].contains(&reason.as_str())
                    || message.contains("no such connection")
            });
            assert!(ours, "{rpc} for {}: {told:?}", operator.uid());
        }
        let packets = Packets::connect(&operator, &broker.admin_packet_socket()).expect("it opens");
        assert_eq!(put(&packets, &database), Ok(()), "{}", broker.log());
    }
    println!("{denied} calls of strangers, each ACCESS_DENIED");
}

fn reason_at_door(broker: &Broker, identity: &Identity, connection: &str, token: &str) -> String {
    let error = broker.login(identity, connection, token).expect_err("no session");
    error.refusal().sqlstate().to_owned()
}

#[test]
fn suspended_means_dead_now_and_after_a_restart() {
    if !several_or_say("peers with and without a grant") {
        return;
    }
    let database = Server::shared().database();
    let (client, attacker) = (Identity::client(), Identity::attacker());
    let mut broker = Broker::usual_setup(&database, Via::Tls)
        .connection("other_db", &database, Via::Tls)
        .grant(Grant::to(&client, &["issue", "open"], &["other_db"]))
        .grant(Grant::to(&ambient(), &["ambient"], &["main_db"]))
        .start();
    let admin = broker.admin(&Identity::own());
    let service = broker.handles(&client);

    let token = service.issue("main_db").expect("a grant").token;
    let other = service.issue("other_db").expect("a grant").token;
    let mut by_handle = broker.session(&client, "main_db", &token);
    let mut without = broker.session(&ambient(), "main_db", "");
    let mut untouched = broker.session(&client, "other_db", &other);
    assert_eq!(database.backends(), 3);

    let started = Instant::now();
    let suspended = admin.suspend(Some("main_db")).expect("an operator");
    let (took, left) = (started.elapsed(), database.backends());
    assert_eq!(left, 1, "backends when the answer came");
    assert_eq!((suspended.handles_revoked, suspended.sessions_cut), (1, 2));
    assert!(suspended.persistent && suspended.problem.is_empty(), "{suspended:?}");
    println!("2 sessions dead in PostgreSQL {took:?} after the suspension was asked for");
    assert!(!matches!(by_handle.query_or_end("SELECT 1"), Some(Ok(_))), "it is cut");
    assert!(!matches!(without.query_or_end("SELECT 1"), Some(Ok(_))), "it is cut");
    untouched.query("SELECT 1").expect("the other connection is not suspended");

    let refusals = |broker: &Broker| {
        let told = broker.handles(&client).issue("main_db").expect_err("suspended");
        assert_eq!((told.code, told.reason.as_str()), (Code::FailedPrecondition, "SUSPENDED"));
        assert_eq!(reason_at_door(broker, &ambient(), "main_db", ""), "57P03");
        let stranger = broker.handles(&attacker);
        let masked = stranger.issue("main_db").expect_err("no grant");
        let unknown = stranger.issue("no_such_db").expect_err("no such connection");
        assert_eq!(masked.without_reference(), unknown.without_reference());
        told.reference.expect("a reference")
    };
    refusals(&broker);
    let gone = service.describe(&token).expect_err("revoked");
    assert_eq!(gone.reason, "HANDLE_INVALID");
    assert_eq!(admin.status().expect("an answer").suspended, ["main_db"]);

    for signal in [Signal::TERM, Signal::KILL] {
        drop(untouched);
        broker.restart_after(signal);
        let reference = refusals(&broker);
        let admin = broker.admin(&Identity::own());
        assert!(admin.connection("main_db").expect("it is there").suspended);
        let explained = admin.explain(reference).expect("it is remembered");
        assert_eq!(explained.reason, "SUSPENDED");
        assert!(explained.advice.iter().any(|line| line.contains("resume")), "{explained:?}");
        let other = broker.handles(&client).issue("other_db").expect("not suspended").token;
        untouched = broker.session(&client, "other_db", &other);
    }

    // All, and what was suspended by itself stays so when one is resumed.
    let admin = broker.admin(&Identity::own());
    let all = admin.suspend(None).expect("an operator");
    assert_eq!((all.handles_revoked, all.sessions_cut), (1, 1));
    assert_eq!(database.backends(), 0, "backends when the answer came");
    let told = broker.handles(&client).issue("other_db").expect_err("suspended");
    assert_eq!(told.reason, "SUSPENDED");
    assert_eq!(admin.resume(Some("main_db")), Ok(vec!["*".to_owned()]));
    refusals(&broker);
    assert_eq!(admin.resume(None), Ok(Vec::new()));
    let token = broker.handles(&client).issue("main_db").expect("resumed").token;
    broker.session(&client, "main_db", &token).query("SELECT 1").expect("resumed");
    broker.restart_after(Signal::KILL);
    broker.handles(&client).issue("main_db").expect("still resumed");
    let audit = broker.audit();
    assert_eq!(audit.of("connection.suspended").len(), 2);
    assert_eq!(audit.of("connection.resumed").len(), 2);
    audit.assert_chained();
}

#[test]
fn a_suspension_that_cannot_be_written_is_in_force_and_says_so() {
    if !several_or_say("the test obstructs a file of the broker's") {
        return;
    }
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let (admin, service) = (broker.admin(&Identity::own()), broker.handles(&Identity::client()));
    // What the new state is written to is a directory.
    let obstacle = broker.setup().path("state/suspended.json.new");
    fs::create_dir(&obstacle).expect("an obstacle");
    let suspended = admin.suspend(Some("main_db")).expect("it is suspended all the same");
    assert!(!suspended.persistent, "{suspended:?}");
    assert!(suspended.problem.contains("restart"), "{suspended:?}");
    println!("told: {}", suspended.problem);
    assert_eq!(service.issue("main_db").expect_err("in force").reason, "SUSPENDED");

    let resumed = admin.resume(Some("main_db")).expect_err("a restart would suspend it again");
    assert_eq!((resumed.reason.as_str(), resumed.code), ("INTERNAL", Code::Internal));
    println!("told: {}", resumed.message);
    for said in ["suspended.json.new", "Is a directory", "try again"] {
        assert!(resumed.message.contains(said), "{}", resumed.message);
    }
    assert_eq!(service.issue("main_db").expect_err("still in force").reason, "SUSPENDED");

    fs::remove_dir(&obstacle).expect("the obstacle goes");
    assert_eq!(admin.resume(Some("main_db")), Ok(Vec::new()));
    service.issue("main_db").expect("resumed");
    // The log tells what held and what did not.
    let audit = broker.audit();
    let told = audit.of("connection.suspended").iter().map(Record::line).collect::<String>();
    assert!(told.contains("\"persistent\":false"), "{told}");
    let resumed = audit.of("connection.resumed");
    let told: Vec<_> =
        resumed.iter().map(|record| (record.text("outcome"), record.text("reason"))).collect();
    let expected =
        [(Some("allowed"), None), (Some("failed"), Some("not_saved")), (Some("allowed"), None)];
    assert_eq!(told, expected);
}

#[test]
fn a_damaged_suspension_ends_the_start_with_a_line_that_helps() {
    let database = Server::shared().database();
    let mut broker = Broker::usual(&database);
    let suspended = broker.admin(&Identity::own()).suspend(Some("main_db")).expect("an operator");
    assert!(suspended.persistent, "{suspended:?}");
    let _status = broker.end_with(Signal::TERM);
    let path = broker.setup().path("state/suspended.json");
    let whole = fs::read(&path).expect("it is there");
    let half = &whole[..whole.len() / 2];
    for damaged in [half, b"", b"null", b"\xff\xfe", br#"{"all":false,"connections":["../x"]}"#] {
        fs::write(&path, damaged).expect("root writes");
        let done = output(&mut broker.setup().command("run"), PATIENCE);
        let (said, code) = (transcript(&done), done.status.code());
        assert!(matches!(code, Some(78 | 69)), "exit {code:?}: {said}");
        let helps = |line: &str| line.contains("suspended.json") && line.contains("remove it");
        assert!(said.lines().any(helps), "{said}");
        assert!(!said.contains("panicked"), "{said}");
    }
}

/// Whether any of the advice has all the words.
fn advises(advice: &[String], words: &[&str]) -> bool {
    advice.iter().any(|line| words.iter().all(|word| line.contains(word)))
}

#[test]
fn an_explanation_leads_to_access() {
    if !several_or_say("a peer without a grant") {
        return;
    }
    let database = Server::shared().database();
    let newcomer = Identity::numbered(64_112);
    let mut broker = Broker::usual_setup(&database, Via::Tls)
        .grant(
            Grant::to(&ambient(), &["issue", "open"], &["main_db"])
                .with("name", "narrow")
                .with("max_sessions", 1),
        )
        .set("limits.queue_timeout", "0s")
        .start();
    let admin = broker.admin(&Identity::own());

    let refused = broker.handles(&newcomer).issue("main_db").expect_err("no grant");
    let reference = refused.reference.expect("a reference");
    let log_line = format!("denied ref={reference} uid={}", newcomer.uid());
    assert_eventually!(broker.log().contains(&log_line), "{}", broker.log());
    let by_ref = admin.explain(reference).expect("an explanation");
    let description = PeerDescription { uid: newcomer.uid(), ..Default::default() };
    let by_peer = admin.explain_peer(description.clone(), "issue", "main_db").expect("too");
    for explained in [&by_ref, &by_peer] {
        assert!(!explained.allowed, "{explained:?}");
        assert_eq!(
            (explained.action.as_str(), explained.connection.as_str()),
            ("issue", "main_db")
        );
        let nearest = explained.considered.first().expect("the nearest grant");
        assert!(nearest.missing.iter().any(|line| line.contains("uid")), "{explained:?}");
        let uid = newcomer.uid().to_string();
        assert!(advises(&explained.advice, &[&uid]), "{explained:?}");
    }
    assert_eq!(by_ref.reason, "no_grant");
    println!("advice: {}", by_ref.advice.join(" | "));

    // What it says is done, and the access works.
    let grant = Grant::to(&newcomer, &["issue", "open"], &["main_db"]).with("name", "newcomer");
    broker.reconfigure(|setup| setup.grant(grant));
    admin.reload().expect("a good configuration");
    let token = broker.handles(&newcomer).issue("main_db").expect("as advised").token;
    broker.session(&newcomer, "main_db", &token).query("SELECT 1").expect("as advised");
    let now = admin.explain(reference).expect("still remembered");
    assert!(now.allowed && now.grant == "newcomer", "{now:?}");
    assert!(admin.explain_peer(description, "open", "main_db").expect("an answer").allowed);

    // A handle of somebody else.
    let invalid = broker.handles(&Identity::client()).describe(&token).expect_err("not his");
    let invalid = admin.explain(invalid.reference.expect("a reference")).expect("an answer");
    assert_eq!(invalid.reason, "HANDLE_INVALID");
    assert!(advises(&invalid.advice, &["issue a new one"]), "{invalid:?}");

    // A limit.
    let token = broker.handles(&ambient()).issue("main_db").expect("a grant").token;
    let _only = broker.session(&ambient(), "main_db", &token);
    let full = broker.login(&ambient(), "main_db", &token).expect_err("one at once").refusal();
    assert_eq!(full.sqlstate(), "53300");
    let reference = full.to_string();
    let reference = reference.split("ref=").nth(1).expect("a reference");
    let reference = reference.trim_end_matches(|c: char| !c.is_ascii_digit());
    let limit = admin.explain(reference.parse().expect("a number")).expect("an answer");
    assert_eq!(limit.reason, "LIMIT_REACHED");
    assert!(advises(&limit.advice, &["max_sessions"]), "{limit:?}");

    // No such ref, no such connection.
    let nothing = admin.explain(u64::MAX).expect_err("no such refusal");
    assert_eq!(nothing.reason, "INVALID_REQUEST");
    let peer = PeerDescription::default();
    let unknown = admin.explain_peer(peer, "open", "no_such_db").expect("an answer");
    assert!(!unknown.allowed && advises(&unknown.advice, &["credbroker show"]), "{unknown:?}");
}

/// The command line of an operator.
struct Line<'a> {
    broker: &'a Broker,
}

impl Line<'_> {
    fn command(&self, arguments: &[&str]) -> std::process::Command {
        let mut cli = self.broker.cli(&Identity::own());
        cli.arg("--admin-dir").arg(self.broker.admin_dir()).args(arguments);
        cli
    }

    /// Standard output of a command that succeeds.
    #[expect(clippy::print_stdout, reason = "what an operator sees is what this test is about")]
    fn run(&self, arguments: &[&str]) -> String {
        let done = output(&mut self.command(arguments), PATIENCE);
        let said = transcript(&done);
        assert!(done.status.success(), "{arguments:?}: {said}\n{}", self.broker.log());
        println!("$ credbroker {}\n{said}", arguments.join(" "));
        String::from_utf8(done.stdout).expect("text")
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let arguments = [&["--output", "json"], arguments].concat();
        serde_json::from_str(&self.run(&arguments)).expect("JSON")
    }
}

#[test]
fn the_command_line_of_an_operator() {
    if !several_or_say("an operator is not the broker") {
        return;
    }
    let database = Server::shared().database();
    let client = Identity::client();
    let mut broker = Broker::usual_setup(&database, Via::Tls)
        .bare_connection("store_db", &database)
        .set("connections.store_db.secret.store", true)
        .grant(Grant::to(&client, &["issue", "open"], &["store_db"]))
        .start();
    let line = Line { broker: &broker };
    let secret = broker.setup().path("logs/password");
    fs::write(&secret, database.canary().reveal()).expect("a file of root's");
    fs::set_permissions(&secret, Permissions::from_mode(0o600)).expect("chmod");
    let file = secret.display().to_string();

    let stored =
        line.json(&["put", "store_db", "--username", database.name(), "--secret-file", &file]);
    assert_eq!(stored["version"], 1, "{stored}");
    let shown = line.run(&["show", "store_db"]);
    assert!(shown.contains("version 1"), "{shown}");
    assert!(!shown.contains(database.canary().reveal()), "{shown}");
    let validated = line.run(&["validate", "store_db"]);
    assert!(validated.contains("works"), "{validated}");
    assert!(validated.contains("scram-sha-256-plus"), "{validated}");

    let service = broker.handles(&client);
    let token = service.issue("store_db").expect("a grant").token;
    let _one = broker.session(&client, "store_db", &token);
    let _two = broker.session(&client, "store_db", &token);
    let status = line.json(&["status"]);
    assert_eq!((&status["handles"], &status["sessions"]), (&1.into(), &2.into()), "{status}");
    let sessions = line.json(&["sessions"]);
    assert_eq!(sessions["sessions"][0]["mode"], "door", "{sessions}");
    let id = sessions["sessions"][0]["id"].as_str().expect("an id");
    assert_eq!(line.run(&["sessions", "close", id]), "closed\n");
    assert_eq!(database.backends(), 1, "one is closed when the command ends");
    assert_eq!(
        line.run(&["suspend", "store_db"]),
        "suspended, handles revoked: 1, sessions cut: 1\n"
    );
    assert_eq!(database.backends(), 0);
    assert_eq!(line.run(&["resume", "store_db"]), "resumed\n");

    let _kept = service.issue("main_db").expect("a grant");
    let token = service.issue("store_db").expect("resumed").token;
    let _session = broker.session(&client, "store_db", &token);
    assert_eq!(
        line.run(&["handle", "revoke", "--connection", "store_db"]),
        "handles revoked: 1, sessions cut: 1\n"
    );
    let token = service.issue("store_db").expect("a grant").token;
    let _session = broker.session(&client, "store_db", &token);
    assert_eq!(line.run(&["delete", "store_db"]), "deleted, sessions cut: 1\n");
    assert_eq!(database.backends(), 0);

    let refused = broker.handles(&Identity::attacker()).issue("main_db").expect_err("no grant");
    let reference = refused.reference.expect("a reference").to_string();
    let explained = line.run(&["explain", &reference]);
    assert!(explained.contains("no_grant"), "{explained}");
    let uid = client.uid().to_string();
    let explained = line.json(&["explain", "--uid", &uid, "main_db", "issue"]);
    assert_eq!((&explained["allowed"], &explained["grant"]), (&true.into(), &"client".into()));

    let mut tail = line.command(&["audit", "tail", "--last", "3"]);
    let tail = Process::start("tail", &mut tail, &broker.setup().path("logs"));
    assert_eventually!(tail.stdout().lines().count() == 3, "{}", tail.stderr());
    let _more = broker.handles(&client).issue("main_db").expect("a grant");
    assert_eventually!(tail.stdout().contains("handle.issued"), "{}", tail.stdout());
    drop(tail);

    broker.reconfigure(|setup| setup.without_grant("worker"));
    let line = Line { broker: &broker };
    let reloaded = line.run(&["reload"]);
    assert!(reloaded.contains("the grants have changed"), "{reloaded}");
    let path = broker.audit().path().display().to_string();
    let verified = line.run(&["audit", "verify", &path]);
    assert!(verified.contains("whole: "), "{verified}");

    // Who is no operator is told by the file system, and where to look.
    let mut stranger = broker.cli(&client);
    let done = output(stranger.arg("--admin-dir").arg(broker.admin_dir()).arg("status"), PATIENCE);
    assert!(matches!(done.status.code(), Some(69 | 77)), "{}", transcript(&done));
}
