//! Opening sessions: admission, the registry, audit, commit, and the record of the end.

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use ring::rand::{SecureRandom as _, SystemRandom};

use super::{Core, Refusal, Verb, Why};
use crate::audit::{Audited, Event, Outcome, Record};
use crate::connection::{AllowedDatabase, Connection};
use crate::credential::Credential;
use crate::handle::{HandleFault, HandleId, TokenHash};
use crate::peer::Peer;
use crate::policy::{Action, Decision, Grant};
use crate::session::{ClientKey, Cut, CutMeanwhile, CutReason, Owner, SessionId};

/// A peer that may come in through a door, if it shows what the admission asks for.
#[must_use]
#[derive(Debug)]
pub(crate) struct Admission {
    pub(crate) connection: Arc<Connection>,
    pub(crate) asks: Admitted,
}

/// What a peer must show.
#[derive(Debug)]
pub(crate) enum Admitted {
    /// A handle's token.
    WithHandle,
    /// Nothing: an ambient grant.
    Ambient(Grant),
}

/// A session in the registry as `opening`, audited, with the credential to log in with. Dropped
/// without [`Opening::commit`], it is taken back and recorded as failed.
#[derive(Debug)]
pub(crate) struct Opening {
    entered: Entered,
    credential: Arc<Credential>,
    database: AllowedDatabase,
}

/// A live session. Dropped without [`Session::close`], it is recorded as failed.
#[derive(Debug)]
pub(crate) struct Session {
    entered: Entered,
    credential: Arc<Credential>,
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
}

/// A place in the registry. Leaves it, and records the end, exactly once.
#[derive(Debug)]
struct Entered {
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

/// What the lock found when a place was asked for.
enum Place {
    Entered {
        id: SessionId,
        cut: Arc<Cut>,
        grant: Grant,
        handle: Option<HandleId>,
        subject: String,
        purpose: String,
    },
    Full(&'static str),
    Denied(Grievance),
}

enum Grievance {
    Handle(HandleFault),
    Policy(crate::policy::Denial),
}

impl Core {
    /// First step of a door: may this peer come in here at all, and what must it show?
    pub(crate) fn admit(&self, peer: &Peer, name: &str) -> Result<Admission, Refusal> {
        let connection = self.connection(peer, name)?;
        let policy = &self.shared.policy;
        let with_handle =
            matches!(policy.decide(peer, Action::Open, &connection.name), Decision::Allow(_))
                || policy.is_redeemer(peer, &connection.name);
        let asks = if with_handle {
            Admitted::WithHandle
        } else {
            Admitted::Ambient(self.grant(peer, Action::Ambient, &connection.name)?)
        };
        Ok(Admission { connection, asks })
    }

