//! P2.

use std::os::fd::OwnedFd;
use std::time::Instant;

use prost::Message as _;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use credbroker_proto::v1::PacketRequest;

use super::echo::Echo;
use super::stats::{Sample, micros, p50, ratios};
use super::{Goal, Outcome, Unit, rig, turns};
use crate::identity::Identity;
use crate::packet::describe;

const REQUESTS: usize = 2000;

pub(super) fn measure(outcome: &mut Outcome) {
    let mode = outcome.mode;
    let broker = rig::without_server().start();
    let packets = broker.packets(&Identity::client());
    let token = packets.issue("main_db").expect("a grant").token;
    let request = PacketRequest { id: 7, request: Some(describe(&token)) }.encode_to_vec();
    let mut buffer = vec![0_u8; 65536];
    let reply = round_trip(packets.socket(), &request, &mut buffer);
    let start =
        |kind: &str| Echo::start(&broker.setup().path(&format!("logs/{kind}.sock")), reply, kind);
    let (echo, task) = (start("plain"), start("task"));
    let sockets = [echo.packets.socket(), task.packets.socket(), packets.socket()];
    for socket in sockets {
        assert_eq!(round_trip(socket, &request, &mut buffer), reply, "the same sizes");
    }

    let requests = mode.count(REQUESTS);
    let mut times: [Vec<f64>; 3] = Default::default();
    for round in 0..mode.rounds() {
        for number in turns(round, times.len()) {
            let one = |_| {
                let started = Instant::now();
                round_trip(sockets[number], &request, &mut buffer);
                started.elapsed()
            };
            times[number].push(micros(p50((0..requests).map(one).collect())));
        }
    }
    let [bare, by_task, ours] = times;
    let row = format!("{}, {} B out, {reply} B back", mode.name(), request.len());
    outcome.figure(&row, "echo p50", &Sample::of(bare.clone()), Unit::Micros);
    let task = "echo by a task";
    outcome.figure(&row, &format!("{task} p50"), &Sample::of(by_task.clone()), Unit::Micros);
    outcome.figure(&row, "describe p50", &Sample::of(ours.clone()), Unit::Micros);
    let goal = if mode.pinned { 1.6 } else { 1.25 };
    let what = format!("{}: p50 ÷ echo", mode.name());
    outcome
        .check(what, ratios(&ours, &bare), Unit::Ratio, Goal::AtMost(goal))
        .under(task, ratios(&by_task, &bare));
    outcome.note(
        "The echo is a thread that blocks, which the kernel runs on its client's processor. By a \
         task, on the broker's runtime, it is woken as the broker is: on another processor, if \
         that is idle.",
    );
}

fn round_trip(socket: &OwnedFd, request: &[u8], buffer: &mut [u8]) -> usize {
    send(socket, request, SendFlags::NOSIGNAL).expect("sent");
    let (_, length) = recv(socket, &mut *buffer, RecvFlags::empty()).expect("a reply");
    assert!(length > 0, "the connection was closed");
    length
}
