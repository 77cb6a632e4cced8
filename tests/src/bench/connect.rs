//! P4.

use std::time::Duration;

use super::open::start_if_taken;
use super::rig::{FREE_TCP, FREE_UNIX, HANDLE_TCP, HANDLE_UNIX, Rig, Target, libpq_client};
use super::stats::{Sample, ratios};
use super::{Goal, Outcome, Unit, progress};
use crate::broker::{Broker, Setup};
use crate::identity::Identity;

const CONNECTS: usize = 60;
const WARM_CONNECTS: usize = 30;
/// A spare is there again 10 to 20 ms after one was taken; logging in takes a few more.
const REFILLED: Duration = Duration::from_millis(40);
/// One contender and its p50 of each round, in milliseconds.
type Times = (Target, usize, Duration, Vec<f64>);

pub(super) fn measure(outcome: &mut Outcome) {
    let mode = outcome.mode;
    let rig = Rig::start();
    let pgbouncer = rig.pgbouncer();
    // Asked for in so many words, as soon as the broker knows the word.
    let cold = start_if_taken(with_spares(rig.setup(), 0)).unwrap_or_else(|| rig.setup().start());
    let warm = start_if_taken(with_spares(rig.setup(), 2));
    let count = mode.count(CONNECTS);
    let now = Duration::ZERO;
    let mut contenders: Vec<Times> = vec![
        (rig.direct(), count, now, Vec::new()),
        (rig.direct().by_tcp("direct, TCP"), count, now, Vec::new()),
        (pgbouncer.target(&rig), count, now, Vec::new()),
    ];
    let doors = |broker: &Broker, names: [&'static str; 4]| {
        let tokens = [HANDLE_UNIX, HANDLE_TCP].map(|connection| {
            broker.handles(&Identity::client()).issue(connection).expect("a grant").token
        });
        let [handle_unix, handle_tcp] = tokens;
        let connections = [
            (HANDLE_UNIX, handle_unix),
            (FREE_UNIX, String::new()),
            (HANDLE_TCP, handle_tcp),
            (FREE_TCP, String::new()),
        ];
        let named = names.into_iter().zip(connections);
        let door = |(name, (connection, token)): (&'static str, (&str, String))| {
            rig.door(name, broker, connection, &token)
        };
        named.map(door).collect::<Vec<_>>()
    };
    let cold_names = ["cold, handle", "cold, ambient", "cold, handle, TCP", "cold, ambient, TCP"];
    contenders.extend(doors(&cold, cold_names).into_iter().map(|door| (door, count, now, vec![])));
    if let Some(warm) = &warm {
        let names = ["warm, handle", "warm, ambient", "warm, handle, TCP", "warm, ambient, TCP"];
        let doors = doors(warm, names).into_iter();
        let count = mode.count(WARM_CONNECTS);
        contenders.extend(doors.map(|door| (door, count, REFILLED, vec![])));
    } else {
        outcome.note("Warm spares are not available yet.");
    }

    let mut trusted = Vec::new();
    for round in 0..mode.rounds() {
        progress(&format!("{}, round {round}", mode.name()));
        for (target, count, pause, times) in &mut contenders {
            times.push(p50(target, *count, *pause));
        }
        // After the others, whose logins it would change.
        rig.trust(true);
        trusted.push(p50(&rig.direct(), count, now));
        rig.trust(false);
    }

    let row = mode.name();
    for (target, _, _, times) in &contenders {
        outcome.figure(target.name, row, &Sample::of(times.clone()), Unit::Millis);
    }
    outcome.figure("direct, trust", row, &Sample::of(trusted.clone()), Unit::Millis);
    let of = |name: &str| {
        let found = contenders.iter().find(|(target, ..)| target.name == name);
        found.map(|(_, _, _, times)| times.clone())
    };
    let direct = of("direct").expect("measured");
    for (name, against, goal) in [
        ("cold, handle", "direct", 0.60),
        ("cold, ambient", "direct", 0.60),
        ("cold, handle, TCP", "direct, TCP", 0.75),
        ("cold, ambient, TCP", "direct, TCP", 0.75),
        ("warm, handle", "direct", 0.15),
        ("warm, ambient", "direct", 0.15),
    ] {
        let (Some(ours), Some(theirs)) = (of(name), of(against)) else { continue };
        let what = format!("{row}: {name} ÷ {against}");
        let goal = Goal::AtMost(goal);
        let check = outcome.check(what, ratios(&ours, &theirs), Unit::Ratio, goal);
        if name.starts_with("cold") {
            check.under("direct without SCRAM", ratios(&trusted, &direct));
        } else {
            check.under("pgbouncer", ratios(&of("pgbouncer").expect("measured"), &direct));
        }
    }
    outcome.note(
        "p50 of the connects of a round. `direct, trust` is what the server and libpq cost when \
         nobody proves anything: a fork, the start of a backend, one statement. pgbouncer asks \
         for its password in clear, as the door for its token, and gives a client the session \
         that served another before, which the broker never does.",
    );
}

fn with_spares(mut setup: Setup, spares: i64) -> Setup {
    for name in [HANDLE_UNIX, HANDLE_TCP, FREE_UNIX, FREE_TCP] {
        setup = setup.set(&format!("connections.{name}.warm"), spares);
    }
    setup
}

/// The median connect of a row of them, in milliseconds.
fn p50(target: &Target, count: usize, pause: Duration) -> f64 {
    let mut command = target.command(libpq_client());
    command.args(["connect", &count.to_string(), &pause.as_micros().to_string()]);
    let printed = target.run(&mut command);
    let times = printed.lines().map(|line| line.parse::<f64>().expect("nanoseconds"));
    Sample::of(times).median() / 1e6
}
