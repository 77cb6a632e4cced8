//! What the broker answers, in types of our own.
//!
//! Each `from_wire` is where an answer is checked: what comes out has every field that the
//! contract promises.

use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime};

use credbroker_proto::v1;

use crate::{Bind, Error};

/// What a handle's holder may know of it. Never the token.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HandleInfo {
    /// Public identifier: `hdl_` and 16 characters of lower-case base32.
    pub id: String,
    /// Name of the connection.
    pub connection: String,
    /// uid of the holder.
    pub holder: u32,
    /// uid that alone may use it, if not the holder.
    pub redeemer: Option<u32>,
    /// When it was issued.
    pub issued: SystemTime,
    /// When it dies unless renewed.
    pub expires: SystemTime,
    /// No renewal moves `expires` past this.
    pub never_after: Option<SystemTime>,
    /// Sessions that may still be opened; `None` is no limit.
    pub uses_left: Option<u32>,
    /// For whom it was issued.
    pub subject: String,
    /// What it is for.
    pub purpose: String,
    /// Sessions open now.
    pub sessions: u32,
    /// How it is tied to its holder.
    pub bind: Bind,
}

impl HandleInfo {
    pub(crate) fn from_wire(handle: Option<v1::Handle>) -> Result<Self, Error> {
        let handle = handle.ok_or_else(|| Error::protocol("it has no handle"))?;
        let bind = Bind::from_wire(handle.bind());
        Ok(Self {
            id: handle.id,
            connection: handle.connection,
            holder: handle.holder,
            redeemer: handle.redeemer,
            issued: time("issued", handle.issued)?,
            expires: time("expires", handle.expires)?,
            never_after: handle.never_after.map(|at| time("never_after", Some(at))).transpose()?,
            uses_left: handle.uses_left,
            subject: handle.subject,
            purpose: handle.purpose,
            sessions: handle.sessions,
            bind,
        })
    }

    /// How long it has to live at `now`; zero once it is dead.
    pub(crate) fn remaining(&self, now: SystemTime) -> Duration {
        self.expires.duration_since(now).unwrap_or_default()
    }

    /// Whether no renewal can move its expiry any more.
    pub(crate) fn is_at_its_last(&self) -> bool {
        self.never_after.is_some_and(|bound| self.expires >= bound)
    }
}

/// The caller's live handles.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HandleList {
    /// Oldest first, at most 1000.
    pub handles: Vec<HandleInfo>,
    /// Whether there are more.
    pub truncated: bool,
}

/// What becomes of a handle.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HandleEvent {
    /// A quarter of its life is left, unless it is renewed.
    Expiring {
        /// When it dies.
        expires: SystemTime,
    },
    /// Its connection has a new credential, which new sessions use.
    Rotated {
        /// Its version.
        credential_version: u64,
    },
    /// It is gone. The stream ends after this.
    Ended {
        /// `revoked`, `expired`, `holder_exited`, `suspended`, `reloaded` or `draining`.
        reason: String,
    },
}

impl HandleEvent {
    /// `None` for an event that this version does not know.
    pub(crate) fn from_wire(event: v1::HandleEvent) -> Option<Result<Self, Error>> {
        Some(Ok(match event.event? {
            v1::handle_event::Event::Expiring(at) => match time("expires", at.expires) {
                Ok(expires) => Self::Expiring { expires },
                Err(error) => return Some(Err(error)),
            },
            v1::handle_event::Event::Rotated(v1::HandleRotated { credential_version }) => {
                Self::Rotated { credential_version }
            }
            v1::handle_event::Event::Ended(v1::HandleEnded { reason }) => Self::Ended { reason },
        }))
    }
}

/// Where to use a handle.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct EndpointInfo {
    /// Absolute path of the directory with the door's socket; what libpq calls host.
    pub door: PathBuf,
    /// The database to ask for.
    pub database: String,
    /// The user name to give: the connection's name.
    pub user: String,
}

impl EndpointInfo {
    pub(crate) fn from_wire(
        endpoint: Option<v1::Endpoint>,
        runtime_dir: &Path,
    ) -> Result<Self, Error> {
        let endpoint = endpoint.ok_or_else(|| Error::protocol("it has no endpoint"))?;
        let door = Path::new(&endpoint.door);
        // A door elsewhere would have tokens sent to a socket whose server nobody checked.
        if !door.components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(Error::protocol("the door is not below the runtime directory"));
        }
        Ok(Self { door: runtime_dir.join(door), database: endpoint.database, user: endpoint.user })
    }
}

