//! Where a connection's server is: one place, or several that are tried in order.

#![forbid(unsafe_code)]

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use super::DEFAULT_PORT;
use crate::peer::Uid;

/// The places of a server, at least one. They are all of one kind, so that what a connection
/// promises holds wherever it leads.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Hosts {
    Tcp(Vec<TcpHost>),
    Unix {
        sockets: Vec<UnixSocket>,
        /// The key `peer_user`: whose the server must be.
        server: Option<Uid>,
    },
}

/// A name or an address, and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TcpHost {
    pub(crate) host: String,
    pub(crate) port: u16,
}

/// The directory of a Unix socket, and the port that its file name carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UnixSocket {
    pub(crate) directory: PathBuf,
    pub(crate) port: u16,
}

impl UnixSocket {
    /// The socket's file, as PostgreSQL names it (19.3.1).
    pub(crate) fn path(&self) -> PathBuf {
        self.directory.join(format!(".s.PGSQL.{}", self.port))
    }
}

/// As in a URL: `db.internal:5432`, `[::1]:5432`.
impl fmt::Display for TcpHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl TcpHost {
    /// Whether it is this machine, as far as its name says.
    pub(super) fn is_here(&self) -> bool {
        match self.host.parse::<IpAddr>() {
            Ok(address) => address.is_loopback(),
            // Whether it is, shows when it was dialled.
            Err(_name) => self.host.eq_ignore_ascii_case("localhost"),
        }
    }
}

impl Hosts {
    /// Whether the server is at this place, as a caller describes it.
    pub(super) fn are_at(&self, host: &str, port: Option<u16>) -> bool {
        let port = port.unwrap_or(DEFAULT_PORT);
        match self {
            // Host names are compared as DNS does (RFC 4343).
            Self::Tcp(hosts) => {
                hosts.iter().any(|one| one.host.eq_ignore_ascii_case(host) && one.port == port)
            }
            Self::Unix { sockets, .. } => {
                sockets.iter().any(|one| one.directory.as_os_str() == host && one.port == port)
            }
        }
    }

    /// The destination as libpq's URL has it (34.1.1.2).
    pub(super) fn url(&self, who: &str, database: &str) -> String {
        match self {
            Self::Tcp(hosts) => {
                let hosts: Vec<String> = hosts.iter().map(ToString::to_string).collect();
                format!("postgresql://{who}@{}/{database}", hosts.join(","))
            }
            Self::Unix { sockets, .. } => {
                let directories: Vec<String> =
                    sockets.iter().map(|one| one.directory.display().to_string()).collect();
                let port = sockets.first().map_or(DEFAULT_PORT, |one| one.port);
                format!("postgresql://{who}@/{database}?host={}&port={port}", directories.join(","))
            }
        }
    }
}
