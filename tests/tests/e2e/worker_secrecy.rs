//! G1, by every way into the SQL worker: neither a password of the broker's, nor one that a caller
//! has sent, is in it when the work is done.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use credbroker_e2e::broker::{Broker, Grant, Setup, Via};
use credbroker_e2e::canary::{Canary, Pattern, random_word};
use credbroker_e2e::handles::Handles;
use credbroker_e2e::identity::{Identity, several_or_say};
use credbroker_e2e::memory;
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::process::Process;
use credbroker_e2e::wait::{PATIENCE, until};
use credbroker_e2e::worker::http::Http;
use credbroker_e2e::worker::lines::Lines;
use credbroker_e2e::worker::served::Served;
use credbroker_e2e::worker::{Era, ToolResult, Worker};
use credbroker_e2e::{assert_eventually, binaries};
use credbroker_proto::v1::execute_query_request::{Params, Target};
use credbroker_proto::v1::sql_value::Kind;
use credbroker_proto::v1::{
    ConnectRequest, DescribeSchemaRequest, ExecuteQueryRequest, ExplainQueryRequest, SqlValue,
    SqlValueList, describe_schema_request, explain_query_request,
};
use serde_json::{Value, json};

use crate::secrecy::assert_clean;
use crate::sql_rpc;

/// All that the worker says, and a place for the listening ones.
const DEBUG: &str = "[log]\nlevel = \"debug\"\n";
const INLINE: &str = "--allow-inline-secrets";

/// A broker, and the passwords that must not be found.
struct Stage {
    broker: Broker,
    /// `main_db`: the broker has its password.
    main: Database,
    /// `stale_db`: the broker has a password that the server refuses.
    stale: Database,
    /// `bare_db`: a caller brings its password.
    brought: Database,
    /// A caller brings this one to `bare_db`, and the server refuses it.
    wrong: Canary,
    /// A caller sends this one where no password belongs.
    misplaced: Canary,
    /// A caller gives this one as a name, and names go to the broker: the buffers of that link may
    /// keep it, but nobody writes it down.
    misnamed: Canary,
}

impl Stage {
    fn set() -> Self {
        let server = Server::shared();
        let (main, stale, brought) = (server.database(), server.database(), server.database());
        stale.set_server_password(&Canary::random());
        let worker = Identity::worker();
        let broker = Setup::new()
            .connection("main_db", &main, Via::Tls)
            .connection("stale_db", &stale, Via::Tls)
            .bare_connection("bare_db", &brought)
            .grant(Grant::to(&worker, &["issue", "open"], &["main_db", "stale_db"]))
            .grant(Grant::to(&worker, &["register", "open"], &["bare_db"]))
            .start();
        let [wrong, misplaced, misnamed] = [(); 3].map(|()| Canary::random());
        Self { broker, main, stale, brought, wrong, misplaced, misnamed }
    }

    /// What no worker ever gets to see.
    fn brokers(&self) -> Vec<Pattern> {
        let of = |database: &Database| {
            [database.canary().patterns(), database.derived_patterns()].concat()
        };
        [of(&self.main), of(&self.stale)].concat()
    }

    /// What passes through a worker.
    fn callers(&self) -> Vec<Pattern> {
        let canaries = [self.brought.canary(), &self.wrong, &self.misplaced];
        canaries.into_iter().flat_map(Canary::patterns).collect()
    }

    /// Asserts that none of it is in a worker that has answered, in what it wrote, or in what its
    /// client `received`.
    fn assert_clean(&self, name: &str, pid: u32, received: &str) {
        assert_clean(name, pid, &self.brokers());
        // It has answered a moment before it drops what it was asked.
        let callers = self.callers();
        let mut found = memory::Scan::default();
        let clean = until(PATIENCE, || {
            found = memory::scan(pid, &callers).expect("the worker can be read");
            found.hits.is_empty().then_some(())
        });
        assert!(clean.is_some(), "{name}: {:?}", found.hits);
        let all = [self.brokers(), callers].concat();
        assert_clean(name, pid, &all);
        let all = [all, self.misnamed.patterns()].concat();
        assert!(!received.is_empty() && is_in(&all, received).is_none(), "{name}: {received}");
        let mut root = self.broker.setup().path("");
        let logs = fs::read_dir(&root).expect("the directory of the test").flatten();
        let mut written: Vec<_> = logs
            .map(|entry| entry.path())
            .filter(|path| path.file_name().is_some_and(|name| name != "etc" && name != "logs"))
            .collect();
        root.push("logs");
        // What clients sent is in their transcripts.
        let logs = fs::read_dir(&root).expect("the logs").flatten().map(|entry| entry.path());
        written
            .extend(logs.filter(|path| path.extension().is_none_or(|kind| kind != "transcript")));
        assert_eq!(memory::scan_files(&written, &all), Vec::<String>::new(), "{name}");
    }
}

