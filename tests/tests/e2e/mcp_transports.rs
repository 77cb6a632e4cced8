//! The three transports of the worker, in both eras: what they say of themselves, what they
//! refuse, and what a client cannot make them do.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use credbroker_e2e::assert_eventually;
use credbroker_e2e::binaries;
use credbroker_e2e::broker::Broker;
use credbroker_e2e::identity::{Identity, several_or_say};
use credbroker_e2e::postgres::Server;
use credbroker_e2e::process::output;
use credbroker_e2e::wait::PATIENCE;
use credbroker_e2e::worker::http::{Event, Http, Response};
use credbroker_e2e::worker::lines::Lines;
use credbroker_e2e::worker::served::Served;
use credbroker_e2e::worker::{Era, ToolResult, Worker};
use serde_json::{Value, json};

/// Makes a request, and gives every message that came for it; the last is the answer.
type Ask<'a> = &'a mut dyn FnMut(&str, &Value) -> Vec<Value>;

fn lines(lines: &mut Lines) -> impl FnMut(&str, &Value) -> Vec<Value> {
    |method, parameters| {
        let id = lines.send_request(method, parameters);
        let mut seen = Vec::new();
        loop {
            seen.push(lines.until(|_| true));
            if seen.last().is_some_and(|message| message["id"].as_u64() == Some(id)) {
                return seen;
            }
        }
    }
}

fn http(http: &mut Http) -> impl FnMut(&str, &Value) -> Vec<Value> {
    |method, parameters| http.start(method, parameters).messages()
}

/// Does `check` on each transport.
fn everywhere(era: Era, broker: &Broker, mut check: impl FnMut(Ask<'_>)) {
    let worker = Identity::worker();
    check(&mut lines(&mut Worker::start_in(era, broker, &worker, &[])));
    let served = Served::unix(broker, &worker, "");
    check(&mut lines(&mut served.connect(era, &Identity::client())));
    let served = Served::http(broker, &worker, &["alice"], "");
    check(&mut http(&mut served.client(era, "alice")));
}

fn answer(ask: Ask<'_>, method: &str, parameters: &Value) -> Value {
    ask(method, parameters).pop().expect("an answer")
}

#[test]
fn both_eras_say_who_serves_on_every_transport() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    everywhere(Era::Stateless, &broker, |ask| {
        let found = answer(ask, "server/discover", &json!({}))["result"].clone();
        let server = &found["_meta"]["io.modelcontextprotocol/serverInfo"];
        assert_eq!(server["name"], "credbroker-sql-worker", "{found}");
        assert!(server["title"].is_string() && server["version"].is_string(), "{found}");
        assert!(found["instructions"].is_string() && found["capabilities"]["tools"].is_object());
        let versions = found["supportedVersions"].as_array().expect("versions");
        assert!(Era::ALL.iter().all(|era| versions.contains(&era.version().into())), "{found}");

        let listed = answer(ask, "tools/list", &json!({}))["result"].clone();
        assert_eq!(
            (&listed["ttlMs"], &listed["cacheScope"]),
            (&json!(3_600_000), &json!("public"))
        );
        assert_eq!(answer(ask, "ping", &json!({}))["error"]["code"], -32601);
        // What is served is declared, and what is declared is served.
        assert!(found["capabilities"]["prompts"].is_object(), "{found}");
        assert_eq!(answer(ask, "prompts/list", &json!({}))["result"]["prompts"], json!([]));
        let unknown = answer(ask, "prompts/get", &json!({ "name": "none" }));
        assert_eq!(unknown["error"]["code"], -32602, "{unknown}");
    });
    everywhere(Era::Legacy, &broker, |ask| {
        assert_eq!(answer(ask, "ping", &json!({}))["result"], json!({}));
        let listed = answer(ask, "tools/list", &json!({}))["result"].clone();
        assert_eq!(listed["tools"][0]["name"], "list_connections", "{listed}");
        assert!(listed.get("ttlMs").is_none() && listed.get("resultType").is_none(), "{listed}");
        let unknown = answer(ask, "tools/call", &json!({ "name": "no_such", "arguments": {} }));
        assert_eq!(unknown["error"]["code"], -32602, "{unknown}");
    });
}

