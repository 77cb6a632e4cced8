//! A credential that the server refuses: looking whether its source has another, and what it means
//! when it has not.

#![forbid(unsafe_code)]

use std::sync::Arc;

use tracing::{error, info, warn};

use super::Core;
use super::opening::Opening;
use crate::audit::{Event, Outcome, Record};
use crate::connection::ConnectionName;
use crate::credential::{Credential, Refused};
use crate::session::{CutReason, RENEWING};

impl Opening {
    /// Reads the source again, and takes on what it has now, once. `None` when that is nothing new.
    pub(crate) async fn renew_credential(&self) -> Option<&Arc<Credential>> {
        let (core, name) = (self.core(), &self.connection().name);
        if self.credential().version() == 0 {
            // A peer's own has no source.
            return None;
        }
        // Whoever rotates meanwhile must not take this opening for one of the old version.
        if !core.state().sessions.renew(self.id(), RENEWING) {
            return None;
        }
        if let Err(problem) = core.shared.credentials.reread(name).await {
            info!(connection = %name, %problem, "the server refuses the credential, and its source cannot be read");
        }
        self.adopt_newer()
    }

    /// Takes on the credential that is in force, if it is another than the opening was lent. Under
    /// the lock under which sessions are marked: a rotation to a yet newer one finds this opening
    /// with the version that it logs in with.
    pub(crate) fn adopt_newer(&self) -> Option<&Arc<Credential>> {
        let (core, connection) = (self.core(), self.connection());
        let own = self.lent().version();
        let mut state = core.state();
        let now = core.shared.credentials.of(&connection.name)?;
        let leads_to_same = state
            .settings
            .connections
            .get(&connection.name)
            .is_some_and(|configured| configured.leads_to_same(connection));
        // The record of this opening names the role: for another one there is none yet, and the
        // next login writes it.
        let is_recorded = now.username() == self.lent().username();
        let is_newer = own != 0 && now.version() != own && is_recorded;
        if leads_to_same && is_newer && state.sessions.renew(self.id(), now.version()) {
            self.adopt(now)
        } else {
            None
        }
    }

    /// The server refused the credential, and there is no other.
    pub(crate) fn refused(&self, meaning: Refused) {
        self.core().refused_by_server(&self.connection().name, self.credential(), meaning);
    }
}

impl Core {
    /// What a refusal means for the sessions that logged in with the same credential.
    pub(crate) fn refused_by_server(
        &self,
        name: &ConnectionName,
        credential: &Credential,
        meaning: Refused,
    ) {
        match meaning {
            Refused::Diverged if credential.version() != 0 => {
                self.diverged(name, credential.version())
            }
            Refused::Doubtful if credential.version() != 0 => warn!(
                connection = %name, version = credential.version(),
                "somebody who has not proved to be the database refuses a credential that it took before: over this link that cannot be told from a changed password, so no session is cut; look at the role's password, and at who answers there (tls mode = \"verify-full\" tells them apart)"
            ),
            Refused::Diverged | Refused::Doubtful | Refused::Again => {}
        }
    }

    /// Somebody else changed the password: whoever is in by the old one may be the one who did.
    fn diverged(&self, name: &ConnectionName, version: u64) {
        let cuts = self.state().sessions.mark(CutReason::Diverged, |owner| {
            owner.connection.name == *name && owner.credential_version == version
        });
        self.fire(&cuts);
        self.drop_spares(CutReason::Diverged, version + 1, |other| other == name);
        error!(
            connection = %name, version, sessions_cut = cuts.len(),
            "the database refuses a credential that it took before, and nobody rotated it here: find out who changed the role's password, set it anew there, and give it to the broker (its source, or credbroker put)"
        );
        let record = Record::new(Event::CredentialDiverged, Outcome::Done)
            .connection(name)
            .detail("version", version)
            .detail("sessions_cut", cuts.len());
        self.shared.audit.always(&record);
    }
}
