//! The life of a session in the core's hands: opening, live, ended. The record of its end is
//! written exactly once, whatever becomes of it.

#![forbid(unsafe_code)]

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use ring::rand::{SecureRandom as _, SystemRandom};
use tokio::time::timeout_at;

use super::{Core, Refusal, Why};
use crate::audit::{Event, Outcome, Record};
use crate::connection::{AllowedDatabase, Connection};
use crate::credential::Credential;
use crate::handle::HandleId;
use crate::metrics::Metrics;
use crate::peer::Peer;
use crate::session::{ClientKey, Cut, CutMeanwhile, CutReason, KeyLength, Lifeline, SessionId};

/// A session in the registry as `opening`, audited, with the credential to log in with. Dropped
/// without [`Opening::commit`], it is taken back and recorded as failed.
#[derive(Debug)]
pub(crate) struct Opening {
    entered: Entered,
    /// As it was when there was a place.
    lent: Arc<Credential>,
    /// The one that took its place, because the server refused it. There is no third.
    newer: OnceLock<Arc<Credential>>,
    database: AllowedDatabase,
}

/// A live session. Its end is recorded by [`Session::close`], or when it is dropped.
#[derive(Debug)]
pub(crate) struct Session {
    entered: Entered,
    credential: Arc<Credential>,
    database: AllowedDatabase,
    key: ClientKey,
}

/// Lets the one message that tells a client it is in leave; only commit makes one.
#[must_use]
#[derive(Debug)]
pub(crate) struct Permit(());

/// How a session ended.
#[derive(Debug)]
pub(crate) struct Closing {
    pub(crate) reason: &'static str,
    pub(crate) from_client: u64,
    pub(crate) from_server: u64,
    /// Whether the server is known to do nothing for it any more.
    pub(crate) server_stopped: bool,
}

/// A place in the registry. Leaves it, and records the end, exactly once.
#[derive(Debug)]
pub(super) struct Entered {
    core: Core,
    peer: Peer,
    connection: Arc<Connection>,
    handle: Option<HandleId>,
    id: SessionId,
    cut: Arc<Cut>,
    since: Instant,
    closing: Closing,
    outcome: Outcome,
    /// Whether `session.opened` stands in the log, so that `session.closed` must.
    recorded: bool,
}

impl Core {
    fn new_key(&self, length: KeyLength) -> Option<ClientKey> {
        let random = SystemRandom::new();
        let mut secret = vec![0; length.bytes()].into_boxed_slice();
        random.fill(&mut secret).ok()?;
        for _ in 0..64 {
            let mut pid = [0; 4];
            random.fill(&mut pid).ok()?;
            // Drivers keep the process id in a signed integer.
            let pid = (u32::from_be_bytes(pid) >> 1).max(1);
            if !self.state().sessions.has_pid(pid) {
                return Some(ClientKey { pid, secret });
            }
        }
        None
    }
}

impl Opening {
    pub(super) fn new(
        entered: Entered,
        credential: Arc<Credential>,
        database: AllowedDatabase,
    ) -> Self {
        Self { entered, lent: credential, newer: OnceLock::new(), database }
    }

    /// `session.opened` stands in the log, so `session.closed` must follow.
    pub(super) fn recorded(mut self) -> Self {
        self.entered.recorded = true;
        self
    }

    /// To log in with. That it is reachable only from here is what keeps every login audited.
    pub(crate) fn credential(&self) -> &Arc<Credential> {
        self.newer.get().unwrap_or(&self.lent)
    }

    pub(super) fn lent(&self) -> &Arc<Credential> {
        &self.lent
    }

    /// Lends another instead, whose version the registry has for this opening. Once.
    pub(super) fn adopt(&self, newer: Arc<Credential>) -> Option<&Arc<Credential>> {
        self.newer.set(newer).ok()?;
        self.newer.get()
    }

    pub(super) fn core(&self) -> &Core {
        &self.entered.core
    }

    pub(super) fn id(&self) -> SessionId {
        self.entered.id
    }

    pub(crate) fn connection(&self) -> &Arc<Connection> {
        &self.entered.connection
    }

    pub(crate) fn database(&self) -> &AllowedDatabase {
        &self.database
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.entered.core.shared.metrics
    }

    /// Returns when something took the right away that this session is being opened under.
    pub(crate) async fn cut(&self) -> CutReason {
        self.entered.cut.fired().await
    }

    /// Third step: makes the session live, unless it was cut meanwhile.
    pub(crate) fn commit(
        mut self,
        lifeline: Lifeline,
        length: KeyLength,
    ) -> Result<(Session, Permit), Refusal> {
        let core = self.entered.core.clone();
        let Some(key) = core.new_key(length) else {
            return Err(self.fail("internal", Why::Internal("no randomness")));
        };
        let committed = core.state().sessions.commit(self.entered.id, key.clone(), lifeline);
        match committed {
            Ok(()) => {
                self.entered.outcome = Outcome::Done;
                // What stands there if nobody closes it: it went away before it was told that
                // it is in.
                self.entered.closing.reason = "client_gone";
                let credential = Arc::clone(self.credential());
                let Self { entered, database, .. } = self;
                Ok((Session { entered, credential, database, key }, Permit(())))
            }
            Err(CutMeanwhile(reason)) => Err(self.fail_cut(reason)),
        }
    }

