//! Opening sessions: admission, then a place in the registry, then the audit record.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Instant;

use super::opening::{Entered, Opening};
use super::{Core, Refusal, Verb, Why};
use crate::audit::{Audited, Event, Outcome, Record};
use crate::connection::Connection;
use crate::handle::{Handle, HandleFault, HandleId, TokenHash};
use crate::peer::Peer;
use crate::policy::{Action, Decision, Denial, Grant};
use crate::session::{ClientKey, Cut, Owner, SessionId};

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
    Policy(Denial),
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
        self.check_alive(peer, name)?;
        self.check_open_for_business(peer, name)?;

        let deadline = Instant::now() + self.shared.limits.queue_timeout;
        let (entered, grant, subject, purpose) = loop {
            let freed = self.shared.freed.notified();
            match self.place(peer, &connection, &asks, token) {
                Place::Entered { id, cut, grant, handle, subject, purpose } => {
                    let entered = Entered::new(self, peer, &connection, handle, id, cut);
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
        let recorded =
            self.record_opening(peer, entered, &grant, database, (&subject, &purpose)).await;
        match recorded {
            Ok(audited) => Ok(audited.into_inner().recorded()),
            Err((handle, refusal)) => {
                // Nothing was tried with the use that was spent.
                if let Some(handle) = handle {
                    self.state().handles.give_back_use(handle);
                }
                Err(refusal)
            }
        }
    }

    /// What is left to check once there is a place, and the record. A refusal names the handle
    /// whose use was spent.
    async fn record_opening(
        &self,
        peer: &Peer,
        entered: Entered,
        grant: &Grant,
        database: Option<&str>,
        (subject, purpose): (&str, &str),
    ) -> Result<Audited<Opening>, (Option<HandleId>, Refusal)> {
        let connection = Arc::clone(entered.connection());
        let (name, handle) = (&connection.name, entered.handle());
        let refused = |refusal| (handle, refusal);
        // Drain may have begun since there was a place; whoever drains counts sessions after
        // setting the flag.
        self.check_open_for_business(peer, name).map_err(refused)?;
        self.check_rate(peer, grant, Verb::Open).map_err(refused)?;
        let Some(database) = connection.database(database) else {
            return Err(refused(self.refuse(peer, Some(name), Why::AccessDenied)));
        };
        let Some(credential) = self.shared.credentials.of(name) else {
            let why = Why::Internal("the connection has no credential");
            return Err(refused(self.refuse(peer, Some(name), why)));
        };
        let mut record = Record::new(Event::SessionOpened, Outcome::Allowed)
            .peer(peer)
            .grant(grant)
            .session(entered.id())
            .database(&database)
            .db_user(credential.username())
            .subject(subject)
            .purpose(purpose);
        if let Some(handle) = handle {
            record = record.handle(handle);
        }
        let opening = Opening::new(entered, credential, database);
        let audited = self.shared.audit.before(&record, opening).await;
        audited.map_err(|unavailable| refused(self.unaudited(peer, name, &unavailable)))
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
                let here = |handle: &Handle| {
                    handle.is_redeemable_by(peer.uid()) && handle.connection.name == connection.name
                };
                let handle = match state.handles.find(token, Instant::now(), here) {
                    Ok(handle) => handle,
                    Err(fault) => return Place::Denied(Grievance::Handle(fault)),
                };
                // The right is the holder's: it must still have it now.
                let (policy, holder) = (&self.shared.policy, &handle.holder);
                let decision = match handle.redeemer {
                    Some(_uid) => policy.decide_redemption(holder, peer, &connection.name),
                    None => policy.decide(holder, Action::Open, &connection.name),
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
}
