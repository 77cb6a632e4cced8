//! Binding Unix sockets where nobody else can interfere, and accepting peers from them.
//!
//! A socket is bound under a umask that is right from its first moment on, never bound and then
//! chmod(2)ed, in a directory that was checked before. One peer that cannot be identified is
//! dropped; it never stops the listener. Nor does a full descriptor table: one descriptor is kept
//! in reserve, so that a newcomer can then be turned away rather than left waiting.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{Mode, unlink};
use rustix::net::sockopt::{socket_acceptconn, socket_type};
use rustix::net::{SocketAddrUnix, SocketFlags, SocketType, accept_with};
use rustix::process::umask;
use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use tracing::{debug, warn};

use super::Peer;
use super::pidfd::{PeerCred, PeerProcess, peer_cred, peer_groups, peer_process, refuse_rights};

/// sun_path of unix(7), less the terminating NUL.
const MAX_PATH: usize = 107;
const BACKLOG: i32 = 1024;
/// How long accept pauses when descriptors or memory have run out.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);
/// How many newcomers are turned away between two pauses.
const SHED_AT_ONCE: usize = 64;

/// Who may connect to a socket, beyond its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SocketAccess {
    /// Mode 0600.
    Owner,
    /// Mode 0660; the group is that of the setgid directory.
    Group,
}

/// A socket could not be bound.
#[derive(Debug, Error)]
pub enum BindError {
    /// sun_path would be truncated.
    #[error("{path}: a socket's path may have {MAX_PATH} bytes and this has {len}: choose a shorter broker.runtime_dir", path = .path.display())]
    PathTooLong {
        /// The whole path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// A system call failed.
    #[error("{path}: cannot bind the socket", path = .path.display())]
    Bind {
        /// The whole path.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A descriptor from the service manager is not what its name says.
    #[error(
        "the socket that the service manager passed as {name:?} is not a listening Unix {kind} socket: set {directive}= to a path",
        directive = .kind.directive()
    )]
    NotOurs {
        /// Its name.
        name: String,
        /// What it must be.
        kind: Kind,
    },
}

/// What a socket carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// SOCK_STREAM: bytes, and never a descriptor.
    Stream,
    /// SOCK_SEQPACKET: messages, with which descriptors may ride along.
    Packet,
}

impl Kind {
    const fn socket_type(self) -> SocketType {
        match self {
            Self::Stream => SocketType::STREAM,
            Self::Packet => SocketType::SEQPACKET,
        }
    }

    const fn directive(self) -> &'static str {
        match self {
            Self::Stream => "ListenStream",
            Self::Packet => "ListenSequentialPacket",
        }
    }

    fn prepare(self, listener: &OwnedFd) {
        match self {
            Self::Stream => refuse_rights(listener.as_fd()),
            Self::Packet => {}
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stream => "stream",
            Self::Packet => "packet",
        })
    }
}

/// A listening socket that is not served yet.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    /// What to unlink at the end; absent for sockets that the service manager owns.
    path: Option<PathBuf>,
}

impl Listener {
    /// Binds a stream socket at `path`, removing a stale one there first. The caller holds the
    /// lock of the runtime directory, so whatever lies at `path` belongs to no live broker.
    ///
    /// # Errors
    /// When the path is too long, or the kernel refuses.
    pub(crate) fn bind(path: &Path, access: SocketAccess) -> Result<Self, BindError> {
        Self::bind_kind(path, access, Kind::Stream)
    }

    /// The same for a packet socket, which lets descriptors ride along.
    ///
    /// # Errors
    /// As [`Listener::bind`].
    pub(crate) fn bind_packet(path: &Path, access: SocketAccess) -> Result<Self, BindError> {
        Self::bind_kind(path, access, Kind::Packet)
    }

    fn bind_kind(path: &Path, access: SocketAccess, kind: Kind) -> Result<Self, BindError> {
        let len = path.as_os_str().as_bytes().len();
        if len > MAX_PATH {
            return Err(BindError::PathTooLong { path: path.to_owned(), len });
        }
        let failed = |source: rustix::io::Errno| BindError::Bind {
            path: path.to_owned(),
            source: source.into(),
        };
        match unlink(path) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(errno) => return Err(failed(errno)),
        }
        let socket = rustix::net::socket_with(
            rustix::net::AddressFamily::UNIX,
            kind.socket_type(),
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .map_err(failed)?;
        kind.prepare(&socket);
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        let mask = match access {
            SocketAccess::Owner => Mode::from_raw_mode(0o177),
            SocketAccess::Group => Mode::from_raw_mode(0o117),
        };
        // umask is the whole process's: this runs before there are threads.
        let before = umask(mask);
        let bound = rustix::net::bind(&socket, &address);
        umask(before);
        bound.map_err(failed)?;
        rustix::net::listen(&socket, BACKLOG).map_err(failed)?;
        Ok(Self { socket, path: Some(path.to_owned()) })
    }