#[test]
fn progress_is_reported_each_second_to_those_who_ask() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let call = |token: Option<&str>| {
        let arguments = json!({ "database": "main_db", "sql": "SELECT pg_sleep(2.5)::text" });
        let mut call = json!({ "name": "execute_sql", "arguments": arguments });
        if let Some(token) = token {
            call["_meta"] = json!({ "progressToken": token });
        }
        call
    };
    for era in Era::ALL {
        everywhere(era, &broker, |ask| {
            let messages = ask("tools/call", &call(Some("mine")));
            let (answer, reports) = messages.split_last().expect("messages");
            assert_eq!(answer["result"]["isError"], false, "{answer}");
            let seconds: Vec<f64> = reports
                .iter()
                .inspect(|report| {
                    assert_eq!(report["method"], "notifications/progress", "{report}");
                    assert_eq!(report["params"]["progressToken"], "mine", "{report}");
                })
                .filter_map(|report| report["params"]["progress"].as_f64())
                .collect();
            assert!((1..=3).contains(&seconds.len()), "{messages:?}");
            assert!(seconds.is_sorted_by(|one, next| one < next), "{seconds:?}");
            assert_eq!(ask("tools/call", &call(None)).len(), 1, "nobody asked for reports");
        });
    }
}

#[test]
fn what_does_not_fit_is_told_to_who_asked() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    for era in Era::ALL {
        everywhere(era, &broker, |ask| {
            let wrong = json!({ "name": "execute_sql", "arguments": "{\"sql\": \"hunter2\"}" });
            for (method, parameters) in [("tools/call", wrong), ("resources/read", json!({}))] {
                let told = answer(ask, method, &parameters);
                assert_eq!(told["error"]["code"], -32602, "{told}");
                let text = told["error"]["message"].as_str().expect("a text");
                assert!(told["id"].is_u64() && text.starts_with(method), "{told}");
                assert!(!told.to_string().contains("hunter2"), "{told}");
            }
            let unknown = answer(ask, "no/such", &json!({}));
            assert_eq!(unknown["error"]["code"], -32601, "{unknown}");
        });
    }
}

#[test]
fn an_id_is_taken_until_its_request_is_answered() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let ask = |sql: &str| {
        let arguments = json!({ "database": "main_db", "sql": sql });
        let parameters = json!({ "name": "execute_sql", "arguments": arguments });
        json!({ "jsonrpc": "2.0", "id": 77, "method": "tools/call", "params": parameters })
    };
    let served = Served::http(&broker, &Identity::worker(), &["alice"], "");
    let http = served.client(Era::Legacy, "alice");
    let first = http.post(&ask("SELECT pg_sleep(300)"));
    assert_eventually!(database.running("pg_sleep") == 1, "the query does not run");
    let second = http.post(&ask("SELECT 1")).answer();
    assert_eq!((&second["id"], &second["error"]["code"]), (&json!(77), &json!(-32600)));
    assert_eq!(database.running("pg_sleep"), 1, "the first is as it was");
    drop(first);
    assert_eventually!(database.running("pg_sleep") == 0, "it runs for nobody");
    let free = || http.post(&ask("SELECT 1")).answer()["result"]["isError"] == false;
    assert_eventually!(free(), "the id is not free again");
}

