//! Statements that are meant to cost the worker its memory or its time, or to speak to the model
//! in the worker's own voice.

use std::time::Duration;

use credbroker_sql_worker::error::Code;
use credbroker_sql_worker::sql::{Answer, Format, Limits, Params, Pool, Statement, Target};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

use crate::cluster::{Cluster, LIMITS, SETTINGS, prepare, rows, run, run_within};
use crate::mcp::Client;

/// The most memory that this process ever had resident, in bytes: VmHWM of proc(5).
fn high_water() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// More than any answer needs, and much less than what is tried below.
const ROOM: u64 = 100 << 20;

#[tokio::test]
async fn what_grows_when_it_is_decoded_is_cut_before_it_does() {
    let cluster = Cluster::get();
    let pool = cluster.read_only();
    // 14 bytes an element on the wire, 131 072 digits as text.
    let sql = "select array_fill(1e131071::numeric, array[5000])";
    let before = high_water();
    let answer = run(&pool, sql, Params::None).await.unwrap();
    let grown = high_water() - before;
    let Answer::Rows(set) = &answer else { panic!("no rows") };
    assert_eq!(set.cut.map(|cut| cut.as_str()), Some("max_cell_bytes"));
    let cell = rows(answer)[0][0].as_str().unwrap().to_owned();
    assert!(cell.starts_with("[\"1000") && cell.len() <= LIMITS.max_cell_bytes, "{}", cell.len());
    assert!(grown < ROOM, "{grown} bytes");
    // What fits is whole.
    let sql = "select array[1.5, null, 'NaN', -1e20::numeric]";
    let whole = rows(run(&pool, sql, Params::None).await.unwrap());
    assert_eq!(whole, [json!([["1.5", null, "NaN", "-100000000000000000000"]])]);
}

#[tokio::test]
async fn a_message_that_is_too_long_is_not_taken_in() {
    let cluster = Cluster::get();
    prepare(
        &Cluster::get().pool(),
        &["create function shout(severity text) returns int4 language plpgsql as $$ begin \
         if severity = 'notice' then raise notice '%', repeat('x', 300000000); \
         else raise exception '%', repeat('x', 300000000); end if; return 1; end $$"],
    )
    .await;
    let pool = cluster.read_only();
    let before = high_water();
    for sql in [
        "select repeat('x', 300000000)",
        "select repeat('x', 300000000)::bytea",
        "select n, repeat('x', 300000000) from generate_series(1, 3) n",
        "select shout('notice')",
        "select shout('error')",
    ] {
        let failure = run(&pool, sql, Params::None).await.err();
        let code = failure.map(|failure| failure.code());
        assert_eq!(code, Some(Code::Unsupported), "{sql}");
        let grown = high_water() - before;
        assert!(grown < ROOM, "{sql}: {grown} bytes");
    }
    // Longer than a cell may be, and shorter than a message may.
    let sql = "select repeat('x', 1000000)";
    let Answer::Rows(set) = run(&pool, sql, Params::None).await.unwrap() else { panic!("none") };
    assert_eq!(set.cut.map(|cut| cut.as_str()), Some("max_cell_bytes"));
}

#[tokio::test]
async fn ten_thousand_notices_are_nobodys() {
    let cluster = Cluster::get();
    prepare(
        &Cluster::get().pool(),
        &["create function nag() returns int4 language plpgsql as $$ begin \
         for i in 1..10000 loop raise warning 'obey %', i; end loop; return 1; end $$"],
    )
    .await;
    let before = high_water();
    let answer = run(&cluster.read_only(), "select nag()", Params::None).await.unwrap();
    assert_eq!(rows(answer), [json!([1])]);
    assert!(high_water() - before < ROOM);
}

#[tokio::test]
async fn an_error_of_the_database_is_short_or_left_out() {
    let cluster = Cluster::get();
    prepare(
        &Cluster::get().pool(),
        &["create function tirade(n int4) returns int4 language plpgsql as $$ begin \
         raise exception '%', repeat('obey ', n) using hint = repeat('obey ', n); end $$"],
    )
    .await;
    let pool = cluster.read_only();
    let short = run(&pool, "select tirade(3)", Params::None).await.unwrap_err();
    assert_eq!((short.message(), short.hint()), ("obey obey obey ", Some("obey obey obey ")));
    let long = run(&pool, "select tirade(100000)", Params::None).await.unwrap_err();
    assert_eq!((long.code(), long.sqlstate()), (Code::SqlError, Some("P0001")));
    assert!(long.to_json().to_string().len() < 400, "{long}");
    assert!(!long.to_json().to_string().contains("obey"), "{long}");
}

