//! What takes rights away by itself: time, the exit of a bound process, the broker's own end.
//! Nothing here can be refused, and nothing here waits for the audit log.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::state::Taken;
use super::watching::HandleEnd;
use super::{Core, Refusal, Why};
use crate::audit::{Event, Outcome, Record};
use crate::connection::ConnectionName;
use crate::handle::{ExpiryQueue, HandleId, REMEMBERED, Standing};
use crate::peer::{Peer, PeerId, Watch};
use crate::session::{self, Cut, CutReason, SessionId};

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

    /// Keeps credentials as their sources have them, and records each that was replaced.
    pub(crate) async fn run_refresh(self) {
        let credentials = self.shared.credentials.clone();
        let rotated = |connection: &ConnectionName, version: u64| {
            info!(%connection, version, "the source has another credential, and logins use it");
            self.rotated(connection, version);
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
            state.expire(id)?
        };
        self.fire(&cuts);
        let record = Record::new(Event::HandleExpired, Outcome::Done)
            .peer(&holder)
            .connection(&connection)
            .handle(id)
            .detail("sessions_cut", cuts.len());
        self.shared.audit.always(&record);
        Some(now + REMEMBERED)
    }

    /// Ends sessions that were marked. Their clients hear of it before this returns.
    pub(super) fn fire(&self, cuts: &[Arc<Cut>]) {
        self.shared.tasks.spawn(session::fire(cuts));
    }

    /// The end of a session that is older than its connection's may be.
    pub(super) fn age_out(&self, id: SessionId) {
        let marked = self.state().sessions.mark_one(id, CutReason::Aged);
        if let Some((_owner, cut)) = marked {
            self.fire(&[cut]);
        }
    }

    /// Carries out what was taken away under the lock: cuts, then records, then waits until the
    /// sessions are dead. `by` is who took it, if it was not the broker itself.
    pub(super) async fn carry_out(&self, by: Option<&Peer>, reason: CutReason, taken: Taken) {
        let Taken { handles, cuts } = taken;
        self.fire(&cuts);
        for handle in &handles {
            self.shared.expiry.forget(handle.id);
            let mut record = Record::new(Event::HandleRevoked, Outcome::Done)
                .peer(by.unwrap_or(&handle.holder))
                .reason(reason)
                .connection(&handle.connection)
                .handle(handle.id)
                .subject(&handle.subject);
            if let [_one] = handles.as_slice() {
                record = record.detail("sessions_cut", cuts.len());
            }
            self.shared.audit.always(&record);
        }
        // What a handle brought with it is wiped here, with its last reference.
        drop(handles);
        self.wait_until_dead(cuts).await;
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
                Err(self.refuse(peer, Some(connection), Why::limit("watched processes")))
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
        let taken = self.state().process_exited(peer);
        if taken.handles.is_empty() {
            return;
        }
        // At once; whoever waits for the rest is nobody.
        self.fire(&taken.cuts);
        let core = self.clone();
        self.shared.tasks.spawn(async move {
            core.carry_out(None, CutReason::HolderExited, taken).await;
        });
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
        self.state().watchers.end_all(HandleEnd(CutReason::Draining));
        self.drop_spares(CutReason::Draining, u64::MAX, |_| true);
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
        self.fire(&cuts);
        self.wait_until_dead(cuts).await;
    }

    /// Tells every task to end.
    pub(crate) fn stop(&self) {
        self.shared.stopped.cancel();
    }

    /// Returns when every task is to end.
    pub(crate) fn until_stopped(&self) -> impl Future<Output = ()> + Send + use<> {
        self.shared.stopped.clone().cancelled_owned()
    }

    /// The last record, when no task is left that would write another.
    pub(crate) fn stopped(&self, within: Duration) {
        self.shared.audit.always(&Record::new(Event::BrokerStopped, Outcome::Done));
        if !self.shared.audit.stop(within) {
            warn!("the audit log could not be closed in time");
        }
    }
}
