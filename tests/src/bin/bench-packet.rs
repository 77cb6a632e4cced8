//! P2: `describe` on packet.sock against a bare SEQPACKET echo of the same sizes, interleaved in
//! one run, unpinned and pinned to one core. Prints medians; it is no test.
#![allow(clippy::print_stdout, reason = "the table is what it is for")]
#![allow(
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a measurement that fails, fails loudly"
)]

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use credbroker_e2e::broker::{Broker, Grant, Setup};
use credbroker_e2e::identity::Identity;
use credbroker_e2e::packet::{Packets, describe};
use credbroker_e2e::wait;
use credbroker_proto::v1::PacketRequest;
use prost::Message as _;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept, bind,
    listen, recv, send, socket_with,
};
use rustix::thread::{CpuSet, sched_setaffinity};

#[derive(Parser)]
struct Arguments {
    /// Rounds of each; the median of their medians is printed.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Requests of a round.
    #[arg(long, default_value_t = 2000)]
    requests: usize,
    /// The broker's worker threads; as many as there are cores when absent.
    #[arg(long)]
    workers: Option<usize>,
    /// Serves as the echo: SOCKET and the length of its replies.
    #[arg(long, num_args = 2, hide = true)]
    echo: Option<Vec<String>>,
}

fn main() {
    let arguments = Arguments::parse();
    if let Some(echo) = &arguments.echo {
        return serve_echo(Path::new(&echo[0]), echo[1].parse().expect("a length"));
    }
    println!("| | echo p50 | describe p50 | ratio | goal |");
    println!("| --- | --- | --- | --- | --- |");
    compare("unpinned", "1.25", &arguments);
    let mut one = CpuSet::new();
    one.set(0);
    // Whatever is started from here on is pinned too.
    sched_setaffinity(None, &one).expect("a core");
    compare("pinned", "1.60", &arguments);
}

fn compare(name: &str, goal: &str, arguments: &Arguments) {
    let client = Identity::client();
    let setup = Setup::new()
        .set("connections.main_db.type", "postgresql")
        .set("connections.main_db.host", "127.0.0.1")
        .set("connections.main_db.database", "mydb")
        .set("connections.main_db.tls.mode", "disable");
    let setup = match arguments.workers {
        Some(workers) => setup.environment("TOKIO_WORKER_THREADS", &workers.to_string()),
        None => setup,
    };
    let secret = setup.secret_file("main_db", "app:password");
    let broker: Broker = setup
        .set("connections.main_db.secret.file", secret.to_str().expect("ASCII"))
        .grant(Grant::to(&client, &["issue"], &["main_db"]))
        .start();
    let packets = broker.packets(&client);
    let token = packets.issue("main_db").expect("a grant").token;
    let request = PacketRequest { id: 7, request: Some(describe(&token)) }.encode_to_vec();
    let mut buffer = vec![0_u8; 65536];
    let reply = round_trip(packets.socket(), &request, &mut buffer);

    let path = broker.setup().path("logs").join("echo.sock");
    let _echo = Echo::start(&path, reply);
    let echo =
        wait::until(Duration::from_secs(10), || Packets::connect(&Identity::own(), &path).ok())
            .expect("the echo listens");
    assert_eq!(round_trip(echo.socket(), &request, &mut buffer), reply, "the same sizes");

    let (mut bare, mut ours) = (Vec::new(), Vec::new());
    for _ in 0..arguments.rounds {
        bare.push(p50(echo.socket(), &request, &mut buffer, arguments.requests));
        ours.push(p50(packets.socket(), &request, &mut buffer, arguments.requests));
    }
    let ratios: Vec<f64> = bare
        .iter()
        .zip(&ours)
        .map(|(bare, ours)| ours.as_secs_f64() / bare.as_secs_f64())
        .collect();
    println!(
        "| {name}, {} B out, {reply} B back | {:.1?} | {:.1?} | {:.2} | {goal} |",
        request.len(),
        median(bare),
        median(ours),
        median_of(ratios)
    );
}

/// The median of one round.
fn p50(socket: &OwnedFd, request: &[u8], buffer: &mut [u8], requests: usize) -> Duration {
    let mut taken: Vec<Duration> = Vec::with_capacity(requests);
    for _ in 0..requests {
        let started = Instant::now();
        round_trip(socket, request, buffer);
        taken.push(started.elapsed());
    }
    median(taken)
}

fn round_trip(socket: &OwnedFd, request: &[u8], buffer: &mut [u8]) -> usize {
    send(socket, request, SendFlags::NOSIGNAL).expect("sent");
    let (_, length) = recv(socket, &mut *buffer, RecvFlags::empty()).expect("a reply");
    assert!(length > 0, "the connection was closed");
    length
}

fn median(mut all: Vec<Duration>) -> Duration {
    all.sort_unstable();
    all[all.len() / 2]
}

fn median_of(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// The echo, in a process of its own.
struct Echo(Child);

impl Echo {
    fn start(path: &Path, reply: usize) -> Self {
        let program: PathBuf = std::env::current_exe().expect("this program");
        let mut command = Command::new(program);
        command.arg("--echo").arg(path).arg(reply.to_string()).stdin(Stdio::null());
        Self(command.spawn().expect("the echo starts"))
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// The least that a server can do: a blocking thread, one recv(2) and one send(2) a request.
fn serve_echo(path: &Path, reply: usize) {
    let listener =
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .expect("a socket");
    bind(&listener, &SocketAddrUnix::new(path).expect("a path")).expect("bound");
    listen(&listener, 1).expect("listening");
    let socket = accept(&listener).expect("the client");
    let (mut buffer, reply) = (vec![0_u8; 65536], vec![7_u8; reply]);
    loop {
        match recv(&socket, &mut buffer[..], RecvFlags::empty()) {
            Ok((_, 1..)) => {}
            Ok(_) | Err(_) => return,
        }
        if send(&socket, &reply, SendFlags::NOSIGNAL).is_err() {
            return;
        }
    }
}
