//! Credential tokens: handles that a principal made, checked at each use.
//!
//! The broker says whether a handle lives; whose it is stands in its subject. Every token
//! that is not the caller's gets one and the same answer, so that trying tells nothing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::{App, Principal};
use crate::broker::{HandleInfo, Token};
use crate::error::{Code, Failure};
use crate::sql::{Lease, Pool, Target};

/// Tokens of one principal that have not expired, of those that this process made. The broker counts
/// them all as this process's: without a bound one principal could use up what is for all.
const MAX_TOKENS: usize = 256;

/// The sessions under credential tokens, by the handle's public identifier, and how many tokens
/// each principal has.
#[derive(Debug, Default)]
pub(super) struct Tokens {
    sessions: Mutex<HashMap<String, Entry>>,
    made: Mutex<HashMap<Principal, Made>>,
}

#[derive(Debug, Default)]
struct Made {
    /// Being asked for.
    coming: usize,
    /// By the handle's public identifier.
    living: HashMap<String, SystemTime>,
}

/// The right to make one token.
#[derive(Debug)]
pub(super) struct Slot<'a> {
    tokens: &'a Tokens,
    principal: Principal,
}

impl Slot<'_> {
    /// The token was made.
    pub(super) fn fill(self, info: &HandleInfo) {
        let mut made = self.tokens.made();
        let own = made.entry(self.principal.clone()).or_default();
        own.living.insert(info.id.clone(), info.expires);
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        if let Some(own) = self.tokens.made().get_mut(&self.principal) {
            own.coming = own.coming.saturating_sub(1);
        }
    }
}

#[derive(Debug)]
struct Entry {
    pool: Pool,
    expires: SystemTime,
}

/// A handle that lives and is the caller's: only [`Tokens::check`] makes one.
#[derive(Debug)]
pub(super) struct Checked(HandleInfo);

impl Tokens {
    /// Room for one more token of the caller's.
    ///
    /// # Errors
    /// `LIMIT_REACHED`.
    pub(super) fn slot(&self, caller: &Principal) -> Result<Slot<'_>, Failure> {
        let (now, mut made) = (SystemTime::now(), self.made());
        let own = made.entry(caller.clone()).or_default();
        own.living.retain(|_, expires| *expires > now);
        if own.coming + own.living.len() >= MAX_TOKENS {
            return Err(Failure::new(Code::LimitReached, "too many credential tokens")
                .with_hint("revoke those that are no longer needed, or give them less time"));
        }
        own.coming += 1;
        Ok(Slot { tokens: self, principal: caller.clone() })
    }

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
        for own in self.made().values_mut() {
            own.living.remove(&checked.0.id);
        }
    }

    /// Closes what is idle, and everything of handles that have expired.
    pub(super) fn sweep(&self, now: SystemTime) {
        self.made().retain(|_, own| {
            own.living.retain(|_, expires| *expires > now);
            own.coming > 0 || !own.living.is_empty()
        });
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

    /// Closes the sessions that nobody uses; gives how many there were.
    pub(super) fn release_idle(&self) -> usize {
        self.map().values().map(|entry| entry.pool.release_idle()).sum()
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
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn made(&self) -> MutexGuard<'_, HashMap<Principal, Made>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
