//! P7.

use super::rig::{FREE_UNIX, Rig, Target, cpu_time, libpq_client};
use super::stats::{Sample, millis, ratios};
use super::{Goal, Outcome, Unit, progress};

/// Bytes of a row with its newline.
const ROW: usize = 8192;
const ROWS: usize = 1024 * 1024 * 1024 / ROW;

pub(super) fn measure(outcome: &mut Outcome) {
    let mode = outcome.mode;
    let rig = Rig::start();
    let broker = rig.setup().start();
    let (pgbouncer, relay) = (rig.pgbouncer(), rig.bare_relay());
    let rows = mode.count(ROWS);
    // The server makes the row once and sends it often: it costs as little as a COPY can.
    let sql =
        format!("COPY (SELECT repeat('a', {}) FROM generate_series(1, {rows})) TO STDOUT", ROW - 1);
    let all: [(Target, Option<u32>); 4] = [
        (rig.direct(), None),
        (pgbouncer.target(&rig), Some(pgbouncer.pid())),
        (rig.door("door", &broker, FREE_UNIX, ""), Some(broker.pid())),
        (relay.target(&rig), Some(relay.pid())),
    ];
    let mut speeds: [Vec<f64>; 4] = Default::default();
    let mut costs: [Vec<f64>; 4] = Default::default();
    for round in 0..mode.rounds() {
        progress(&format!("{}, round {round}", mode.name()));
        for (number, (target, between)) in all.iter().enumerate() {
            let before = between.map(cpu_time);
            let mut command = target.command(libpq_client());
            let printed = target.run(command.args(["copy", &sql]));
            let after = between.map(cpu_time);
            let mut words = printed.split_whitespace();
            let mut next = || words.next().and_then(|word| word.parse::<f64>().ok());
            let (bytes, nanoseconds) = next().zip(next()).expect("two numbers");
            assert_eq!(bytes, (rows * ROW) as f64, "{}: every byte", target.name);
            let mebibytes = bytes / (1024.0 * 1024.0);
            speeds[number].push(mebibytes / (nanoseconds / 1e9));
            if let Some((before, after)) = before.zip(after) {
                costs[number].push(millis(after - before) / (mebibytes / 1024.0));
            }
        }
    }
    let row = mode.name();
    for ((target, between), (speed, cost)) in all.iter().zip(speeds.iter().zip(&costs)) {
        let unit = Unit::MebibytesPerSecond;
        outcome.figure(row, target.name, &Sample::of(speed.clone()), unit);
        if between.is_some() {
            let row = format!("{row}: relay's CPU a GiB");
            outcome.figure(&row, target.name, &Sample::of(cost.clone()), Unit::Millis);
        }
    }
    let [direct, pgbouncer, door, relay] = &speeds;
    outcome
        .check(
            format!("{row}: bytes a second ÷ direct"),
            ratios(door, direct),
            Unit::Ratio,
            Goal::AtLeast(0.95),
        )
        .under("bare relay", ratios(relay, direct));
    outcome
        .check(
            format!("{row}: bytes a second ÷ pgbouncer"),
            ratios(door, pgbouncer),
            Unit::Ratio,
            Goal::AtLeast(1.5),
        )
        .under("bare relay", ratios(relay, pgbouncer));
    outcome.note(format!("{rows} rows of {ROW} B to a libpq client that counts and drops them."));
}
