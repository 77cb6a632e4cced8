//! What is configured for one connection: `[connections.NAME]`.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::raw::{RawAccess, RawConnection};
use crate::sql::{Access, ColumnPattern, Guard, Limits, Policy, Role, TablePattern};

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
            guard: guard(name, raw)?,
        };
        if policy.access == Access::ReadWrite && !policy.guard.mask.is_empty() {
            // What is masked could be copied to where it is not.
            return Err(format!("connections.{name}.mask: it needs access = \"read-only\""));
        }
        Ok(Self { policy: Arc::new(policy), limits: raw.limits.check(name, all)? })
    }
}

fn guard(name: &str, raw: &RawConnection) -> Result<Guard, String> {
    let mask = raw.mask.iter().map(|text| {
        ColumnPattern::parse(text).ok_or_else(|| {
            format!("connections.{name}.mask: {text:?} is not table.column or schema.table.column")
        })
    });
    let table = |text: &String| {
        TablePattern::parse(text)
            .ok_or_else(|| format!("connections.{name}.tables: {text:?} is not schema.table"))
    };
    let tables = raw.tables.as_ref().map(|tables| tables.iter().map(table).collect());
    Ok(Guard { mask: mask.collect::<Result<_, _>>()?, tables: tables.transpose()? })
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
