//! The gRPC service of the SQL worker: the verbs, whose they are, and that nothing goes on, or
//! piles up, for a client that does not read.

use std::time::{Duration, Instant};

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::{Broker, Grant, Setup, Via};
use credbroker_e2e::handles::{Handles, Refusal};
use credbroker_e2e::identity::{Identity, several_or_say};
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::wait::{PATIENCE, until};
use credbroker_e2e::worker::served::Served;
use credbroker_proto::v1::execute_query_request::{Params, Target};
use credbroker_proto::v1::execute_query_response::Part;
use credbroker_proto::v1::sql_service_client::SqlServiceClient;
use credbroker_proto::v1::sql_value::Kind;
use credbroker_proto::v1::{
    ConnectNamedRequest, ConnectRequest, CreateCredentialTokenRequest, DescribeSchemaRequest,
    DisconnectRequest, ExecuteQueryRequest, ExecuteQueryResponse, ExplainQueryRequest,
    ListSqlConnectionsRequest, RevokeCredentialTokenRequest, SqlColumns, SqlDone, SqlFormat,
    SqlValue, SqlValueList, SqlValueMap, describe_schema_request, describe_schema_response,
    explain_query_request,
};
use rustix::process::Signal;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};
use tonic_types::StatusExt as _;

const SERVICE: &str = "credbroker.v1.SqlService";
const NO_TOKEN: &str = "cbh_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
const NO_CONNECTION: &str = "conn_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
const LIMIT: Duration = Duration::from_secs(1);
/// More than the widest row of these tests.
const MAX_MESSAGE: usize = 8 << 20;

/// A whole answer.
#[derive(Debug, Default)]
pub(crate) struct Whole {
    columns: SqlColumns,
    pub(crate) rows: Vec<Vec<Kind>>,
    csv: String,
    done: SqlDone,
}

pub(crate) fn client(channel: Channel) -> SqlServiceClient<Channel> {
    SqlServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE)
}

pub(crate) fn connect(served: &Served, identity: &Identity) -> Handles {
    Handles::over(served.dial(identity)).expect("a client")
}

pub(crate) fn on_main_db(sql: &str) -> ExecuteQueryRequest {
    let target = Some(Target::Connection("main_db".into()));
    ExecuteQueryRequest { target, sql: sql.into(), ..Default::default() }
}

pub(crate) fn on(connection_id: &str, sql: &str) -> ExecuteQueryRequest {
    let target = Some(Target::ConnectionId(connection_id.into()));
    ExecuteQueryRequest { target, sql: sql.into(), ..Default::default() }
}

async fn whole(channel: Channel, request: ExecuteQueryRequest) -> Result<Whole, Status> {
    let mut parts = client(channel).execute_query(request).await?.into_inner();
    let (mut all, mut count, mut ended) = (Whole::default(), 0, false);
    while let Some(part) = parts.message().await? {
        assert!(!ended, "something comes after done");
        match part.part.expect("a part") {
            Part::Columns(columns) => {
                assert_eq!(count, 0, "columns come first");
                all.columns = columns;
            }
            Part::Rows(rows) => {
                all.rows.extend(rows.rows.into_iter().map(|row| {
                    row.cells.into_iter().map(|cell| cell.kind.expect("a kind")).collect()
                }))
            }
            Part::Csv(csv) => all.csv.push_str(&csv.text),
            Part::Done(done) => (all.done, ended) = (done, true),
        }
        count += 1;
    }
    assert!(ended, "an answer ends with done or with an error");
    Ok(all)
}

pub(crate) fn run(service: &Handles, request: ExecuteQueryRequest) -> Result<Whole, Refusal> {
    service.ask(async |channel| whole(channel, request).await)
}

/// As [`run`], for what is refused: all that the caller gets to see.
pub(crate) fn refused(service: &Handles, request: ExecuteQueryRequest) -> Status {
    let refused = service.ask(async |channel| Ok(whole(channel, request).await.err()));
    refused.expect("no other refusal").expect("it is refused")
}

