//! Handing an authenticated socket over: the same way in as through the door, and after it no byte
//! passes through the broker.
//!
//! What the broker keeps is a dup, to end the session with: a socket is shut down for everybody
//! who has it. The keeper has another before the client has its own, so that the end of the broker
//! is the end of the session. A client's close(2) ends nothing as long as these are open: it shuts
//! the socket down, or it exits, which is seen.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use rustix::net::sockopt::set_socket_linger;
use rustix::net::{Shutdown, shutdown};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::backend::Authenticated;
use super::cancel::Registered;
use super::codec::{MAX_STARTUP, Startup};
use super::spares::Spares;
use super::stop::{Server, Stopped};
use super::{Door, entry};
use crate::connection::{Connection, NoHandoff};
use crate::core::{Closing, Opening, Permit, Refusal, Session, Why};
use crate::door::ends::{Ends, Watch};
use crate::door::login::{Asked, Protocol, UpstreamFault, Wanted, login};
use crate::handle::TokenHash;
use crate::keeper::{Held, Holding, NotHeld};
use crate::metrics::SessionBytes;
use crate::packet::Closing as Closer;
use crate::peer::{Peer, Uid};
use crate::session::{ClientKey, KeyLength, Lifeline, SessionId};
use crate::sys::{self, TcpInfo};

/// Longest prelude: the rest of a packet is the reply's own.
const MAX_PRELUDE: usize = 60 * 1024;
/// How often bytes are counted while a session lives.
const COUNT_EVERY: Duration = Duration::from_secs(10);
/// How long a server may take to see the end of an idle session by itself.
const NOTICED_WITHIN: Duration = Duration::from_millis(20);
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// Why without a keeper nothing is handed over.
const KEEPER_ENDED: &str = "the keeper has ended, and the broker must be restarted";

/// What sockets that were handed over have in common. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Handoffs {
    pub(crate) holding: Holding,
    pub(crate) ends: Ends,
    pub(crate) closer: Closer,
}

/// A request for an authenticated socket, with a startup message's parameters.
#[derive(Debug)]
pub(crate) struct OpenRequest {
    token: Option<TokenHash>,
    startup: Startup,
}

/// A socket on its way to its client. Dropped before [`Handed::sent`], the session is over.
#[must_use]
#[derive(Debug)]
pub(crate) struct Handed {
    /// From AuthenticationOk to ReadyForQuery, with the broker's cancel key.
    pub(crate) prelude: Vec<u8>,
    pub(crate) session: SessionId,
    /// In non-blocking mode.
    pub(crate) socket: OwnedFd,
    delivery: Delivery,
}

/// That a socket is on its way. Dropped before it is [`done`](Delivery::done), the session is over.
#[must_use]
#[derive(Debug)]
pub(crate) struct Delivery(oneshot::Sender<()>);

/// Why there is no socket.
#[derive(Debug)]
pub(crate) enum NotHanded {
    Refused(Refusal),
    /// The proven server's own ErrorResponse.
    Theirs(Vec<u8>),
}

impl OpenRequest {
    /// The field that is wrong, and what it must do or be.
    ///
    /// # Errors
    /// When it could not stand in a startup message (55.7), or names what the handle says already.
    pub(crate) fn new(
        token: Option<TokenHash>,
        database: String,
        parameters: Vec<(String, String)>,
    ) -> Result<Self, (&'static str, &'static str)> {
        let size: usize = parameters.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
        if size + database.len() > MAX_STARTUP {
            return Err(("startup", "have at most 10000 bytes, names and values together"));
        }
        let nul =
            parameters.iter().any(|(name, value)| name.contains('\0') || value.contains('\0'));
        if nul || database.contains('\0') {
            return Err(("startup", "have no NUL in it"));
        }
        let taken = |name: &str| {
            name.is_empty() || matches!(name, "user" | "database") || name.starts_with("_pq_.")
        };
        if parameters.iter().any(|(name, _)| taken(name)) {
            return Err((
                "startup",
                "name settings only: neither user nor database nor _pq_. options",
            ));
        }
        let (replication, parameters): (Vec<_>, Vec<_>) =
            parameters.into_iter().partition(|(name, _)| name == "replication");
        let startup = Startup {
            // The handle says who that is.
            user: String::new(),
            database: Some(database).filter(|database| !database.is_empty()),
            replication: replication.into_iter().next_back().map(|(_, value)| value),
            parameters: parameters
                .into_iter()
                .map(|(name, value)| (name, value.into_bytes()))
                .collect(),
            options: Vec::new(),
            minor: 0,
        };
        Ok(Self { token, startup })
    }
}

