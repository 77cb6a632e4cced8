//! `connection_id`: random names for open connections, each of one principal.
//!
//! A reference is a name, not a right: it is looked up together with the principal, and a
//! foreign one gets the answer of one that does not exist.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Principal;
use super::access::Access;
use crate::error::{Code, Failure};
use crate::random;

/// Open connections of one principal.
const MAX_REFERENCES: usize = 64;

/// The references of all principals.
#[derive(Debug, Default)]
pub(super) struct References(Mutex<HashMap<String, Arc<Access>>>);

impl References {
    /// Names `access` for its principal.
    pub(super) fn insert(
        &self,
        principal: &Principal,
        access: Arc<Access>,
    ) -> Result<String, Failure> {
        let id = random::name("conn_")?;
        let mut map = self.map();
        if map.values().filter(|access| access.belongs_to(principal)).count() >= MAX_REFERENCES {
            return Err(Failure::new(Code::LimitReached, "too many open connections")
                .with_hint("disconnect those that are no longer needed"));
        }
        map.insert(id.clone(), access);
        Ok(id)
    }

    pub(super) fn find(&self, principal: &Principal, id: &str) -> Result<Arc<Access>, Failure> {
        let map = self.map();
        let access = map.get(id).filter(|access| access.belongs_to(principal));
        access.map(Arc::clone).ok_or_else(unknown)
    }

    pub(super) fn remove(&self, principal: &Principal, id: &str) -> Result<Arc<Access>, Failure> {
        let access = self.find(principal, id)?;
        self.map().remove(id);
        Ok(access)
    }

    pub(super) fn all(&self) -> Vec<Arc<Access>> {
        self.map().values().map(Arc::clone).collect()
    }

    fn map(&self) -> MutexGuard<'_, HashMap<String, Arc<Access>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unknown() -> Failure {
    Failure::invalid("connection_id is unknown, or was disconnected")
        .with_hint("open one with connect_named_storage or connect_storage")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn principal(name: &str) -> Principal {
        Principal::http(&crate::app::Name::parse(name).unwrap())
    }

    fn access(name: &str) -> Arc<Access> {
        Arc::new(Access::new(principal(name), "db".to_owned()))
    }

    #[test]
    fn a_foreign_reference_does_not_exist() {
        let references = References::default();
        let id = references.insert(&principal("a"), access("a")).unwrap();
        assert!(id.starts_with("conn_") && id.len() == 5 + 32, "{id}");
        assert!(references.find(&principal("a"), &id).is_ok());
        let foreign = references.find(&principal("b"), &id).unwrap_err();
        assert_eq!(foreign, references.find(&principal("b"), "conn_none").unwrap_err());
        assert!(references.remove(&principal("b"), &id).is_err());
        assert!(references.remove(&principal("a"), &id).is_ok());
        assert_eq!(foreign, references.find(&principal("a"), &id).unwrap_err());
    }

    #[test]
    fn their_number_is_bounded_per_principal() {
        let references = References::default();
        for _ in 0..MAX_REFERENCES {
            references.insert(&principal("a"), access("a")).unwrap();
        }
        let refused = references.insert(&principal("a"), access("a")).unwrap_err();
        assert_eq!(refused.code(), Code::LimitReached);
        assert!(references.insert(&principal("b"), access("b")).is_ok());
    }
}
