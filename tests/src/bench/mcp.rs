//! P11.

mod client;
mod direct;

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::pipe::PipeFlags;
use serde_json::{Value, json};

use self::client::{Http, Lines};
use self::direct::{How, Session};
use super::rig::{FREE_UNIX, HANDLE_UNIX, Rig, cpu_time, memory_kb};
use super::stats::{Sample, micros, p50};
use super::{Goal, Outcome, Unit, pgbench, progress, turns};
use crate::binaries;
use crate::broker::Broker;
use crate::identity::Identity;
use crate::process::Process;
use crate::worker::Era;
use crate::worker::served::Served;

const CALLS: usize = 400;
const CALLS_AT_ONCE: usize = 2000;
const AT_ONCE: [usize; 3] = [1, 8, 64];
const SQL: &str = "SELECT aid, abalance FROM pgbench_accounts WHERE aid = 4711";
/// Who is measured is not to be held back.
const CONFIG: &str = "[limits]\ncalls_per_second = 100000\nconcurrency = 64\n";
/// Between two calls, for every contender: whoever asks for one row looks at it.
const PAUSE: Duration = Duration::from_millis(1);
const GOAL: Goal = Goal::AtMost(250.0);

const DIRECT: &str = "sqlx, direct";
const DOOR: &str = "sqlx, door";
const STEPS: &str = "sqlx, door, each step of the worker";
const REFUSED: &str = "MCP, stdio, a statement that is refused";
const STDIO: &str = "MCP, stdio";

/// One call; how long it takes is what is measured.
type Call<'a> = Box<dyn FnMut() + 'a>;

pub(super) fn measure(outcome: &mut Outcome) {
    let mode = outcome.mode;
    let rig = Rig::start();
    pgbench::fill(&rig.direct());
    let broker = rig.setup().start();
    let (direct, door) = (rig.direct(), rig.door("door", &broker, FREE_UNIX, ""));
    let session = |target, how| -> Call<'_> {
        let mut session = Session::open(target, how);
        Box::new(move || session.run(SQL))
    };
    let client = Identity::client();
    let unix = Served::unix(&broker, &client, CONFIG);
    let http = Served::http(&broker, &client, &["bench"], CONFIG);
    let (_process, lines) = stdio(&broker, "one-by-one");
    let lines = std::cell::RefCell::new(lines);
    let query = json!({ "database": HANDLE_UNIX, "sql": SQL });
    let bound = json!({ "database": HANDLE_UNIX, "sql": SQL.replace("4711", "$1"),
        "params": [4711] });
    // Nothing of it gets to the broker or to a database.
    let refused = json!({ "database": HANDLE_UNIX, "sql": "BEGIN" });
    let over_stdio = |arguments: &Value, succeeds: bool| -> Call<'_> {
        let (lines, arguments) = (&lines, arguments.clone());
        Box::new(move || assert_result(&lines.borrow_mut().call(&arguments), succeeds))
    };
    let over_unix = || -> Call<'_> {
        let (mut lines, arguments) = (Lines::of(unix.dial(&client)), query.clone());
        Box::new(move || assert_result(&lines.call(&arguments), true))
    };
    let over_http = || -> Call<'_> {
        let mut web = Http::connect(&http.client(Era::Stateless, "bench"));
        let arguments = query.clone();
        Box::new(move || assert_result(&web.call(&arguments), true))
    };
    let mut contenders: Vec<(&str, Call<'_>, Vec<f64>)> = vec![
        (DIRECT, session(&direct, How::Unprepared), vec![]),
        ("sqlx, direct, prepared once", session(&direct, How::Prepared), vec![]),
        (DOOR, session(&door, How::Unprepared), vec![]),
        (STEPS, session(&door, How::Steps), vec![]),
        (REFUSED, over_stdio(&refused, false), vec![]),
        (STDIO, over_stdio(&query, true), vec![]),
        ("MCP, stdio, with a parameter", over_stdio(&bound, true), vec![]),
        ("MCP, Unix socket", over_unix(), vec![]),
        ("MCP, HTTP", over_http(), vec![]),
    ];
    for (_, call, _) in &mut contenders {
        let _warm = times(call, 20);
    }
    for round in 0..mode.rounds() {
        progress(&format!("{}, round {round}", mode.name()));
        for number in turns(round, contenders.len()) {
            let (_, call, medians) = &mut contenders[number];
            medians.push(micros(p50(times(call, mode.count(CALLS)))));
        }
    }
    for (name, _, medians) in &contenders {
        outcome.figure(name, &column(mode.name(), "p50"), &Sample::of(medians.clone()), MICROS);
    }
    let added = |name: &str, over: &str| {
        let of = |name| contenders.iter().find(|(known, ..)| *known == name).expect("measured");
        let (ours, theirs) = (&of(name).2, &of(over).2);
        Sample::of(ours.iter().zip(theirs).map(|(ours, theirs)| ours - theirs))
    };
    let row = mode.name();
    outcome
        .check(format!("{row}: p50 added to sqlx direct"), added(STDIO, DIRECT), MICROS, GOAL)
        .under("each step of the worker by sqlx, without MCP", added(STEPS, DIRECT));
    outcome
        .check(format!("{row}: p50 added to sqlx at the door"), added(STDIO, DOOR), MICROS, GOAL)
        .under("each step of the worker by sqlx, without MCP", added(STEPS, DOOR));
    drop(contenders);
    at_once(outcome, &broker);
    outcome.note(
        "The statement reads one row by its primary key. The worker prepares it in every call, in \
         a transaction of its own, and so does \"sqlx\", without the transaction; every contender \
         has one session, and the worker's is behind the door. The steps are: begin and take the \
         snapshot, describe, execute, roll back, close the statement, DISCARD ALL; the worker does \
         the last three behind its answer. One call is made at a time, and 1 ms after the answer \
         to the one before; \"at once\" calls follow each other without a pause.",
    );
    outcome.note(
        "The worker's limits are raised for this, to 100 000 calls a second (50 by default) and 64 \
         at once (16); its handle has 4 sessions, for which the others wait.",
    );
}

