//! Who may do what: the kernel names the caller, and "unknown" and "forbidden" look alike.

use credbroker_e2e::broker::{Broker, Grant, Via};
use credbroker_e2e::identity::{Identity, several_or_say};
use credbroker_e2e::postgres::Server;
use credbroker_e2e::process::{output, transcript};
use credbroker_e2e::wait::PATIENCE;
use credbroker_e2e::worker::Worker;
use credbroker_proto::v1::IssueHandleRequest;
use serde_json::json;
use tonic::Code;

/// The form of a token, with nothing behind it.
const MADE_UP: &str = "cbh_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// What the door says to a login, without the reference.
fn answer(broker: &Broker, identity: &Identity, connection: &str, token: &str) -> String {
    let error = broker.login(identity, connection, token).expect_err("no session for this one");
    error.refusal().without_reference()
}

#[test]
fn a_wrong_uid_gets_the_same_answer_as_an_unknown_name() {
    if !several_or_say("a uid without a grant learns nothing") {
        return;
    }
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let (client, attacker) = (Identity::client(), Identity::attacker());
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;

    let service = broker.handles(&attacker);
    let forbidden = service.issue("main_db").expect_err("no grant");
    let unknown = service.issue("no_such_db").expect_err("no such connection");
    assert_eq!(forbidden.code, Code::PermissionDenied);
    assert_eq!(forbidden.reason, "ACCESS_DENIED");
    assert_eq!(forbidden.without_reference(), unknown.without_reference());
    assert!(service.connections().expect("an empty list").is_empty());

    let forbidden = answer(&broker, &attacker, "main_db", &token);
    assert_eq!(forbidden, answer(&broker, &attacker, "no_such_db", &token));
    assert_eq!(forbidden, answer(&broker, &attacker, "main_db", MADE_UP));
    assert!(!forbidden.contains("main_db"), "{forbidden}");

    // Nor does a granted uid learn which other names there are.
    let other = broker.handles(&client).issue("no_such_db").expect_err("no such connection");
    assert_eq!(other.without_reference(), unknown.without_reference());
}

#[test]
fn a_stolen_token_is_useless() {
    if !several_or_say("a token of another uid opens nothing") {
        return;
    }
    let database = Server::shared().database();
    let broker = Broker::usual_setup(&database, Via::Tls)
        .grant(Grant::to(&Identity::numbered(64_105), &["issue", "open"], &["main_db"]))
        .start();
    let token = broker.handles(&Identity::client()).issue("main_db").expect("a grant").token;

    // The thief has a grant of its own for the same connection; the token is still not his.
    let thief = Identity::numbered(64_105);
    assert_eq!(
        answer(&broker, &thief, "main_db", &token),
        answer(&broker, &thief, "main_db", MADE_UP)
    );
    let service = broker.handles(&thief);
    let calls = |token: &str| {
        [
            service.describe(token).map(|_handle| ()),
            service.renew(token).map(|_handle| ()),
            service.revoke(token).map(|_cut| ()),
        ]
    };
    for (stolen, made_up) in calls(&token).into_iter().zip(calls(MADE_UP)) {
        let (stolen, made_up) = (stolen.expect_err("stolen"), made_up.expect_err("made up"));
        assert_eq!(stolen.reason, "HANDLE_INVALID");
        assert_eq!(stolen.without_reference(), made_up.without_reference());
    }

    // And it still works for its holder.
    let _session = broker.session(&Identity::client(), "main_db", &token);

    let mut psql = broker.psql(&Identity::attacker(), "main_db", &token);
    let done = output(psql.args(["-c", "SELECT 1"]), PATIENCE);
    assert!(!done.status.success(), "{}", transcript(&done));
}

#[test]
fn g3_a_token_is_bound() {
    if !several_or_say("a token is bound to its holder or redeemer") {
        return;
    }
    let database = Server::shared().database();
    let (holder, redeemer) = (Identity::client(), Identity::numbered(64_106));
    let redeemers = vec![toml::Value::Table(toml::Table::from_iter([(
        "uid".to_owned(),
        i64::from(redeemer.uid()).into(),
    )]))];
    let both = ["issue", "open"];
    let broker = Broker::usual_setup(&database, Via::Tls)
        .grant(
            Grant::to(&Identity::numbered(64_107), &both, &["main_db"])
                .with("redeemers", toml::Value::Array(redeemers)),
        )
        .grant(Grant::to(&redeemer, &["open"], &["main_db"]))
        .start();
    let for_redeemer = |identity: &Identity, redeemer: u32| {
        let request = IssueHandleRequest {
            connection: "main_db".into(),
            redeemer: Some(redeemer),
            ..Default::default()
        };
        broker.handles(identity).issue_with(request)
    };

    // A redeemer must be named by the grant.
    let refused = for_redeemer(&holder, redeemer.uid()).expect_err("the grant names nobody");
    assert_eq!(refused.reason, "ACCESS_DENIED", "{refused:?}");

    let issuer = Identity::numbered(64_107);
    let issued = for_redeemer(&issuer, redeemer.uid()).expect("the grant names this redeemer");
    let _session = broker.session(&redeemer, "main_db", &issued.token);
    for wrong in [&issuer, &holder] {
        assert_eq!(
            answer(&broker, wrong, "main_db", &issued.token),
            answer(&broker, wrong, "main_db", MADE_UP),
            "uid {}",
            wrong.uid()
        );
    }
}

