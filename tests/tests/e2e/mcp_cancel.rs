//! Cancel means stopped: whatever ends a call of the worker ends its statement in the database
//! within a second. A matrix of transport, era and cause; each cell prints what it measured.

use std::time::{Duration, Instant, SystemTime};

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::{Broker, Grant, Via};
use credbroker_e2e::identity::Identity;
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::wait::{PATIENCE, until};
use credbroker_e2e::worker::http::{Exchange, Http};
use credbroker_e2e::worker::lines::Lines;
use credbroker_e2e::worker::served::Served;
use credbroker_e2e::worker::{Era, ToolResult, Worker};
use rustix::process::Signal;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(1);
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(2);
const TOKEN_LIFE: &str = "3s";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    Stdio,
    Unix,
    Http,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// `notifications/cancelled`.
    Cancelled,
    /// End of standard input, end of the socket, the loss of the HTTP client.
    HangUp,
    /// The statement's time is over.
    Deadline,
    /// The handle's time is over.
    Expiry,
    /// The same principal revokes the token, in another call.
    Revoked,
    /// An operator revokes every handle of the connection.
    Operator,
    /// SIGTERM to the worker.
    Terminate,
}

impl Cause {
    const ALL: [Self; 7] = [
        Self::Cancelled,
        Self::HangUp,
        Self::Deadline,
        Self::Expiry,
        Self::Revoked,
        Self::Operator,
        Self::Terminate,
    ];

    fn exists_in(self, transport: Transport, era: Era) -> bool {
        // There the lost client is the cancellation.
        !(self == Self::Cancelled && transport == Transport::Http && era == Era::Stateless)
    }
}

/// A client that can have one call in flight.
enum Client {
    Stdio(Worker, u64),
    Unix(Served, Lines, u64),
    Http(Served, Http, Option<Exchange>),
}

impl Client {
    fn start(transport: Transport, era: Era, broker: &Broker, config: &str) -> Self {
        let worker = Identity::worker();
        match transport {
            Transport::Stdio => {
                let file = broker.setup().path(&format!("worker-{era:?}.toml"));
                std::fs::write(&file, config).expect("a configuration");
                let options = ["--config", file.to_str().expect("ASCII")];
                Self::Stdio(Worker::start_in(era, broker, &worker, &options), 0)
            }
            Transport::Unix => {
                let served = Served::unix(broker, &worker, config);
                let lines = served.connect(era, &Identity::client());
                Self::Unix(served, lines, 0)
            }
            Transport::Http => {
                let served = Served::http(broker, &worker, &["alice"], config);
                let http = served.client(era, "alice");
                Self::Http(served, http, None)
            }
        }
    }

    fn call(&mut self, tool: &str, arguments: &Value) -> ToolResult {
        match self {
            Self::Stdio(worker, _) => worker.call(tool, arguments),
            Self::Unix(_, lines, _) => lines.call(tool, arguments),
            Self::Http(_, http, _) => http.call(tool, arguments),
        }
    }

    fn begin(&mut self, tool: &str, arguments: &Value) {
        match self {
            Self::Stdio(worker, id) => *id = worker.start_call(tool, arguments),
            Self::Unix(_, lines, id) => *id = lines.start_call(tool, arguments),
            Self::Http(_, http, exchange) => *exchange = Some(http.start_call(tool, arguments)),
        }
    }

    fn cancel(&mut self) {
        match self {
            Self::Stdio(worker, id) => worker.cancel(*id),
            Self::Unix(_, lines, id) => lines.cancel(*id),
            Self::Http(_, http, _) => {
                let cancelled = json!({ "requestId": http.last_id() });
                let accepted = http.notify("notifications/cancelled", &cancelled);
                assert_eq!(accepted.status, 202, "{accepted:?}");
            }
        }
    }

    fn hang_up(&mut self) {
        match self {
            Self::Stdio(worker, _) => worker.close_input(),
            Self::Unix(_, lines, _) => lines.close_input(),
            Self::Http(_, _, exchange) => *exchange = None,
        }
    }

    fn terminate(&mut self) {
        match self {
            Self::Stdio(worker, _) => worker.process().signal(Signal::TERM),
            Self::Unix(served, ..) | Self::Http(served, ..) => {
                served.process().signal(Signal::TERM);
            }
        }
    }