const MICROS: Unit = Unit::Micros;

fn column(mode: &str, what: &str) -> String {
    format!("{mode}, {what}")
}

/// How long each of some calls takes, with a pause before each.
fn times(call: &mut Call<'_>, count: usize) -> Vec<Duration> {
    let one = |_| {
        thread::sleep(PAUSE);
        let started = Instant::now();
        call();
        started.elapsed()
    };
    (0..count).map(one).collect()
}

/// Keeps so many calls under way on one connection, and tells what that costs.
fn at_once(outcome: &mut Outcome, broker: &Broker) {
    let mode = outcome.mode;
    let arguments = json!({ "database": HANDLE_UNIX, "sql": SQL });
    for under_way in AT_ONCE {
        // One worker each, whose memory is that of this many calls and no more.
        let (process, mut lines) = stdio(broker, &format!("at-once-{under_way}"));
        let mut of_round = [vec![], vec![], vec![], vec![]];
        let _warm = keep(&mut lines, &arguments, under_way, 4 * under_way);
        for _ in 0..mode.rounds() {
            let (started, before) = (Instant::now(), cpu_time(process.pid()));
            let mut all = keep(&mut lines, &arguments, under_way, mode.count(CALLS_AT_ONCE));
            let (elapsed, cost) = (started.elapsed(), cpu_time(process.pid()) - before);
            all.sort_unstable();
            let figures = [
                all.len() as f64 / elapsed.as_secs_f64(),
                micros(all[all.len() / 2]),
                micros(all[all.len() * 99 / 100]),
                micros(cost) / all.len() as f64,
            ];
            for (sample, figure) in of_round.iter_mut().zip(figures) {
                sample.push(figure);
            }
        }
        let row = format!("MCP, stdio, {under_way} at once");
        let units = [Unit::PerSecond, MICROS, MICROS, MICROS];
        let names = ["calls", "p50", "p99", "worker's CPU a call"];
        for ((name, unit), sample) in names.iter().zip(units).zip(of_round) {
            outcome.figure(&row, &column(mode.name(), name), &Sample::of(sample), unit);
        }
        let resident = memory_kb(process.pid(), "status", "VmHWM") as f64 / 1024.0;
        let resident = Sample::of([resident]);
        outcome.figure(&row, &column(mode.name(), "resident at most"), &resident, Unit::Mebibytes);
    }
}

/// Makes `count` calls of which `under_way` are always waiting for their answers; the time of
/// each.
fn keep(lines: &mut Lines, arguments: &Value, under_way: usize, count: usize) -> Vec<Duration> {
    let mut started = HashMap::new();
    let mut all = Vec::with_capacity(count);
    let mut sent = 0;
    while all.len() < count {
        while sent < count && started.len() < under_way {
            started.insert(lines.send(arguments), Instant::now());
            sent += 1;
        }
        let answer = lines.receive();
        let id = answer["id"].as_u64().expect("the id of a call");
        all.push(started.remove(&id).expect("a call that was made").elapsed());
        assert_result(&answer["result"], true);
    }
    all
}

fn assert_result(result: &Value, succeeds: bool) {
    let said = &result["structuredContent"];
    assert_eq!(said["success"], succeeds, "{result}");
    assert!(!succeeds || said["rows"][0][0] == 4711, "{result}");
}

/// A worker of its own on its standard streams.
fn stdio(broker: &Broker, name: &str) -> (Process, Lines) {
    let file = broker.setup().path(&format!("{name}.toml"));
    fs::write(&file, CONFIG).expect("the worker's configuration");
    let logs = broker.setup().path("logs");
    let log = File::create(logs.join(format!("{name}.err"))).expect("a log file");
    let client = Identity::client();
    let mut command = client.command(binaries::sql_worker());
    command.args(["mcp", "--stdio", "--config"]).arg(&file);
    command.arg("--runtime-dir").arg(broker.runtime_dir());
    broker.tell(&mut command);
    let (theirs_in, input) = pipe(&client);
    let (output, theirs_out) = pipe(&client);
    command.stdin(theirs_in).stdout(theirs_out).stderr(log);
    let child = command.spawn().expect("the worker starts");
    // It has the worker's ends of the pipes.
    drop(command);
    (Process::adopt(name, child, &logs), Lines::greet(File::from(input), File::from(output)))
}

/// A pipe of the worker's own user, as when a program of the same user starts it: of anybody
/// else's the worker does not get a description of its own, and must block in it.
fn pipe(owner: &Identity) -> (OwnedFd, OwnedFd) {
    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
    let uid = rustix::fs::Uid::from_raw(owner.uid());
    rustix::fs::fchown(&reader, Some(uid), None).expect("the pipe is given");
    (reader, writer)
}
