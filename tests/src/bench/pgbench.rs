//! P5.

use std::time::Duration;

use super::rig::{FREE_UNIX, Rig, Target, cpu_time};
use super::stats::{Sample, micros, ratios};
use super::{Goal, Outcome, Unit, progress, several, turns};
use crate::postgres::programs;

const CLIENTS: [usize; 2] = [1, 8];
const SPAN: Duration = Duration::from_secs(2);
const SCALE: &str = "10";

/// Who is measured, with the process between client and server if there is one.
struct Contender {
    target: Target,
    between: Option<u32>,
    per_second: Vec<f64>,
    /// Processor time of that process a transaction, in microseconds.
    cost: Vec<f64>,
}

pub(super) fn measure(outcome: &mut Outcome) {
    let mode = outcome.mode;
    let rig = Rig::start();
    let broker = rig.setup().start();
    let (pgbouncer, relay) = (rig.pgbouncer(), rig.bare_relay());
    fill(&rig.direct());
    for clients in CLIENTS {
        let contender = |target: Target, between: Option<u32>| Contender {
            target,
            between,
            per_second: Vec::new(),
            cost: Vec::new(),
        };
        let door = rig.door("door", &broker, FREE_UNIX, "");
        let mut all = [
            contender(rig.direct(), None),
            contender(pgbouncer.target(&rig), Some(pgbouncer.pid())),
            contender(door, Some(broker.pid())),
            contender(relay.target(&rig), Some(relay.pid())),
        ];
        for round in 0..mode.rounds() {
            progress(&format!("{}, {}, round {round}", mode.name(), several(clients, "client")));
            for number in turns(round, all.len()) {
                all[number].run(clients, mode.span(SPAN));
            }
        }
        tell(outcome, clients, &all);
    }
    outcome.note(format!(
        "Scale {SCALE}; the relay's cost is utime and stime of the whole process, divided by the \
         transactions. The bare relay is one thread that does one epoll_wait(2), one recv(2) and \
         one send(2) a message and knows nothing: the floor for a relay in user space. By a \
         profile, the door makes the same system calls, and four fifths of its time are theirs; the \
         rest (tasks and timers of its runtime, the count of frames) is 19 % of it, of pgbouncer's \
         13 % and of the bare relay's 7 %."
    ));
}

fn tell(outcome: &mut Outcome, clients: usize, all: &[Contender; 4]) {
    let mode = outcome.mode;
    let row = format!("{}, {}", mode.name(), several(clients, "client"));
    for one in all {
        let name = one.target.name;
        outcome.figure(&row, name, &Sample::of(one.per_second.clone()), Unit::PerSecond);
    }
    let costs = format!("{row}: relay's CPU a transaction");
    for one in all.iter().filter(|one| one.between.is_some()) {
        outcome.figure(&costs, one.target.name, &Sample::of(one.cost.clone()), Unit::Micros);
    }
    let [direct, pgbouncer, door, relay] = all;
    let to_direct = ratios(&door.per_second, &direct.per_second);
    outcome.text(&row, "door ÷ direct", to_direct.range(Unit::Ratio));
    let speed = |one: &Contender| ratios(&one.per_second, &pgbouncer.per_second);
    let goal = match (clients, mode.pinned) {
        (1, true) => Some(1.05),
        (1, false) => None,
        _ => Some(0.95),
    };
    match goal {
        Some(goal) => outcome
            .check(format!("{row}: tps ÷ pgbouncer"), speed(door), Unit::Ratio, Goal::AtLeast(goal))
            .under("bare relay", speed(relay)),
        None => outcome.text(&row, "door ÷ pgbouncer", speed(door).range(Unit::Ratio)),
    }
    let cost = |one: &Contender| ratios(&one.cost, &pgbouncer.cost);
    let what = format!("{row}: relay's CPU a transaction ÷ pgbouncer");
    outcome
        .check(what, cost(door), Unit::Ratio, Goal::AtMost(0.9))
        .under("bare relay", cost(relay));
}

impl Contender {
    fn run(&mut self, clients: usize, span: Duration) {
        let mut command = self.target.command(programs().join("pgbench"));
        command.args(["--no-vacuum", "--select-only", "--protocol=prepared"]);
        command.args(["--client", &clients.to_string(), "--jobs", &clients.min(2).to_string()]);
        command.args(["--time", &span.as_secs().max(1).to_string()]);
        let before = self.between.map(cpu_time);
        let printed = self.target.run(&mut command);
        let after = self.between.map(cpu_time);
        let transactions = number(&printed, "number of transactions actually processed: ");
        self.per_second.push(number(&printed, "tps = "));
        if let Some((before, after)) = before.zip(after) {
            self.cost.push(micros(after - before) / transactions);
        }
    }
}

/// Makes pgbench's tables.
pub(super) fn fill(target: &Target) {
    let mut command = target.command(programs().join("pgbench"));
    command.args(["--initialize", "--quiet", "--unlogged-tables", "--scale", SCALE]);
    let _printed = target.run(&mut command);
}

fn number(printed: &str, before: &str) -> f64 {
    let (_, rest) = printed.split_once(before).unwrap_or_else(|| panic!("no {before}: {printed}"));
    let number = rest.split(|c: char| !c.is_ascii_digit() && c != '.').next().unwrap_or_default();
    number.parse().expect("a number")
}