impl Handed {
    /// It has left, and there is no copy of it here any more.
    pub(crate) fn sent(self) -> Delivery {
        self.delivery
    }
}

impl Delivery {
    /// The client has it.
    pub(crate) fn done(self) {
        let _ = self.0.send(());
    }

    /// Whether the session is over.
    pub(crate) fn is_moot(&self) -> bool {
        self.0.is_closed()
    }
}

impl Door {
    /// Opens a session whose socket goes to the peer. `departed`: nobody is there any more who
    /// could have it.
    ///
    /// # Errors
    /// [`NotHanded`].
    pub(crate) async fn hand_off(
        &self,
        peer: &Peer,
        request: OpenRequest,
        departed: CancellationToken,
    ) -> Result<Handed, NotHanded> {
        let mut taker = Taker {
            holding: self.handoffs.holding.clone(),
            spares: self.spares.clone(),
            request,
            departed: departed.clone(),
            prelude: Vec::new(),
            answer: None,
        };
        let Some((session, upstream)) = login(&self.core, peer, &mut taker).await else {
            return Err(taker.answer.unwrap_or_else(|| {
                // It was taken away between two steps, or nobody waits.
                NotHanded::Refused(self.core.refuse(peer, None, Why::HandleInvalid))
            }));
        };
        let Ready { authenticated, held } = upstream;
        let Authenticated { stream, remote, mut prelude, how: _ } = authenticated;
        let server = Server { remote, key: prelude.take_key() };
        let name = session.connection().name.clone();
        let parted = stream.into_plain_socket().ok().and_then(|socket| {
            let watch = self.handoffs.ends.watch(socket.try_clone().ok()?).ok()?;
            Some((socket, watch))
        });
        let Some((socket, watch)) = parted else {
            session.close(Closing {
                reason: "internal",
                from_client: 0,
                from_server: 0,
                server_stopped: false,
            });
            let why = Why::Internal("the socket cannot be parted with");
            return Err(NotHanded::Refused(self.core.refuse(peer, Some(&name), why)));
        };
        let (delivery, delivered) = oneshot::channel();
        let cancellable =
            server.key.as_ref().map(|key| self.cancels.register(session.id(), &server.remote, key));
        let handed = Handed {
            prelude: taker.prelude,
            session: session.id(),
            socket,
            delivery: Delivery(delivery),
        };
        let away = Away {
            counted: Counted::from(&watch, self.core.metrics().session_bytes(&name)),
            door: self.clone(),
            uid: peer.uid(),
            session,
            server,
            watch,
            held,
            departed,
            _cancellable: cancellable,
        };
        self.core.tasks().spawn(away.run(delivered));
        Ok(handed)
    }
}

/// Somebody who wants the socket itself, in the flow by which everybody comes in.
#[derive(Debug)]
struct Taker {
    holding: Holding,
    spares: Spares,
    request: OpenRequest,
    departed: CancellationToken,
    prelude: Vec<u8>,
    answer: Option<NotHanded>,
}

/// An authenticated link whose socket the keeper has, too.
#[derive(Debug)]
struct Ready {
    authenticated: Authenticated,
    held: Held,
}

impl Taker {
    async fn held(&self, authenticated: &Authenticated) -> Result<Held, UpstreamFault> {
        let ours = |reason, why| UpstreamFault::Ours { reason, why };
        let socket = authenticated
            .stream
            .duplicate()
            .map_err(|_out_of_descriptors| ours("internal", Why::Internal("no descriptor left")))?;
        self.holding.hold(socket).await.map_err(|fault| match fault {
            NotHeld::Full => ours("limit", Why::limit("sockets that are handed over")),
            NotHeld::KeeperGone => ours("keeper_ended", Why::HandoffUnsupported(KEEPER_ENDED)),
        })
    }
}

impl Protocol for Taker {
    type Upstream = Ready;

