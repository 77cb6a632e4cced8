//! What takes rights away by itself: time, the exit of a bound process, the broker's own end.
//! Nothing here can be refused, and nothing here waits for the audit log.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::{Core, Refusal, Why};
use crate::audit::{Event, Outcome, Record};
use crate::connection::ConnectionName;
use crate::handle::{ExpiryQueue, Handle, HandleId, REMEMBERED, Standing};
use crate::peer::{Peer, PeerId, Watch};
use crate::session::{Cut, CutReason};

/// How long an answer to a revocation waits for the sessions to be gone, server included.
const DEAD_WITHIN: Duration = Duration::from_secs(3);

impl Core {
    /// Ends handles as their time comes, until the core is dropped.
    pub(crate) async fn run_expiry(self, queue: ExpiryQueue) {
        tokio::select! {
            () = queue.run(|id| self.expire(id)) => {}
            () = self.shared.stopped.cancelled() => {}
        }
    }

    /// Brings the audit log to the disk once a second, and writes what waits.
    pub(crate) async fn run_audit_sync(self) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        while !self.shared.stopped.is_cancelled() {
            tokio::select! {
                _ = tick.tick() => {}
                () = self.shared.stopped.cancelled() => return,
            }
            let audit = self.shared.audit.clone();
            let _ = tokio::task::spawn_blocking(move || audit.settle()).await;
        }
    }

    /// Keeps credentials as their sources have them.
    pub(crate) async fn run_refresh(self) {
        let credentials = self.shared.credentials.clone();
        let rotated = |connection: &ConnectionName, version: u64| {
            info!(%connection, version, "the source has another credential, and logins use it");
        };
        credentials.run_refresh(self.shared.stopped.clone(), rotated).await;
    }

    /// The end of a handle's time. Answers when to look at it again.
    fn expire(&self, id: HandleId) -> Option<Instant> {
        let now = Instant::now();
        let (connection, holder, cuts) = {
            let mut state = self.state();
            let handle = state.handles.get(id)?;
            match handle.standing {
                Standing::Live if handle.expires > now => return Some(handle.expires),
                Standing::Live => {}
                Standing::Expired => {
                    state.handles.remove(id);
                    return None;
                }
            }
            let handle = state.handles.expire(id)?;
            let (connection, holder) = (Arc::clone(&handle.connection), handle.holder.clone());
            (
                connection,
                holder,
                state.sessions.mark(CutReason::Expired, |owner| owner.handle == Some(id)),
            )
        };
        cuts.iter().for_each(|cut| cut.fire());
        let record = Record::new(Event::HandleExpired, Outcome::Done)
            .peer(&holder)
            .connection(&connection.name)
            .handle(id)
            .detail("sessions_cut", cuts.len());
        self.shared.audit.always(&record);
        Some(now + REMEMBERED)
    }

    /// Sees to it that a peer's bound handles end when its process exits.
    pub(super) fn watch_holder(
        &self,
        peer: &Peer,
        connection: &ConnectionName,
    ) -> Result<(), Refusal> {
        match peer.watch() {
            Watch::Already => Ok(()),
            Watch::Impossible => {
                Err(self.refuse(peer, Some(connection), Why::LimitReached("watched processes")))
            }
            Watch::Begin(exit) => {
                let (core, id) = (self.clone(), peer.id());
                self.shared.tasks.spawn(async move {
                    tokio::select! {
                        exited = exit.wait() => if exited.is_some() {
                            core.holder_exited(id);
                        },
                        () = core.shared.stopped.cancelled() => {}
                    }
                });
                Ok(())
            }
        }
    }

    pub(super) fn holder_exited(&self, peer: PeerId) {
        let (handles, cuts) = {
            let mut state = self.state();
            let bound: Vec<HandleId> = state
                .handles
                .held_by(peer)
                .filter(|handle| handle.is_bound())
                .map(|handle| handle.id)
                .collect();
            let handles: Vec<Handle> =
                bound.iter().filter_map(|id| state.handles.remove(*id)).collect();
            let ours = |handle: Option<HandleId>| handle.is_some_and(|id| bound.contains(&id));
            (handles, state.sessions.mark(CutReason::HolderExited, |owner| ours(owner.handle)))
        };
        cuts.iter().for_each(|cut| cut.fire());
        for handle in handles {
            self.shared.expiry.forget(handle.id);
            let record = Record::new(Event::HandleRevoked, Outcome::Done)
                .peer(&handle.holder)
                .reason(CutReason::HolderExited)
                .connection(&handle.connection.name)
                .handle(handle.id);
            self.shared.audit.always(&record);
        }
    }

    /// Returns when the cut sessions are gone, or it has taken too long to say so.
    pub(super) async fn wait_until_dead(&self, cuts: Vec<Arc<Cut>>) {
        let count = cuts.len();
        let all = async {
            for cut in cuts {
                cut.ended().await;
            }
        };
        if tokio::time::timeout(DEAD_WITHIN, all).await.is_err() {
            warn!(sessions = count, "some cut sessions have not ended on the server yet");
        }
    }

    /// The broker's end: nothing new is granted, sessions may finish until `deadline`, and then
    /// are cut.
    pub(crate) async fn drain(&self, deadline: Duration) {
        self.shared.draining.cancel();
        let finished = async {
            loop {
                let freed = self.shared.freed.notified();
                if self.state().sessions.is_empty() {
                    return;
                }
                freed.await;
            }
        };
        info!(sessions = self.state().sessions.len(), "draining");
        if tokio::time::timeout(deadline, finished).await.is_err() {
            self.cut_all().await;
        }
    }

    /// Cuts whatever is open, and returns when it is gone.
    pub(crate) async fn cut_all(&self) {
        let cuts = self.state().sessions.mark(CutReason::Draining, |_| true);
        info!(sessions = cuts.len(), "cutting what is still open");
        cuts.iter().for_each(|cut| cut.fire());
        self.wait_until_dead(cuts).await;
    }

    /// The last record.
    pub(crate) fn stopped(&self) {
        self.shared.stopped.cancel();
        self.shared.audit.always(&Record::new(Event::BrokerStopped, Outcome::Done));
        self.shared.audit.settle();
    }
}