#[test]
fn a_client_that_lost_its_stream_comes_back_for_the_rest() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let served = Served::http(&broker, &Identity::worker(), &["alice"], "");
    let mut http = served.client(Era::Legacy, "alice");
    let call = |sql: &str| {
        let arguments = json!({ "database": "main_db", "sql": sql });
        let meta = json!({ "progressToken": "mine" });
        json!({ "name": "execute_sql", "arguments": arguments, "_meta": meta })
    };
    let message = |event: &Event| serde_json::from_str::<Value>(&event.data).expect("a message");

    // It is still there, by another stream.
    let listening = http.send("GET", &http.headers(), "");
    let mut events = http.start("tools/call", &call("SELECT pg_sleep(2.5)::text")).events();
    let first = events.next().expect("an event to come back by");
    assert!(first.data.is_empty() && !first.id.is_empty(), "{first:?}");
    assert!(first.retry.is_some_and(|after| after < 300), "it is gone by then: {first:?}");
    let report = events.next().expect("a report");
    assert_eq!(message(&report)["method"], "notifications/progress");
    drop(events);
    let rest: Vec<Event> = http.resume(&report).collect();
    assert!(rest.iter().all(|event| event.id != report.id), "it comes twice: {rest:?}");
    let answer = message(rest.last().expect("an answer"));
    assert!(!ToolResult::of("execute_sql", &answer).is_error, "{answer}");
    let answers = rest.iter().filter(|event| message(event).get("id").is_some()).count();
    assert_eq!(answers, 1, "{rest:?}");

    // It is not, and hears that its call has ended.
    drop(listening);
    let mut events = http.start("tools/call", &call("SELECT pg_sleep(300)")).events();
    let first = events.next().expect("an event to come back by");
    assert_eventually!(database.running("pg_sleep") == 1, "the query does not run");
    drop(events);
    assert_eventually!(database.running("pg_sleep") == 0, "it runs for nobody");
    let answer = http.resume(&first).last().expect("an answer");
    let answer = ToolResult::of("execute_sql", &message(&answer));
    assert_eq!(answer.text("/error/code"), "CANCELLED");
}

/// An answer, but for its date.
fn plain(mut response: Response) -> Response {
    response.headers.retain(|(name, _)| name != "date");
    response
}

#[test]
fn http_lets_in_only_who_was_meant_to_come() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let served = Served::http(&broker, &Identity::worker(), &["alice"], "");
    let alice = served.client(Era::Stateless, "alice");
    let ping = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/list",
        "params": Era::Stateless.parameters(&json!({})) });
    let ping = ping.to_string();
    let with = |changes: &[(&'static str, Option<&str>)]| {
        let mut headers = alice.headers();
        headers.push(("Content-Type", "application/json".to_owned()));
        headers.push(("Mcp-Method", "tools/list".to_owned()));
        for (name, value) in changes {
            headers.retain(|(found, _)| found != name);
            headers.extend(value.map(|value| (*name, value.to_owned())));
        }
        headers
    };
    let post = |changes: &[(&'static str, Option<&str>)], body: &str| {
        plain(alice.send("POST", &with(changes), body).response())
    };
    assert_eq!(post(&[], &ping).status, 200);

    // Without a valid bearer there is one answer, whatever is missing.
    let missing = post(&[("Authorization", None)], &ping);
    assert_eq!((missing.status, missing.header("www-authenticate")), (401, Some("Bearer")));
    let wrong = format!("Bearer {}", "x".repeat(40));
    for value in [wrong.as_str(), "Bearer", "Basic YWxpY2U6YWxpY2U="] {
        assert_eq!(post(&[("Authorization", Some(value))], &ping), missing);
        assert_eq!(post(&[("Authorization", Some(value))], "{"), missing);
    }
    for method in ["GET", "DELETE", "OPTIONS"] {
        let response = alice.send(method, &with(&[("Authorization", None)]), "").response();
        assert_eq!(plain(response), missing);
    }

    let port = alice.address.port();
    for host in ["evil.example", "localhost", &format!("evil.example:{port}")] {
        assert_eq!(post(&[("Host", Some(host))], &ping).status, 403, "{host}");
    }
    assert_eq!(post(&[("Host", Some(&format!("localhost:{port}")))], &ping).status, 200);
    for origin in ["http://evil.example", "null"] {
        assert_eq!(post(&[("Origin", Some(origin))], &ping).status, 403, "{origin}");
    }
    assert_eq!(post(&[("Origin", Some("http://localhost:3000"))], &ping).status, 200);

    let not_acceptable = post(&[("Accept", Some("application/json"))], &ping);
    assert_eq!(not_acceptable.status, 406);
    assert_eq!(post(&[("Content-Type", Some("text/plain"))], &ping).status, 415);
    assert_eq!(post(&[("MCP-Protocol-Version", Some("2025-11-25"))], &ping).status, 400);
    assert_eq!(post(&[("Mcp-Method", Some("tools/call"))], &ping).status, 400);
    let broken = post(&[], "{");
    assert!(broken.status == 400 && broken.body.contains("-32700"), "{broken:?}");
    let batch = post(&[], &format!("[{ping}]"));
    assert!(batch.status == 400 && batch.body.contains("-32600"), "{batch:?}");
    let long = format!("{{\"x\":\"{}\"}}", "x".repeat(1 << 20));
    assert_eq!(post(&[], &long).status, 413);
    assert_eq!(alice.send("PUT", &with(&[]), "").response().status, 405);
    assert_eq!(alice.send("GET", &with(&[]), "").response().status, 405);

    // The legacy era: no session, no such session, and a version that nobody speaks.
    let legacy = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/list" }).to_string();
    let in_session = |session| {
        let version = ("MCP-Protocol-Version", Some("2025-11-25"));
        post(&[version, ("Mcp-Session-Id", session)], &legacy).status
    };
    assert_eq!((in_session(None), in_session(Some("made-up"))), (400, 404));
    assert_eq!(post(&[("MCP-Protocol-Version", Some("1999-01-01"))], &legacy).status, 400);
    assert!(!served.log().contains(&alice.bearer), "{}", served.log());
}

#[test]
fn http_starts_only_where_it_is_safe() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let run = |address: &str, config: &str| {
        let file = broker.setup().path("unsafe.toml");
        std::fs::write(&file, config).expect("a configuration");
        let mut command = Identity::own().command(binaries::sql_worker());
        let done =
            output(command.args(["mcp", "--http", address, "--config"]).arg(&file), PATIENCE);
        assert_eq!(done.status.code(), Some(78));
        String::from_utf8_lossy(&done.stderr).into_owned()
    };
    let open = broker.setup().path("open.bearer");
    std::fs::write(&open, "x".repeat(40)).expect("a bearer");
    let bearers = format!("[http.bearers]\nalice = \"{}\"\n", open.display());
    let said = run("0.0.0.0:0", &bearers);
    assert!(said.contains("only a loopback address is served"), "{said}");
    let said = run("127.0.0.1:0", "");
    assert!(said.contains("needs a bearer token") && said.contains("bearers = {"), "{said}");
    let said = run("127.0.0.1:0", &bearers);
    assert!(said.contains("others can read it: chmod 0600"), "{said}");
}

