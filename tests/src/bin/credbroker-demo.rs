//! The demonstration: every line that it prints as a success was observed, and it fails if one
//! was not. Started by `deploy/demo.sh`, which also cleans up after it.
#![allow(clippy::print_stdout, reason = "it shows something to people")]

use std::fmt::Display;
use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use credbroker_e2e::audit::Record;
use credbroker_e2e::broker::Broker;
use credbroker_e2e::canary::Pattern;
use credbroker_e2e::holder::Holder;
use credbroker_e2e::identity::{Identity, several};
use credbroker_e2e::memory::{self, Scan};
use credbroker_e2e::postgres::{Cluster, Database};
use credbroker_e2e::process::{output, transcript};
use credbroker_e2e::wait::{PATIENCE, until};
use credbroker_e2e::worker::Worker;
use credbroker_e2e::{postgres, shared};
use serde_json::{Value, json};

const QUERY: &str = "SELECT id, name, balance FROM accounts ORDER BY id";

fn main() -> ExitCode {
    let mut story = Story { failed: Vec::new(), colour: std::io::stdout().is_terminal() };
    tell(&mut story);
    if story.failed.is_empty() {
        println!("\nAll of this was so. For your own: deploy/broker.toml.");
        return ExitCode::SUCCESS;
    }
    println!("\nNot so:");
    for what in &story.failed {
        println!("  {what}");
    }
    ExitCode::FAILURE
}

fn tell(story: &mut Story) {
    story.chapter(if several() { "Three processes, three uids" } else { "Three processes" });
    let cluster = Cluster::start(shared::directory());
    let database = cluster.server().database();
    prepare(&database);
    let broker = Broker::usual(&database);
    let mut worker = Worker::start(&broker, &Identity::worker());
    let uid = |identity: Identity| identity.uid();
    story.note(format!("PostgreSQL            SCRAM-SHA-256 and TLS, from {}", programs()));
    story.note(format!("credbrokerd           uid {}, has the password", uid(Identity::broker())));
    story.note(format!("credbroker-sql-worker uid {}, has none", uid(Identity::worker())));
    if !several() {
        story.note("without root all three have the same uid, which is no boundary");
    }

    story.chapter("A query, as an MCP client asks it");
    let arguments = json!({ "database": "main_db", "sql": QUERY });
    story.note(format!("tools/call execute_sql {arguments}"));
    let result = worker.call("execute_sql", &arguments);
    for row in rows(&result.content) {
        story.note(row);
    }
    story.check(rows(&result.content).len() == 3, "three rows came back");

    story.chapter("Where the password is");
    prove(story, &broker, &worker, &database);

    story.chapter("psql, unmodified, and a stolen token");
    let client = Identity::client();
    let issued = broker.handles(&client).issue("main_db").expect("the client has a grant");
    let ask = |identity: &Identity| {
        let mut psql = broker.psql(identity, "main_db", &issued.token);
        output(psql.args(["-c", "SELECT count(*) FROM accounts"]), PATIENCE)
    };
    story.note("psql 'postgresql:///mydb?host=$RUNTIME/postgres&user=main_db&password=$TOKEN'");
    let own = ask(&client);
    let counted = String::from_utf8_lossy(&own.stdout).trim() == "3";
    story.check(own.status.success() && counted, format!("uid {}: 3 accounts", client.uid()));
    if several() {
        let stolen = ask(&Identity::attacker());
        let said = transcript(&stolen);
        let said = said.lines().last().unwrap_or_default();
        let said = said.split_once("FATAL:").map_or(said, |(_socket, fatal)| fatal.trim());
        let refused = !stolen.status.success();
        let uid = Identity::attacker().uid();
        story.check(refused, format!("uid {uid}, the same token: refused"));
        story.note(format!("psql: FATAL: {said}"));
    }

    story.chapter("Revoked means dead now");
    revoke(story, &broker, &mut worker, &database);

    story.chapter("What the audit log says of it");
    let events =
        ["handle.issued", "session.opened", "session.closed", "handle.revoked", "access.denied"];
    let records = broker.audit().records();
    for event in events {
        let last = records.iter().rev().find(|record| record.event() == event);
        if event != "access.denied" || several() {
            story.check(last.is_some(), last.map_or(event.to_owned(), audit_line));
        }
    }
    broker.audit().assert_chained();
    story.check(true, format!("{} records, each sealed by the next", records.len()));
}