    fn asked(&self) -> Asked<'_> {
        Asked {
            connection: Wanted::HandedOver(self.request.token),
            database: self.request.startup.database.as_deref(),
        }
    }

    fn objection(&self, connection: &Connection) -> Option<Why> {
        if let Err(no) = connection.handoff() {
            return Some(Why::HandoffUnsupported(no.because()));
        }
        if self.holding.is_gone() {
            return Some(Why::HandoffUnsupported(KEEPER_ENDED));
        }
        entry::objection(&self.request.startup, connection)
    }

    async fn ask_token(&mut self) -> io::Result<Option<TokenHash>> {
        Ok(self.request.token)
    }

    async fn log_in(&mut self, opening: &Opening) -> Result<Ready, UpstreamFault> {
        let gone = self.departed.cancelled();
        let authenticated =
            entry::log_in_for(&self.request.startup, opening, &self.spares, gone).await?;
        let unsupported = |because| UpstreamFault::Ours {
            reason: "handoff_unsupported",
            why: Why::HandoffUnsupported(because),
        };
        if authenticated.stream.leaves_the_machine() && !opening.connection().insecure_handoff {
            return Err(unsupported(NoHandoff::Plaintext.because()));
        }
        let any_key = ClientKey { pid: 0, secret: [0; KeyLength::Short.bytes()].into() };
        if authenticated.prelude.for_client(&any_key).len() > MAX_PRELUDE {
            return Err(unsupported("the server says more before it is ready than a packet takes"));
        }
        // Before there is anything that could leave.
        let held = self.held(&authenticated).await?;
        Ok(Ready { authenticated, held })
    }

    fn lifeline(&self, upstream: &Ready) -> io::Result<Lifeline> {
        upstream.authenticated.stream.duplicate().map(Lifeline::HandedOff)
    }

    fn key_length(&self) -> KeyLength {
        KeyLength::Short
    }

    async fn welcome(
        &mut self,
        _permit: Permit,
        session: &Session,
        upstream: &mut Ready,
    ) -> io::Result<()> {
        self.prelude = upstream.authenticated.prelude.for_client(session.client_key());
        self.spares.came_in(session, &entry::parameters(&self.request.startup));
        Ok(())
    }

    async fn refuse(&mut self, refusal: &Refusal) {
        self.answer = Some(NotHanded::Refused(refusal.clone()));
    }

    async fn pass_on(&mut self, error: &[u8]) {
        self.answer = Some(NotHanded::Theirs(error.to_vec()));
    }
}

/// A session whose bytes go past the broker.
#[derive(Debug)]
struct Away {
    door: Door,
    uid: Uid,
    session: Session,
    server: Server,
    watch: Watch,
    held: Held,
    counted: Counted,
    departed: CancellationToken,
    _cancellable: Option<Registered>,
}

impl Away {
    async fn run(mut self, delivered: oneshot::Receiver<()>) {
        let reason = self.end(delivered).await;
        if let Some(socket) = self.watch.socket() {
            // For everybody who has it. After a cut it is shut down already.
            let _ = shutdown(socket, Shutdown::Both);
        }
        self.session.client_is_dead().await;
        // Nobody counted what was asked and answered, so whether the server is at work is not
        // known before it closes its side.
        let left = self.server_leaves().await;
        let Self { door, uid, session, server, watch, held, mut counted, .. } = self;
        counted.look(&watch);
        let stopped =
            if left { Stopped::Gone } else { door.terminator.stop(server, &session).await };
        let socket = watch.into_socket();
        if let Some(socket) = &socket {
            // Whatever is left unsent goes nowhere, and no close of it waits for it.
            let _ = set_socket_linger(socket, Some(Duration::ZERO));
        }
        held.release().await;
        let Counted { from_client, from_server, .. } = counted;
        let server_stopped = stopped == Stopped::Gone;
        session.close(Closing { reason, from_client, from_server, server_stopped });
        // The last of the broker's, and somebody else may have made it linger again.
        door.handoffs.closer.close(Some(uid), socket.into_iter().collect()).await;
    }

