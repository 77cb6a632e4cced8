//! Credential tokens: handles that a principal made, checked at each use.
//!
//! The broker says whether a handle lives; whose it is stands in its subject. Every token
//! that is not the caller's gets one and the same answer, so that trying tells nothing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::{App, Principal};
use crate::broker::{HandleInfo, Token};
use crate::error::Failure;
use crate::sql::{Lease, Pool, Target};

/// The sessions under credential tokens, by the handle's public identifier.
#[derive(Debug, Default)]
pub(super) struct Tokens(Mutex<HashMap<String, Entry>>);

#[derive(Debug)]
struct Entry {
    pool: Pool,
    expires: SystemTime,
}

/// A handle that lives and is the caller's: only [`Tokens::check`] makes one.
#[derive(Debug)]
pub(super) struct Checked(HandleInfo);

impl Tokens {
    /// Asks the broker what the token is, and whether it is the caller's.
    pub(super) async fn check(
        &self,
        app: &App,
        caller: &Principal,
        token: &Token,
    ) -> Result<Checked, Failure> {
        let info = app.broker.describe(token).await?;
        if info.subject == caller.subject() {
            Ok(Checked(info))
        } else {
            Err(Failure::handle_invalid())
        }
    }

    /// A session under the token's handle.
    pub(super) async fn lease(
        &self,
        app: &App,
        caller: &Principal,
        connection: &str,
        token: &Token,
    ) -> Result<Lease, Failure> {
        let checked = self.check(app, caller, token).await?;
        if checked.0.connection != connection {
            return Err(Failure::invalid("credential_token is for another database"));
        }
        let pool = match self.known(&checked) {
            Some(pool) => pool,
            None => self.open(app, &checked, token).await?,
        };
        pool.lease().await
    }

    /// Closes the sessions of a handle that has ended.
    pub(super) fn forget(&self, checked: &Checked) {
        if let Some(entry) = self.map().remove(&checked.0.id) {
            entry.pool.close();
        }
    }

    /// Closes what is idle, and everything of handles that have expired.
    pub(super) fn sweep(&self, now: SystemTime) {
        self.map().retain(|_, entry| {
            let lives = entry.expires > now;
            if lives {
                entry.pool.sweep();
            } else {
                entry.pool.close();
            }
            lives
        });
    }

    /// Closes everything.
    pub(super) fn close(&self) {
        for (_, entry) in self.map().drain() {
            entry.pool.close();
        }
    }

    fn known(&self, checked: &Checked) -> Option<Pool> {
        let mut map = self.map();
        let entry = map.get_mut(&checked.0.id)?;
        // It may have been renewed elsewhere.
        entry.expires = checked.0.expires;
        Some(entry.pool.clone())
    }

    async fn open(&self, app: &App, checked: &Checked, token: &Token) -> Result<Pool, Failure> {
        let connection = app.connection(&checked.0.connection).await?;
        let door = connection.door.ok_or_else(Failure::handle_invalid)?;
        let configured = app.config.connection(&checked.0.connection);
        let target = Target::door(
            &door.directory,
            &door.database,
            &door.user,
            token.expose(),
            &configured.limits,
        )
        .with_policy(Arc::clone(&configured.policy));
        let pool = Pool::new(target, app.config.pool);
        let entry = Entry { pool, expires: checked.0.expires };
        // Another call may have been faster; one pool a handle is the rule.
        Ok(self.map().entry(checked.0.id.clone()).or_insert(entry).pool.clone())
    }

    fn map(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