    /// Second step: enters the registry under the lock that spends the handle's use, then
    /// writes the record, and only then lends the credential.
    pub(crate) async fn open(
        &self,
        peer: &Peer,
        admission: Admission,
        token: Option<TokenHash>,
        database: Option<&str>,
    ) -> Result<Opening, Refusal> {
        let Admission { connection, asks } = admission;
        let name = &connection.name;
        let Some(database) = connection.database(database) else {
            return Err(self.refuse(peer, Some(name), Why::AccessDenied));
        };
        let Some(credential) = self.shared.credentials.of(name) else {
            return Err(self.refuse(
                peer,
                Some(name),
                Why::Internal("the connection has no credential"),
            ));
        };
        self.check_alive(peer, name)?;
        self.check_open_for_business(peer, name)?;

        let deadline = Instant::now() + self.shared.limits.queue_timeout;
        let (entered, grant, subject, purpose) = loop {
            let freed = self.shared.freed.notified();
            match self.place(peer, &connection, &asks, token) {
                Place::Entered { id, cut, grant, handle, subject, purpose } => {
                    let entered = Entered {
                        core: self.clone(),
                        peer: peer.clone(),
                        connection: Arc::clone(&connection),
                        handle,
                        id,
                        cut,
                        since: Instant::now(),
                        closing: Closing { reason: "not_opened", from_client: 0, from_server: 0 },
                        outcome: Outcome::Failed,
                        recorded: false,
                    };
                    break (entered, grant, subject, purpose);
                }
                Place::Denied(Grievance::Handle(fault)) => {
                    return Err(self.refuse(peer, Some(name), fault.into()));
                }
                Place::Denied(Grievance::Policy(denial)) => {
                    return Err(self.deny(peer, Some(name), &denial));
                }
                Place::Full(what) => {
                    if tokio::time::timeout_at(deadline.into(), freed).await.is_err() {
                        return Err(self.refuse(peer, Some(name), Why::LimitReached(what)));
                    }
                }
            }
        };
        // Drain may have begun between the check above and the place in the registry; whoever
        // drains counts sessions after setting the flag.
        self.check_open_for_business(peer, name)?;
        self.check_rate(peer, &grant, Verb::Open)?;

        let mut record = Record::new(Event::SessionOpened, Outcome::Allowed)
            .peer(peer)
            .grant(&grant)
            .session(entered.id)
            .database(&database)
            .db_user(credential.username())
            .subject(&subject)
            .purpose(&purpose);
        if let Some(handle) = entered.handle {
            record = record.handle(handle);
        }
        let audited: Audited<Opening> = self
            .shared
            .audit
            .before(&record, Opening { entered, credential, database })
            .map_err(|_unavailable| self.refuse(peer, Some(name), Why::AuditUnavailable))?;
        let mut opening = audited.into_inner();
        opening.entered.recorded = true;
        Ok(opening)
    }

    /// Everything that must be one step, in one lock: the handle's state, its holder's grant,
    /// the limits, the spent use and the entry.
    fn place(
        &self,
        peer: &Peer,
        connection: &Arc<Connection>,
        asks: &Admitted,
        token: Option<TokenHash>,
    ) -> Place {
        let mut state = self.state();
        let state = &mut *state;
        let (grant, handle) = match asks {
            Admitted::Ambient(grant) => (grant.clone(), None),
            Admitted::WithHandle => {
                let Some(token) = token else {
                    return Place::Denied(Grievance::Handle(HandleFault::Invalid));
                };
                let here = |handle: &crate::handle::Handle| {
                    handle.is_redeemable_by(peer.uid()) && handle.connection.name == connection.name
                };
                let handle = match state.handles.find(token, Instant::now(), here) {
                    Ok(handle) => handle,
                    Err(fault) => return Place::Denied(Grievance::Handle(fault)),
                };
                // The right is the holder's: it must still have it now.
                let decision = match handle.redeemer {
                    Some(redeemer) => self.shared.policy.decide_redeemer(
                        &handle.holder,
                        redeemer,
                        &connection.name,
                    ),
                    None => {
                        self.shared.policy.decide(&handle.holder, Action::Open, &connection.name)
                    }
                };
                match decision {
                    Decision::Allow(grant) => (grant, Some(handle)),
                    Decision::Deny(denial) => return Place::Denied(Grievance::Policy(denial)),
                }
            }
        };
        let limit = grant.max_sessions().unwrap_or(self.shared.limits.sessions);
        if state.sessions.count(peer.uid(), &connection.name) >= limit {
            return Place::Full("sessions");
        }
        let (mut id_of_handle, mut subject, mut purpose) = (None, String::new(), String::new());
        if let Some(handle) = handle {
            if handle
                .max_sessions
                .is_some_and(|most| state.sessions.count_of_handle(handle.id) >= most)
            {
                return Place::Full("sessions of the handle");
            }
            match &mut handle.uses_left {
                None => {}
                // Spent handles are like unknown ones.
                Some(0) => return Place::Denied(Grievance::Handle(HandleFault::Invalid)),
                // The decrement is what grants.
                Some(left) => *left -= 1,
            }
            (subject, purpose) = (handle.subject.clone(), handle.purpose.clone());
            id_of_handle = Some(handle.id);
        }
        let owner =
            Owner { uid: peer.uid(), connection: connection.name.clone(), handle: id_of_handle };
        let (id, cut) = state.sessions.enter(owner);
        Place::Entered { id, cut, grant, handle: id_of_handle, subject, purpose }
    }

