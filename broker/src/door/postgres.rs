//! The Postgres door: any client of protocol 3 connects to a Unix socket, names a connection as
//! its user, gives a handle's token as its password, and is from then on talking to the server.

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::time::timeout;
use tracing::debug;

use self::backend::Authenticated;
use self::codec::Frames;
use self::frontend::{Opened, greet};
use self::spares::Spares;
use self::stop::{Server, Stopped, Terminator};
use crate::core::{Closing, Core};
use crate::door::login::login;
use crate::door::relay::workers::Workers;
use crate::door::relay::{End, Watcher, relay};
use crate::lobby::{Lobby, Place};
use crate::metrics::SessionBytes;
use crate::peer::{Accepting, Peer};
use crate::socket::Socket;

mod attempt;
mod backend;
mod cancel;
mod codec;
mod entry;
mod fault;
mod frontend;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
pub(crate) mod handoff;
mod scram;
mod secret_messages;
mod spares;
mod sqlstate;
mod stop;
mod validate;

use self::cancel::Cancels;
use self::handoff::Handoffs;
pub(crate) use self::validate::{Validated, validate};

/// For a client to say what it wants, and again to give its token.
const STARTUP_WITHIN: Duration = Duration::from_secs(5);

/// Logins at once, over all peers: each holds a buffer of its startup message.
const MAX_LOGINS: usize = 1024;

/// The door, and what its sessions share. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Door {
    core: Core,
    workers: Workers,
    lobby: Lobby,
    cancels: Cancels,
    terminator: Terminator,
    spares: Spares,
    handoffs: Handoffs,
}

impl Door {
    pub(crate) fn new(core: Core, workers: Workers, handoffs: Handoffs) -> Self {
        let (lobby, cancels) = (Lobby::new(MAX_LOGINS), Cancels::default());
        let (terminator, spares) = (Terminator::new(core.clone()), Spares::new(core.clone()));
        Self { core, workers, lobby, cancels, terminator, spares, handoffs }
    }

    /// Serves a listener until the core drains.
    pub(crate) async fn serve(self, listener: Accepting) {
        loop {
            let (socket, peer) = tokio::select! {
                () = self.core.draining() => return,
                accepted = listener.accept_socket() => accepted,
            };
            let Some(place) = self.lobby.enter(peer.uid()) else {
                debug!(uid = %peer.uid(), "closed a connection: too many unfinished logins");
                continue;
            };
            let door = self.clone();
            self.workers.spawn(self.core.tasks(), door.receive(socket, peer, place));
        }
    }

    /// Finds out what a client wants, and serves it.
    async fn receive(self, socket: OwnedFd, peer: Peer, place: Place) {
        let socket = match Socket::adopt(socket) {
            Ok(socket) => socket,
            Err(error) => return debug!(uid = %peer.uid(), %error, "dropped a connection"),
        };
        match timeout(STARTUP_WITHIN, greet(socket, &self.spares)).await {
            Ok(Ok(Opened::Client(client))) => self.converse(peer, *client, place).await,
            Ok(Ok(Opened::Cancel(key, socket))) => {
                if let Some(session) = self.core.session_of(&peer, &key) {
                    self.cancels.cancel(session).await;
                }
                drop(socket);
            }
            Ok(Err(error)) => {
                debug!(uid = %peer.uid(), %error, "a client ended before it said what it wants")
            }
            Err(_elapsed) => {
                debug!(uid = %peer.uid(), "a client did not say what it wants in time")
            }
        }
    }