fn is_in(patterns: &[Pattern], text: &str) -> Option<String> {
    let found = patterns.iter().find(|pattern| pattern.is_in(text.as_bytes()));
    found.map(|pattern| pattern.form().to_owned())
}

/// A client of some transport, and all that it was told.
struct Caller<'a> {
    call: &'a mut dyn FnMut(&str, &Value) -> ToolResult,
    received: String,
}

impl Caller<'_> {
    fn ask(&mut self, tool: &str, arguments: &Value) -> ToolResult {
        let result = (self.call)(tool, arguments);
        self.received += &result.raw.to_string();
        result
    }

    fn done(&mut self, tool: &str, arguments: &Value) -> ToolResult {
        let result = self.ask(tool, arguments);
        assert!(!result.is_error, "{tool}: {}", result.raw);
        result
    }

    /// The code of the refusal.
    fn refused(&mut self, tool: &str, arguments: &Value) -> String {
        let result = self.ask(tool, arguments);
        assert!(result.is_error, "{tool}: {}", result.raw);
        result.text("/error/code").to_owned()
    }

    /// What a caller does with connections whose password the broker has.
    fn work(&mut self, stage: &Stage) {
        let sql = |database: &str, sql: &str| json!({ "database": database, "sql": sql });
        for _round in 0..20 {
            self.done("execute_sql", &sql("main_db", "SELECT count(*) AS n FROM pg_class"));
        }
        self.done("list_connections", &json!({}));
        self.done("describe_schema", &json!({ "database": "main_db" }));
        self.done("explain_query", &json!({ "database": "main_db", "query": "TABLE pg_class" }));
        let named = self.done("connect_named_storage", &json!({ "connection_name": "main_db" }));
        let server = stage.main.server();
        let place = json!({ "storage_type": "postgresql", "host": "localhost",
            "port": server.port, "database": stage.main.name() });
        let found = self.done("connect_storage", &place);
        for connected in [named, found] {
            let id = connected.text("/connection_id");
            self.done("execute_query", &json!({ "connection_id": id, "query": "SELECT 1" }));
            self.done("disconnect", &json!({ "connection_id": id }));
        }
        let made = self.done("create_credential_token", &json!({ "database": "main_db" }));
        let token = made.text("/credential_token");
        let mut with_token = sql("main_db", "SELECT 2");
        with_token["credential_token"] = token.into();
        self.done("execute_sql", &with_token);
        self.done("revoke_credential_token", &json!({ "credential_token": token }));

        let authid = sql("main_db", "SELECT * FROM pg_authid");
        assert_eq!(self.refused("execute_sql", &authid), "SQL_ERROR");
        let write = sql("main_db", "CREATE TABLE t ()");
        assert_eq!(self.refused("execute_sql", &write), "READ_ONLY");
        assert_eq!(self.refused("execute_sql", &sql("no_db", "SELECT 1")), "ACCESS_DENIED");
        assert_eq!(self.refused("execute_sql", &json!({ "sql": 1 })), "INVALID_REQUEST");
        // The login that the broker tries is refused, at first and by the breaker.
        for _round in 0..3 {
            let refused = self.refused("execute_sql", &sql("stale_db", "SELECT 1"));
            assert_eq!(refused, "UPSTREAM_REFUSED");
        }
    }

    /// Sends passwords, where they are taken if `allowed`, and where they never are.
    fn bring(&mut self, stage: &Stage, allowed: bool) {
        let login = |password: &Canary| {
            json!({ "database": "bare_db", "username": stage.brought.name(),
                "password": password.reveal() })
        };
        let place = |password: &Canary| {
            json!({ "storage_type": "postgresql", "host": "localhost",
                "port": stage.brought.server().port, "database": stage.brought.name(),
                "username": stage.brought.name(), "password": password.reveal() })
        };
        let secret = stage.misplaced.reveal();
        let padded = format!("{secret}{}", "x".repeat(16 << 10));
        let url = format!("postgresql://somebody:{secret}@localhost/{}", stage.brought.name());
        let pairs = format!("host=localhost password='{secret}'");
        for (tool, arguments) in [
            ("create_credential_token", json!({ "database": "bare_db", "password": secret })),
            ("create_credential_token", json!({ "database": "bare_db", "username": secret })),
            ("create_credential_token", json!({ "database": "bare_db", "password": [secret] })),
            ("create_credential_token", json!({ "database": "bare_db", "pass": secret })),
            (
                "create_credential_token",
                json!({ "database": "bare_db", "username": "u", "password": padded }),
            ),
            ("connect_storage", json!({ "connection_string": url })),
            ("connect_storage", json!({ "connection_string": pairs })),
            (
                "execute_sql",
                json!({ "database": "main_db", "credential_token": secret, "sql": "" }),
            ),
        ] {
            self.refused(tool, &arguments);
        }
        let name = stage.misnamed.reveal();
        self.refused("create_credential_token", &json!({ "database": name }));
        self.refused("connect_named_storage", &json!({ "connection_name": name }));
        self.refused("execute_sql", &json!({ "database": name, "sql": "SELECT 1" }));

        let own = stage.brought.canary();
        if allowed {
            let mut tokens = Vec::new();
            for password in [own, own, &stage.wrong] {
                let made = self.done("create_credential_token", &login(password));
                tokens.push(made.text("/credential_token").to_owned());
            }
            let sql = |token: &str| {
                json!({ "database": "bare_db", "credential_token": token,
                    "sql": "SELECT current_user" })
            };
            let used = self.done("execute_sql", &sql(&tokens[0]));
            assert_eq!(used.content["rows"], json!([[stage.brought.name()]]));
            assert_eq!(self.refused("execute_sql", &sql(&tokens[2])), "UPSTREAM_REFUSED");
            // One is revoked, the others live on.
            self.done("revoke_credential_token", &json!({ "credential_token": tokens[1] }));
            let connected = self.done("connect_storage", &place(own));
            let id = connected.text("/connection_id");
            self.done("execute_query", &json!({ "connection_id": id, "query": "SELECT 1" }));
        } else {
            for password in [own, &stage.wrong] {
                let refused = self.refused("create_credential_token", &login(password));
                assert_eq!(refused, "UNSUPPORTED");
                let refused = self.refused("connect_storage", &place(password));
                assert_eq!(refused, "UNSUPPORTED");
            }
        }
    }
}