#[test]
fn g3_a_redeemer_must_be_all_that_the_grant_says() {
    if !several_or_say("a redeemer is another uid") {
        return;
    }
    let database = Server::shared().database();
    let (issuer, redeemer) = (Identity::numbered(64_107), Identity::numbered(64_106));
    let group = i64::from(redeemer.uid()) + 1000;
    let selector = toml::Table::from_iter([
        ("uid".to_owned(), i64::from(redeemer.uid()).into()),
        ("group".to_owned(), group.into()),
    ]);
    let redeemers = toml::Value::Array(vec![toml::Value::Table(selector)]);
    let broker = Broker::usual_setup(&database, Via::Tls)
        .grant(Grant::to(&issuer, &["issue"], &["main_db"]).with("redeemers", redeemers))
        .grant(Grant::to(&redeemer, &["open"], &["main_db"]))
        .start();
    let request = IssueHandleRequest {
        connection: "main_db".into(),
        redeemer: Some(redeemer.uid()),
        ..Default::default()
    };
    let issued = broker.handles(&issuer).issue_with(request).expect("a grant");
    let refused = broker.login(&redeemer, "main_db", &issued.token).expect_err("not in the group");
    assert_eq!(refused.refusal().sqlstate(), "28000");
}

#[test]
fn g3_a_credential_token_belongs_to_one_mcp_principal() {
    if !several_or_say("workers of two uids are two principals") {
        return;
    }
    let database = Server::shared().database();
    let other_uid = Identity::client();
    let broker = Broker::usual(&database);
    let mut owner = Worker::start(&broker, &Identity::worker());
    let mut sibling = Worker::start(&broker, &Identity::worker());
    let mut stranger = Worker::start(&broker, &other_uid);
    let made = owner.call("create_credential_token", &json!({ "database": "main_db" }));
    let token = made.content["credential_token"].as_str().expect("a token").to_owned();
    let ask = |token: &str| json!({ "database": "main_db", "credential_token": token, "sql": "SELECT 1 AS one" });

    let honoured = sibling.call("execute_sql", &ask(&token));
    assert!(!honoured.is_error, "a worker of the same uid: {}", honoured.raw);
    let stolen = stranger.call("execute_sql", &ask(&token));
    let made_up = stranger.call("execute_sql", &ask(MADE_UP));
    assert!(stolen.is_error && made_up.is_error, "{} {}", stolen.raw, made_up.raw);
    let plain = |result: &credbroker_e2e::worker::ToolResult| {
        credbroker_e2e::frontend::without_reference(&result.raw.to_string())
    };
    assert_eq!(plain(&stolen), plain(&made_up));
}

#[test]
fn a_handle_is_for_one_connection() {
    let (first, second) = (Server::shared().database(), Server::shared().database());
    let client = Identity::client();
    let broker = credbroker_e2e::broker::Setup::new()
        .connection("first", &first, Via::Tls)
        .connection("second", &second, Via::Tls)
        .grant(Grant::to(&client, &["issue", "open"], &["first", "second"]))
        .start();
    let token = broker.handles(&client).issue("first").expect("a grant").token;
    let _session = broker.session(&client, "first", &token);
    assert_eq!(
        answer(&broker, &client, "second", &token),
        answer(&broker, &client, "second", MADE_UP)
    );
    assert_eq!(second.backends(), 0);
}

#[test]
fn another_database_than_the_configured_ones_is_refused() {
    let (database, other) = (Server::shared().database(), Server::shared().database());
    let broker = Broker::usual(&database);
    let client = Identity::client();
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    for name in [other.name(), "postgres"] {
        let refused = broker.knock(&client).login("main_db", Some(name), &token);
        let refusal = refused.expect_err("not among `databases`").refusal();
        assert_eq!(refusal.sqlstate(), "28000", "{refusal}");
    }
    assert_eq!(database.backends(), 0);
}

#[test]
fn limits_hold() {
    let database = Server::shared().database();
    let client = Identity::client();
    let broker = credbroker_e2e::broker::Setup::new()
        .connection("main_db", &database, Via::Tls)
        .set("limits.queue_timeout", "100ms")
        .grant(Grant::to(&client, &["issue", "open"], &["main_db"]).with("max_sessions", 2))
        .start();
    let service = broker.handles(&client);
    let token = service.issue("main_db").expect("a grant").token;
    let _first = broker.session(&client, "main_db", &token);
    let _second = broker.session(&client, "main_db", &token);
    let third = broker.login(&client, "main_db", &token).expect_err("two is the limit").refusal();
    assert_eq!(third.sqlstate(), "53300", "{third}");

    let once = IssueHandleRequest {
        connection: "main_db".into(),
        max_uses: Some(1),
        ..Default::default()
    };
    drop((_first, _second));
    let once = service.issue_with(once).expect("a grant").token;
    credbroker_e2e::assert_eventually!(database.backends() == 0, "the first two are gone");
    let session = broker.session(&client, "main_db", &once);
    drop(session);
    let spent = broker.login(&client, "main_db", &once).expect_err("it had one use").refusal();
    assert_eq!(spent.sqlstate(), "28P01", "{spent}");
}