    /// Ends the opening with a refusal, and says why in the closing record. That a socket cannot
    /// be handed over, which may show only now, costs no use: with the same handle the client
    /// goes through the door.
    pub(crate) fn fail(mut self, reason: &'static str, why: Why) -> Refusal {
        self.entered.closing.reason = reason;
        if let (Why::HandoffUnsupported(_), Some(handle)) = (&why, self.entered.handle) {
            self.entered.core.state().handles.give_back_use(handle);
        }
        let connection = &self.entered.connection.name;
        self.entered.core.refuse(&self.entered.peer, Some(connection), why)
    }

    /// The same, for what took the right away.
    pub(crate) fn fail_cut(self, reason: CutReason) -> Refusal {
        let why = match reason {
            CutReason::Revoked | CutReason::HolderExited => Why::HandleInvalid,
            CutReason::Expired => Why::HandleExpired,
            CutReason::Suspended => Why::Suspended,
            CutReason::Reloaded | CutReason::Closed | CutReason::Aged => Why::AccessDenied,
            CutReason::Rotated | CutReason::Diverged => {
                Why::UpstreamRefused(self.connection().name.clone())
            }
            CutReason::Draining => Why::Draining,
        };
        self.fail(reason.name(), why)
    }

    /// Ends the opening without a refusal: the server's own words go to the client, or nobody is
    /// there to read any.
    pub(crate) fn end(mut self, reason: &'static str) {
        self.entered.closing.reason = reason;
    }
}

impl Session {
    pub(crate) fn id(&self) -> SessionId {
        self.entered.id
    }

    /// What the client is given to cancel with.
    pub(crate) fn client_key(&self) -> &ClientKey {
        &self.key
    }

    pub(crate) fn credential(&self) -> &Arc<Credential> {
        &self.credential
    }

    pub(crate) fn database(&self) -> &AllowedDatabase {
        &self.database
    }

    pub(crate) fn connection(&self) -> &Arc<Connection> {
        &self.entered.connection
    }

    /// Says that the client's socket is closed, and returns when it is the server's turn.
    pub(crate) async fn client_is_dead(&self) {
        self.entered.cut.client_is_dead().await;
    }

    /// Whether the client has been sent whole messages, and nothing waits to be sent.
    pub(crate) fn client_can_be_told(&self, can: bool) {
        self.entered.cut.client_can_be_told(can);
    }

    /// Whether it is to end. From then on nothing more may go to the server.
    pub(crate) fn is_cut(&self) -> bool {
        self.entered.cut.reason().is_some()
    }

    /// Returns when it is to end: somebody says so, or it has become too old.
    pub(crate) async fn cut(&self) -> CutReason {
        let entered = &self.entered;
        if let Some(age) = entered.connection.max_session_age
            && timeout_at((entered.since + age).into(), entered.cut.fired()).await.is_err()
        {
            entered.core.age_out(entered.id);
        }
        entered.cut.fired().await
    }

    /// Records the end and leaves the registry.
    pub(crate) fn close(mut self, closing: Closing) {
        self.entered.closing = closing;
    }
}

impl Entered {
    pub(super) fn new(
        core: &Core,
        peer: &Peer,
        connection: &Arc<Connection>,
        handle: Option<HandleId>,
        id: SessionId,
        cut: Arc<Cut>,
    ) -> Self {
        Self {
            core: core.clone(),
            peer: peer.clone(),
            connection: Arc::clone(connection),
            handle,
            id,
            cut,
            since: Instant::now(),
            closing: Closing {
                reason: "not_opened",
                from_client: 0,
                from_server: 0,
                server_stopped: true,
            },
            outcome: Outcome::Failed,
            recorded: false,
        }
    }

    fn record_end(&self) {
        let Closing { mut reason, from_client, from_server, server_stopped } = self.closing;
        // What was live and marked to be cut was cut: that a link broke is how that was noticed.
        if let (Outcome::Done, Some(cut)) = (self.outcome, self.cut.reason()) {
            reason = cut.name();
        }
        let lasted = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mut record = Record::new(Event::SessionClosed, self.outcome)
            .reason(reason)
            .peer(&self.peer)
            .connection(&self.connection.name)
            .session(self.id)
            .detail("lasted_ms", lasted)
            .detail("bytes_from_client", from_client)
            .detail("bytes_from_server", from_server);
        if !server_stopped {
            record = record.detail("server_stopped", false);
        }
        if let Some(handle) = self.handle {
            record = record.handle(handle);
        }
        self.core.shared.audit.always(&record);
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        if self.recorded {
            self.record_end();
        }
        self.core.state().sessions.leave(self.id);
        self.core.shared.freed.notify_waiters();
    }
}
