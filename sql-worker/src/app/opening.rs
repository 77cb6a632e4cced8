//! From what a call names to a session: its turn, its right, and room for it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{AcquireError, OwnedSemaphorePermit, SemaphorePermit};
use tokio::time::timeout;

use super::access::Access;
use super::{App, Principal, Source};
use crate::error::{Code, Failure};
use crate::sql::Lease;

/// How long the broker may take to see that sessions were closed.
const RELEASE: Duration = Duration::from_millis(100);

/// The right to run one statement: the caller's, and of all.
pub(super) struct Turn<'a> {
    _own: OwnedSemaphorePermit,
    _of_all: SemaphorePermit<'a>,
}

impl App {
    /// Waits until a further statement may run.
    pub(super) async fn turn(&self, caller: &Principal) -> Result<Turn<'_>, Failure> {
        let turns = self.room(caller).turns();
        // In this order: who has many waits among their own.
        let taking = async {
            let own = turns.acquire_owned().await?;
            Ok(Turn { _own: own, _of_all: self.calls.acquire().await? })
        };
        timeout(self.config.pool.wait, taking)
            .await
            .map_err(|_elapsed| {
                Failure::new(Code::PoolTimeout, "too many statements run; nothing was run")
                    .with_hint("try again when another call has ended")
            })?
            .map_err(|_closed: AcquireError| Failure::cancelled())
    }

    /// The name of the connection that `source` leads to.
    pub(super) fn name(&self, caller: &Principal, source: &Source<'_>) -> Result<String, Failure> {
        Ok(match source {
            Source::Own(connection) | Source::Token(connection, _) => (*connection).to_owned(),
            Source::Reference(id) => self.references.find(caller, id)?.connection().to_owned(),
        })
    }

    pub(super) async fn lease(
        &self,
        caller: &Principal,
        source: Source<'_>,
    ) -> Result<Lease, Failure> {
        let lease = self.with_room(|| self.open(caller, source)).await;
        match (&lease, self.connection_of(caller, source)) {
            (Err(refused), Some(name)) if refused.code() == Code::UpstreamRefused => {
                self.require_credential(&name).await?;
                lease
            }
            _ => lease,
        }
    }

    /// Opens, and once more when sessions that nobody uses were in the way: the broker counts the
    /// sessions of all principals as this process's.
    pub(super) async fn with_room<F>(&self, open: impl Fn() -> F) -> Result<Lease, Failure>
    where
        F: Future<Output = Result<Lease, Failure>>,
    {
        match open().await {
            Err(refused) if refused.code() == Code::LimitReached && self.release_idle() => {
                tokio::time::sleep(RELEASE).await;
                open().await
            }
            opened => opened,
        }
    }

    /// Closes the sessions that nobody uses; whether there were any.
    fn release_idle(&self) -> bool {
        let of_accesses = self.accesses().iter().map(|access| access.release_idle()).sum::<usize>();
        of_accesses + self.tokens.release_idle() > 0
    }

    /// The name of the connection that a source leads to, if the caller has it.
    fn connection_of(&self, caller: &Principal, source: Source<'_>) -> Option<String> {
        match source {
            Source::Own(name) | Source::Token(name, _) => Some(name.to_owned()),
            Source::Reference(id) => {
                self.references.find(caller, id).ok().map(|access| access.connection().to_owned())
            }
        }
    }

    /// Says so when the broker has no credential for a connection, and who can help.
    pub(super) async fn require_credential(&self, name: &str) -> Result<(), Failure> {
        match self.connection(name).await {
            Ok(connection) if !connection.has_credential => {
                Err(Failure::credential_missing(&connection.name))
            }
            Ok(_) | Err(_) => Ok(()),
        }
    }

    async fn open(&self, caller: &Principal, source: Source<'_>) -> Result<Lease, Failure> {
        match source {
            Source::Token(connection, token) => {
                self.tokens.lease(self, caller, connection, token).await
            }
            Source::Reference(id) => self.references.find(caller, id)?.lease(self).await,
            Source::Own(connection) => {
                let key = (caller.clone(), connection.to_owned());
                let new = || Arc::new(Access::new(caller.clone(), connection.to_owned()));
                let access = Arc::clone(self.own().entry(key).or_insert_with(new));
                let lease = access.lease(self).await;
                if lease.is_err() {
                    // A name that led nowhere is not kept.
                    self.own().retain(|_, access| !access.is_vacant());
                }
                lease
            }
        }
    }
}