    /// The code of the answer to the call in flight.
    fn code(&mut self) -> String {
        let answer = match self {
            Self::Stdio(worker, id) => worker.answer_to(*id),
            Self::Unix(_, lines, id) => lines.answer_to(*id),
            Self::Http(_, _, exchange) => exchange.take().expect("a call").answer(),
        };
        ToolResult::of("execute_sql", &answer).text("/error/code").to_owned()
    }

    /// What was answered so far to the call that was cancelled: the next request shows that
    /// nothing more comes.
    fn assert_no_answer(&mut self) {
        match self {
            Self::Stdio(worker, id) => assert_silent(worker, *id),
            Self::Unix(_, lines, id) => assert_silent(lines, *id),
            Self::Http(_, _, exchange) => {
                let messages = exchange.take().expect("a call").messages();
                assert_eq!(messages, Vec::<Value>::new(), "the stream ends without an answer");
            }
        }
    }

    /// The process ends by itself, and in time.
    fn assert_ends(&mut self) -> Duration {
        let started = Instant::now();
        let process = match self {
            Self::Stdio(worker, _) => worker.process(),
            Self::Unix(served, ..) | Self::Http(served, ..) => served.process(),
        };
        assert!(process.wait(PATIENCE).success(), "{}", process.stderr());
        started.elapsed()
    }
}

fn assert_silent(lines: &mut Lines, id: u64) {
    let listed = lines.request("tools/list", &json!({}));
    assert!(listed["result"]["tools"].is_array(), "{listed}");
    let answered = lines.transcript().lines().any(|line| {
        let message: Value = serde_json::from_str(line).expect("a message");
        message["id"].as_u64() == Some(id) && message.get("method").is_none()
    });
    assert!(!answered, "a cancelled call was answered");
}

/// How long after `zero` the query was seen to be gone.
fn gone(database: &Database, zero: Instant) -> Duration {
    let mut admin = database.admin();
    let ask = "SELECT count(*) FROM pg_stat_activity
        WHERE usename = $1 AND state = 'active' AND strpos(query, 'pg_sleep') > 0";
    let gone = until(PATIENCE, || {
        let row = admin.query_one(ask, &[&database.name()]).expect("pg_stat_activity is readable");
        (row.get::<_, i64>(0) == 0).then(Instant::now)
    });
    gone.expect("the query ends").saturating_duration_since(zero)
}

fn cell(
    transport: Transport,
    era: Era,
    cause: Cause,
    broker: &Broker,
    database: &Database,
) -> (String, Duration) {
    let deadline = format!("[limits]\nstatement_timeout = \"{}s\"\n", STATEMENT_TIMEOUT.as_secs());
    let config = if cause == Cause::Deadline { deadline.as_str() } else { "" };
    let mut client = Client::start(transport, era, broker, config);
    let mut ask = json!({ "database": "main_db", "sql": "SELECT pg_sleep(300)" });
    let mut expires = SystemTime::now();
    if matches!(cause, Cause::Expiry | Cause::Revoked) {
        let minutes = json!({ "database": "main_db", "expiry_minutes": 1 });
        let made = client.call("create_credential_token", &minutes);
        assert!(!made.is_error, "{}", made.raw);
        ask["credential_token"] = made.text("/credential_token").into();
        // To the second; the handle lives for TOKEN_LIFE from its creation on.
        expires = SystemTime::now() + Duration::from_secs(3);
    }
    let begun = Instant::now();
    client.begin("execute_sql", &ask);
    assert_eventually!(database.running("pg_sleep") == 1, "{cause:?}: the query does not run");

    let zero = Instant::now();
    let zero = match cause {
        Cause::Cancelled => {
            client.cancel();
            zero
        }
        Cause::HangUp => {
            client.hang_up();
            zero
        }
        Cause::Deadline => begun + STATEMENT_TIMEOUT,
        Cause::Expiry => zero + expires.duration_since(SystemTime::now()).unwrap_or_default(),
        Cause::Revoked => {
            let revoked = json!({ "credential_token": ask["credential_token"] });
            let done = client.call("revoke_credential_token", &revoked);
            assert!(!done.is_error, "{}", done.raw);
            zero
        }
        Cause::Operator => {
            broker.operator().revoke_all("main_db").expect("the operator may");
            zero
        }
        Cause::Terminate => {
            client.terminate();
            zero
        }
    };
    let took = gone(database, zero);
    let line = format!("{transport:?} {} {cause:?}: {} ms", era.version(), took.as_millis());

    match (cause, transport) {
        (Cause::Cancelled, _) => client.assert_no_answer(),
        (Cause::HangUp, Transport::Stdio) | (Cause::Terminate, _) => {
            let ended = client.assert_ends();
            assert!(ended <= PATIENCE, "{transport:?} {era:?} {cause:?}: ended after {ended:?}");
        }
        (Cause::HangUp, Transport::Unix | Transport::Http) => {}
        (Cause::Deadline, _) => assert_eq!(client.code(), "TIMEOUT"),
        (Cause::Expiry | Cause::Revoked | Cause::Operator, _) => {
            let code = client.code();
            assert!(["CANCELLED", "HANDLE_INVALID"].contains(&code.as_str()), "{cause:?}: {code}");
        }
    }
    (line, took)
}

