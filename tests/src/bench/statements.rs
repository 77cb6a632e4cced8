//! P6.

use std::pin::{Pin, pin};
use std::time::Instant;

use credbroker_client::{ClientBuilder, Handle, Handoff, IssueRequest, OpenRequest};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::{Builder, Runtime};
use tokio_postgres::config::SslMode;
use tokio_postgres::{Client, Config, NoTls};

use super::open::{self, Opener};
use super::rig::{FREE_UNIX, HANDLE_UNIX, Rig, Target};
use super::stats::{Sample, ratios};
use super::{Goal, Outcome, Unit, pgbench, progress, turns};
use crate::broker::Broker;
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
    // Its session ends with the handle.
    let mut _handle = None;
    if let (Some(broker), Some(_)) = (&handing, &opener) {
        let (handed, handle) = hand_over(&runtime, broker);
        contenders.push(("handed off", runtime.block_on(over(handed)), Vec::new()));
        _handle = Some(handle);
    }
    for round in 0..mode.rounds() {
        progress(&format!("{}, round {round}", mode.name()));
        for number in turns(round, contenders.len()) {
            let (_, driven, speeds) = &mut contenders[number];
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

/// By the client library, as the client's uid.
fn hand_over(runtime: &Runtime, broker: &Broker) -> (Handoff, Handle) {
    // Who acts as another than root sees no other.
    let server = Identity::broker().uid();
    let handed = async || {
        let client = ClientBuilder::default()
            .runtime_dir(broker.runtime_dir())
            .server_uid(server)
            .connect_packet()
            .await?;
        let handle = client.issue(IssueRequest::new(HANDLE_UNIX)).await?;
        let handed = client.open(handle.token(), OpenRequest::new()).await?;
        Ok::<_, credbroker_client::Error>((handed, handle))
    };
    let handed = Identity::client().act(|| runtime.block_on(handed()));
    handed.expect("a thread").expect("it is granted")
}

async fn over(handed: Handoff) -> Driven {
    // The session is there already: its user and its database are what `open` said.
    let connected =
        Config::new().user("handed").ssl_mode(SslMode::Disable).connect_raw(handed, NoTls).await;
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
