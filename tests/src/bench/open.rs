//! P3.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use credbroker_proto::v1::packet_reply::Reply;
use credbroker_proto::v1::packet_request::Request;
use credbroker_proto::v1::{OpenRequest, OpenResponse, PacketRequest, Reason, StartupParameter};
use prost::Message as _;

use super::echo::Echo;
use super::rig::{self, HANDLE_UNIX, Rig};
use super::stats::{Sample, micros, p50, ratios};
use super::{Goal, Outcome, Unit};
use crate::broker::{Broker, Grant, Setup};
use crate::identity::Identity;
use crate::packet::{Packets, reason};

const OPENS: usize = 40;
/// With the pause before each that an `open` has for its spare: cores that sleep wake slowly.
const PACED: &str = "echo after the same pause p50";
/// A spare is there again this long after one was taken.
pub(super) const REFILLED: Duration = Duration::from_millis(40);

pub(super) fn measure(outcome: &mut Outcome) {
    let mode = outcome.mode;
    let rig = Rig::start();
    let Some(cold) = broker(&rig, None) else {
        return outcome.note("`open` is not available yet.");
    };
    let Some(first) = Opener::over(&cold) else {
        return outcome.note("`open` is not available yet.");
    };
    let warm = broker(&rig, Some(2));
    let warm = warm.as_ref().and_then(Opener::over);
    if warm.is_none() {
        outcome.note("Warm spares are not available yet: `open` logs in each time.");
    }
    let echo = Echo::start(&cold.setup().path("logs/echo.sock"), first.reply_bytes(), "descriptor");
    let request = PacketRequest { id: 7, request: Some(first.request()) }.encode_to_vec();

    let opens = mode.count(OPENS);
    let [mut bare, mut paced, mut colds, mut warms] = [(); 4].map(|()| Vec::new());
    for _round in 0..mode.rounds() {
        let times = (0..50 * opens).map(|_| bare_echo(&echo.packets, &request)).collect();
        bare.push(micros(p50(times)));
        let times = (0..opens).map(|_| {
            thread::sleep(REFILLED);
            bare_echo(&echo.packets, &request)
        });
        paced.push(micros(p50(times.collect())));
        colds.push(micros(p50((0..opens).map(|_| first.timed()).collect())));
        if let Some(warm) = &warm {
            let times = (0..opens).map(|_| {
                thread::sleep(REFILLED);
                warm.timed()
            });
            warms.push(micros(p50(times.collect())));
        }
    }
    let row = mode.name();
    outcome.figure(row, "echo with a descriptor p50", &Sample::of(bare.clone()), Unit::Micros);
    outcome.figure(row, PACED, &Sample::of(paced.clone()), Unit::Micros);
    outcome.figure(row, "open, cold p50", &Sample::of(colds), Unit::Micros);
    if warm.is_some() {
        outcome.figure(row, "open, warm p50", &Sample::of(warms.clone()), Unit::Micros);
        let goal = Goal::AtMost(if mode.pinned { 3.0 } else { 1.5 });
        outcome
            .check(format!("{row}: warm p50 ÷ echo"), ratios(&warms, &bare), Unit::Ratio, goal)
            .under(PACED, ratios(&paced, &bare));
    }
    outcome.note(format!(
        "After an open there are {} ms in which its spare is replaced: a server process is started, \
         and the broker logs in to it. So no open finds in a processor's cache what the one before \
         has left there, and neither does an echo after as long a pause. Before it answers, an open \
         is decided, recorded by the audit log's thread, and held by another process, the keeper, \
         which has to say so.",
        REFILLED.as_millis()
    ));
}

fn bare_echo(echo: &Packets, request: &[u8]) -> Duration {
    let started = Instant::now();
    echo.send_raw(request, &[]).expect("sent");
    // As raw as `open` is asked for: it looks at no byte of the reply.
    let _descriptor = echo.receive_descriptor();
    started.elapsed()
}

/// A broker that may hand over, unless this one cannot.
pub(super) fn broker(rig: &Rig, warm: Option<i64>) -> Option<Broker> {
    let grant = Grant::to(&Identity::client(), &["handoff"], &[HANDLE_UNIX]);
    let setup = rig.setup().grant(grant.with("max_sessions", 1200));
    let setup = match warm {
        Some(spares) => setup.set(&format!("connections.{HANDLE_UNIX}.warm"), spares),
        None => setup,
    };
    start_if_taken(setup)
}

/// Starts a broker, unless it is too old for this configuration.
pub(super) fn start_if_taken(setup: Setup) -> Option<Broker> {
    rig::is_taken(&setup).then(|| setup.start())
}

/// Who asks for sockets.
pub(super) struct Opener {
    packets: Packets,
    token: String,
}

impl Opener {
    /// `None` when this broker hands nothing over.
    pub(super) fn over(broker: &Broker) -> Option<Self> {
        let packets = broker.packets(&Identity::client());
        let token = packets.issue(HANDLE_UNIX).expect("a grant").token;
        let opener = Self { packets, token };
        match opener.packets.call(opener.request(), &[]) {
            Ok(_session) => Some(opener),
            Err(refused) => {
                let unable = [Reason::HandoffUnsupported, Reason::Unsupported];
                assert!(unable.contains(&reason(&refused)), "{refused:?}");
                None
            }
        }
    }

    fn request(&self) -> Request {
        let encoding = StartupParameter { name: "client_encoding".into(), value: "UTF8".into() };
        Request::Open(OpenRequest {
            token: self.token.clone(),
            database: String::new(),
            startup: vec![encoding],
        })
    }

    pub(super) fn token(&self) -> &str {
        &self.token
    }

    /// The login prelude and the socket.
    pub(super) fn open(&self) -> (OpenResponse, UnixStream) {
        match self.packets.call(self.request(), &[]).expect("it is granted") {
            (Reply::Opened(opened), mut sockets) => {
                assert_eq!(sockets.len(), 1, "one socket");
                (opened, OwnedFd::into(sockets.remove(0)))
            }
            (other, _) => panic!("{other:?}"),
        }
    }

    fn reply_bytes(&self) -> usize {
        let (opened, _socket) = self.open();
        opened.encoded_len() + 8
    }

    /// How long it took; the session is ended afterwards.
    fn timed(&self) -> Duration {
        let started = Instant::now();
        let (_prelude, socket) = self.open();
        let took = started.elapsed();
        let _gone = socket.shutdown(std::net::Shutdown::Both);
        took
    }
}