/// Lines with a password in them that are no message.
fn no_messages(secret: &str) -> [String; 3] {
    [
        format!("{{\"password\":\"{secret}\",\"x\":\"{}\"}}", "x".repeat(1 << 20)),
        format!("[\"{secret}\"]"),
        format!("{{\"jsonrpc\":\"2.0\",\"id\":1,\"password\":\"{secret}\""),
    ]
}

/// All of it by a connection of lines, which stays open. Long ones come first: they would cover
/// what a buffer has kept of the others.
fn by_lines(stage: &Stage, lines: &mut Lines, allowed: bool) -> String {
    let mut received = String::new();
    for line in no_messages(stage.misplaced.reveal()) {
        lines.send_line(&line);
        received += &lines.until(|message| message["error"].is_object()).to_string();
    }
    let mut call = |tool: &str, arguments: &Value| lines.call(tool, arguments);
    let mut caller = Caller { call: &mut call, received };
    caller.work(stage);
    caller.bring(stage, allowed);
    caller.received
}

/// All of it by HTTP, over connections that are closed.
fn by_http(stage: &Stage, http: &mut Http, allowed: bool) -> String {
    let mut call = |tool: &str, arguments: &Value| http.call(tool, arguments);
    let mut caller = Caller { call: &mut call, received: String::new() };
    caller.work(stage);
    caller.bring(stage, allowed);
    caller.received
}

/// Passwords once more, each by a connection that the client keeps.
fn by_kept_http(stage: &Stage, http: &Http, era: Era) -> (String, Vec<impl Sized + use<>>) {
    let (mut received, mut kept) = (String::new(), Vec::new());
    let ask = json!({ "name": "create_credential_token", "arguments": {
        "database": "bare_db", "username": stage.brought.name(),
        "password": stage.brought.canary().reveal() } });
    let ask = json!({ "jsonrpc": "2.0", "id": 1_000_000, "method": "tools/call",
        "params": era.parameters(&ask) });
    let headers = http.headers_of(&ask);
    let broken = no_messages(stage.misplaced.reveal());
    for body in broken.iter().chain([&ask.to_string()]) {
        let mut exchange = http.send_and_stay("POST", &headers, body);
        received += &exchange.read().body;
        kept.push(exchange);
    }
    (received, kept)
}

