//! Ending sessions: each from anywhere, and many at once.
//!
//! What a cut does, in this order. The session is *marked*, under the registry's lock: from then on
//! its relay passes nothing more to the server. Its relay is *let go*: it tells the client and
//! closes its socket. When all clients are dead the links to the servers are *shut down*. The
//! servers' ends come last because each costs far more than all the rest: a thousand backends that
//! end take the processors for a second, and clients would wait for their turn.

#![forbid(unsafe_code)]

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use rustix::net::{Shutdown, shutdown};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// How long the servers' ends wait for the clients'.
const CLIENTS_FIRST: Duration = Duration::from_millis(20);

/// Why a session was ended by the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CutReason {
    /// Its handle was revoked.
    Revoked,
    /// Its handle expired.
    Expired,
    /// Its handle was bound to a process that exited.
    HolderExited,
    /// An operator suspended the connection.
    Suspended,
    /// The policy or the destination changed, and no longer allows it.
    Reloaded,
    /// The credential that it logged in with was replaced, and its grace is over.
    Rotated,
    /// The server refuses the credential that it logged in with, and nobody replaced that here.
    Diverged,
    /// An operator closed it.
    Closed,
    /// It is older than its connection's sessions may be.
    Aged,
    /// The broker shuts down.
    Draining,
}

impl CutReason {
    /// As it stands in audit records.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Revoked => "revoked",
            Self::Expired => "expired",
            Self::HolderExited => "holder_exited",
            Self::Suspended => "suspended",
            Self::Reloaded => "reloaded",
            Self::Rotated => "rotated",
            Self::Diverged => "diverged",
            Self::Closed => "closed",
            Self::Aged => "aged",
            Self::Draining => "draining",
        }
    }
}

impl fmt::Display for CutReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a session's life hangs on once it is live.
#[derive(Debug)]
pub(crate) enum Lifeline {
    /// A duplicate of the link to the server; a relay holds it, and the client's socket.
    Relayed(OwnedFd),
    /// A duplicate of the link that the client has itself: its end is the client's.
    HandedOff(OwnedFd),
}

/// Ends one session.
#[derive(Debug, Default)]
pub(crate) struct Cut {
    reason: OnceLock<CutReason>,
    let_go: CancellationToken,
    client_dead: CancellationToken,
    shut_down: CancellationToken,
    ended: CancellationToken,
    lifeline: Mutex<Option<Lifeline>>,
}

impl Cut {
    /// Called under the registry's lock, so that commit sees it.
    pub(crate) fn mark(&self, reason: CutReason) {
        let _ = self.reason.set(reason);
    }

    /// What there is to shut down from now on.
    pub(crate) fn hold(&self, lifeline: Lifeline) {
        *self.lifeline() = Some(lifeline);
    }

    /// There is no client to wait for.
    pub(crate) fn has_no_client(&self) {
        self.client_dead.cancel();
    }

    /// The session is over.
    pub(crate) fn end(&self) {
        // A duplicate would keep the link open.
        *self.lifeline() = None;
        self.client_dead.cancel();
        self.ended.cancel();
    }

    /// Why it was marked, if it was.
    pub(crate) fn reason(&self) -> Option<CutReason> {
        self.reason.get().copied()
    }

    fn let_go(&self) {
        if let Some(Lifeline::HandedOff(link)) = &*self.lifeline() {
            let _ = shutdown(link, Shutdown::Both);
            self.client_dead.cancel();
        }
        self.let_go.cancel();
    }

    fn shut_down(&self) {
        if let Some(Lifeline::Relayed(link)) = &*self.lifeline() {
            // Fails only when the server was faster.
            let _ = shutdown(link, Shutdown::Both);
        }
        self.shut_down.cancel();
    }

    fn lifeline(&self) -> MutexGuard<'_, Option<Lifeline>> {
        self.lifeline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when the session is to end.
    pub(crate) async fn fired(&self) -> CutReason {
        self.let_go.cancelled().await;
        self.reason.get().copied().unwrap_or(CutReason::Revoked)
    }

    /// Says that the client's socket is closed, and returns when it is the server's turn: at once,
    /// unless the session is one of many that are being cut.
    pub(crate) async fn client_is_dead(&self) {
        self.client_dead.cancel();
        if self.let_go.is_cancelled() {
            let _ = timeout(CLIENTS_FIRST, self.shut_down.cancelled()).await;
        }
    }

    /// Returns when the session has ended: its client's socket closed and the server stopped.
    pub(crate) async fn ended(&self) {
        self.ended.cancelled().await;
    }
}

/// Lets all of these go, at once. What is returned does the rest, and must be run.
pub(crate) fn fire(cuts: &[Arc<Cut>]) -> impl Future<Output = ()> + Send + use<> {
    for cut in cuts {
        cut.let_go();
    }
    let cuts = cuts.to_vec();
    async move {
        let dead = async {
            for cut in &cuts {
                cut.client_dead.cancelled().await;
            }
        };
        // Whether they are or not: a relay that hangs does not save its session.
        let _ = timeout(CLIENTS_FIRST, dead).await;
        for cut in &cuts {
            cut.shut_down();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn live() -> (Arc<Cut>, UnixStream) {
        let (ours, server) = UnixStream::pair().unwrap();
        let cut = Arc::new(Cut::default());
        cut.hold(Lifeline::Relayed(ours.into()));
        cut.mark(CutReason::Revoked);
        server.set_nonblocking(true).unwrap();
        (cut, server)
    }

    fn has_ended(server: &mut UnixStream) -> bool {
        matches!(server.read(&mut [0]), Ok(0))
    }

    #[tokio::test(start_paused = true)]
    async fn servers_are_shut_down_when_every_client_is_dead() {
        let ((one, mut first), (two, mut second)) = (live(), live());
        let rest = fire(&[Arc::clone(&one), Arc::clone(&two)]);
        assert_eq!(one.fired().await, CutReason::Revoked);
        let relays = async {
            one.client_is_dead().await;
            two.client_is_dead().await;
        };
        tokio::pin!(rest);
        one.client_dead.cancel();
        let early = timeout(CLIENTS_FIRST / 2, &mut rest).await;
        assert!(early.is_err() && !has_ended(&mut first), "the other one lives");
        tokio::join!(rest, relays);
        assert!(has_ended(&mut first) && has_ended(&mut second));
    }

    #[tokio::test(start_paused = true)]
    async fn a_relay_that_hangs_saves_no_session() {
        let (cut, mut server) = live();
        fire(&[Arc::clone(&cut)]).await;
        assert!(has_ended(&mut server));
    }

    #[tokio::test]
    async fn a_client_that_leaves_by_itself_waits_for_nothing() {
        let (cut, mut server) = live();
        cut.client_is_dead().await;
        assert!(!has_ended(&mut server));
    }
}
