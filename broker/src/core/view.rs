//! What a holder or redeemer may see of a handle, and a peer of itself.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::SystemTime;

use super::state::State;
use super::{Asked, Core, Refusal};
use crate::arena::Arena;
use crate::connection::{Connection, ConnectionName, Destination};
use crate::handle::{Bind, Handle, HandleId};
use crate::metrics::{self, Snapshot};
use crate::peer::{Peer, Uid};
use crate::policy::{Action, Actions};

/// A handle, described. Never the token: the table has none.
#[derive(Clone, Debug)]
pub(crate) struct HandleView {
    pub(crate) id: HandleId,
    pub(crate) connection: ConnectionName,
    pub(crate) holder: Uid,
    pub(crate) redeemer: Option<Uid>,
    pub(crate) issued: SystemTime,
    pub(crate) expires: SystemTime,
    pub(crate) never_after: Option<SystemTime>,
    pub(crate) uses_left: Option<u32>,
    pub(crate) subject: String,
    pub(crate) purpose: String,
    pub(crate) sessions: usize,
    pub(crate) bind: Bind,
}

/// A connection as one peer may see it.
#[derive(Debug)]
pub(crate) struct Viewed {
    pub(crate) connection: Arc<Connection>,
    pub(crate) actions: Actions,
    pub(crate) has_credential: bool,
}

impl State {
    pub(super) fn view(&self, id: HandleId) -> Option<HandleView> {
        self.handles.get(id).map(|handle| self.view_of(handle))
    }

    pub(super) fn view_of(&self, handle: &Handle) -> HandleView {
        HandleView {
            id: handle.id,
            connection: handle.connection.clone(),
            holder: handle.holder.uid(),
            redeemer: handle.redeemer,
            issued: handle.issued_at,
            expires: handle.wall(handle.expires),
            never_after: handle.never_after.map(|moment| handle.wall(moment)),
            uses_left: handle.uses_left,
            subject: handle.subject.clone(),
            purpose: handle.purpose.clone(),
            sessions: self.sessions.count_of_handle(handle.id),
            bind: handle.bind,
        }
    }
}

impl Core {
    /// The connections on which `peer` may do anything, by name.
    pub(crate) fn connections_of(&self, peer: &Peer) -> Vec<Viewed> {
        self.shared.metrics.begin(metrics::Verb::List).done();
        let settings = self.settings();
        let all = settings.connections.values();
        let seen = all.filter_map(|connection| {
            let actions = settings.policy.actions(peer, &connection.name);
            let has_credential = self.shared.credentials.of(&connection.name).is_some();
            (!actions.is_empty()).then(|| Viewed {
                connection: Arc::clone(connection),
                actions,
                has_credential,
            })
        });
        seen.collect()
    }

    /// The name of a peer's connection to a destination. What is not there, and what the peer may
    /// not use, get the same answer.
    pub(crate) fn resolve(
        &self,
        peer: &Peer,
        destination: &Destination<'_>,
    ) -> Result<ConnectionName, Refusal> {
        let timed = self.shared.metrics.begin(metrics::Verb::Resolve);
        let settings = self.settings();
        let usable = |name: &ConnectionName| !settings.policy.actions(peer, name).is_empty();
        let found = settings
            .connections
            .values()
            .find(|connection| connection.is_at(destination) && usable(&connection.name));
        match found {
            Some(connection) => {
                timed.done();
                Ok(connection.name.clone())
            }
            None => {
                let denial = settings.policy.unknown_connection(peer);
                Err(self.deny(peer, Asked::unknown(Action::List), &denial))
            }
        }
    }

    /// The state of the broker, for metrics.
    pub(crate) fn snapshot(&self, arena: &Arena) -> Snapshot {
        let (handles, sessions, warm_spares) = {
            let state = self.state();
            let kept = state.settings.connections.values().filter(|connection| connection.warm > 0);
            let spares = kept
                .map(|connection| (connection.name.clone(), state.spares.ready(&connection.name)));
            (state.handles.live_count(), state.sessions.len(), spares.collect())
        };
        Snapshot {
            handles,
            sessions,
            warm_spares,
            arena: arena.usage(),
            audit_records: self.shared.audit.head().seq,
            audit_writable: self.shared.audit.is_writable(),
            credential_expiry: self.shared.credentials.expiries(),
            last_reload_successful: self.shared.reloading.last().1.is_none(),
        }
    }

    /// Counts a question that is always answered.
    pub(crate) fn asked_who(&self) {
        self.shared.metrics.begin(metrics::Verb::WhoAmI).done();
    }

    /// What a peer should know about its own isolation.
    pub(crate) fn warnings_for(&self, peer: &Peer) -> Vec<String> {
        let mut warnings = Vec::new();
        if peer.uid() == Uid::own() {
            warnings.push("you run with the broker's own uid: between you and its secrets there is no boundary".to_owned());
        }
        if peer.uid().is_overflow() {
            warnings.push(
                "your uid is not mapped in the broker's user namespace, so no grant can match you"
                    .to_owned(),
            );
        }
        warnings
    }
}