fn each_way(prove: impl Fn(&Stage, Era, &[&str])) {
    if !several_or_say("memory of other processes can be read") {
        return;
    }
    let stage = Stage::set();
    for era in Era::ALL {
        for options in [&[][..], &[INLINE]] {
            prove(&stage, era, options);
        }
    }
}

#[test]
fn g1_no_worker_holds_a_secret_by_stdio() {
    each_way(|stage, era, options| {
        let file = stage.broker.setup().path("stdio.toml");
        fs::write(&file, DEBUG).expect("a configuration");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).expect("chmod");
        let config = ["--config", file.to_str().expect("ASCII")];
        let options = [options, &config].concat();
        for start in [Worker::start_in, Worker::start_on_a_socket] {
            let mut worker = start(era, &stage.broker, &Identity::worker(), &options);
            let received = by_lines(stage, &mut worker, options.contains(&INLINE));
            stage.assert_clean(&format!("stdio {era:?} {options:?}"), worker.pid(), &received);
        }
    });
}

#[test]
fn g1_no_worker_holds_a_secret_by_a_unix_socket() {
    each_way(|stage, era, options| {
        let worker = Identity::worker();
        let mut served = Served::unix_with(&stage.broker, &worker, options, DEBUG);
        let mut lines = served.connect(era, &Identity::client());
        let received = by_lines(stage, &mut lines, options.contains(&INLINE));
        let pid = served.process().pid();
        stage.assert_clean(&format!("unix {era:?} {options:?}"), pid, &received);
    });
}

#[test]
fn g1_no_worker_holds_a_secret_by_http() {
    each_way(|stage, era, options| {
        let worker = Identity::worker();
        let mut served = Served::http_with(&stage.broker, &worker, &["alice"], options, DEBUG);
        let mut alice = served.client(era, "alice");
        let received = by_http(stage, &mut alice, options.contains(&INLINE));
        let (more, _kept) = by_kept_http(stage, &alice, era);
        let name = format!("http {era:?} {options:?}");
        stage.assert_clean(&name, served.process().pid(), &(received + &more));
    });
}

#[test]
fn g1_no_worker_holds_a_secret_by_grpc() {
    if !several_or_say("memory of other processes can be read") {
        return;
    }
    let stage = Stage::set();
    let mut served = Served::rpc(&stage.broker, &Identity::worker(), DEBUG);
    let service = sql_rpc::connect(&served, &Identity::client());
    let received = by_grpc(&stage, &service);
    stage.assert_clean("gRPC", served.process().pid(), &received);
}

/// What [`Caller::work`] does, by gRPC.
fn by_grpc(stage: &Stage, service: &Handles) -> String {
    let mut received = String::new();
    let on_stale_db = || ExecuteQueryRequest {
        target: Some(Target::Connection("stale_db".into())),
        ..sql_rpc::on_main_db("SELECT 1")
    };
    for _round in 0..20 {
        let all = sql_rpc::run(service, sql_rpc::on_main_db("SELECT count(*) FROM pg_class"));
        received += &format!("{:?}", all.expect("rows"));
    }
    let described = service.ask(async |channel| {
        let connection = describe_schema_request::Target::Connection("main_db".into());
        let request = DescribeSchemaRequest { target: Some(connection), subject: None };
        sql_rpc::client(channel).describe_schema(request).await
    });
    received += &format!("{:?}", described.expect("a description"));
    let explained = service.ask(async |channel| {
        let connection = explain_query_request::Target::Connection("main_db".into());
        let request =
            ExplainQueryRequest { target: Some(connection), sql: "TABLE pg_class".into() };
        sql_rpc::client(channel).explain_query(request).await
    });
    received += &format!("{:?}", explained.expect("a plan"));
    let found = service.ask(async |channel| {
        let request = ConnectRequest {
            storage_type: "postgresql".into(),
            host: "localhost".into(),
            database: stage.main.name().into(),
            port: Some(stage.main.server().port.into()),
        };
        sql_rpc::client(channel).connect(request).await
    });
    let found = found.expect("it is configured").into_inner();
    received += &format!("{found:?}");
    for id in [sql_rpc::open(service), found.connection_id] {
        sql_rpc::run(service, sql_rpc::on(&id, "SELECT 1")).expect("a row");
        sql_rpc::disconnect(service, &id).expect("its own");
    }
    let token = sql_rpc::token(service);
    let with =
        ExecuteQueryRequest { credential_token: token.clone(), ..sql_rpc::on_main_db("SELECT 2") };
    sql_rpc::run(service, with).expect("a row");
    sql_rpc::revoke(service, &token).expect("its own");
    for sql in ["SELECT * FROM pg_authid", "CREATE TABLE t ()"] {
        received += &format!("{:?}", sql_rpc::refused(service, sql_rpc::on_main_db(sql)));
    }
    for _round in 0..3 {
        let refused = sql_rpc::run(service, on_stale_db()).expect_err("the server says no");
        assert_eq!(refused.reason, "UPSTREAM_REFUSED");
        received += &format!("{refused:?}");
    }
    received
}