    /// From a startup message to the end of the session.
    async fn converse(self, peer: Peer, mut client: frontend::Frontend, place: Place) {
        let Some((session, upstream)) = login(&self.core, &peer, &mut client).await else { return };
        drop(place);
        let Authenticated { mut stream, remote, mut prelude, .. } = upstream;
        let server = Server { remote, key: prelude.take_key() };
        drop(prelude);
        let _cancellable =
            server.key.as_ref().map(|key| self.cancels.register(session.id(), &server.remote, key));

        let bytes = self.core.metrics().session_bytes(&session.connection().name);
        let mut watcher = Conversation { bytes, ..Conversation::default() };
        let (end, carried) = relay(&mut client.socket, &mut stream, &mut watcher, &session).await;
        // The client's socket dies first, then the link, then whatever the server still does.
        session.client_is_dead().await;
        drop(client);
        drop(stream);
        // An idle backend ends by itself when its link does.
        let stopped = if watcher.server_busy() {
            self.terminator.stop(server, &session).await
        } else {
            Stopped::Gone
        };
        let reason = match end {
            End::Client | End::Server if watcher.client_said_goodbye() => "client_terminated",
            End::Client => "client_gone",
            End::Server => "server_closed",
            End::Broken => "link_broken",
            End::Cut(reason) => reason.name(),
        };
        session.close(Closing {
            reason,
            from_client: carried.from_client,
            from_server: carried.from_server,
            server_stopped: stopped == Stopped::Gone,
        });
    }
}

/// What a relay keeps count of in protocol 3 (documentation, 55.2).
#[derive(Debug, Default)]
struct Conversation {
    client: Frames,
    server: Frames,
    /// Query, Sync and FunctionCall, each of which the server ends with one ReadyForQuery.
    asked: u64,
    answered: u64,
    /// Something was sent that the server may work on before the next of those.
    unsynced: bool,
    goodbye: bool,
    bytes: SessionBytes,
}

impl Watcher for Conversation {
    fn client_sent(&mut self, bytes: &[u8]) {
        self.bytes.client_sent(bytes.len());
        let Self { client, asked, unsynced, goodbye, .. } = self;
        client.advance(bytes, |tag| match tag {
            b'Q' | b'S' | b'F' => {
                *asked += 1;
                *unsynced = false;
            }
            b'X' => *goodbye = true,
            _ => *unsynced = true,
        });
    }

    fn server_sent(&mut self, bytes: &[u8]) {
        self.bytes.server_sent(bytes.len());
        let Self { server, answered, .. } = self;
        server.advance(bytes, |tag| *answered += u64::from(tag == b'Z'));
    }

    fn server_at_boundary(&self) -> bool {
        self.server.at_boundary()
    }

    fn server_busy(&self) -> bool {
        self.asked != self.answered || self.unsynced || !self.client.at_boundary()
    }

    fn client_said_goodbye(&self) -> bool {
        self.goodbye
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::door::wire::Writer;

    fn message(tag: u8) -> Vec<u8> {
        Writer::tagged(tag).bytes(b"body").finish()
    }

    #[test]
    fn the_server_is_busy_until_each_question_has_its_answer() {
        let mut conversation = Conversation::default();
        assert!(!conversation.server_busy());
        conversation.client_sent(&[message(b'Q'), message(b'Q')].concat());
        conversation.server_sent(&message(b'Z'));
        assert!(conversation.server_busy(), "one of two pipelined queries is answered");
        conversation.server_sent(&[message(b'D'), message(b'C'), message(b'Z')].concat());
        assert!(!conversation.server_busy());
    }

    #[test]
    fn an_execute_without_sync_is_work_too() {
        let mut conversation = Conversation::default();
        conversation
            .client_sent(&[message(b'P'), message(b'B'), message(b'E'), message(b'H')].concat());
        assert!(conversation.server_busy());
        conversation.client_sent(&message(b'S'));
        conversation.server_sent(&message(b'Z'));
        assert!(!conversation.server_busy());
    }

    #[test]
    fn half_a_message_is_not_a_boundary() {
        let mut conversation = Conversation::default();
        let row = message(b'D');
        conversation.server_sent(&row[..7]);
        assert!(!conversation.server_at_boundary());
        conversation.server_sent(&row[7..]);
        assert!(conversation.server_at_boundary());
    }

    #[test]
    fn goodbye_is_heard() {
        let mut conversation = Conversation::default();
        conversation.client_sent(b"X\0\0\0\x04");
        assert!(conversation.client_said_goodbye() && !conversation.server_busy());
    }
}
