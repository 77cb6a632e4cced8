//! Opening sessions: admission, then a place in the registry, then the audit record.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Instant;

use super::opening::{Entered, Opening};
use super::state::{By, Claim, NoPlace, Placed};
use super::{Asked, Core, Refusal, Verb, Why};
use crate::audit::{Audited, Event, Outcome, Record};
use crate::connection::Connection;
use crate::credential::Credential;
use crate::handle::{Handle, TokenHash};
use crate::metrics;
use crate::peer::Peer;
use crate::policy::{Action, Decision};
use crate::session::{ClientKey, Mode, SessionId};

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
    Ambient,
    /// A handle's token, and a grant to take the socket itself.
    ToHandOff,
}

impl Admitted {
    const fn by(&self, token: Option<TokenHash>) -> By {
        match self {
            Self::Ambient => By::Ambient,
            Self::WithHandle => By::Token(token),
            Self::ToHandOff => By::TokenForHandoff(token),
        }
    }
}

impl Core {
    /// First step of a door: may this peer come in here at all, and what must it show?
    pub(crate) fn admit(&self, peer: &Peer, name: &str) -> Result<Admission, Refusal> {
        let connection = self.connection(peer, Action::Open, name)?;
        let settings = self.settings();
        let policy = &settings.policy;
        let with_handle =
            matches!(policy.decide(peer, Action::Open, &connection.name), Decision::Allow(_))
                || policy.is_redeemer(peer, &connection.name);
        let asks = if with_handle {
            Admitted::WithHandle
        } else {
            let _grant = self.grant(peer, Action::Ambient, &connection.name)?;
            Admitted::Ambient
        };
        Ok(Admission { connection, asks })
    }

    /// The same for somebody who wants the socket itself. What it leads to, its handle says.
    pub(crate) fn admit_handoff(
        &self,
        peer: &Peer,
        token: Option<TokenHash>,
    ) -> Result<Admission, Refusal> {
        let redeemable = |handle: &Handle| handle.is_redeemable_by(peer);
        let name = self.look_up(peer, token, redeemable, |handle| handle.connection.clone())?;
        let connection = self.connection(peer, Action::Handoff, name.as_str())?;
        let _grant = self.grant(peer, Action::Handoff, &name)?;
        Ok(Admission { connection, asks: Admitted::ToHandOff })
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
        let timed = self.shared.metrics.begin(metrics::Verb::Open);
        let Admission { connection, asks } = admission;
        let name = &connection.name;
        self.check_alive(peer, name)?;
        self.check_open_for_business(peer, name)?;

        let by = asks.by(token);
        let claim = Claim { peer, connection: &connection, database, by };
        let deadline = Instant::now() + self.settings().limits.queue_timeout;
        let placed = loop {
            let freed = self.shared.freed.notified();
            let credentials = &self.shared.credentials;
            let place = self.state().place(&claim, Instant::now(), |name| credentials.of(name));
            let why = match place {
                Ok(placed) => break placed,
                Err(NoPlace::Full(what)) => {
                    if tokio::time::timeout_at(deadline.into(), freed).await.is_ok() {
                        continue;
                    }
                    Why::limit(what)
                }
                Err(NoPlace::Policy(denial)) => {
                    let action = match by {
                        By::Ambient => Action::Ambient,
                        By::Token(_) => Action::Open,
                        By::TokenForHandoff(_) => Action::Handoff,
                    };
                    return Err(self.deny(peer, Asked::about(action, name), &denial));
                }
                Err(NoPlace::Handle(fault)) => fault.into(),
                Err(NoPlace::Suspended) => Why::Suspended,
                Err(NoPlace::Database | NoPlace::Moved) => Why::AccessDenied,
                Err(NoPlace::NoCredential) => Why::NoCredential(name.clone()),
            };
            return Err(self.refuse(peer, Some(name), why));
        };
        let handle = placed.handle;
        match self.record_opening(peer, &connection, placed, by.mode()).await {
            Ok(audited) => {
                timed.done();
                Ok(audited.into_inner().recorded())
            }
            Err(refusal) => {
                // Nothing was tried with the use that was spent.
                if let Some(handle) = handle {
                    self.state().handles.give_back_use(handle);
                }
                Err(refusal)
            }
        }
    }

    /// What is left to check once there is a place, and the record.
    async fn record_opening(
        &self,
        peer: &Peer,
        connection: &Arc<Connection>,
        placed: Placed,
        mode: Mode,
    ) -> Result<Audited<Opening>, Refusal> {
        let Placed { id, cut, grant, database, credential, handle, subject, purpose } = placed;
        let entered = Entered::new(self, peer, connection, handle, id, cut);
        let name = &connection.name;
        // Drain may have begun since there was a place; whoever drains counts sessions after
        // setting the flag.
        self.check_open_for_business(peer, name)?;
        self.check_rate(peer, &grant, Verb::Open)?;
        // The last look before the grant: what waited for a place may have outlived its process.
        self.check_alive(peer, name)?;
        let mut record = Record::new(Event::SessionOpened, Outcome::Allowed)
            .peer(peer)
            .grant(&grant)
            .session(id)
            .database(&database)
            .db_user(credential.username())
            .subject(&subject)
            .purpose(&purpose);
        if mode == Mode::Handoff {
            record = record.detail("mode", mode.name());
        }
        if let Some(handle) = handle {
            record = record.handle(handle);
        }
        let opening = Opening::new(entered, credential, database);
        let audited = self.shared.audit.before(&record, opening).await;
        audited.map_err(|unavailable| self.unaudited(peer, Some(name), &unavailable))
    }

    /// The credential with which one could log in now where a session is: another version than its
    /// own, when that was replaced. `None` when there is none, or it is for another role or another
    /// destination.
    pub(crate) fn credential_in_force(
        &self,
        connection: &Connection,
        username: &str,
    ) -> Option<Arc<Credential>> {
        // Under one lock: a reload changes both in one step.
        let state = self.state();
        let credential = self.shared.credentials.of(&connection.name)?;
        let now = state.settings.connections.get(&connection.name)?;
        (now.leads_to_same(connection) && credential.username() == username).then_some(credential)
    }

    /// The live session that a client's cancel key means, if it is the peer's own.
    pub(crate) fn session_of(&self, peer: &Peer, key: &ClientKey) -> Option<SessionId> {
        self.state().sessions.by_key(key, peer.uid())
    }
}
