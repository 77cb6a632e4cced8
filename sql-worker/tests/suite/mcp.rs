//! The tools, over the protocol.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use credbroker_sql_worker::app::{App, Principal};
use credbroker_sql_worker::broker::{Login, Secret};
use credbroker_sql_worker::config::Config;
use credbroker_sql_worker::mcp;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, DuplexStream, Lines};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::broker::FakeBroker;

pub(crate) struct Client {
    to: DuplexStream,
    from: Lines<BufReader<DuplexStream>>,
    serving: JoinHandle<()>,
    pub(crate) broker: Arc<FakeBroker>,
    app: Arc<App>,
    stop: CancellationToken,
    next: u64,
}

impl Client {
    pub(crate) async fn start() -> Self {
        Self::start_with("").await
    }

    pub(crate) async fn start_with(config: &str) -> Self {
        let broker = Arc::new(FakeBroker::new());
        let config = Config::parse(config).unwrap();
        let app = Arc::new(App::new(Arc::clone(&broker) as _, config));
        let (to, input) = tokio::io::duplex(1 << 20);
        let (output, from) = tokio::io::duplex(1 << 20);
        let stop = CancellationToken::new();
        let serving =
            mcp::serve(Arc::clone(&app), Principal::stdio(), (input, output), None, stop.clone());
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(serving);
        let serving = futures_util::FutureExt::map(async move { tasks.join_next().await }, |_| ());
        #[expect(clippy::disallowed_methods, reason = "a test waits for it by its handle")]
        let serving = tokio::spawn(serving);
        let from = BufReader::new(from).lines();
        let mut client = Self { to, from, serving, broker, app, stop, next: 1 };
        let hello = json!({"protocolVersion": "2025-11-25", "capabilities": {},
            "clientInfo": {"name": "test", "version": "0"}});
        let answer = client.request("initialize", hello).await;
        assert_eq!(answer["result"]["serverInfo"]["name"], "credbroker-sql-worker");
        assert!(answer["result"]["instructions"].is_string());
        client.send(&json!({"jsonrpc": "2.0", "method": "notifications/initialized"})).await;
        client
    }

    async fn send(&mut self, message: &Value) {
        self.to.write_all(format!("{message}\n").as_bytes()).await.unwrap();
    }

    pub(crate) async fn receive(&mut self) -> Value {
        let line = tokio::time::timeout(Duration::from_secs(20), self.from.next_line()).await;
        serde_json::from_str(&line.unwrap().unwrap().unwrap()).unwrap()
    }

    pub(crate) async fn request(&mut self, method: &str, params: Value) -> Value {
        let id = self.post(method, params).await;
        let answer = self.receive().await;
        assert_eq!(answer["id"], id);
        answer
    }

    pub(crate) async fn post(&mut self, method: &str, params: Value) -> u64 {
        let id = self.next;
        self.next += 1;
        let request = json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params});
        self.send(&request).await;
        id
    }

    /// Calls a tool; the text must be the structured result.
    pub(crate) async fn call(&mut self, tool: &str, arguments: Value) -> Value {
        let answer =
            self.request("tools/call", json!({"name": tool, "arguments": arguments})).await;
        let result = &answer["result"];
        let structured = &result["structuredContent"];
        assert_eq!(&bare(result["content"][0]["text"].as_str().unwrap()), structured);
        assert_eq!(result["isError"], json!(structured["success"] == json!(false)));
        structured.clone()
    }
}

/// The JSON in the text of a result, with or without marks around it.
fn bare(text: &str) -> Value {
    match text.lines().collect::<Vec<_>>()[..] {
        [json] => serde_json::from_str(json).unwrap(),
        [sentence, open, json, close] => {
            let mark = open.trim_matches(['<', '>']);
            assert!(mark.starts_with("untrusted-data-") && sentence.contains(mark));
            assert_eq!(close, open.replace('<', "</"));
            serde_json::from_str(json).unwrap()
        }
        _ => panic!("{text}"),
    }
}