/// Asserts that the search finds what a worker does hold: a value of a statement that runs.
fn assert_found(name: &str, pid: u32, database: &Database, planted: &Canary) {
    assert_eventually!(database.running("AS planted") == 1, "{name}: it does not run");
    let found = memory::scan(pid, &planted.patterns()).expect("the worker can be read");
    assert!(found.hits.iter().any(|hit| hit.form == "raw"), "{name}: {found:?}");
}

/// The control of all of the above, in workers of each kind.
#[test]
fn g1_what_is_planted_in_a_worker_is_found() {
    if !several_or_say("memory of other processes can be read") {
        return;
    }
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let worker = Identity::worker();
    const SQL: &str = "SELECT $1::text, pg_sleep(300) AS planted";
    let planted = Canary::random();
    let ask = json!({ "database": "main_db", "sql": SQL, "params": [planted.reveal()] });
    {
        let mut stdio = Worker::start(&broker, &worker);
        let _id = stdio.start_call("execute_sql", &ask);
        assert_found("stdio", stdio.pid(), &database, &planted);
    }
    assert_eventually!(database.running("AS planted") == 0, "it goes with its worker");
    {
        let mut served = Served::unix(&broker, &worker, "");
        let mut lines = served.connect(Era::Legacy, &Identity::client());
        let _id = lines.start_call("execute_sql", &ask);
        assert_found("unix", served.process().pid(), &database, &planted);
    }
    assert_eventually!(database.running("AS planted") == 0, "it goes with its worker");
    {
        let mut served = Served::http(&broker, &worker, &["alice"], "");
        let _call = served.client(Era::Stateless, "alice").start_call("execute_sql", &ask);
        assert_found("http", served.process().pid(), &database, &planted);
    }
    assert_eventually!(database.running("AS planted") == 0, "it goes with its worker");
    {
        let mut served = Served::rpc(&broker, &worker, "");
        let service = sql_rpc::connect(&served, &Identity::client());
        let value = Kind::StringValue(planted.reveal().into());
        let values = vec![SqlValue { kind: Some(value) }];
        let params = Some(Params::Positional(SqlValueList { values }));
        let request = ExecuteQueryRequest { params, ..sql_rpc::on_main_db(SQL) };
        let _parts = sql_rpc::begin(&service, request);
        assert_found("gRPC", served.process().pid(), &database, &planted);
    }
}

/// The control of what is around a worker: its environment, command line and open files.
#[test]
fn g1_what_is_planted_around_a_worker_is_found() {
    if !several_or_say("memory of other processes can be read") {
        return;
    }
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let planted = random_word(32);
    let file = broker.setup().path(&format!("{planted}.toml"));
    fs::write(&file, "").expect("a configuration");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).expect("chmod");
    let socket = broker.setup().path("run/worker.sock");
    let mut command = Identity::broker().command(binaries::sql_worker());
    command.arg("serve").arg("--listen").arg(format!("unix:{}", socket.display()));
    command.arg("--config").arg(&file).env("PLANTED", &planted);
    let logs = broker.setup().path("logs");
    let process = Process::start("planted", &mut command, &logs);
    assert_eventually!(process.stderr().contains("serving gRPC"), "{}", process.stderr());
    fs::write(logs.join("planted.out"), &planted).expect("an open file of the worker");

    let patterns = Canary::known(&planted).patterns();
    let found = memory::scan_surroundings(process.pid(), &patterns).expect("the worker is there");
    for place in ["/environ: raw", "/cmdline: raw", "/fd/1: raw"] {
        assert!(found.iter().any(|hit| hit.ends_with(place)), "{place}: {found:?}");
    }
    let written = memory::scan_files(&[logs], &patterns);
    assert!(written.iter().any(|hit| hit.ends_with("planted.out: raw")), "{written:?}");
}