#[test]
fn a_slow_or_silent_http_client_holds_up_nobody() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let served = Served::http(&broker, &Identity::worker(), &["alice"], "");
    let mut alice = served.client(Era::Legacy, "alice");
    let mut silent: Vec<TcpStream> = (0..100)
        .map(|_| {
            let mut stream = TcpStream::connect(alice.address).expect("the worker listens");
            stream.write_all(b"POST /mcp HTTP/1.1\r\nHost: ").expect("it takes bytes");
            stream
        })
        .collect();
    let started = Instant::now();
    assert!(!alice.call("list_connections", &json!({})).is_error);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    // A head without end is not kept.
    let mut endless = silent.pop().expect("a stream");
    endless.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let _cut_off = endless.write_all(&vec![b'x'; 256 << 10]);
    let mut said = Vec::new();
    let _reset = endless.read_to_end(&mut said);
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(said.is_empty() || said.starts_with("HTTP/1.1 4"), "{said}");
}

/// Requests whose bodies do not come are in the works like any other.
#[test]
fn one_bearer_cannot_take_the_turns_of_another() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let served = Served::http(&broker, &Identity::worker(), &["alice", "bob"], "");
    let alice = served.client(Era::Stateless, "alice");
    let head = format!(
        "POST /mcp HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {}\r\nContent-Length: 9\r\n\r\n",
        alice.address, alice.bearer
    );
    let held: Vec<TcpStream> = (0..128)
        .map(|_| {
            let mut stream = TcpStream::connect(alice.address).expect("the worker listens");
            stream.write_all(head.as_bytes()).expect("it takes bytes");
            stream
        })
        .collect();
    assert_eventually!(
        alice.send("GET", &alice.headers(), "").response().status == 503,
        "all of alice's turns are taken"
    );
    let mut bob = served.client(Era::Stateless, "bob");
    assert!(!bob.call("list_connections", &json!({})).is_error);
    drop(held);
    let mut alice = alice;
    assert_eventually!(
        alice.start("tools/list", &json!({})).response().status == 200,
        "those who left make room"
    );
}