    /// Waits for the end; gives why, for the record.
    async fn end(&mut self, mut delivered: oneshot::Receiver<()>) -> &'static str {
        let mut on_its_way = true;
        loop {
            tokio::select! {
                biased;
                reason = self.session.cut() => return reason.name(),
                sent = &mut delivered, if on_its_way => match sent {
                    Ok(()) => on_its_way = false,
                    Err(_undelivered) => return "client_gone",
                },
                () = self.departed.cancelled() => return "client_gone",
                () = self.door.handoffs.holding.gone() => return "keeper_ended",
                () = self.watch.ended() => {
                    return if self.server_has_left() { "server_closed" } else { "client_terminated" };
                }
                () = tokio::time::sleep(COUNT_EVERY) => self.counted.look(&self.watch),
            }
        }
    }

    /// Waits a moment for the server to see the end by itself. Whether it did.
    async fn server_leaves(&self) -> bool {
        let Some(_tcp) = info(&self.watch) else { return false };
        let until = tokio::time::Instant::now() + NOTICED_WITHIN;
        while !self.server_has_left() {
            if tokio::time::Instant::now() >= until {
                return false;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        true
    }

    /// Whether the server has closed its side, as far as it can be told: of a Unix socket it
    /// cannot.
    fn server_has_left(&self) -> bool {
        info(&self.watch).is_some_and(|now| has_left(now, self.counted.at_first))
    }
}

/// The states (include/net/tcp_states.h) in which the other side has sent its FIN. A closed socket
/// that has forgotten what it received was disconnected by whoever has it: connect(2), AF_UNSPEC.
fn has_left(now: TcpInfo, at_first: Option<TcpInfo>) -> bool {
    const TIME_WAIT: u8 = 6;
    const CLOSE: u8 = 7;
    const CLOSE_WAIT: u8 = 8;
    const LAST_ACK: u8 = 9;
    const CLOSING: u8 = 11;
    match now.state {
        TIME_WAIT | CLOSE_WAIT | LAST_ACK | CLOSING => true,
        CLOSE => at_first.is_some_and(|first| now.received >= first.received),
        _ => false,
    }
}

fn info(watch: &Watch) -> Option<TcpInfo> {
    watch.socket().and_then(|socket| sys::tcp_info(socket.as_fd()))
}

/// Bytes since the handover, as the kernel counts them; a client can make it count wrong. Of a
/// Unix socket nothing is known.
#[derive(Debug)]
struct Counted {
    at_first: Option<TcpInfo>,
    from_client: u64,
    from_server: u64,
    metric: SessionBytes,
}

impl Counted {
    fn from(watch: &Watch, metric: SessionBytes) -> Self {
        Self { at_first: info(watch), from_client: 0, from_server: 0, metric }
    }

    fn look(&mut self, watch: &Watch) {
        let (Some(first), Some(now)) = (self.at_first, info(watch)) else { return };
        let further = |now: u64, first: u64, before: &mut u64| {
            let more = now.saturating_sub(first).saturating_sub(*before);
            *before += more;
            usize::try_from(more).unwrap_or(usize::MAX)
        };
        self.metric.client_sent(further(now.sent, first.sent, &mut self.from_client));
        self.metric.server_sent(further(now.received, first.received, &mut self.from_server));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(database: &str, parameters: &[(&str, &str)]) -> Result<OpenRequest, &'static str> {
        let parameters = parameters.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
        OpenRequest::new(None, database.to_owned(), parameters.collect()).map_err(|(_, must)| must)
    }

    #[test]
    fn a_request_is_what_a_startup_message_could_say() {
        let good = request("", &[("application_name", "x"), ("replication", "database")]).unwrap();
        assert_eq!(good.startup.database, None);
        assert_eq!(good.startup.replication.as_deref(), Some("database"));
        assert_eq!(good.startup.parameters, [("application_name".to_owned(), b"x".to_vec())]);
        let long = "x".repeat(MAX_STARTUP);
        for bad in [
            [("application_name", long.as_str())],
            [("application_name", "a\0role\0b")],
            [("user", "postgres")],
            [("database", "postgres")],
            [("_pq_.x", "1")],
            [("", "x")],
        ] {
            assert!(request("", &bad).is_err(), "{bad:?}");
        }
        assert!(request("my\0db", &[]).is_err());
        assert!(request(&long, &[("a", "b")]).is_err());
    }

    #[test]
    fn who_left_is_told_from_the_state_of_the_link() {
        let first = TcpInfo { state: 1, sent: 10, received: 100 };
        let now = |state, received| TcpInfo { state, sent: 10, received };
        for (state, received, left) in
            [(1, 100, false), (4, 100, false), (5, 100, false), (8, 100, true), (7, 100, true)]
        {
            assert_eq!(has_left(now(state, received), Some(first)), left, "{state}");
        }
        assert!(!has_left(now(7, 0), Some(first)), "disconnected by the client");
    }
}
