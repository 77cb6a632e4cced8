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

    /// Counts up with each change of the connection's credential.
    pub(crate) fn version(&self) -> u64 {
        1
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

// PROVISIONAL
#[derive(Debug)]
pub(crate) struct Material;
impl Material {
    pub(crate) fn whole(_: String, _: Slot) -> Result<Self, crate::source::SourceFault> {
        Ok(Self)
    }
    pub(crate) fn username(&self) -> &str {
        ""
    }
}
#[derive(Debug)]
pub(crate) struct CredentialView {
    pub(crate) version: u64,
    pub(crate) since: std::time::SystemTime,
    pub(crate) expires_at: Option<std::time::SystemTime>,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) persistent: bool,
}
impl Credential {
    pub(crate) fn registered(_: Material) -> Self {
        panic!()
    }
}
impl Credentials {
    pub(crate) fn configured_username(&self, _: &ConnectionName) -> Option<String> {
        None
    }
    pub(crate) fn split(&self, _: &Slot) -> Result<Material, crate::source::SourceFault> {
        Ok(Material)
    }
    pub(crate) fn put(
        &self,
        _: &ConnectionName,
        _: Material,
        _: Option<std::time::SystemTime>,
        _: BTreeMap<String, String>,
    ) -> u64 {
        1
    }
    pub(crate) fn delete(&self, _: &ConnectionName) -> bool {
        true
    }
    pub(crate) fn room_for(
        &self,
        _: crate::peer::Uid,
        _: usize,
    ) -> Result<Slot, crate::arena::ArenaFull> {
        Err(crate::arena::ArenaFull)
    }
    pub(crate) fn room(&self, _: usize) -> Result<Slot, crate::arena::ArenaFull> {
        Err(crate::arena::ArenaFull)
    }
    pub(crate) fn source_of(&self, _: &ConnectionName) -> String {
        String::new()
    }
    pub(crate) fn describe(&self, _: &ConnectionName) -> Option<CredentialView> {
        None
    }
    pub(crate) fn warnings(&self) -> Vec<String> {
        vec![]
    }
    pub(crate) fn arena_usage(&self) -> crate::arena::Usage {
        panic!()
    }
    pub(crate) fn prepare(&self, _: &Config) -> Result<(), SourceError> {
        Ok(())
    }
    pub(crate) fn install(&self, _: ()) -> Vec<(ConnectionName, u64)> {
        vec![]
    }
}