#[test]
fn a_unix_socket_is_for_its_group_and_bounded_for_each_user() {
    if !several_or_say("a socket lets in its group alone") {
        return;
    }
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let served = Served::unix(&broker, &Identity::worker(), "");
    let outsider = Identity::client().without_groups();
    let shut = outsider.act(|| {
        let socket = served.socket();
        std::os::unix::net::UnixStream::connect(socket).map_err(|error| error.kind())
    });
    assert_eq!(shut.expect("a thread").err(), Some(std::io::ErrorKind::PermissionDenied));

    let greedy = Identity::client();
    let mut held: Vec<_> = (0..64).map(|_| served.dial(&greedy)).collect();
    let mut last = served.dial(&greedy);
    last.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut said = String::new();
    last.read_to_string(&mut said).expect("the worker hangs up");
    let said: Value = serde_json::from_str(&said).expect("one message");
    assert!(said["error"]["message"].to_string().contains("close one"), "{said}");
    let mut other = served.connect(Era::Legacy, &Identity::attacker());
    assert!(!other.tools().is_empty(), "another user is served");
    held.clear();
    let mut again = None;
    assert_eventually!(
        {
            let stream = served.dial(&greedy);
            stream.set_read_timeout(Some(Duration::from_millis(50))).expect("a timeout");
            let open = (&stream).read(&mut [0]).is_err();
            again = open.then_some(stream);
            open
        },
        "those who left make room"
    );
    drop(again);
}

#[test]
fn calls_are_limited_for_each_principal() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let slow = "[limits]\ncalls_per_second = 1\n";
    let served = Served::http(&broker, &Identity::worker(), &["alice", "bob"], slow);
    let mut alice = served.client(Era::Stateless, "alice");
    let codes: Vec<String> = (0..6)
        .map(|_| alice.call("list_connections", &json!({})).text("/error/code").to_owned())
        .collect();
    assert!(codes[..2].iter().all(String::is_empty), "{codes:?}");
    assert!(codes[2..].contains(&"LIMIT_REACHED".to_owned()), "{codes:?}");
    let mut bob = served.client(Era::Stateless, "bob");
    assert!(!bob.call("list_connections", &json!({})).is_error, "bob did not call yet");
    assert_eventually!(!alice.call("list_connections", &json!({})).is_error, "it comes back");
}

#[test]
fn the_log_says_who_called_what_and_nothing_of_it() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let served = Served::http(&broker, &Identity::worker(), &["alice"], "");
    let mut alice = served.client(Era::Stateless, "alice");
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    for traceparent in [trace, "canary-traceparent\n"] {
        let arguments = json!({ "database": "main_db", "sql": "SELECT 'canary-sql', $1",
            "params": ["canary-value"] });
        let call = json!({ "name": "execute_sql", "arguments": arguments,
            "_meta": { "traceparent": traceparent } });
        assert_eq!(alice.request("tools/call", &call)["result"]["isError"], false);
    }
    let log = served.log();
    let calls: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("a line is JSON")["fields"].clone())
        .filter(|fields| fields["message"] == "call")
        .collect();
    assert_eq!(calls.len(), 2, "{log}");
    for call in &calls {
        assert_eq!(call["principal"], "http:alice", "{call}");
        assert_eq!((&call["tool"], &call["code"]), (&json!("execute_sql"), &json!("OK")), "{call}");
        assert!(call["elapsed_ms"].is_u64(), "{call}");
    }
    assert_eq!(calls[0]["traceparent"], trace);
    assert!(calls[1].get("traceparent").is_none(), "{log}");
    assert!(!log.contains("canary") && !log.contains(&alice.bearer), "{log}");
}