pub(crate) fn begin(
    service: &Handles,
    request: ExecuteQueryRequest,
) -> Streaming<ExecuteQueryResponse> {
    begin_within(service, request, None)
}

fn begin_within(
    service: &Handles,
    request: ExecuteQueryRequest,
    deadline: Option<Duration>,
) -> Streaming<ExecuteQueryResponse> {
    let mut request = Request::new(request);
    if let Some(deadline) = deadline {
        request.set_timeout(deadline);
    }
    let begun = service
        .ask(async |channel| client(channel).execute_query(request).await)
        .expect("an answer begins");
    begun.into_inner()
}

/// How a stream ends, whatever came before.
fn end(service: &Handles, parts: &mut Streaming<ExecuteQueryResponse>) -> Refusal {
    loop {
        match service.next(parts, PATIENCE).expect("it ends in time") {
            Ok(Some(_part)) => {}
            Ok(None) => panic!("it ended well"),
            Err(refusal) => return refusal,
        }
    }
}

pub(crate) fn open(service: &Handles) -> String {
    let request = ConnectNamedRequest { connection_name: "main_db".into() };
    let opened =
        service.ask(async |channel| client(channel).connect_named(request).await).expect("opened");
    opened.into_inner().connection_id
}

pub(crate) fn token(service: &Handles) -> String {
    let request = CreateCredentialTokenRequest { connection: "main_db".into(), ttl: None };
    let made = service
        .ask(async |channel| client(channel).create_credential_token(request).await)
        .expect("a token");
    made.into_inner().credential_token
}

pub(crate) fn revoke(service: &Handles, token: &str) -> Result<(), Refusal> {
    let request = RevokeCredentialTokenRequest { credential_token: token.into() };
    service
        .ask(async |channel| client(channel).revoke_credential_token(request).await)
        .map(|_revoked| ())
}

pub(crate) fn disconnect(service: &Handles, id: &str) -> Result<(), Refusal> {
    let request = DisconnectRequest { connection_id: id.into() };
    service.ask(async |channel| client(channel).disconnect(request).await).map(|_gone| ())
}

fn text(text: &str) -> Kind {
    Kind::StringValue(text.into())
}

const READ_WRITE: &str = "[connections.main_db]\naccess = \"read-write\"\n";