#[tokio::test]
async fn the_tools_do_what_they_say() {
    let mut client = Client::start().await;
    let tools = client.request("tools/list", json!({})).await;
    assert_eq!(tools["result"]["tools"].as_array().unwrap().len(), 10);

    let list = client.call("list_connections", json!({})).await;
    assert_eq!(list["connections"][0]["name"], "main_db");
    assert_eq!(list["connections"][0]["needs_credential"], false);

    let sql = json!({"database": "main_db", "sql": "select :a::int4 as a, 2::int8 as a",
        "params": {"a": 1}});
    let mut result = client.call("execute_sql", sql).await;
    result["elapsed_ms"] = json!(0);
    assert_eq!(
        result,
        json!({"success": true, "columns": [{"name": "a", "type": "int4"},
            {"name": "a", "type": "int8"}], "rows": [[1, "2"]], "row_count": 1,
            "truncated": false, "elapsed_ms": 0})
    );
    let csv = json!({"database": "main_db", "sql": "select generate_series(1, 9) as n",
        "format": "csv", "max_rows": 2});
    let result = client.call("execute_sql", csv).await;
    assert_eq!(result["csv"], "n\r\n1\r\n2\r\n");
    assert_eq!(result["truncated_reason"], "max_rows");

    let open = client.call("connect_named_storage", json!({"connection_name": "main_db"})).await;
    let id = open["connection_id"].clone();
    let query = json!({"connection_id": id, "query": "select $1::text", "params": ["x"]});
    assert_eq!(client.call("execute_query", query.clone()).await["rows"], json!([["x"]]));
    let closed = client.call("disconnect", json!({"connection_id": id})).await;
    assert_eq!(closed["disconnected"], true);
    let gone = client.call("execute_query", query).await;
    assert_eq!(gone["error"]["code"], "INVALID_REQUEST");
    // The worker's own handle for main_db is all that is left.
    assert_eq!(client.broker.handles.lock().unwrap().len(), 1);
    client.app.close().await;
    assert_eq!(client.broker.handles.lock().unwrap().len(), 0);
}

#[tokio::test]
async fn a_reference_on_a_login_that_was_brought_ends_with_its_handle() {
    let client = Client::start().await;
    let (app, caller) = (&client.app, Principal::stdio());
    let login = Login {
        username: "app".into(),
        secret: Secret::from_bytes(b"correct horse".to_vec()).unwrap(),
    };
    let id = app.connect_with(&caller, "main_db", login).await.unwrap();
    assert_eq!(client.broker.handles.lock().unwrap().len(), 1);
    app.disconnect(&caller, &id).await.unwrap();
    assert_eq!(client.broker.handles.lock().unwrap().len(), 0, "and none was asked for again");
}

#[tokio::test]
async fn refusals_are_tool_results() {
    let mut client = Client::start().await;
    let cases = [
        ("execute_sql", json!({"database": "none", "sql": "select 1"}), "ACCESS_DENIED"),
        ("execute_sql", json!({"database": "main_db", "sql": "selec 1"}), "SQL_ERROR"),
        ("execute_sql", json!({"database": "main_db"}), "INVALID_REQUEST"),
        (
            "execute_sql",
            json!({"database": "main_db", "sql": "select 1", "max_rows": 0}),
            "INVALID_REQUEST",
        ),
        ("execute_sql", json!({"database": "main_db", "sql": "select :a"}), "INVALID_REQUEST"),
        ("connect_named_storage", json!({"connection_name": "none"}), "ACCESS_DENIED"),
        ("disconnect", json!({"connection_id": "conn_x"}), "INVALID_REQUEST"),
        ("create_credential_token", json!({"database": "none"}), "ACCESS_DENIED"),
        (
            "create_credential_token",
            json!({"database": "main_db", "expiry_minutes": 1441}),
            "INVALID_REQUEST",
        ),
        (
            "create_credential_token",
            json!({"database": "main_db", "username": "u", "password": "hunter2"}),
            "UNSUPPORTED",
        ),
        (
            "create_credential_token",
            json!({"database": "main_db", "expiry_minutes": "hunter2"}),
            "INVALID_REQUEST",
        ),
        (
            "execute_sql",
            json!({"database": "main_db", "sql": "select 1", "pass": "hunter2"}),
            "INVALID_REQUEST",
        ),
    ];
    for (tool, arguments, code) in cases {
        let result = client.call(tool, arguments).await;
        assert_eq!(result["error"]["code"], code, "{result}");
        assert!(!result.to_string().contains("hunter2"), "{result}");
    }
    let unknown = client.request("tools/call", json!({"name": "drop_all", "arguments": {}})).await;
    assert_eq!(unknown["error"]["code"], -32602);
}

#[tokio::test]
async fn a_token_is_its_principals_alone() {
    let mut client = Client::start().await;
    let made = client
        .call("create_credential_token", json!({"database": "main_db", "expiry_minutes": 5}))
        .await;
    assert_eq!(made["connection"]["name"], "main_db");
    assert!(made["expires_at"].as_str().unwrap().ends_with('Z'), "{made}");
    let token = made["credential_token"].as_str().unwrap().to_owned();
    let with = |database: &str, token: &str| json!({"database": database, "credential_token": token, "sql": "select 1"});
    let result = client.call("execute_sql", with("main_db", &token)).await;
    assert_eq!(result["rows"], json!([[1]]));
    let other = client.call("execute_sql", with("other_db", &token)).await;
    assert_eq!(other["error"]["code"], "INVALID_REQUEST");

    let expired = format!("cbh_{:x>43}", "");
    let foreign = format!("cbh_{:y>43}", "");
    let (own, info) = {
        let handles = client.broker.handles.lock().unwrap();
        (token.clone(), handles[&token].clone())
    };
    {
        let mut handles = client.broker.handles.lock().unwrap();
        let mut other = info.clone();
        other.subject = "unix:uid=4242".into();
        handles.insert(foreign.clone(), other);
        let mut old = info;
        old.expires = SystemTime::now() - Duration::from_secs(1);
        handles.insert(expired.clone(), old);
    }
    let revoke = |token: &str| json!({"credential_token": token});
    assert_eq!(client.call("revoke_credential_token", revoke(&own)).await["revoked"], true);

    let unknown = format!("cbh_{:z>43}", "");
    let expected = client.call("execute_sql", with("main_db", &unknown)).await;
    assert_eq!(expected["error"]["code"], "HANDLE_INVALID");
    for token in [&own, &foreign, &expired, "no token at all"] {
        assert_eq!(client.call("execute_sql", with("main_db", token)).await, expected);
        assert_eq!(client.call("revoke_credential_token", revoke(token)).await, expected);
    }
    assert!(client.broker.handles.lock().unwrap().contains_key(&foreign));
}

