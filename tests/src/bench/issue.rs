//! P1.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use credbroker_proto::v1::IssueHandleRequest;
use credbroker_proto::v1::handle_service_client::HandleServiceClient;
use futures_util::future::join_all;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tonic::service::Routes;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use super::rig::Helper;
use super::stats::{Sample, ratios};
use super::{Goal, Outcome, Unit, echo, progress, rig, several, turns};
use crate::identity::Identity;
use crate::wait;

const CONNECTIONS: [usize; 2] = [1, 8];
const SPAN: Duration = Duration::from_secs(1);
/// About as long as an audit record.
const LINE: [u8; 600] = [b'\n'; 600];

pub(super) fn measure(outcome: &mut Outcome) {
    let mode = outcome.mode;
    let span = mode.span(SPAN);
    for connections in CONNECTIONS {
        let row = format!("{}, {}", mode.name(), several(connections, "connection"));
        progress(&row);
        let broker = rig::without_server().start();
        // Where the client's uid may go too.
        let directory = rig::temporary();
        let server = |name: &str, arguments: &[&str]| {
            let path = directory.path().join(name);
            let helper =
                Helper::start(&[["serve-empty", rig::ascii(&path)].as_slice(), arguments].concat());
            let listens = || UnixStream::connect(&path).ok();
            wait::until(Duration::from_secs(10), listens).expect("the empty server listens");
            (helper, path)
        };
        let (_empty, empty) = server("empty", &[]);
        let log = directory.path().join("log");
        let (_writing, writing) = server("writing", &[rig::ascii(&log)]);
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let ours = channels(&runtime, &broker.socket(), connections);
        let empty = channels(&runtime, &empty, connections);
        let writing = channels(&runtime, &writing, connections);
        let mut speeds: [Vec<f64>; 3] = Default::default();
        let check = async |channel| {
            HealthClient::new(channel).check(HealthCheckRequest::default()).await.map(drop)
        };
        let issue = async |channel| {
            let connection = "main_db".into();
            let request = IssueHandleRequest { connection, ..Default::default() };
            HandleServiceClient::new(channel).issue_handle(request).await.map(drop)
        };
        for round in 0..mode.rounds() {
            for number in turns(round, speeds.len()) {
                speeds[number].push(match number {
                    0 => throughput(&runtime, &empty, span, check),
                    1 => throughput(&runtime, &writing, span, check),
                    _ => throughput(&runtime, &ours, span, issue),
                });
            }
        }
        let [theirs, written, issued] = speeds;
        outcome.figure(&row, "empty call", &Sample::of(theirs.clone()), Unit::PerSecond);
        let writes = "empty call that waits for a line";
        outcome.figure(&row, writes, &Sample::of(written.clone()), Unit::PerSecond);
        outcome.figure(&row, "IssueHandle", &Sample::of(issued.clone()), Unit::PerSecond);
        outcome
            .check(
                format!("{row}: throughput ÷ empty call"),
                ratios(&issued, &theirs),
                Unit::Ratio,
                Goal::AtLeast(0.8),
            )
            .under(writes, ratios(&written, &theirs));
    }
    outcome.note(
        "One request in flight on each connection; the client is one thread. Every handle lives \
         on to the end of the run, and each has its record in the audit log before the reply. The \
         floor replies when a thread has written a line of 600 B to a file: one thread for all, \
         since records are chained, which takes what is there at once. By a profile, gRPC has more \
         than half of the broker's time, the call itself (decision, record, table) a fifth, and the \
         log's thread a sixth, of which half is write(2) and a look whether the file is still there.",
    );
}

fn channels(runtime: &Runtime, path: &Path, count: usize) -> Vec<Channel> {
    let channel = |_| {
        let stream = Identity::client().connect(path).expect("it listens");
        runtime.block_on(channel(stream)).expect("a channel")
    };
    (0..count).map(channel).collect()
}

async fn channel(stream: UnixStream) -> io::Result<Channel> {
    stream.set_nonblocking(true)?;
    let mut once = Some(tokio::net::UnixStream::from_std(stream)?);
    let connector = tower::service_fn(move |_uri| {
        let stream = once.take().map(TokioIo::new);
        async move { stream.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)) }
    });
    let endpoint = Endpoint::from_static("http://localhost");
    endpoint.connect_with_connector(connector).await.map_err(io::Error::other)
}

/// Calls in a second, one after the other on each channel.
fn throughput(
    runtime: &Runtime,
    channels: &[Channel],
    span: Duration,
    call: impl AsyncFn(Channel) -> Result<(), Status>,
) -> f64 {
    let done = Cell::new(0_u32);
    let started = Instant::now();
    let caller = async |channel: &Channel| {
        while started.elapsed() < span {
            call(channel.clone()).await.expect("it is granted");
            done.set(done.get() + 1);
        }
    };
    let _all = runtime.block_on(join_all(channels.iter().map(caller)));
    f64::from(done.get()) / started.elapsed().as_secs_f64()
}

/// A service whose one call does nothing, or waits for a line to be written.
#[derive(Clone)]
struct Empty {
    log: Option<mpsc::Sender<oneshot::Sender<()>>>,
}

#[tonic::async_trait]
impl Health for Empty {
    type WatchStream = futures_util::stream::Empty<Result<HealthCheckResponse, Status>>;

    async fn check(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        if let Some(log) = &self.log {
            let (written, is_written) = oneshot::channel();
            let _gone = log.send(written);
            is_written.await.map_err(|_gone| Status::unavailable("the writer has ended"))?;
        }
        Ok(Response::new(HealthCheckResponse::default()))
    }

    async fn watch(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Ok(Response::new(futures_util::stream::empty()))
    }
}

/// Writes a line for each that waits, as many as there are at once.
fn write(mut log: File, waiting: &mpsc::Receiver<oneshot::Sender<()>>) {
    while let Ok(first) = waiting.recv() {
        let all: Vec<_> = [first].into_iter().chain(waiting.try_iter()).collect();
        log.write_all(&LINE.repeat(all.len())).expect("there is room");
        for waiter in all {
            let _gone = waiter.send(());
        }
    }
}

/// Serves gRPC with the broker's runtime and settings, for ever, and does nothing; with `log`
/// there is a line in it before each reply, written by a thread of its own.
///
/// # Panics
/// When the socket or the file cannot be had.
pub fn serve_empty(path: &Path, log: Option<&Path>) {
    let start = |log: &Path| {
        let log = File::options().append(true).create(true).open(log).expect("a file");
        let (waiter, waiting) = mpsc::channel();
        thread::spawn(move || write(log, &waiting));
        waiter
    };
    let empty = Empty { log: log.map(start) };
    let listener = UnixListener::from(echo::listener(path, rustix::net::SocketType::STREAM));
    listener.set_nonblocking(true).expect("a socket");
    let runtime = Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let listener = tokio::net::UnixListener::from_std(listener).expect("registered");
        let mut connections = JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.expect("a client");
            let routes = Routes::new(HealthServer::new(empty.clone()));
            let mut server = http2::Builder::new(TokioExecutor::new());
            server
                .timer(TokioTimer::new())
                .max_concurrent_streams(64)
                .max_header_list_size(16 * 1024)
                .keep_alive_interval(Duration::from_secs(30))
                .keep_alive_timeout(Duration::from_secs(10));
            let service = TowerToHyperService::new(routes);
            connections.spawn(async move {
                let _ended = server.serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
}