    /// The live session that a client's cancel key means, if it is the peer's own.
    pub(crate) fn session_of(&self, peer: &Peer, key: ClientKey) -> Option<SessionId> {
        self.state().sessions.by_key(key, peer.uid())
    }

    fn new_key(&self) -> Option<ClientKey> {
        let random = SystemRandom::new();
        for _ in 0..64 {
            let (mut pid, mut secret) = ([0; 4], [0; 4]);
            random.fill(&mut pid).ok()?;
            random.fill(&mut secret).ok()?;
            // Drivers keep the process id in a signed integer.
            let key = ClientKey { pid: (u32::from_be_bytes(pid) >> 1).max(1), secret };
            if !self.state().sessions.has_key(key) {
                return Some(key);
            }
        }
        None
    }
}

impl Opening {
    /// To log in with. That it is reachable only from here is what keeps every login audited.
    pub(crate) fn credential(&self) -> &Arc<Credential> {
        &self.credential
    }

    pub(crate) fn connection(&self) -> &Arc<Connection> {
        &self.entered.connection
    }

    pub(crate) fn database(&self) -> &AllowedDatabase {
        &self.database
    }

    /// Returns when something took the right away that this session is being opened under.
    pub(crate) async fn cut(&self) -> CutReason {
        self.entered.cut.fired().await
    }

    /// Third step: makes the session live, unless it was cut meanwhile. `upstream` duplicates
    /// the authenticated socket.
    pub(crate) fn commit(mut self, upstream: OwnedFd) -> Result<(Session, Permit), Refusal> {
        let core = self.entered.core.clone();
        let Some(key) = core.new_key() else {
            return Err(self.fail("internal", Why::Internal("no randomness")));
        };
        let committed = core.state().sessions.commit(self.entered.id, key, upstream);
        match committed {
            Ok(()) => {
                self.entered.outcome = Outcome::Done;
                let Self { entered, credential, database: _ } = self;
                Ok((Session { entered, credential, key }, Permit(())))
            }
            Err(CutMeanwhile(reason)) => Err(self.fail_cut(reason)),
        }
    }

    /// Ends the opening with a refusal, and says why in the closing record.
    pub(crate) fn fail(mut self, reason: &'static str, why: Why) -> Refusal {
        self.entered.closing.reason = reason;
        let connection = &self.entered.connection.name;
        self.entered.core.refuse(&self.entered.peer, Some(connection), why)
    }

    /// The same, for what took the right away.
    pub(crate) fn fail_cut(self, reason: CutReason) -> Refusal {
        match reason {
            CutReason::Revoked => self.fail("revoked", Why::HandleInvalid),
            CutReason::HolderExited => self.fail("holder_exited", Why::HandleInvalid),
            CutReason::Expired => self.fail("expired", Why::HandleExpired),
            CutReason::Draining => self.fail("draining", Why::Draining),
        }
    }

    /// Ends the opening because the server itself said no; its words go to the client.
    pub(crate) fn server_said_no(mut self) {
        self.entered.closing.reason = "server_error";
    }
}

impl Session {
    pub(crate) fn id(&self) -> SessionId {
        self.entered.id
    }

    /// What the client is given to cancel with.
    pub(crate) fn client_key(&self) -> ClientKey {
        self.key
    }

    pub(crate) fn credential(&self) -> &Arc<Credential> {
        &self.credential
    }

    pub(crate) fn connection(&self) -> &Arc<Connection> {
        &self.entered.connection
    }

    /// Returns when the session is to end.
    pub(crate) async fn cut(&self) -> CutReason {
        self.entered.cut.fired().await
    }

    /// Records the end and leaves the registry.
    pub(crate) fn close(mut self, closing: Closing) {
        self.entered.closing = closing;
    }
}

impl Entered {
    fn record_end(&self) {
        let Closing { reason, from_client, from_server } = self.closing;
        let lasted = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mut record = Record::new(Event::SessionClosed, self.outcome)
            .reason(reason)
            .peer(&self.peer)
            .connection(&self.connection.name)
            .session(self.id)
            .detail("lasted_ms", lasted)
            .detail("bytes_from_client", from_client)
            .detail("bytes_from_server", from_server);
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