#[test]
fn every_verb_answers_any_grpc_client() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let served = Served::rpc(&broker, &Identity::worker(), READ_WRITE);
    let service = connect(&served, &Identity::client());

    assert_eq!(service.serving(""), Ok(true));
    assert_eq!(service.serving(SERVICE), Ok(true));
    let mut services = service.reflected_services().expect("reflection answers");
    services.sort();
    let health = "grpc.health.v1.Health";
    assert_eq!(services, [SERVICE, health, "grpc.reflection.v1.ServerReflection"]);

    let listed = service.ask(async |channel| {
        client(channel).list_sql_connections(ListSqlConnectionsRequest {}).await
    });
    let listed = listed.expect("a list").into_inner().connections;
    assert_eq!((listed[0].name.as_str(), listed[0].needs_credential), ("main_db", false));

    let sql = "SELECT 9007199254740993 AS big, 1.10::numeric AS exact, 7 AS small, \
               0.5::float8 AS half, 'NaN'::float8 AS nan, '\\xdead'::bytea AS bytes, \
               '{\"a\": [1, null]}'::jsonb AS doc, NULL AS nothing, true AS small";
    let all = run(&service, on_main_db(sql)).expect("typed rows");
    assert_eq!(
        all.rows,
        [[
            text("9007199254740993"),
            text("1.10"),
            Kind::Int64Value(7),
            Kind::DoubleValue(0.5),
            text("NaN"),
            text("3q0="),
            Kind::JsonValue("{\"a\":[1,null]}".into()),
            Kind::NullValue(0),
            Kind::BoolValue(true),
        ]]
    );
    let types: Vec<_> = all.columns.columns.iter().map(|column| column.r#type.as_str()).collect();
    let expected =
        ["int8", "numeric", "int4", "float8", "float8", "bytea", "jsonb", "text", "bool"];
    assert_eq!(types, expected);
    assert_eq!((all.done.row_count, all.done.truncated), (1, false));

    let create = on_main_db("CREATE TABLE kept (id int8 PRIMARY KEY, body bytea)");
    let created = run(&service, create).expect("it may write");
    assert!(created.columns.columns.is_empty() && created.done.affected_rows.is_some());
    let kinds = [Kind::Int64Value(i64::MAX), Kind::BytesValue(vec![1, 2])];
    let values = kinds.map(|kind| SqlValue { kind: Some(kind) }).into();
    let params = Some(Params::Positional(SqlValueList { values }));
    let insert = ExecuteQueryRequest { params, ..on_main_db("INSERT INTO kept VALUES ($1, $2)") };
    assert_eq!(run(&service, insert).expect("inserted").done.affected_rows, Some(1));
    let readonly = ExecuteQueryRequest { readonly: Some(true), ..on_main_db("DELETE FROM kept") };
    let status = refused(&service, readonly);
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");

    let id = open(&service);
    let value = SqlValue { kind: Some(Kind::Int64Value(i64::MAX)) };
    let values = [("id".to_owned(), value)].into();
    let csv = ExecuteQueryRequest {
        params: Some(Params::Named(SqlValueMap { values })),
        format: SqlFormat::Csv.into(),
        ..on(&id, "SELECT id, body FROM kept WHERE id = :id")
    };
    let all = run(&service, csv).expect("CSV");
    assert_eq!(all.csv, format!("id,body\r\n{},AQI=\r\n", i64::MAX));

    let explain = ExplainQueryRequest {
        target: Some(explain_query_request::Target::ConnectionId(id.clone())),
        sql: "SELECT * FROM kept WHERE id = $1".into(),
    };
    let plan = service.ask(async |channel| client(channel).explain_query(explain).await);
    let plan = plan.expect("a plan").into_inner();
    assert!(!plan.plan.is_empty() && plan.total_cost.is_some(), "{plan:?}");

    let describe = DescribeSchemaRequest {
        target: Some(describe_schema_request::Target::Connection("main_db".into())),
        subject: Some(describe_schema_request::Subject::Table("kept".into())),
    };
    let told = service.ask(async |channel| client(channel).describe_schema(describe).await);
    let told = told.expect("a description").into_inner();
    let Some(describe_schema_response::Description::Table(table)) = told.description else {
        panic!("a table: {told:?}");
    };
    assert!(table.fields.contains_key("columns"), "{table:?}");

    disconnect(&service, &id).expect("disconnected");
    assert_eq!(disconnect(&service, &id).expect_err("once").code, Code::InvalidArgument);

    let token = token(&service);
    let with = ExecuteQueryRequest { credential_token: token.clone(), ..on_main_db("SELECT 1") };
    assert!(run(&service, with.clone()).is_ok());
    revoke(&service, &token).expect("revoked");
    assert_eq!(refused(&service, with).code(), Code::NotFound);
    assert!(!served.log().contains("cbh_") && !served.log().contains("SELECT"));
}

/// By name and by destination: a connection, and its session in the database, end with
/// `Disconnect`, whatever runs in it.
#[test]
fn disconnect_leaves_nothing_in_the_database() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let served = Served::rpc(&broker, &Identity::worker(), "");
    let service = connect(&served, &Identity::client());
    let unknown = run(&service, on(NO_CONNECTION, "SELECT 1")).expect_err("not there");
    let find = || {
        let request = ConnectRequest {
            storage_type: "postgresql".into(),
            host: "localhost".into(),
            database: database.name().into(),
            port: Some(database.server().port.into()),
        };
        let found = service.ask(async |channel| client(channel).connect(request).await);
        found.expect("it is configured").into_inner().connection_id
    };
    for id in [open(&service), find()] {
        let pid = "SELECT pg_backend_pid()";
        let first = run(&service, on(&id, pid)).expect("a row").rows;
        assert_eq!(run(&service, on(&id, pid)).expect("a row").rows, first, "its own session");
        disconnect(&service, &id).expect("its own");
        let refused = run(&service, on(&id, "SELECT 1")).expect_err("it is gone");
        assert_eq!(refused.without_reference(), unknown.without_reference());
    }
    assert_eventually!(database.backends() == 0, "a session is left");

    let id = open(&service);
    let mut parts = begin(&service, on(&id, "SELECT pg_sleep(300)"));
    assert_eventually!(database.running("pg_sleep") == 1, "the query does not run");
    disconnect(&service, &id).expect("its own");
    let refusal = end(&service, &mut parts);
    assert!(["CANCELLED", "HANDLE_INVALID"].contains(&refusal.reason.as_str()), "{refusal:?}");
    assert_eventually!(database.backends() == 0, "a session is left");
}