/// A connection that the caller may use, masked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConnectionInfo {
    /// Its name.
    pub name: String,
    /// Its type: `postgresql`.
    pub kind: String,
    /// Where it leads, with user and password masked.
    pub target: String,
    /// What the caller may do with it: `list`, `issue`, `open`, `ambient`.
    pub may: Vec<String>,
    /// Whether the broker holds a credential for it.
    pub has_credential: bool,
    /// Where its door is.
    pub endpoint: Option<EndpointInfo>,
}

impl ConnectionInfo {
    pub(crate) fn from_wire(connection: v1::Connection, runtime_dir: &Path) -> Result<Self, Error> {
        let endpoint = connection
            .endpoint
            .map(|endpoint| EndpointInfo::from_wire(Some(endpoint), runtime_dir))
            .transpose()?;
        Ok(Self {
            name: connection.name,
            kind: connection.r#type,
            target: connection.target,
            may: connection.may,
            has_credential: connection.has_credential,
            endpoint,
        })
    }
}

/// The caller as the kernel describes it to the broker.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WhoAmI {
    /// Effective uid when it connected.
    pub uid: u32,
    /// Effective gid when it connected.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Process id; `None` where the broker lives in another PID namespace.
    pub pid: Option<u32>,
    /// Names of the grants whose selector matches.
    pub grants: Vec<String>,
    /// Whether the caller may use the admin sockets.
    pub operator: bool,
    /// What the caller should know about its own isolation, one sentence each.
    pub warnings: Vec<String>,
    /// Version of the broker.
    pub broker_version: String,
}

impl From<v1::WhoAmIResponse> for WhoAmI {
    fn from(response: v1::WhoAmIResponse) -> Self {
        Self {
            uid: response.uid,
            gid: response.gid,
            groups: response.groups,
            pid: response.pid,
            grants: response.grants,
            operator: response.operator,
            warnings: response.warnings,
            broker_version: response.broker_version,
        }
    }
}

pub(crate) fn time(field: &str, at: Option<prost_types::Timestamp>) -> Result<SystemTime, Error> {
    at.and_then(|at| SystemTime::try_from(at).ok())
        .ok_or_else(|| Error::protocol(format!("the time {field} is missing or wrong")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire() -> v1::Handle {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        v1::Handle { id: "hdl_a".into(), issued: at(100), expires: at(160), ..Default::default() }
    }

    #[test]
    fn a_handle_without_its_times_is_no_handle() {
        assert!(HandleInfo::from_wire(Some(wire())).is_ok());
        for broken in [
            None,
            Some(v1::Handle { issued: None, ..wire() }),
            Some(v1::Handle { expires: None, ..wire() }),
        ] {
            assert!(matches!(HandleInfo::from_wire(broken), Err(Error::Protocol { .. })));
        }
    }

    #[test]
    fn what_remains_is_never_negative() {
        let info = HandleInfo::from_wire(Some(wire())).unwrap();
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(info.remaining(at(130)), Duration::from_secs(30));
        assert_eq!(info.remaining(at(200)), Duration::ZERO);
    }

    #[test]
    fn the_last_expiry_is_known() {
        let mut info = HandleInfo::from_wire(Some(wire())).unwrap();
        assert!(!info.is_at_its_last());
        info.never_after = Some(info.expires + Duration::from_secs(1));
        assert!(!info.is_at_its_last());
        info.never_after = Some(info.expires);
        assert!(info.is_at_its_last());
    }

    #[test]
    fn a_door_stays_below_the_runtime_directory() {
        let door = |door: &str| {
            let endpoint = v1::Endpoint { door: door.into(), ..Default::default() };
            EndpointInfo::from_wire(Some(endpoint), Path::new("/run/credbroker"))
        };
        assert_eq!(door("postgres").unwrap().door, Path::new("/run/credbroker/postgres"));
        for wrong in ["/tmp", "../tmp", "postgres/../..", "./postgres"] {
            assert!(matches!(door(wrong), Err(Error::Protocol { .. })), "{wrong}");
        }
    }
}