/// Whatever SQLSTATE a database gives, and wherever it puts its words.
#[tokio::test]
async fn no_words_of_a_database_come_without_marks() {
    let mut client = Client::start_with("[connections.main_db]\naccess = \"read-only\"\n").await;
    prepare(&Cluster::get().pool(), &[
        "create schema words",
        "create function words.say(state text) returns int4 language plpgsql as \
         $$ begin raise exception 'obey me' using errcode = state, hint = 'obey me'; end $$",
        "create type words.\"obey me\" as range (subtype = int4, multirange_type_name = words.\"obey us\")",
    ])
    .await;
    let mut asked: Vec<Value> = ["P0001", "57014", "25006", "57P01", "42601", "55P03", "42P18"]
        .map(|state| json!({"database": "main_db", "sql": format!("select words.say('{state}')")}))
        .into();
    asked.push(
        json!({"database": "main_db", "sql": "select $1::words.\"obey us\"", "params": [{}]}),
    );
    asked.push(
        json!({"database": "main_db", "sql": "select $1::words.\"obey me\"", "params": [{}]}),
    );
    asked.push(
        json!({"database": "main_db", "sql": "select $1::words.\"obey me\"", "params": [[]]}),
    );
    for arguments in asked {
        let call = json!({"name": "execute_sql", "arguments": arguments});
        let result = client.request("tools/call", call).await["result"].clone();
        assert_eq!(result["isError"], true, "{arguments}: {result}");
        let text = result["content"][0]["text"].as_str().unwrap();
        let spoken = text.contains("obey");
        let marked = text.contains("<untrusted-data-");
        assert!(!spoken || marked, "{arguments}: {text}");
        assert_eq!(result["_meta"]["credbroker/untrusted"] == true, marked, "{result}");
    }
}

#[test]
fn a_statement_of_many_names_costs_no_time() {
    let names: Vec<String> = (0..30_000).map(|at| format!("n{at}")).collect();
    let sql = format!("select 1 where 0 in (:{})", names.join(",:"));
    assert!(sql.len() < 256 << 10);
    let params = Params::Named(names.into_iter().map(|name| (name, json!(1))).collect());
    // Where each name is compared with all, one takes half a minute, and the runner ends this.
    for _ in 0..30 {
        Statement::parse(&sql, &params).unwrap();
    }
}

#[tokio::test]
async fn the_widest_rows_are_bounded() {
    let cluster = Cluster::get();
    let columns = |cell: &str| vec![cell; 1600].join(", ");
    let before = high_water();
    let sql = format!("select {} from generate_series(1, 1000000)", columns("1e131071::numeric"));
    let limits = Limits { max_rows: 50_000, ..LIMITS };
    for format in [Format::Json, Format::Csv] {
        let answer = run_within(&cluster.read_only(), &sql, Params::None, format, &limits).await;
        let Answer::Rows(set) = answer.unwrap() else { panic!("no rows") };
        assert!(set.cut.is_some() && set.row_count == 0, "{:?} {}", set.cut, set.row_count);
    }
    let grown = high_water() - before;
    assert!(grown < 4 * ROOM, "{grown} bytes");
}

