//! The secret material of a connection, in the arena.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::arena::{Arena, Slot};
use crate::config::Config;
use crate::connection::ConnectionName;
use crate::source::SourceError;

/// A user name and a password. The password is in the arena; nothing of it is printable.
pub(crate) struct Credential {
    username: String,
    password: Slot,
}

/// The credential of every connection.
#[derive(Debug)]
pub(crate) struct Credentials {
    by_connection: BTreeMap<ConnectionName, Arc<Credential>>,
}

impl Credential {
    pub(crate) fn new(username: String, password: Slot) -> Self {
        Self { username, password }
    }

    /// The database role; not a secret.
    pub(crate) fn username(&self) -> &str {
        &self.username
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
        let load = config
            .connections
            .iter()
            .map(|(name, configured)| Ok((name.clone(), Arc::new(configured.source.load(arena)?))));
        let by_connection = load.collect::<Result<_, _>>()?;
        // Two connections may name one variable, so it goes when all have read it.
        config.connections.values().for_each(|configured| configured.source.wipe());
        Ok(Self { by_connection })
    }

    pub(crate) fn of(&self, connection: &ConnectionName) -> Option<Arc<Credential>> {
        self.by_connection.get(connection).cloned()
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
