//! What the worker's configuration lets statements do on a connection.
//!
//! A policy only narrows: what the database role may not do, no policy gives. The default is
//! the narrowest.

use std::collections::BTreeSet;

use super::guard::Guard;
use crate::error::{Code, Failure};

/// Whether statements may change anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Access {
    /// Each statement runs in a read-only transaction that is rolled back.
    #[default]
    ReadOnly,
    /// Each statement runs in a transaction that is committed when it succeeds.
    ReadWrite,
}

impl Access {
    /// The word of the configuration.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ReadOnly => "read-only",
            Self::ReadWrite => "read-write",
        }
    }

    /// What a call gets that asks for `readonly`.
    ///
    /// # Errors
    /// `READ_ONLY` when it asks for more than the connection has.
    pub(crate) fn narrowed(self, readonly: Option<bool>) -> Result<Self, Failure> {
        match (self, readonly) {
            (Self::ReadOnly, Some(false)) => {
                Err(Failure::new(Code::ReadOnly, "the connection is read-only; nothing was run")
                    .with_hint(
                        "leave readonly out; writing takes access = \"read-write\" for this \
                         connection in the worker's configuration",
                    ))
            }
            (Self::ReadOnly, None | Some(true)) | (Self::ReadWrite, Some(true)) => {
                Ok(Self::ReadOnly)
            }
            (Self::ReadWrite, None | Some(false)) => Ok(Self::ReadWrite),
        }
    }
}

/// What a database role may be or hold that no transaction confines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// It may do everything.
    Superuser,
    /// It runs programs on the server.
    ExecuteServerProgram,
    /// It reads files of the server.
    ReadServerFiles,
    /// It writes files of the server.
    WriteServerFiles,
    /// It makes and drops replication slots, which stand outside transactions.
    Replication,
    /// It may grant itself the three above, before PostgreSQL 16. Harmless where nothing can
    /// be granted, so it is looked at on read-write connections only.
    CreateRole,
}

impl Role {
    /// All of them, the most powerful first.
    pub const ALL: [Self; 6] = [
        Self::Superuser,
        Self::ExecuteServerProgram,
        Self::ReadServerFiles,
        Self::WriteServerFiles,
        Self::Replication,
        Self::CreateRole,
    ];

    /// The name in `allow_roles`: PostgreSQL's for a role, the keyword for an attribute.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Superuser => "superuser",
            Self::ExecuteServerProgram => "pg_execute_server_program",
            Self::ReadServerFiles => "pg_read_server_files",
            Self::WriteServerFiles => "pg_write_server_files",
            Self::Replication => "replication",
            Self::CreateRole => "createrole",
        }
    }

    /// The role of that name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == name)
    }
}

/// What is allowed on one connection.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    /// What statements may do.
    pub access: Access,
    /// What the database role may be, of what is refused otherwise.
    pub allow_roles: BTreeSet<Role>,
    /// What is not shown.
    pub guard: Guard,
}

impl Policy {
    /// Everything that its role may do.
    #[must_use]
    pub fn read_write() -> Self {
        Self { access: Access::ReadWrite, ..Self::default() }
    }

    /// The first of `held` that is not allowed here.
    pub(super) fn refuses(&self, held: &[Role]) -> Option<Role> {
        if self.allow_roles.contains(&Role::Superuser) {
            return None;
        }
        let matters = |role: &Role| *role != Role::CreateRole || self.access == Access::ReadWrite;
        Role::ALL
            .into_iter()
            .filter(matters)
            .find(|role| held.contains(role) && !self.allow_roles.contains(role))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_only_narrows() {
        let cases = [
            (Access::ReadOnly, None, Ok(Access::ReadOnly)),
            (Access::ReadOnly, Some(true), Ok(Access::ReadOnly)),
            (Access::ReadOnly, Some(false), Err(Code::ReadOnly)),
            (Access::ReadWrite, None, Ok(Access::ReadWrite)),
            (Access::ReadWrite, Some(true), Ok(Access::ReadOnly)),
            (Access::ReadWrite, Some(false), Ok(Access::ReadWrite)),
        ];
        for (access, readonly, expected) in cases {
            let got = access.narrowed(readonly).map_err(|failure| failure.code());
            assert_eq!(got, expected, "{access:?} {readonly:?}");
        }
    }

    #[test]
    fn roles_are_refused_unless_they_are_named() {
        let allowing = |roles: &[Role], access| Policy {
            access,
            allow_roles: roles.iter().copied().collect(),
            ..Policy::default()
        };
        let narrow = allowing(&[], Access::ReadOnly);
        assert_eq!(narrow.refuses(&[]), None);
        for role in Role::ALL {
            let expected = (role != Role::CreateRole).then_some(role);
            assert_eq!(narrow.refuses(&[role]), expected);
            assert_eq!(allowing(&[], Access::ReadWrite).refuses(&[role]), Some(role));
            assert_eq!(allowing(&[role], Access::ReadWrite).refuses(&[role]), None);
            assert_eq!(Role::parse(role.as_str()), Some(role));
        }
        let files = allowing(&[Role::ReadServerFiles], Access::ReadOnly);
        assert_eq!(files.refuses(&Role::ALL), Some(Role::Superuser));
        assert_eq!(allowing(&[Role::Superuser], Access::ReadOnly).refuses(&Role::ALL), None);
    }
}
