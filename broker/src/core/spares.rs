//! Logging in ahead of a client: the broker's own act, recorded before it happens, and undone by
//! whatever would end a session of the connection.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::state::SpareId;
use super::{Core, Opening};
use crate::audit::{Event, Outcome, Record};
use crate::connection::{AllowedDatabase, Connection, ConnectionName};
use crate::credential::{Credential, Refused};
use crate::session::{Cut, CutReason, Lifeline};

/// The broker's own permission to log in once: recorded, and with the credential to do it with.
/// Dropped without [`Dialling::commit`], it is given back.
#[derive(Debug)]
pub(crate) struct Dialling {
    place: Place,
    connection: Arc<Connection>,
    credential: Arc<Credential>,
    database: AllowedDatabase,
}

/// A link that waits for its client, under a right that holds still.
#[derive(Debug)]
pub(crate) struct Spare {
    place: Place,
    connection: Arc<Connection>,
    credential: Arc<Credential>,
}

/// A place among the spares, given up on drop.
#[derive(Debug)]
struct Place {
    core: Core,
    id: SpareId,
    cut: Arc<Cut>,
}

impl Core {
    /// Permission to dial one more spare for a database of a connection. `None` when there are
    /// enough, when nothing may be opened, or when it cannot be recorded.
    pub(crate) async fn dial_spare(
        &self,
        name: &ConnectionName,
        database: &AllowedDatabase,
    ) -> Option<Dialling> {
        if self.is_draining() {
            return None;
        }
        let dialling = {
            let mut state = self.state();
            if state.suspended.covers(name) {
                return None;
            }
            let connection = Arc::clone(state.settings.connections.get(name)?);
            let credential = self.shared.credentials.of(name)?;
            if !connection.allows(database) {
                return None;
            }
            let (id, cut) = state.spares.enter(name, credential.version(), connection.warm)?;
            let place = Place { core: self.clone(), id, cut };
            Dialling { place, connection, credential, database: database.clone() }
        };
        let record = Record::new(Event::UpstreamDialled, Outcome::Allowed)
            .connection(name)
            .database(database)
            .db_user(dialling.credential.username());
        Some(self.shared.audit.before(&record, dialling).await.ok()?.into_inner())
    }

    /// Takes the right of spares away, as of the sessions of their connections.
    pub(super) fn drop_spares(
        &self,
        reason: CutReason,
        version: u64,
        which: impl Fn(&ConnectionName) -> bool,
    ) {
        let cuts = self.state().spares.mark(reason, version, which);
        self.fire(&cuts);
    }
}

impl Dialling {
    pub(crate) fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    pub(crate) fn credential(&self) -> &Arc<Credential> {
        &self.credential
    }

    pub(crate) fn database(&self) -> &AllowedDatabase {
        &self.database
    }

    /// The server refused the credential.
    pub(crate) fn refused(&self, meaning: Refused) {
        let Self { place, connection, credential, .. } = self;
        place.core.refused_by_server(&connection.name, credential, meaning);
    }

    /// Returns when the right is gone.
    pub(crate) async fn cut(&self) -> CutReason {
        self.place.cut.fired().await
    }

    /// It is logged in. `None` when the right has gone meanwhile.
    pub(crate) fn commit(self, lifeline: Lifeline) -> Option<Spare> {
        let Self { place, connection, credential, database: _ } = self;
        place.core.state().spares.commit(place.id, lifeline).ok()?;
        // No client has to die before it.
        place.cut.has_no_client();
        Some(Spare { place, connection, credential })
    }
}

impl Spare {
    /// Whether the session that is being opened would log in just so: to the same destination as
    /// configured now, with the credential in force.
    pub(crate) fn is_good_for(&self, opening: &Opening) -> bool {
        Arc::ptr_eq(&self.connection, opening.connection())
            && Arc::ptr_eq(&self.credential, opening.credential())
            && self.place.cut.reason().is_none()
    }

    /// Returns when the right is gone, or a client has taken it.
    pub(crate) fn end(&self) -> impl Future<Output = ()> + Send + use<> {
        let cut = Arc::clone(&self.place.cut);
        async move {
            tokio::select! {
                _reason = cut.fired() => {}
                () = cut.ended() => {}
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.core.state().spares.leave(self.id);
    }
}
