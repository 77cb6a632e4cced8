//! Why a peer may or may not do something.

use std::time::SystemTime;

use credbroker_proto::v1;

use super::optional_time;
use crate::Error;

/// A peer that need not be there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerDescription {
    /// Effective uid.
    pub uid: u32,
    /// Effective gid, if known.
    pub gid: Option<u32>,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Path of the program.
    pub exe: Option<String>,
    /// systemd unit.
    pub unit: Option<String>,
}

impl PeerDescription {
    pub(in crate::admin) fn into_wire(self) -> v1::PeerDescription {
        let Self { uid, gid, groups, exe, unit } = self;
        v1::PeerDescription { uid, gid, groups, exe, unit }
    }

    fn from_wire(peer: v1::PeerDescription) -> Self {
        let v1::PeerDescription { uid, gid, groups, exe, unit } = peer;
        Self { uid, gid, groups, exe, unit }
    }
}

/// Why a peer may or may not do something.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Explanation {
    /// Whether it is allowed now.
    pub allowed: bool,
    /// The grant that allows it. Empty: none.
    pub grant: String,
    /// Why it was refused then, of a refusal.
    pub reason: String,
    /// When it was refused, of a refusal.
    pub at: Option<SystemTime>,
    /// Who asked.
    pub peer: Option<PeerDescription>,
    /// The action.
    pub action: String,
    /// The connection.
    pub connection: String,
    /// The grants that were looked at, nearest first.
    pub considered: Vec<Considered>,
    /// What to change, one sentence each.
    pub advice: Vec<String>,
}

impl Explanation {
    pub(in crate::admin) fn from_wire(response: v1::ExplainAccessResponse) -> Result<Self, Error> {
        let considered = response.considered.into_iter();
        Ok(Self {
            allowed: response.allowed,
            grant: response.grant,
            reason: response.reason,
            at: optional_time("at", response.at)?,
            peer: response.peer.map(PeerDescription::from_wire),
            action: response.action,
            connection: response.connection,
            considered: considered
                .map(|grant| Considered { grant: grant.grant, missing: grant.missing })
                .collect(),
            advice: response.advice,
        })
    }
}

/// A grant that does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Considered {
    /// Its name.
    pub grant: String,
    /// What does not hold: `uid is 1000, the grant wants 10001`.
    pub missing: Vec<String>,
}
