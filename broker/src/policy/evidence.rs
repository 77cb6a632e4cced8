//! What a selector looks at: the same questions, whether a peer is here or an operator describes
//! one to ask what it could do.

#![forbid(unsafe_code)]

use std::fmt;
use std::path::PathBuf;

use crate::peer::{Gid, Peer, Program, Uid, Unit, Unknown};

/// Answers what grants ask. It proves nothing: a [`super::Grant`] is made for a [`Peer`] only.
pub trait Evidence {
    /// Effective uid.
    fn uid(&self) -> Uid;
    /// Effective gid, if it is known.
    fn gid(&self) -> Option<Gid>;
    /// Supplementary groups.
    fn groups(&self) -> &[Gid];
    /// Whether it runs this program.
    ///
    /// # Errors
    /// Why that is not known.
    fn runs(&self, program: &Program) -> Result<bool, Unknown>;
    /// The system service that it belongs to, if to any.
    ///
    /// # Errors
    /// Why that is not known.
    fn unit(&self) -> Result<Option<&Unit>, Unknown>;
}

impl Evidence for Peer {
    fn uid(&self) -> Uid {
        self.uid()
    }

    fn gid(&self) -> Option<Gid> {
        Some(self.gid())
    }

    fn groups(&self) -> &[Gid] {
        self.groups()
    }

    fn runs(&self, program: &Program) -> Result<bool, Unknown> {
        self.exe().map(|running| program.is(running))
    }

    fn unit(&self) -> Result<Option<&Unit>, Unknown> {
        self.unit()
    }
}

/// A peer that need not be there, as an operator describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// Effective uid.
    pub uid: Uid,
    /// Effective gid, if it is given.
    pub gid: Option<Gid>,
    /// Supplementary groups.
    pub groups: Vec<Gid>,
    /// Path of the program, if it is given.
    pub exe: Option<PathBuf>,
    /// The system service, if it is given.
    pub unit: Option<Unit>,
}

impl Evidence for Described {
    fn uid(&self) -> Uid {
        self.uid
    }

    fn gid(&self) -> Option<Gid> {
        self.gid
    }

    fn groups(&self) -> &[Gid] {
        &self.groups
    }

    /// By its path: there is no process to compare files with.
    fn runs(&self, program: &Program) -> Result<bool, Unknown> {
        self.exe.as_deref().map(|path| path == program.path()).ok_or(Unknown::NotGiven)
    }

    fn unit(&self) -> Result<Option<&Unit>, Unknown> {
        self.unit.as_ref().map(Some).ok_or(Unknown::NotGiven)
    }
}

/// What a peer lacks to be one that a selector means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missing {
    /// The selector names nobody.
    Anybody,
    /// Another uid.
    Uid {
        /// The peer's.
        is: Uid,
        /// The selector's.
        wants: Uid,
    },
    /// Another gid, or one that is not known.
    Gid {
        /// The peer's.
        is: Option<Gid>,
        /// The selector's.
        wants: Gid,
    },
    /// A group that the peer is not in, neither as its gid nor beside it.
    Group {
        /// The selector's.
        wants: Gid,
    },
    /// An id that stands for everybody who is not mapped.
    Unmapped,
    /// Another program, or one that is not known.
    Exe {
        /// The selector's.
        wants: Program,
        /// Why it is not known, if it is not.
        unknown: Option<Unknown>,
    },
    /// Another service, or one that is not known.
    Unit {
        /// The peer's, if it is known and there is one.
        is: Option<Unit>,
        /// The selector's.
        wants: Unit,
        /// Why it is not known, if it is not.
        unknown: Option<Unknown>,
    },
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anybody => f.write_str("the grant names nobody"),
            Self::Uid { is, wants } => write!(f, "uid is {is}, the grant wants {wants}"),
            Self::Gid { is: Some(is), wants } => write!(f, "gid is {is}, the grant wants {wants}"),
            Self::Gid { is: None, wants } => {
                write!(f, "gid is not known: it was not given; the grant wants {wants}")
            }
            Self::Group { wants } => write!(f, "is not in group {wants}, which the grant wants"),
            Self::Unmapped => f.write_str(
                "the grant wants an id that stands for everybody who is not mapped, which is never matched",
            ),
            Self::Exe { wants, unknown: None } => {
                write!(f, "runs another program, the grant wants {wants}")
            }
            Self::Exe { wants, unknown: Some(why) } => {
                write!(f, "exe is not known: {why}; the grant wants {wants}")
            }
            Self::Unit { wants, unknown: Some(why), .. } => {
                write!(f, "unit is not known: {why}; the grant wants {wants}")
            }
            Self::Unit { is: Some(is), wants, unknown: None } => {
                write!(f, "unit is {is}, the grant wants {wants}")
            }
            Self::Unit { is: None, wants, unknown: None } => {
                write!(f, "is in no system service, the grant wants unit {wants}")
            }
        }
    }
}