#[test]
fn a_destination_is_only_looked_up() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let served = Served::rpc(&broker, &Identity::worker(), "");
    let service = connect(&served, &Identity::client());
    let elsewhere = ConnectRequest {
        storage_type: "postgresql".into(),
        host: "canary.example".into(),
        database: "canary".into(),
        port: None,
    };
    let denied = service.ask(async |channel| client(channel).connect(elsewhere).await);
    let denied = denied.expect_err("no such connection");
    assert_eq!((denied.code, denied.reason.as_str()), (Code::PermissionDenied, "ACCESS_DENIED"));
    assert!(denied.reference.is_some(), "{denied:?}");
    assert!(!denied.message.contains("canary") && !served.log().contains("canary"));
}

#[test]
fn errors_are_for_programs_and_hold_no_statement() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let served = Served::rpc(&broker, &Identity::worker(), "");
    let service = connect(&served, &Identity::client());
    let unknown = |name: &str| ExecuteQueryRequest {
        target: Some(Target::Connection(name.into())),
        ..on_main_db("SELECT 1")
    };
    let both =
        ExecuteQueryRequest { credential_token: NO_TOKEN.into(), ..on(NO_CONNECTION, "SELECT 1") };
    let cases = [
        (on_main_db("SELECT 1/0 -- canary"), Code::InvalidArgument, "SQL_ERROR", "22012"),
        (on_main_db("SELECT 'canary'::int4"), Code::InvalidArgument, "SQL_ERROR", "22P02"),
        (on_main_db("CREATE TABLE canary ()"), Code::FailedPrecondition, "READ_ONLY", ""),
        (on_main_db("SELECT $1"), Code::InvalidArgument, "INVALID_REQUEST", ""),
        (unknown("canary"), Code::PermissionDenied, "ACCESS_DENIED", ""),
        (ExecuteQueryRequest::default(), Code::InvalidArgument, "INVALID_REQUEST", ""),
        (
            ExecuteQueryRequest { max_rows: Some(50_001), ..on_main_db("SELECT 1") },
            Code::InvalidArgument,
            "INVALID_REQUEST",
            "",
        ),
        (
            ExecuteQueryRequest { format: 9, ..on_main_db("SELECT 1") },
            Code::InvalidArgument,
            "INVALID_REQUEST",
            "",
        ),
        (both, Code::InvalidArgument, "INVALID_REQUEST", ""),
    ];
    for (request, code, reason, sqlstate) in cases {
        let status = refused(&service, request);
        let info = status.get_details_error_info().expect("ErrorInfo");
        assert_eq!((status.code(), info.reason.as_str()), (code, reason), "{status:?}");
        assert_eq!(info.domain, "credbroker");
        if !sqlstate.is_empty() {
            assert_eq!(info.metadata["sqlstate"], sqlstate, "{status:?}");
        }
        assert!(!format!("{status:?}").contains("canary"), "{status:?}");
    }
    assert!(!served.log().contains("canary"), "{}", served.log());
}

