//! The secret material of a connection, in the arena.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use crate::arena::{Arena, ArenaFull, Slot};
use crate::config::Config;
use crate::connection::ConnectionName;
use crate::source::{self, SourceError, SourceFault};

/// A user name and a password. The password is in the arena; nothing of it is printable.
pub(crate) struct Credential {
    username: String,
    password: Slot,
    version: u64,
}

/// The credential of every connection.
#[derive(Debug)]
pub(crate) struct Credentials {
    by_connection: RwLock<BTreeMap<ConnectionName, Arc<Credential>>>,
    arena: Arena,
}

impl Credential {
    pub(crate) fn new(username: String, password: Slot) -> Self {
        Self { username, password, version: 1 }
    }

    /// The database role; not a secret.
    pub(crate) fn username(&self) -> &str {
        &self.username
    }

    /// Counts up with each change of the connection's credential.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// For the login machines only.
    pub(crate) fn password(&self) -> &Slot {
        &self.password
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[REDACTED]")
    }
}

impl Credentials {
    /// Reads every credential of the configuration.
    ///
    /// # Errors
    /// The first that cannot be read.
    pub(crate) fn load(config: &Config, arena: &Arena) -> Result<Self, SourceError> {
        let load =
            config.connections.iter().filter(|(_, configured)| !configured.source.is_absent()).map(
                |(name, configured)| Ok((name.clone(), Arc::new(configured.source.load(arena)?))),
            );
        let by_connection = load.collect::<Result<_, _>>()?;
        // Two connections may name one variable, so it goes when all have read it.
        config.connections.values().for_each(|configured| configured.source.wipe());
        Ok(Self { by_connection: RwLock::new(by_connection), arena: arena.clone() })
    }

    pub(crate) fn of(&self, connection: &ConnectionName) -> Option<Arc<Credential>> {
        self.by_connection.read().unwrap_or_else(PoisonError::into_inner).get(connection).cloned()
    }

    /// Gives a connection its next credential, and the number of that.
    pub(crate) fn put(&self, connection: &ConnectionName, mut credential: Credential) -> u64 {
        let mut all = self.by_connection.write().unwrap_or_else(PoisonError::into_inner);
        let version = all.get(connection).map_or(0, |before| before.version) + 1;
        credential.version = version;
        all.insert(connection.clone(), Arc::new(credential));
        version
    }

    /// A zeroed place in the arena.
    pub(crate) fn room(&self, len: usize) -> Result<Slot, ArenaFull> {
        self.arena.allocate(len)
    }

    /// Takes `username:password` apart.
    pub(crate) fn split(&self, text: &Slot) -> Result<(String, Slot), SourceFault> {
        source::split(text, &self.arena)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::BackendChoice;

    #[test]
    fn debug_shows_neither_user_nor_password() {
        let arena = Arena::map(BackendChoice::Auto, 64 * 1024).unwrap();
        let mut slot = arena.allocate(6).unwrap();
        slot.fill(|bytes| bytes.copy_from_slice(b"canary"));
        let credential = Credential::new("app".into(), slot);
        assert_eq!(format!("{credential:?}"), "[REDACTED]");
    }
}
