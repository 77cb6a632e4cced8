//! P9.

use std::thread;
use std::time::{Duration, Instant};

use credbroker_proto::v1::packet_reply::Reply;

use super::rig::{memory_kb, without_server};
use super::stats::{Sample, micros, p50, ratios};
use super::{Goal, Outcome, Unit};
use crate::identity::Identity;
use crate::packet::{Packets, issue};

const FEW: usize = 1000;
const MANY: usize = 100_000;
const CONNECTIONS: usize = 4;
/// What is sent ahead of the replies.
const AHEAD: usize = 64;
const SINGLE: usize = 2000;
/// How long the log of many takes to reach the disk, behind the replies.
const SETTLE: Duration = Duration::from_secs(3);

pub(super) fn measure(outcome: &mut Outcome) {
    let mode = outcome.mode;
    let (mut few, mut many, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
    let rounds = if mode.quick { 1 } else { 3 };
    for _round in 0..rounds {
        let broker = without_server().start();
        let packets: Vec<_> =
            (0..CONNECTIONS).map(|_| broker.packets(&Identity::client())).collect();
        let resident = || memory_kb(broker.pid(), "status", "VmRSS");
        issue_many(&packets[0], FEW);
        few.push(micros(one_by_one(&packets[0])));
        let before = resident();
        thread::scope(|scope| {
            for packets in &packets {
                scope.spawn(|| issue_many(packets, MANY / CONNECTIONS));
            }
        });
        let grown = (resident().saturating_sub(before) * 1024) as f64;
        bytes.push(grown / MANY as f64);
        many.push(micros(one_by_one(&packets[0])));
    }
    outcome.figure("1 000 live", "issue p50", &Sample::of(few.clone()), Unit::Micros);
    outcome.figure("100 000 live", "issue p50", &Sample::of(many.clone()), Unit::Micros);
    let ratio = ratios(&many, &few);
    outcome.check("issue p50 at 100 000 ÷ at 1 000", ratio, Unit::Ratio, Goal::AtMost(1.3));
    let bytes = Sample::of(bytes);
    outcome.figure("100 000 live", "resident, each", &bytes, Unit::Bytes);
    outcome.check("resident memory of a handle", bytes, Unit::Bytes, Goal::AtMost(512.0));
    outcome.note("By packet, with the audit log on, once the log of those before is on the disk.");
}

fn issue_many(packets: &Packets, count: usize) {
    let (mut sent, mut done) = (0, 0);
    while done < count {
        if sent < count && sent - done < AHEAD {
            packets.send(sent as u64, issue("main_db"), &[]).expect("it reads");
            sent += 1;
        } else {
            let received = packets.receive().expect("a reply").expect("the connection stays open");
            let reply = received.reply.reply.expect("a reply");
            assert!(matches!(reply, Reply::Issued(_)), "{reply:?}");
            done += 1;
        }
    }
}

fn one_by_one(packets: &Packets) -> Duration {
    thread::sleep(SETTLE);
    let one = |_| {
        let started = Instant::now();
        packets.issue("main_db").expect("a grant");
        started.elapsed()
    };
    p50((0..SINGLE).map(one).collect())
}
