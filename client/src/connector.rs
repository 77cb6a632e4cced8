//! Connects to a socket of the broker's and checks who serves it.
//!
//! Invariant: a [`Verified`] socket exists only after the kernel has named the server and
//! that uid was found among the trusted ones, so nothing is ever sent to anybody else.
//! SO_PEERCRED names the process that called listen(2): under socket activation that is
//! systemd, uid 0 (man unix(7)).

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::time::sleep;
use tokio_seqpacket::UnixSeqpacket;

/// Group and others: whoever may write to the directory can put a socket of their own there.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// Every uid that this user namespace has no name for: one stranger looks like another.
const OVERFLOW_UID: u32 = 65534;

/// Between two attempts at a listener whose backlog is full.
const BACKLOG_WAIT: Duration = Duration::from_millis(5);

/// Whom to accept as the broker.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Trust {
    /// uid 0, our own, and the owner of the socket in a directory that others cannot write.
    #[default]
    Usual,
    /// These and nobody else.
    Only(BTreeSet<u32>),
}

impl Trust {
    fn uids(&self, own: u32, socket_owner: Option<u32>) -> BTreeSet<u32> {
        match self {
            Self::Usual => {
                let known = |uid: &u32| *uid != OVERFLOW_UID;
                [0, own].into_iter().chain(socket_owner).filter(known).collect()
            }
            Self::Only(uids) => uids.clone(),
        }
    }
}

/// Knows one socket and whom to accept behind it.
#[derive(Clone, Debug)]
pub(crate) struct Connector {
    socket: PathBuf,
    trust: Trust,
}

/// A connected socket whose server is trusted.
#[derive(Debug)]
pub(crate) struct Verified<S>(S);

impl<S> Verified<S> {
    pub(crate) fn into_inner(self) -> S {
        self.0
    }
}

/// Why there is no verified socket. It is found again in the source chain of whatever tonic
/// makes of it, hence `Clone`.
#[derive(Clone, Debug, Error)]
pub(crate) enum Failure {
    #[error("cannot connect to {}", socket.display())]
    Io {
        socket: PathBuf,
        #[source]
        source: Arc<io::Error>,
    },
    #[error("{} is served by uid {seen}", socket.display())]
    Untrusted { socket: PathBuf, seen: u32, trusted: BTreeSet<u32> },
}

impl Connector {
    pub(crate) fn new(socket: PathBuf, trust: Trust) -> Self {
        Self { socket, trust }
    }

    /// Connects to a SOCK_STREAM socket.
    pub(crate) async fn connect(&self) -> Result<Verified<UnixStream>, Failure> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| self.io(error))?;
        let seen = stream.peer_cred().map_err(|error| self.io(error))?.uid();
        self.verify(stream, seen)
    }

    /// Connects to a SOCK_SEQPACKET socket.
    pub(crate) async fn connect_packets(&self) -> Result<Verified<UnixSeqpacket>, Failure> {
        let socket = dial_packets(&self.socket).await.map_err(|error| self.io(error))?;
        let seen = socket.peer_cred().map_err(|error| self.io(error))?.uid();
        self.verify(socket, seen)
    }

    fn verify<S>(&self, socket: S, seen: u32) -> Result<Verified<S>, Failure> {
        let own = rustix::process::geteuid().as_raw();
        let trusted = self.trust.uids(own, owner_to_trust(&self.socket));
        if trusted.contains(&seen) {
            Ok(Verified(socket))
        } else {
            Err(Failure::Untrusted { socket: self.socket.clone(), seen, trusted })
        }
    }

    fn io(&self, error: io::Error) -> Failure {
        Failure::Io { socket: self.socket.clone(), source: Arc::new(error) }
    }
}

/// `UnixSeqpacket::connect` takes EAGAIN, which says that the backlog is full, for a connection
/// that is on its way; what it then gives is connected to nobody (man connect(2)).
async fn dial_packets(path: &Path) -> io::Result<UnixSeqpacket> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    loop {
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return UnixSeqpacket::try_from(socket),
            Err(Errno::AGAIN) => sleep(BACKLOG_WAIT).await,
            Err(error) => return Err(error.into()),
        }
    }
}

/// The owner of the socket, unless somebody else could have put it there.
fn owner_to_trust(socket: &Path) -> Option<u32> {
    let directory = fs::metadata(socket.parent()?).ok()?;
    let owner = fs::symlink_metadata(socket).ok()?.uid();
    let directory_is_theirs = directory.uid() == 0 || directory.uid() == owner;
    (directory_is_theirs && directory.mode() & WRITABLE_BY_OTHERS == 0).then_some(owner)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, chown};

    use super::*;

    fn set(uids: &[u32]) -> BTreeSet<u32> {
        uids.iter().copied().collect()
    }

    #[test]
    fn usual_trust_is_root_ourselves_and_the_owner() {
        assert_eq!(Trust::Usual.uids(1000, Some(71)), set(&[0, 71, 1000]));
        assert_eq!(Trust::Usual.uids(1000, None), set(&[0, 1000]));
    }

    #[test]
    fn the_uid_of_strangers_is_trusted_only_by_name() {
        assert_eq!(Trust::Usual.uids(65534, Some(65534)), set(&[0]));
        assert_eq!(Trust::Only(set(&[65534])).uids(1000, None), set(&[65534]));
    }

    #[test]
    fn a_named_set_replaces_the_usual_one() {
        assert_eq!(Trust::Only(set(&[71])).uids(1000, Some(1000)), set(&[71]));
        assert_eq!(Trust::Only(set(&[])).uids(0, Some(0)), set(&[]));
    }

    #[test]
    fn the_owner_counts_only_in_a_directory_that_others_cannot_write() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("broker.sock");
        let own = rustix::process::geteuid().as_raw();
        assert_eq!(owner_to_trust(&socket), None, "no socket");

        fs::write(&socket, "").unwrap();
        let decide = |mode| {
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
            owner_to_trust(&socket)
        };
        assert_eq!(decide(0o755), Some(own));
        assert_eq!(decide(0o2750), Some(own));
        assert_eq!(decide(0o770), None, "group-writable");
        assert_eq!(decide(0o1777), None, "anybody may create a socket here");
    }

    #[test]
    fn the_owner_does_not_count_in_the_directory_of_a_third_party() {
        if !rustix::process::geteuid().is_root() {
            return; // only root can give files away
        }
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("broker.sock");
        fs::write(&socket, "").unwrap();
        chown(&socket, Some(71), None).unwrap();
        assert_eq!(owner_to_trust(&socket), Some(71), "root's directory");
        chown(dir.path(), Some(72), None).unwrap();
        assert_eq!(owner_to_trust(&socket), None);
    }
}