/// Searches the processes and the files of this run.
fn prove(story: &mut Story, broker: &Broker, worker: &Worker, database: &Database) {
    let patterns = database.canary().patterns();
    let control = Holder::of(database.canary().reveal());
    let found = memory::scan(control.pid(), &patterns);
    let copies = found.map(|scan| scan.hits.len()).unwrap_or_default();
    story.check(copies > 0, format!("positive control: {copies} copies in a process that has it"));
    drop(control);

    let worker_scan = memory::scan(worker.pid(), &patterns);
    let around = memory::scan_surroundings(worker.pid(), &patterns);
    let searched = |scan: &Scan| format!("({} MiB searched)", scan.bytes_read >> 20);
    match (worker_scan, around) {
        (Ok(scan), Ok(around)) => {
            let copies = scan.hits.len() + around.len();
            story.check(
                copies == 0 && scan.bytes_read > 0,
                format!(
                    "worker: {copies} copies in its memory, environment, files {}",
                    searched(&scan)
                ),
            );
        }
        (Err(error), _) | (_, Err(error)) => story.check(false, format!("worker: {error}")),
    }

    // What is equal to the password for a login counts as the password.
    let equal: Vec<Pattern> = [patterns.clone(), database.derived_patterns()].concat();
    match memory::scan(broker.pid(), &equal) {
        Ok(scan) => {
            let copies = scan.outside_arena().len();
            let text = format!("broker: {copies} copies outside its arena {}", searched(&scan));
            story.check(copies == 0 && scan.bytes_read > 0, text);
            story.note(if scan.unreadable_arena > 0 {
                "its arena is memfd_secret: not even root can read it".to_owned()
            } else {
                format!("its arena is a locked memfd: {} copies there", scan.in_arena())
            });
        }
        Err(_) if !several() => story.note("broker: not dumpable, only root can look".to_owned()),
        Err(error) => story.check(false, format!("broker: {error}")),
    }

    let places: Vec<PathBuf> =
        ["logs", "run", "state"].map(|name| broker.setup().path(name)).into();
    let hits = memory::scan_files(&places, &patterns);
    story.check(hits.is_empty(), format!("logs, audit log, MCP transcript: {} copies", hits.len()));
}

/// Cuts a query that runs in the worker, and asks again.
fn revoke(story: &mut Story, broker: &Broker, worker: &mut Worker, database: &Database) {
    let made = worker.call("create_credential_token", &json!({ "database": "main_db" }));
    let token = made.text("/credential_token").to_owned();
    let issued = broker.audit().of("handle.issued");
    let handle = issued.last().and_then(|record| record.text("handle")).unwrap_or_default();
    let ask = |sql: &str| json!({ "database": "main_db", "credential_token": token, "sql": sql });

    let call = worker.start_call("execute_sql", &ask("SELECT pg_sleep(300)"));
    let running = until(PATIENCE, || (database.running("pg_sleep") > 0).then_some(()));
    story.check(running.is_some(), "pg_sleep(300) runs in the database");
    let started = Instant::now();
    let revoked = broker.handles(&Identity::own()).revoke_id(handle);
    let sessions = match revoked {
        Ok(sessions) => sessions,
        Err(refusal) => return story.check(false, format!("revoke: {}", refusal.message)),
    };
    let answer = worker.answer_to(call);
    let gone = until(PATIENCE, || (database.running("pg_sleep") == 0).then(|| started.elapsed()));
    let took = gone.map_or_else(|| "never".to_owned(), |took| format!("{} ms", took.as_millis()));
    let cut = answer.pointer("/result/isError") == Some(&json!(true)) && gone.is_some();
    story.check(cut, format!("revoked: {sessions} session cut, gone from the database in {took}"));

    let refused = worker.call("execute_sql", &ask(QUERY));
    story.check(refused.is_error, "the same token again: refused");
    story.note(refused.text("/error/message"));
}

fn prepare(database: &Database) {
    let script = format!(
        "CREATE TABLE accounts (id int PRIMARY KEY, name text, balance numeric(10, 2));
         INSERT INTO accounts VALUES (1, 'Ada', 1815.12), (2, 'Grace', 1906.09), (3, 'Edith', 0);
         GRANT SELECT ON accounts TO {}",
        database.name()
    );
    database.admin().batch_execute(&script).expect("the demo's table can be made");
}

fn rows(content: &Value) -> Vec<String> {
    let cell = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let row = |row: &Value| {
        let cells = row.as_array().into_iter().flatten().map(cell);
        cells.map(|cell| format!("{cell:<10}")).collect::<String>().trim_end().to_owned()
    };
    content["rows"].as_array().into_iter().flatten().map(row).collect()
}

fn audit_line(record: &Record) -> String {
    let field = |name: &str| record.text(name).unwrap_or("-").to_owned();
    let uid = record.number("peer.uid").map_or_else(|| "-".to_owned(), |uid| uid.to_string());
    format!(
        "#{:<3} {:<15} {:<8} uid {uid:<6} {:<8} {}",
        record.number("seq").unwrap_or_default(),
        record.event(),
        field("outcome"),
        field("connection"),
        record.text("handle").or_else(|| record.text("reason")).unwrap_or_default(),
    )
}

fn programs() -> String {
    postgres::programs().display().to_string()
}

/// What is printed, and what was not as it should be.
struct Story {
    failed: Vec<String>,
    colour: bool,
}

impl Story {
    fn chapter(&self, title: &str) {
        println!("\n{}", self.painted("1", title));
    }

    fn note(&self, text: impl Display) {
        println!("    {}", self.painted("2", &text.to_string()));
    }

    fn check(&mut self, held: bool, text: impl Display) {
        let text = text.to_string();
        let mark = if held { self.painted("32", "ok") } else { self.painted("31", "NO") };
        println!(" {mark} {text}");
        if !held {
            self.failed.push(text);
        }
    }

    fn painted(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}