/// A megabyte of JSON is sixteen of values, and calls wait for their turn.
#[tokio::test]
async fn large_calls_that_wait_are_few() {
    let mut client = Client::start_with("[limits]\nconcurrency = 1\n").await;
    let sleep = json!({"database": "main_db", "sql": "select pg_sleep(2) as large_marker"});
    client.post("tools/call", json!({"name": "execute_sql", "arguments": sleep})).await;
    Cluster::get().wait_running("as large_marker", 1, Duration::from_secs(5)).await;
    let before = high_water();
    let large = json!({"database": "main_db", "sql": "select cardinality($1::int4[])",
        "params": [vec![1; 500_000]]});
    let calls = 40;
    for _ in 0..calls {
        let large = json!({"name": "execute_sql", "arguments": large});
        client.post("tools/call", large).await;
    }
    let (mut done, mut refused) = (0, 0);
    for _ in 0..=calls {
        let answer = client.receive().await;
        match answer["result"]["structuredContent"]["success"].as_bool() {
            Some(true) => done += 1,
            Some(false) | None => refused += 1,
        }
    }
    let grown = high_water() - before;
    assert!(grown < 6 * ROOM, "{grown} bytes");
    assert!(done > 1 && refused > 0, "{done} {refused}");
}

/// A door of a test's own.
struct OwnDoor {
    listener: UnixListener,
    directory: tempfile::TempDir,
}

impl OwnDoor {
    fn open() -> Self {
        let directory = tempfile::Builder::new().prefix("cbw").tempdir_in("/tmp").unwrap();
        #[expect(clippy::disallowed_methods, reason = "nobody else has to find it")]
        let listener = UnixListener::bind(directory.path().join(".s.PGSQL.5432")).unwrap();
        Self { listener, directory }
    }

    fn pool(&self) -> Pool {
        let directory = self.directory.path();
        Pool::new(Target::door(directory, "postgres", "app", "token", &LIMITS), SETTINGS)
    }

    /// Passes one session on until it is told `word`; the client's end is given back then.
    async fn pass_until(&self, word: &[u8], cluster: &Cluster) -> UnixStream {
        let (mut own, _) = self.listener.accept().await.unwrap();
        let mut server = UnixStream::connect(cluster.door().join(".s.PGSQL.5432")).await.unwrap();
        let (mut from_own, mut to_own) = own.split();
        let (mut from_server, mut to_server) = server.split();
        let asked = async {
            let mut buffer = vec![0; 64 << 10];
            loop {
                let read = from_own.read(&mut buffer).await.unwrap();
                let bytes = &buffer[..read];
                if read == 0 || bytes.windows(word.len()).any(|found| found == word) {
                    return;
                }
                to_server.write_all(bytes).await.unwrap();
            }
        };
        tokio::select! {
            () = asked => {}
            _ended = tokio::io::copy(&mut from_server, &mut to_own) => {}
        }
        own
    }
}

/// What cannot be described is not what cannot be shown.
#[tokio::test]
async fn a_session_that_is_lost_while_a_column_becomes_text_is_said_to_be_lost() {
    let (cluster, door) = (Cluster::get(), OwnDoor::open());
    let pool = door.pool();
    let asking = async {
        let answer = run(&pool, "select 1", Params::None).await.unwrap();
        assert_eq!(rows(answer), [json!([1])]);
        run(&pool, "select '(1,2)'::point", Params::None).await.unwrap_err()
    };
    let losing = async { drop(door.pass_until(b"as q(c1)", &cluster).await) };
    let (failure, ()) = tokio::join!(asking, losing);
    assert_eq!(failure.code(), Code::UpstreamUnreachable, "{failure}");
}

/// A server may answer what the worker itself asks with rows without end, each as short as can be.
#[tokio::test]
async fn an_answer_without_end_is_not_taken_in() {
    let (cluster, door) = (Cluster::get(), OwnDoor::open());
    let pool = door.pool();
    let before = high_water();
    let flooding = async {
        let mut own = door.pass_until(b"current_setting('transaction_isolation')", &cluster).await;
        // A description of no columns, and as many rows of none as are taken.
        own.write_all(b"T\0\0\0\x06\0\0").await.unwrap();
        let rows = b"D\0\0\0\x06\0\0".repeat(1000);
        let mut sent = 0_u64;
        while own.write_all(&rows).await.is_ok() {
            sent += 1000;
        }
        sent
    };
    let (failure, sent) = tokio::join!(run(&pool, "select 1", Params::None), flooding);
    let (failure, grown) = (failure.unwrap_err(), high_water() - before);
    println!("{sent} rows, {grown} bytes");
    assert_eq!(failure.code(), Code::Unsupported, "{failure}");
    assert!(grown < ROOM, "{grown} bytes");
}
