//! P2.

use std::os::fd::OwnedFd;
use std::time::Instant;

use prost::Message as _;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use credbroker_proto::v1::PacketRequest;

use super::echo::Echo;
use super::stats::{Sample, micros, p50, ratios};
use super::{Goal, Outcome, Unit, rig};
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
    let echo = Echo::start(&broker.setup().path("logs/echo.sock"), reply, false);
    let echo = echo.packets.socket();
    assert_eq!(round_trip(echo, &request, &mut buffer), reply, "the same sizes");

    let requests = mode.count(REQUESTS);
    let (mut bare, mut ours) = (Vec::new(), Vec::new());
    for _round in 0..mode.rounds() {
        for (socket, times) in [(echo, &mut bare), (packets.socket(), &mut ours)] {
            let one = |_| {
                let started = Instant::now();
                round_trip(socket, &request, &mut buffer);
                started.elapsed()
            };
            times.push(micros(p50((0..requests).map(one).collect())));
        }
    }
    let row = format!("{}, {} B out, {reply} B back", mode.name(), request.len());
    outcome.figure(&row, "echo p50", &Sample::of(bare.clone()), Unit::Micros);
    outcome.figure(&row, "describe p50", &Sample::of(ours.clone()), Unit::Micros);
    let goal = if mode.pinned { 1.6 } else { 1.25 };
    let what = format!("{}: p50 ÷ echo", mode.name());
    outcome.check(what, ratios(&ours, &bare), Unit::Ratio, Goal::AtMost(goal));
}

fn round_trip(socket: &OwnedFd, request: &[u8], buffer: &mut [u8]) -> usize {
    send(socket, request, SendFlags::NOSIGNAL).expect("sent");
    let (_, length) = recv(socket, &mut *buffer, RecvFlags::empty()).expect("a reply");
    assert!(length > 0, "the connection was closed");
    length
}
