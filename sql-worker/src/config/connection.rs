//! What is configured for one connection: `[connections.NAME]`.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::raw::{RawAccess, RawConnection};
use crate::sql::{Limits, Policy, Role};

/// What statements on a connection may do, and how much of it.
#[derive(Debug, Clone)]
pub struct Connection {
    /// What they may do.
    pub policy: Arc<Policy>,
    /// Bounds of one statement; a call may ask for its own `max_rows`.
    pub limits: Limits,
}

impl Connection {
    pub(super) fn parse(
        name: &str,
        raw: &RawConnection,
        default: RawAccess,
        all: Limits,
    ) -> Result<Self, String> {
        let policy = Policy {
            access: raw.access.unwrap_or(default).into(),
            allow_roles: roles(name, &raw.allow_roles)?,
        };
        Ok(Self { policy: Arc::new(policy), limits: raw.limits.check(name, all)? })
    }
}

fn roles(name: &str, given: &[String]) -> Result<BTreeSet<Role>, String> {
    let parse = |text: &String| {
        Role::parse(text).ok_or_else(|| {
            let known = Role::ALL.map(Role::as_str).join(", ");
            format!("connections.{name}.allow_roles: {text:?} is not one of {known}")
        })
    };
    given.iter().map(parse).collect()
}