#[test]
fn limits_are_those_of_the_tools() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let config = "[limits]\ncalls_per_second = 5\nmax_bytes = \"4KiB\"\nmax_cell_bytes = 64\n";
    let served = Served::rpc(&broker, &Identity::worker(), config);
    let service = connect(&served, &Identity::client());
    let reason = |request| {
        let all = run(&service, request).expect("a part of it");
        assert!(all.done.truncated);
        assert_eq!(all.done.row_count, all.rows.len() as u64);
        all.done.truncated_reason
    };
    let three = ExecuteQueryRequest {
        max_rows: Some(3),
        ..on_main_db("SELECT i FROM generate_series(1, 4) i")
    };
    assert_eq!(reason(three), "max_rows");
    let wide = "SELECT repeat('x', 60) FROM generate_series(1, 500)";
    assert_eq!(reason(on_main_db(wide)), "max_bytes");
    assert_eq!(reason(on_main_db("SELECT repeat('x', 65)")), "max_cell_bytes");

    let refusals: Vec<_> =
        (0..20).filter_map(|_| run(&service, on_main_db("SELECT 1")).err()).collect();
    let refusal = refusals.first().expect("a call too many");
    assert_eq!((refusal.code, refusal.reason.as_str()), (Code::ResourceExhausted, "LIMIT_REACHED"));
    assert_eq!(refusal.retry, Some(Duration::from_secs(1)));
}

#[test]
fn g3_by_grpc_the_uid_is_the_principal() {
    if !several_or_say("clients of two uids are two principals") {
        return;
    }
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let worker = Identity::worker();
    let served = Served::rpc(&broker, &worker, "");
    let owner = connect(&served, &Identity::client());
    let again = connect(&served, &Identity::client());
    let stranger = connect(&served, &Identity::attacker());
    let (token, id) = (token(&owner), open(&owner));

    let with = |token: &str| ExecuteQueryRequest {
        credential_token: token.into(),
        ..on_main_db("SELECT 1")
    };
    let seen = |refusal: Refusal| refusal.without_reference();
    let run_as_stranger = |request| seen(run(&stranger, request).expect_err("not there"));
    assert_eq!(run_as_stranger(with(&token)), run_as_stranger(with(NO_TOKEN)));
    assert_eq!(
        run_as_stranger(on(&id, "SELECT 1")),
        run_as_stranger(on(NO_CONNECTION, "SELECT 1"))
    );
    let revoked = |token| seen(revoke(&stranger, token).expect_err("not there"));
    assert_eq!(revoked(&token), revoked(NO_TOKEN));
    let disconnected = |id| seen(disconnect(&stranger, id).expect_err("not there"));
    assert_eq!(disconnected(&id), disconnected(NO_CONNECTION));

    assert!(run(&again, with(&token)).is_ok(), "another connection of the same uid");
    assert!(run(&again, on(&id, "SELECT 1")).is_ok());
    // Of the same uid by another edge: it is the same principal.
    let tools = Served::unix(&broker, &worker, "");
    let mut lines = tools.connect(credbroker_e2e::worker::Era::Legacy, &Identity::client());
    let ask = serde_json::json!({
        "database": "main_db", "credential_token": token, "sql": "SELECT 1",
    });
    assert!(!lines.call("execute_sql", &ask).is_error);
    revoke(&again, &token).expect("its own");
    assert!(run(&owner, with(&token)).is_err());
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// The stream is dropped, the connection stays: RST_STREAM.
    Reset,
    /// The client is gone.
    HangUp,
    /// `grpc-timeout`.
    Deadline,
    /// The statement's time is over.
    Timeout,
    /// The handle's time is over.
    Expiry,
    /// The same principal revokes the token, in another call.
    Revoked,
    /// An operator revokes every handle of the connection.
    Operator,
    /// SIGTERM to the worker.
    Terminate,
}

/// How long after `zero` the query was seen to be gone.
fn gone(database: &Database, zero: Instant) -> Duration {
    let gone = until(PATIENCE, || (database.running("pg_sleep") == 0).then(Instant::now));
    gone.expect("the query ends").saturating_duration_since(zero)
}