#[tokio::test]
async fn one_principal_has_so_many_tokens_and_no_more() {
    let mut client = Client::start_with("[limits]\ncalls_per_second = 1000\n").await;
    let make = || json!({"database": "main_db", "expiry_minutes": 1440});
    let mut last = String::new();
    for _ in 0..256 {
        let made = client.call("create_credential_token", make()).await;
        made["credential_token"].as_str().unwrap().clone_into(&mut last);
    }
    let refused = client.call("create_credential_token", make()).await;
    assert_eq!(refused["error"]["code"], "LIMIT_REACHED");
    // Another principal's are another matter, and so is one that was given up.
    let other = Principal::unix(4242).unwrap();
    let ttl = Duration::from_secs(60);
    client.app.create_token(&other, "main_db", ttl).await.unwrap();
    client.call("revoke_credential_token", json!({"credential_token": last})).await;
    assert_eq!(client.call("create_credential_token", make()).await["success"], true);
    assert_eq!(client.call("create_credential_token", make()).await["success"], false);
}

#[tokio::test]
async fn cancelled_calls_stop_in_the_database() {
    let mut client = Client::start().await;
    let cluster = Arc::clone(&client.broker.cluster);
    let sql = json!({"database": "main_db", "sql": "select pg_sleep(60) as cancel_marker"});
    let id = client.post("tools/call", json!({"name": "execute_sql", "arguments": sql})).await;
    cluster.wait_running("as cancel_marker", 1, Duration::from_secs(5)).await;
    let cancel = json!({"jsonrpc": "2.0", "method": "notifications/cancelled",
        "params": {"requestId": id, "reason": "changed my mind"}});
    client.send(&cancel).await;
    cluster.wait_running("as cancel_marker", 0, Duration::from_secs(1)).await;
    // Nothing is said about it any more, and the next call works.
    let sql = json!({"database": "main_db", "sql": "select 1"});
    assert_eq!(client.call("execute_sql", sql).await["rows"], json!([[1]]));
}

#[tokio::test]
async fn the_end_of_input_stops_everything() {
    let mut client = Client::start().await;
    let cluster = Arc::clone(&client.broker.cluster);
    let sql = json!({"database": "main_db", "sql": "select pg_sleep(60) as eof_marker"});
    client.post("tools/call", json!({"name": "execute_sql", "arguments": sql})).await;
    cluster.wait_running("as eof_marker", 1, Duration::from_secs(5)).await;
    let Client { to, serving, app, .. } = client;
    let started = Instant::now();
    drop(to);
    serving.await.unwrap();
    app.close().await;
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    cluster.wait_running("as eof_marker", 0, Duration::from_secs(1)).await;
}

#[tokio::test]
async fn a_stop_answers_what_is_in_flight() {
    let mut client = Client::start().await;
    let cluster = Arc::clone(&client.broker.cluster);
    let sql = json!({"database": "main_db", "sql": "select pg_sleep(60) as stop_marker"});
    let id = client.post("tools/call", json!({"name": "execute_sql", "arguments": sql})).await;
    cluster.wait_running("as stop_marker", 1, Duration::from_secs(5)).await;
    client.stop.cancel();
    let answer = client.receive().await;
    assert_eq!(answer["id"], id);
    assert_eq!(answer["result"]["structuredContent"]["error"]["code"], "CANCELLED");
    client.serving.await.unwrap();
    cluster.wait_running("as stop_marker", 0, Duration::from_secs(1)).await;
}

#[tokio::test]
async fn the_later_era_is_spoken_too() {
    let mut client = Client::start().await;
    let meta = json!({"io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "0"},
        "io.modelcontextprotocol/clientCapabilities": {}});
    let answer = client.request("server/discover", json!({"_meta": meta})).await;
    assert!(
        answer["result"]["supportedVersions"].as_array().unwrap().contains(&json!("2026-07-28")),
        "{answer}"
    );
}
