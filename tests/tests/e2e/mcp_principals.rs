//! Whose token: what one MCP principal made is, to another, not there. In every transport and
//! era, byte for byte but for the reference.

use credbroker_e2e::broker::Broker;
use credbroker_e2e::frontend::without_reference;
use credbroker_e2e::identity::{Identity, several_or_say};
use credbroker_e2e::postgres::Server;
use credbroker_e2e::worker::http::Http;
use credbroker_e2e::worker::lines::Lines;
use credbroker_e2e::worker::served::Served;
use credbroker_e2e::worker::{Era, ToolResult, Worker};
use serde_json::{Value, json};

/// The form of a token, and of a reference, with nothing behind them.
const NO_TOKEN: &str = "cbh_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
const NO_CONNECTION: &str = "conn_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// Calls a tool as somebody.
type Call<'a> = &'a mut dyn FnMut(&str, &Value) -> ToolResult;

fn lines(lines: &mut Lines) -> impl FnMut(&str, &Value) -> ToolResult {
    |tool, arguments| lines.call(tool, arguments)
}

fn http(http: &mut Http) -> impl FnMut(&str, &Value) -> ToolResult {
    |tool, arguments| http.call(tool, arguments)
}

fn use_token(call: Call<'_>, token: &str) -> ToolResult {
    let ask = json!({ "database": "main_db", "credential_token": token, "sql": "SELECT 1" });
    call("execute_sql", &ask)
}

fn make_token(call: Call<'_>) -> String {
    let made = call("create_credential_token", &json!({ "database": "main_db" }));
    assert!(!made.is_error, "{}", made.raw);
    made.text("/credential_token").to_owned()
}

/// Everything that takes a token or a reference answers `stranger` as if there were none.
fn assert_is_not_there(stranger: Call<'_>, token: &str, connection: &str) {
    let same = |mut ask: Box<dyn FnMut(&str) -> ToolResult + '_>, real: &str, made_up: &str| {
        let (stolen, unknown) = (ask(real), ask(made_up));
        assert!(stolen.is_error && unknown.is_error, "{} {}", stolen.raw, unknown.raw);
        let plain = |result: &ToolResult| without_reference(&result.raw.to_string());
        assert_eq!(plain(&stolen), plain(&unknown));
    };
    let stranger = std::cell::RefCell::new(stranger);
    let call = |tool: &str, arguments: Value| (stranger.borrow_mut())(tool, &arguments);
    same(
        Box::new(|token| {
            let database = "main_db";
            let sql = "SELECT 1";
            call(
                "execute_sql",
                json!({ "database": database, "credential_token": token, "sql": sql }),
            )
        }),
        token,
        NO_TOKEN,
    );
    same(
        Box::new(|token| call("revoke_credential_token", json!({ "credential_token": token }))),
        token,
        NO_TOKEN,
    );
    same(
        Box::new(|id| call("execute_query", json!({ "connection_id": id, "query": "SELECT 1" }))),
        connection,
        NO_CONNECTION,
    );
    same(
        Box::new(|id| call("disconnect", json!({ "connection_id": id }))),
        connection,
        NO_CONNECTION,
    );
}

/// The owner makes a token and a connection; the stranger finds neither; the owner, by another
/// connection or process of the same principal, still does.
fn assert_bound(owner: Call<'_>, stranger: Call<'_>, again: Call<'_>, same_process: bool) {
    let token = make_token(owner);
    let opened = owner("connect_named_storage", &json!({ "connection_name": "main_db" }));
    let connection = opened.text("/connection_id").to_owned();
    assert!(!opened.is_error, "{}", opened.raw);
    assert_is_not_there(stranger, &token, &connection);

    let honoured = use_token(again, &token);
    assert!(!honoured.is_error, "the same principal: {}", honoured.raw);
    let query = json!({ "connection_id": connection, "query": "SELECT 1" });
    let found = again("execute_query", &query);
    assert_eq!(found.is_error, !same_process, "{}", found.raw);
    let revoked = again("revoke_credential_token", &json!({ "credential_token": token }));
    assert!(!revoked.is_error, "{}", revoked.raw);
    assert!(use_token(owner, &token).is_error, "a revoked token");
}

#[test]
fn g3_on_a_unix_socket_the_uid_is_the_principal() {
    if !several_or_say("clients of two uids are two principals") {
        return;
    }
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let worker = Identity::worker();
    let (served, sibling) =
        (Served::unix(&broker, &worker, ""), Served::unix(&broker, &worker, ""));
    let (owner, stranger) = (Identity::client(), Identity::attacker());
    for era in Era::ALL {
        let mut first = served.connect(era, &owner);
        let mut other = served.connect(era, &stranger);
        let mut second = served.connect(era, &owner);
        let mut elsewhere = sibling.connect(era, &owner);
        assert_bound(&mut lines(&mut first), &mut lines(&mut other), &mut lines(&mut second), true);
        let mut first = lines(&mut first);
        assert_bound(&mut first, &mut lines(&mut other), &mut lines(&mut elsewhere), false);
    }
    let log = served.log();
    for identity in [&owner, &stranger] {
        let principal = format!("\"principal\":\"unix:uid={}\"", identity.uid());
        assert!(log.contains(&principal), "{log}");
    }
    assert!(!log.contains("cbh_") && !log.contains("SELECT"), "{log}");
}

#[test]
fn g3_over_http_the_bearer_is_the_principal() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let served = Served::http(&broker, &Identity::worker(), &["alice", "bob"], "");
    for era in Era::ALL {
        let mut alice = served.client(era, "alice");
        let mut bob = served.client(era, "bob");
        let mut again = served.client(era, "alice");
        assert_bound(&mut http(&mut alice), &mut http(&mut bob), &mut http(&mut again), true);
    }
}

#[test]
fn g3_a_session_is_of_the_bearer_who_opened_it() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let served = Served::http(&broker, &Identity::worker(), &["alice", "bob"], "");
    let mut alice = served.client(Era::Legacy, "alice");
    let mut thief = served.client(Era::Legacy, "bob");
    let mut nobody = thief.clone();
    thief.session.clone_from(&alice.session);
    nobody.session = Some("5882b8aa-2257-4ecc-8516-f94dbab0b6a4".to_owned());
    let date = |response: &mut credbroker_e2e::worker::http::Response| {
        response.headers.retain(|(name, _)| name != "date");
    };
    let mut answers = [&mut thief, &mut nobody].map(|client| {
        let called = client.start("tools/list", &json!({})).response();
        let ended = client.send("DELETE", &client.headers(), "").response();
        let heard = client.send("GET", &client.headers(), "").response();
        [called, ended, heard]
    });
    answers.iter_mut().flatten().for_each(date);
    assert_eq!(answers[0], answers[1]);
    assert_eq!(answers[0][0].status, 404);
    // And what the thief tried changed nothing.
    assert!(!alice.call("list_connections", &json!({})).is_error);
}

#[test]
fn g3_transports_do_not_share_principals() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let worker = Identity::worker();
    let mut stdio = Worker::start(&broker, &worker);
    let served = Served::unix(&broker, &worker, "");
    let mut unix = served.connect(Era::Legacy, &worker);
    let token = make_token(&mut lines(&mut stdio));
    let (stolen, unknown) = {
        let mut call = lines(&mut unix);
        (use_token(&mut call, &token), use_token(&mut call, NO_TOKEN))
    };
    let plain = |result: &ToolResult| without_reference(&result.raw.to_string());
    assert_eq!(plain(&stolen), plain(&unknown));
}