fn cell(cause: Cause, broker: &Broker, database: &Database) -> String {
    let timeout = "[limits]\nstatement_timeout = \"2s\"\n";
    let config = if cause == Cause::Timeout { timeout } else { "" };
    let mut served = Served::rpc(broker, &Identity::worker(), config);
    let service = connect(&served, &Identity::client());
    let other = connect(&served, &Identity::client());
    let mut request = on_main_db("SELECT pg_sleep(300)");
    if matches!(cause, Cause::Expiry | Cause::Revoked) {
        request.credential_token = token(&service);
    }
    let made = Instant::now();
    let deadline = (cause == Cause::Deadline).then_some(Duration::from_secs(2));
    let mut parts = begin_within(&service, request.clone(), deadline);
    assert_eventually!(database.running("pg_sleep") == 1, "{cause:?}: the query does not run");

    let mut zero = Instant::now();
    let mut service = Some(service);
    let mut keep = None;
    match cause {
        Cause::Reset => drop(parts),
        Cause::HangUp => {
            service = None;
            keep = Some(parts);
        }
        Cause::Deadline | Cause::Timeout => {
            zero = made + Duration::from_secs(2);
            keep = Some(parts);
        }
        Cause::Expiry => {
            zero = made + Duration::from_secs(3);
            keep = Some(parts);
        }
        Cause::Revoked => {
            revoke(&other, &request.credential_token).expect("its own");
            keep = Some(parts);
        }
        Cause::Operator => {
            broker.operator().revoke_all("main_db").expect("the operator may");
            keep = Some(parts);
        }
        Cause::Terminate => {
            served.process().signal(Signal::TERM);
            let refusal = end(service.as_ref().expect("a client"), &mut parts);
            assert_eq!(refusal.reason, "CANCELLED", "{refusal:?}");
        }
    }
    let took = gone(database, zero);
    assert!(took <= LIMIT, "{cause:?}: {took:?}");

    if let (Some(service), Some(mut parts)) = (&service, keep) {
        let refusal = end(service, &mut parts);
        let in_time = matches!(cause, Cause::Deadline | Cause::Timeout);
        let expected: &[&str] =
            if in_time { &["TIMEOUT"] } else { &["CANCELLED", "HANDLE_INVALID"] };
        assert!(expected.contains(&refusal.reason.as_str()), "{cause:?}: {refusal:?}");
    }
    if cause == Cause::Terminate {
        assert!(served.process().wait(PATIENCE).success());
        assert!(zero.elapsed() <= 2 * LIMIT, "{:?}", zero.elapsed());
    } else {
        run(&other, on_main_db("SELECT 1")).expect("what it leaves behind is whole");
    }
    format!("{cause:?}: {} ms", took.as_millis())
}

#[test]
fn cancel_means_stopped_by_grpc() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    for cause in [
        Cause::Reset,
        Cause::HangUp,
        Cause::Deadline,
        Cause::Timeout,
        Cause::Revoked,
        Cause::Operator,
        Cause::Terminate,
    ] {
        println!("{}", cell(cause, &broker, &database));
    }
    let short = Grant::to(&Identity::worker(), &["issue", "open"], &["main_db"]);
    let short = Setup::new()
        .connection("main_db", &database, Via::Tls)
        .grant(short.with("max_ttl", "3s"))
        .start();
    println!("{}", cell(Cause::Expiry, &short, &database));
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number")
}

const WIDE: &str = "[limits]\nmax_rows = 50000\nmax_bytes = \"64MiB\"\n";
/// About 60 MiB.
const WIDE_SQL: &str = "SELECT i, repeat('x', 1200) FROM generate_series(1, 50000) i";
/// What may be on the way: windows, one batch in JSON and as a message, the driver's buffer.
const ON_THE_WAY_KIB: u64 = 16 << 10;