/// How often a cell may be late: others take the processors too.
const TRIES: usize = 3;

fn matrix(transport: Transport) -> String {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let worker = Identity::worker();
    let short = Grant::to(&worker, &["issue", "open"], &["main_db"]).with("max_ttl", TOKEN_LIFE);
    let short = credbroker_e2e::broker::Setup::new()
        .connection("main_db", &database, Via::Tls)
        .grant(short)
        .start();
    let mut lines = Vec::new();
    for era in Era::ALL {
        for cause in Cause::ALL.into_iter().filter(|cause| cause.exists_in(transport, era)) {
            let broker = if cause == Cause::Expiry { &short } else { &broker };
            let in_time = (0..TRIES).any(|_try| {
                let (line, took) = cell(transport, era, cause, broker, &database);
                lines.push(line);
                took <= LIMIT
            });
            assert!(in_time, "{}", lines.join("\n"));
        }
    }
    lines.join("\n")
}

#[test]
fn cancel_means_stopped_on_standard_streams() {
    println!("{}", matrix(Transport::Stdio));
}

#[test]
fn cancel_means_stopped_on_a_unix_socket() {
    println!("{}", matrix(Transport::Unix));
}

#[test]
fn cancel_means_stopped_over_http() {
    println!("{}", matrix(Transport::Http));
}

/// A session of the legacy era: its calls end with it, and with the last of its streams; a
/// client that keeps one open is still there.
#[test]
fn cancel_means_stopped_when_a_session_is_left() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let served = Served::http(&broker, &Identity::worker(), &["alice"], "");
    let ask = json!({ "database": "main_db", "sql": "SELECT pg_sleep(300)" });

    let mut http = served.client(Era::Legacy, "alice");
    let call = http.start_call("execute_sql", &ask);
    assert_eventually!(database.running("pg_sleep") == 1, "the query does not run");
    let zero = Instant::now();
    assert_eq!(http.send("DELETE", &http.headers(), "").response().status, 202);
    let took = gone(&database, zero);
    println!("DELETE: {} ms", took.as_millis());
    assert!(took <= 3 * LIMIT, "{took:?}");
    drop(call);
    assert_eq!(http.start("tools/list", &json!({})).response().status, 404);

    let mut http = served.client(Era::Legacy, "alice");
    let listening = http.send("GET", &http.headers(), "");
    let call = http.start_call("execute_sql", &ask);
    assert_eventually!(database.running("pg_sleep") == 1, "the query does not run");
    drop(call);
    let stays = credbroker_e2e::wait::holds_for(LIMIT, || database.running("pg_sleep") == 1);
    assert!(stays, "the client still listens");
    let zero = Instant::now();
    drop(listening);
    let took = gone(&database, zero);
    println!("last stream: {} ms", took.as_millis());
    assert!(took <= 3 * LIMIT, "{took:?}");
}

/// A worker whose answers nobody can get any more does not go on.
#[test]
fn cancel_means_stopped_when_the_worker_is_killed() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let mut worker = Worker::start(&broker, &Identity::worker());
    let ask = json!({ "database": "main_db", "sql": "SELECT pg_sleep(300)" });
    let _id = worker.start_call("execute_sql", &ask);
    assert_eventually!(database.running("pg_sleep") == 1, "the query does not run");
    let zero = Instant::now();
    worker.process().signal(Signal::KILL);
    let took = gone(&database, zero);
    println!("SIGKILL: {} ms", took.as_millis());
    assert!(took <= 3 * LIMIT, "{took:?}");
}