    /// Takes a stream socket that the service manager listens on already.
    ///
    /// # Errors
    /// When it is not a listening Unix stream socket.
    pub(crate) fn from_service_manager(socket: OwnedFd, name: &str) -> Result<Self, BindError> {
        Self::passed(socket, name, Kind::Stream)
    }

    /// The same for a packet socket.
    ///
    /// # Errors
    /// When it is not a listening Unix packet socket.
    pub(crate) fn packet_from_service_manager(
        socket: OwnedFd,
        name: &str,
    ) -> Result<Self, BindError> {
        Self::passed(socket, name, Kind::Packet)
    }

    fn passed(socket: OwnedFd, name: &str, kind: Kind) -> Result<Self, BindError> {
        let is_unix = rustix::net::getsockname(&socket)
            .is_ok_and(|address| SocketAddrUnix::try_from(address).is_ok());
        let is_kind = socket_type(&socket).is_ok_and(|found| found == kind.socket_type());
        let listens = socket_acceptconn(&socket).unwrap_or(false);
        if !(is_unix && is_kind && listens) {
            return Err(BindError::NotOurs { name: name.to_owned(), kind });
        }
        kind.prepare(&socket);
        Ok(Self { socket, path: None })
    }

    /// Starts accepting, inside a tokio runtime.
    ///
    /// # Errors
    /// When the socket cannot be registered with the runtime.
    pub(crate) fn serve(self) -> io::Result<Accepting> {
        // Whatever its type: of a listener only readiness and accept4(2) are used.
        let listener = StdListener::from(self.socket);
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        let reserve = Mutex::new(spare(listener.as_fd()));
        Ok(Accepting { listener, path: self.path, reserve })
    }
}

/// A listening socket that is being served.
#[derive(Debug)]
pub(crate) struct Accepting {
    listener: UnixListener,
    path: Option<PathBuf>,
    /// Any descriptor: given up for a moment to turn newcomers away when no other is left.
    reserve: Mutex<Option<OwnedFd>>,
}

/// A connection and who made it.
#[derive(Debug)]
pub(crate) struct Accepted {
    pub(crate) stream: UnixStream,
    pub(crate) peer: Peer,
}

impl Accepting {
    /// The next identified peer of a stream socket. Never fails: what goes wrong with one
    /// connection is logged and the connection dropped.
    pub(crate) async fn accept(&self) -> Accepted {
        loop {
            let (socket, peer) = self.next(drop).await;
            match UnixStream::from_std(socket.into()) {
                Ok(stream) => return Accepted { stream, peer },
                Err(error) => debug!(%error, "dropped a connection"),
            }
        }
    }

    /// The same, before it belongs to a runtime.
    pub(crate) async fn accept_socket(&self) -> (OwnedFd, Peer) {
        self.next(drop).await
    }

    /// The next identified peer of a packet socket, which is non-blocking and close-on-exec.
    ///
    /// `discard` gets the connections that are dropped. Descriptors may wait in them already, and
    /// closing those can block, which must not happen here.
    pub(crate) async fn accept_packet(&self, discard: impl FnMut(OwnedFd)) -> (OwnedFd, Peer) {
        self.next(discard).await
    }

    async fn next(&self, mut discard: impl FnMut(OwnedFd)) -> (OwnedFd, Peer) {
        let mut exhausted = false;
        loop {
            // Whatever its type: out of the runtime's register it is just a socket.
            let accepted = match self.listener.accept().await {
                Ok((stream, _)) => stream.into_std().map(OwnedFd::from),
                Err(error) => Err(error),
            };
            let Unidentified { why, error } = match accepted {
                Ok(socket) => match identify(socket.as_fd()) {
                    Ok(peer) => return (socket, peer),
                    Err(why) => {
                        discard(socket);
                        why
                    }
                },
                Err(error) => Unidentified { why: "it ended before it was accepted", error },
            };
            if !is_exhausted(&error) {
                exhausted = false;
                debug!(why, %error, "dropped a connection without an identity");
                continue;
            }
            // Most shortages are over in a moment; who waits through one that is not would wait
            // for nothing.
            let shed = if exhausted { self.turn_away(&mut discard) } else { 0 };
            // accept4(2) says so even when nobody waits: that is no news.
            if !exhausted || shed > 0 {
                warn!(%error, turned_away = shed, "cannot accept: out of descriptors or memory");
            }
            exhausted = true;
            tokio::time::sleep(EXHAUSTED_PAUSE).await;
        }
    }

    /// Closes connections that nobody can serve, with the descriptor kept for that. How many.
    fn turn_away(&self, mut discard: impl FnMut(OwnedFd)) -> usize {
        let mut reserve = self.reserve.lock().unwrap_or_else(PoisonError::into_inner);
        *reserve = None;
        let flags = SocketFlags::CLOEXEC;
        let accepted = (0..SHED_AT_ONCE).map_while(|_| accept_with(&self.listener, flags).ok());
        let refused = accepted.map(&mut discard).count();
        *reserve = spare(self.listener.as_fd());
        refused
    }
}

