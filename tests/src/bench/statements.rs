//! P6.

use std::io;
use std::os::unix::net::UnixStream;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::{Builder, Runtime};
use tokio_postgres::{Client, Config, NoTls};

use super::open::{self, Opener};
use super::rig::{FREE_UNIX, Rig, Target};
use super::stats::{Sample, ratios};
use super::{Goal, Outcome, Unit, pgbench, progress};
use crate::identity::Identity;

const STATEMENTS: usize = 6000;
const SQL: &str = "SELECT abalance FROM pgbench_accounts WHERE aid = $1";

/// A client, and what moves its bytes.
type Driven = (Client, Pin<Box<dyn Future<Output = ()>>>);

pub(super) fn measure(outcome: &mut Outcome) {
    let mode = outcome.mode;
    let rig = Rig::start();
    let pgbouncer = rig.pgbouncer();
    pgbench::fill(&rig.direct());
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    let handing = open::broker(&rig, None);
    let opener = handing.as_ref().and_then(Opener::over);
    if opener.is_none() {
        outcome.note("Handoff is not available yet.");
    }
    let broker = rig.setup().start();
    let connect = |target: &Target| runtime.block_on(by_name(target));
    let mut contenders = vec![
        ("direct", connect(&rig.direct()), Vec::new()),
        ("direct again", connect(&rig.direct()), Vec::new()),
        ("pgbouncer", connect(&pgbouncer.target(&rig)), Vec::new()),
        ("door", connect(&rig.door("door", &broker, FREE_UNIX, "")), Vec::new()),
    ];
    if let Some(opener) = &opener {
        let (opened, socket) = opener.open();
        let handed = runtime.block_on(async { over(Handed::new(opened.prelude, socket)).await });
        contenders.push(("handed off", handed, Vec::new()));
    }
    for round in 0..mode.rounds() {
        progress(&format!("{}, round {round}", mode.name()));
        for (_, driven, speeds) in &mut contenders {
            speeds.push(speed(&runtime, driven, mode.count(STATEMENTS)));
        }
    }
    let row = mode.name();
    for (name, _, speeds) in &contenders {
        outcome.figure(row, name, &Sample::of(speeds.clone()), Unit::PerSecond);
    }
    let of = |name: &str| {
        let found = contenders.iter().find(|(known, ..)| *known == name);
        found.map(|(_, _, speeds)| speeds.as_slice())
    };
    let (direct, again) = (of("direct").expect("measured"), of("direct again").expect("measured"));
    let pgbouncer = of("pgbouncer").expect("measured");
    if let Some(handed) = of("handed off") {
        let what = |against: &str| format!("{row}: handed off ÷ {against}");
        outcome
            .check(what("direct"), ratios(handed, direct), Unit::Ratio, Goal::AtLeast(0.98))
            .under("another direct one", ratios(again, direct));
        outcome
            .check(what("pgbouncer"), ratios(handed, pgbouncer), Unit::Ratio, Goal::AtLeast(1.6))
            .under("direct", ratios(direct, pgbouncer));
    }
    outcome.note("tokio-postgres on one thread, one prepared statement after the other.");
}

async fn by_name(target: &Target) -> Driven {
    let path = target.socket();
    let stream = Identity::client().connect(&path).expect("it listens");
    stream.set_nonblocking(true).expect("a socket");
    let stream = tokio::net::UnixStream::from_std(stream).expect("registered");
    let connected = target.config().connect_raw(stream, NoTls).await;
    drive(connected.expect("a session"))
}

async fn over(handed: Handed) -> Driven {
    // The session is there already: its user and its database are what `open` said.
    let connected = Config::new().user("handed").connect_raw(handed, NoTls).await;
    drive(connected.expect("a session"))
}

fn drive<S, T>((client, connection): (Client, tokio_postgres::Connection<S, T>)) -> Driven
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
    T: AsyncRead + AsyncWrite + Unpin + 'static,
{
    (client, Box::pin(async { connection.await.expect("the session lives on") }))
}

/// Statements a second.
fn speed(runtime: &Runtime, (client, driver): &mut Driven, count: usize) -> f64 {
    runtime.block_on(async {
        let work = async {
            let statement = client.prepare(SQL).await.expect("prepared");
            let started = Instant::now();
            for number in 0..count {
                let aid = i32::try_from(number * 7 % 100_000 + 1).expect("a small number");
                client.query_one(&statement, &[&aid]).await.expect("a row");
            }
            count as f64 / started.elapsed().as_secs_f64()
        };
        let mut work = pin!(work);
        tokio::select! {
            speed = &mut work => speed,
            () = driver.as_mut() => panic!("the session ended"),
        }
    })
}

/// A socket that was handed over, for a driver that wants to log in: it answers the driver's
/// startup message with what the server said to the broker, and is the socket from then on.
struct Handed {
    asked: bool,
    prelude: Vec<u8>,
    told: usize,
    socket: tokio::net::UnixStream,
}

impl Handed {
    /// Within a runtime.
    fn new(prelude: Vec<u8>, socket: UnixStream) -> Self {
        socket.set_nonblocking(true).expect("a socket");
        let socket = tokio::net::UnixStream::from_std(socket).expect("registered");
        Self { asked: false, prelude, told: 0, socket }
    }
}

impl AsyncRead for Handed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.told < self.prelude.len() {
            let count = buffer.remaining().min(self.prelude.len() - self.told);
            buffer.put_slice(&self.prelude[self.told..self.told + count]);
            self.told += count;
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.socket).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Handed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if !self.asked {
            // tokio-postgres sends its startup message whole.
            self.asked = true;
            return Poll::Ready(Ok(bytes.len()));
        }
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
