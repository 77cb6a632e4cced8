//! P10.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::rig::{ascii, memory_kb, without_server};
use super::stats::{Sample, millis};
use super::{Goal, Outcome, Unit};
use crate::binaries;
use crate::process::Process;

const STARTS: usize = 20;
const LIMIT: Duration = Duration::from_secs(10);
const MIB: f64 = 1024.0 * 1024.0;

pub(super) fn measure(outcome: &mut Outcome) {
    let setup = without_server();
    let _written = setup.write();
    let path = setup.path("notify.sock");
    let socket = UnixDatagram::bind(&path).expect("a socket");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).expect("chmod");
    socket.set_read_timeout(Some(LIMIT)).expect("a socket");
    let mut times = Vec::new();
    let (mut resident, mut both) = (Vec::new(), Vec::new());
    for start in 0..outcome.mode.count(STARTS) {
        let mut command = setup.command("run");
        command.env("NOTIFY_SOCKET", ascii(&path));
        let started = Instant::now();
        let mut process = Process::start("broker", &mut command, &setup.path("logs"));
        await_ready(&socket, &process);
        times.push(millis(started.elapsed()));
        if start < 3 {
            // Idle, not starting.
            thread::sleep(Duration::from_secs(1));
            let kib = |pid, file, key| memory_kb(pid, file, key) as f64 * 1024.0 / MIB;
            resident.push(kib(process.pid(), "status", "VmRSS"));
            let family = [vec![process.pid()], children(process.pid())].concat();
            both.push(family.iter().map(|pid| kib(*pid, "smaps_rollup", "Pss")).sum());
        }
        process.signal(Signal::TERM);
        let _status = process.wait(LIMIT);
    }
    let size = fs::metadata(binaries::credbrokerd()).expect("it was built").len() as f64 / MIB;
    let [resident, both, times, size] = [resident, both, times, vec![size]].map(Sample::of);
    for (row, sample, unit) in [
        ("resident memory of the broker", &resident, Unit::Mebibytes),
        ("proportional memory of broker and keeper", &both, Unit::Mebibytes),
        ("start (exec of setpriv included) to READY=1", &times, Unit::Millis),
        ("size of credbrokerd", &size, Unit::Mebibytes),
    ] {
        outcome.text(row, "idle, one connection", sample.range(unit));
    }
    for (what, sample, unit, goal) in [
        ("idle resident memory", resident, Unit::Mebibytes, 12.0),
        ("start to READY", times, Unit::Millis, 50.0),
        ("stripped binary", size, Unit::Mebibytes, 15.0),
    ] {
        outcome.check(what, sample, unit, Goal::AtMost(goal));
    }
}

fn await_ready(socket: &UnixDatagram, process: &Process) {
    let mut buffer = [0; 512];
    loop {
        let received = socket.recv(&mut buffer);
        let count = received.unwrap_or_else(|_| panic!("not ready:\n{}", process.stderr()));
        if String::from_utf8_lossy(&buffer[..count]).lines().any(|line| line == "READY=1") {
            return;
        }
    }
}

fn children(pid: u32) -> Vec<u32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}