impl Drop for Accepting {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = unlink(path);
        }
    }
}

/// Why a connection has no identity.
#[derive(Debug)]
struct Unidentified {
    why: &'static str,
    error: io::Error,
}

/// Asks the kernel who connected. A peer that is dead already is nobody.
fn identify(socket: BorrowedFd<'_>) -> Result<Peer, Unidentified> {
    let no = |why| move |error| Unidentified { why, error };
    let PeerCred { uid, gid, pid } = peer_cred(socket).map_err(no("no SO_PEERCRED"))?;
    let groups = peer_groups(socket).map_err(no("no SO_PEERGROUPS"))?;
    let pidfd = match peer_process(socket).map_err(no("no SO_PEERPIDFD"))? {
        PeerProcess::Known(pidfd) if pidfd.is_alive() => Some(pidfd),
        PeerProcess::Known(_) | PeerProcess::Dead => {
            return Err(no("the process has exited")(io::ErrorKind::NotConnected.into()));
        }
        PeerProcess::Unsupported => None,
    };
    Ok(Peer::attested(uid, gid, groups, pid, pidfd))
}

/// A descriptor to give up later.
fn spare(of: BorrowedFd<'_>) -> Option<OwnedFd> {
    of.try_clone_to_owned().ok()
}

fn is_exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixStream as StdStream;

    use rustix::net::sockopt::socket_passcred;
    use rustix::net::{AddressFamily, connect, socket_with};

    use super::*;
    use crate::peer::{Uid, Unknown};

    fn listener(kind: Kind) -> (tempfile::TempDir, PathBuf, Listener) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = Listener::bind_kind(&path, SocketAccess::Owner, kind).unwrap();
        (dir, path, listener)
    }

    #[tokio::test]
    async fn a_packet_socket_says_who_connected() {
        let (_dir, path, listener) = listener(Kind::Packet);
        let accepting = listener.serve().unwrap();
        let flags = SocketFlags::CLOEXEC;
        let client = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        connect(&client, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        let (socket, peer) = accepting.accept_packet(drop).await;
        assert_eq!(peer.uid(), Uid::own());
        assert_eq!(socket_type(&socket).unwrap(), SocketType::SEQPACKET);
        let flags = rustix::fs::fcntl_getfl(&socket).unwrap();
        assert!(flags.contains(rustix::fs::OFlags::NONBLOCK));
        let flags = rustix::io::fcntl_getfd(&socket).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        assert!(!socket_passcred(&socket).unwrap());
    }

    #[tokio::test]
    async fn the_program_and_the_unit_of_a_peer_are_read_when_asked_for() {
        let (_dir, path, listener) = listener(Kind::Stream);
        let accepting = listener.serve().unwrap();
        let (_one, _two) = (StdStream::connect(&path).unwrap(), StdStream::connect(&path).unwrap());
        let (peer, again) = (accepting.accept().await.peer, accepting.accept().await.peer);
        if !crate::peer::pidfd_is_available() {
            assert_eq!(peer.exe(), Err(Unknown::NoPidfd));
            assert!(!peer.same_process(&again));
            return;
        }
        assert_eq!(peer.without_process().exe(), Err(Unknown::NoPidfd), "not asked for yet");
        let own = peer.exe().unwrap();
        assert_eq!(Ok(own), again.exe());
        assert_eq!(Ok(own), peer.without_process().exe(), "what was read stays");
        // This test is in no system service, or there is none to be told from.
        assert!(matches!(peer.unit(), Ok(None) | Err(Unknown::NoSystemSlice)));
        assert!(peer.same_process(&again) && peer.same_process(&peer));
        assert!(!peer.same_process(&again.without_process()));
    }

    #[test]
    fn a_passed_socket_must_be_of_its_kind() {
        let (_dir, _path, stream) = listener(Kind::Stream);
        let (_dir, _path, packet) = listener(Kind::Packet);
        let wrong = Listener::packet_from_service_manager(stream.socket, "packet").unwrap_err();
        assert_eq!(
            wrong.to_string(),
            "the socket that the service manager passed as \"packet\" is not a listening Unix packet socket: set ListenSequentialPacket= to a path"
        );
        assert!(Listener::from_service_manager(packet.socket, "broker").is_err());
    }

    #[tokio::test]
    async fn who_cannot_be_served_is_turned_away_and_the_reserve_is_kept() {
        let (_dir, path, listener) = listener(Kind::Stream);
        let accepting = listener.serve().unwrap();
        let mut clients: Vec<_> = (0..3).map(|_| StdStream::connect(&path).unwrap()).collect();
        assert_eq!(accepting.turn_away(drop), 3);
        for client in &mut clients {
            assert_eq!(client.read(&mut [0]).unwrap(), 0, "hung up");
        }
        assert!(accepting.reserve.lock().unwrap().is_some());
        let _client = StdStream::connect(&path).unwrap();
        assert_eq!(accepting.accept().await.peer.uid(), Uid::own());
    }
}