#[test]
fn a_slow_reader_holds_its_own_statement_and_no_memory() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let config = format!("{WIDE}statement_timeout = \"20s\"\n");
    let mut served = Served::rpc(&broker, &Identity::worker(), &config);
    let pid = served.process().pid();
    let slow = connect(&served, &Identity::client());
    let other = connect(&served, &Identity::client());
    run(&other, on_main_db("SELECT 1")).expect("warm");
    let before = resident_kib(pid);

    let mut parts = begin(&slow, on_main_db(WIDE_SQL));
    let first = slow.next(&mut parts, PATIENCE).expect("in time").expect("columns");
    assert!(matches!(first.and_then(|part| part.part), Some(Part::Columns(_))));
    // The database waits for the worker, the worker for the client.
    let mut admin = database.admin();
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE usename = $1
        AND state = 'active' AND wait_event = 'ClientWrite' AND strpos(query, 'repeat') > 0";
    assert_eventually!(
        admin.query_one(waiting, &[&database.name()]).expect("activity").get::<_, i64>(0) == 1,
        "the database does not wait"
    );
    let held = resident_kib(pid);
    println!("unread: {before} KiB before, {held} KiB while 60 MiB wait");
    assert!(held <= before + ON_THE_WAY_KIB, "{before} KiB, then {held} KiB");
    run(&other, on_main_db("SELECT 1")).expect("others go on");

    let (mut rows, mut done, mut most) = (0, None, held);
    while let Some(part) = slow.next(&mut parts, PATIENCE).expect("in time").expect("a part") {
        match part.part.expect("a part") {
            Part::Rows(batch) => rows += batch.rows.len(),
            Part::Done(end) => done = Some(end),
            Part::Columns(_) | Part::Csv(_) => panic!("rows, then done"),
        }
        most = most.max(resident_kib(pid));
    }
    let done = done.expect("it is whole");
    assert_eq!((rows, done.row_count, done.truncated), (50_000, 50_000, false));
    println!("read: at most {most} KiB");
    assert!(most <= before + ON_THE_WAY_KIB, "{before} KiB, then {most} KiB");
}

#[test]
fn who_has_too_many_connections_is_told_so() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let served = Served::rpc(&broker, &Identity::worker(), "");
    let greedy = Identity::client();
    let mut held: Vec<_> = (0..64).map(|_| served.dial(&greedy)).collect();
    let last = connect(&served, &greedy);
    let refused = run(&last, on_main_db("SELECT 1")).expect_err("no place");
    assert_eq!((refused.code, refused.reason.as_str()), (Code::ResourceExhausted, "LIMIT_REACHED"));
    assert!(refused.message.contains("too many connections"), "{refused:?}");
    held.clear();
    assert_eventually!(
        run(&connect(&served, &greedy), on_main_db("SELECT 1")).is_ok(),
        "those who left make room"
    );
}

/// Nobody reads: the statement's time is over all the same, and its session is free.
#[test]
fn a_reader_that_never_reads_is_bounded_by_time() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let config = format!("{WIDE}statement_timeout = \"2s\"\n");
    let served = Served::rpc(&broker, &Identity::worker(), &config);
    let slow = connect(&served, &Identity::client());
    let begun = Instant::now();
    let mut parts = begin(&slow, on_main_db(WIDE_SQL));
    assert_eventually!(database.running("repeat") == 1, "the query does not run");
    let ended = until(PATIENCE, || (database.running("repeat") == 0).then(Instant::now));
    let took = ended.expect("it ends").duration_since(begun);
    println!("ended after {} ms", took.as_millis());
    assert!(took <= Duration::from_secs(2) + LIMIT, "{took:?}");
    let refusal = end(&slow, &mut parts);
    assert_eq!((refusal.code, refusal.reason.as_str()), (Code::DeadlineExceeded, "TIMEOUT"));
}

#[test]
fn a_million_rows_leave_nothing_behind() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let mut served = Served::rpc(&broker, &Identity::worker(), WIDE);
    let pid = served.process().pid();
    let service = connect(&served, &Identity::client());
    let sql = "SELECT i, i::text, i * 0.5 FROM generate_series(1, 50000) i";
    let mut sizes = Vec::new();
    for _ in 0..20 {
        let all = run(&service, on_main_db(sql)).expect("rows");
        assert_eq!((all.rows.len(), all.done.truncated), (50_000, false));
        sizes.push(resident_kib(pid));
    }
    println!("resident: {sizes:?} KiB");
    let (first, last) = (sizes[0], sizes[19]);
    assert!(last <= first + ON_THE_WAY_KIB, "{sizes:?}");
}
