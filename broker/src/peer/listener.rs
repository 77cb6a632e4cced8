//! Binding Unix sockets where nobody else can interfere, and accepting peers from them.
//!
//! A socket is bound under a umask that is right from its first moment on, never bound and then
//! chmod(2)ed, in a directory that was checked before. One peer that cannot be identified is
//! dropped; it never stops the listener.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, unlink};
use rustix::net::sockopt::{set_socket_passcred, socket_acceptconn, socket_type};
use rustix::net::{SocketAddrUnix, SocketType};
use rustix::process::umask;
use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use tracing::{debug, warn};

use super::pidfd::{PeerProcess, peer_groups, peer_process, refuse_rights};
use super::{Gid, Peer, Uid};

/// sun_path of unix(7), less the terminating NUL.
const MAX_PATH: usize = 107;
const BACKLOG: i32 = 1024;
/// How long accept pauses when descriptors or memory have run out.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);

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
        "the socket that the service manager passed as {name:?} is not a listening Unix {kind} socket: set {directive} to a path"
    )]
    NotOurs {
        /// Its name.
        name: String,
        /// What it ought to be.
        kind: &'static str,
        /// The directive that makes one.
        directive: &'static str,
    },
}

/// A listening socket that is not served yet.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    /// What to unlink at the end; absent for sockets that the service manager owns.
    path: Option<PathBuf>,
}

impl Listener {
    /// Binds `path`, removing a stale socket there first. The caller holds the lock of the
    /// runtime directory, so whatever lies at `path` belongs to no live broker.
    ///
    /// # Errors
    /// When the path is too long, or the kernel refuses.
    pub(crate) fn bind(path: &Path, access: SocketAccess) -> Result<Self, BindError> {
        let listener = Self::bind_as(path, access, SocketType::STREAM)?;
        refuse_rights(listener.socket.as_fd());
        Ok(listener)
    }

    /// The same for a SOCK_SEQPACKET socket, on which descriptors may ride along.
    ///
    /// # Errors
    /// When the path is too long, or the kernel refuses.
    pub(crate) fn bind_packet(path: &Path, access: SocketAccess) -> Result<Self, BindError> {
        Self::bind_as(path, access, SocketType::SEQPACKET)
    }

    fn bind_as(path: &Path, access: SocketAccess, kind: SocketType) -> Result<Self, BindError> {
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
            kind,
            rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK,
            None,
        )
        .map_err(failed)?;
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

    /// Takes a socket that the service manager listens on already.
    ///
    /// # Errors
    /// When it is not a listening Unix stream socket.
    pub(crate) fn from_service_manager(socket: OwnedFd, name: &str) -> Result<Self, BindError> {
        let listener = Self::passed_as(socket, name, SocketType::STREAM)?;
        refuse_rights(listener.socket.as_fd());
        Ok(listener)
    }

    /// The same for a SOCK_SEQPACKET socket.
    ///
    /// # Errors
    /// When it is not a listening Unix seqpacket socket.
    pub(crate) fn packet_from_service_manager(
        socket: OwnedFd,
        name: &str,
    ) -> Result<Self, BindError> {
        let listener = Self::passed_as(socket, name, SocketType::SEQPACKET)?;
        // PassCredentials= would have the kernel add a control message to every packet.
        let _ = set_socket_passcred(&listener.socket, false);
        Ok(listener)
    }

    fn passed_as(socket: OwnedFd, name: &str, wanted: SocketType) -> Result<Self, BindError> {
        let is_unix = rustix::net::getsockname(&socket)
            .is_ok_and(|address| SocketAddrUnix::try_from(address).is_ok());
        let is_wanted = socket_type(&socket).is_ok_and(|kind| kind == wanted);
        let listens = socket_acceptconn(&socket).unwrap_or(false);
        if !(is_unix && is_wanted && listens) {
            let (kind, directive) = match wanted {
                SocketType::SEQPACKET => ("seqpacket", "ListenSequentialPacket="),
                _ => ("stream", "ListenStream="),
            };
            return Err(BindError::NotOurs { name: name.to_owned(), kind, directive });
        }
        Ok(Self { socket, path: None })
    }

    /// Starts accepting, inside a tokio runtime.
    ///
    /// # Errors
    /// When the socket cannot be registered with the runtime.
    pub(crate) fn serve(self) -> io::Result<Accepting> {
        let listener = StdListener::from(self.socket);
        listener.set_nonblocking(true)?;
        Ok(Accepting { listener: UnixListener::from_std(listener)?, path: self.path })
    }
}

/// A listening socket that is being served.
#[derive(Debug)]
pub(crate) struct Accepting {
    listener: UnixListener,
    path: Option<PathBuf>,
}

/// A connection and who made it.
#[derive(Debug)]
pub(crate) struct Accepted {
    pub(crate) stream: UnixStream,
    pub(crate) peer: Peer,
}

impl Accepting {
    /// The next identified peer. Never fails: what goes wrong with one connection is logged and
    /// the connection dropped.
    pub(crate) async fn accept(&self) -> Accepted {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => match identify(&stream) {
                    Ok(peer) => return Accepted { stream, peer },
                    Err(Unidentified(why)) => {
                        debug!(why, "dropped a connection without an identity")
                    }
                },
                Err(error) if is_exhausted(&error) => {
                    warn!(%error, "cannot accept: out of descriptors or memory");
                    tokio::time::sleep(EXHAUSTED_PAUSE).await;
                }
                Err(error) => debug!(%error, "a connection ended before it was accepted"),
            }
        }
    }

    /// The same for a SOCK_SEQPACKET socket: the connection, non-blocking, and who made it.
    ///
    /// `discard` gets the connections that are dropped. Descriptors may wait in them already, and
    /// closing those can block, which must not happen here.
    pub(crate) async fn accept_packet(&self, mut discard: impl FnMut(OwnedFd)) -> (OwnedFd, Peer) {
        loop {
            match self.listener.accept().await {
                // What is accepted is no stream: it is only registered and identified as one.
                Ok((stream, _)) => {
                    let peer = identify(&stream);
                    let Ok(socket) = stream.into_std().map(OwnedFd::from) else { continue };
                    match peer {
                        Ok(peer) => return (socket, peer),
                        Err(Unidentified(why)) => {
                            debug!(why, "dropped a connection without an identity");
                            discard(socket);
                        }
                    }
                }
                Err(error) if is_exhausted(&error) => {
                    warn!(%error, "cannot accept: out of descriptors or memory");
                    tokio::time::sleep(EXHAUSTED_PAUSE).await;
                }
                Err(error) => debug!(%error, "a connection ended before it was accepted"),
            }
        }
    }
}

impl Drop for Accepting {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = unlink(path);
        }
    }
}

#[derive(Debug)]
struct Unidentified(&'static str);

/// Asks the kernel who connected. A peer that is dead already is nobody.
fn identify(stream: &UnixStream) -> Result<Peer, Unidentified> {
    let fd = stream.as_fd();
    let cred = stream.peer_cred().map_err(|_error| Unidentified("no SO_PEERCRED"))?;
    let groups = peer_groups(fd).map_err(|_error| Unidentified("no SO_PEERGROUPS"))?;
    let pidfd = match peer_process(fd).map_err(|_error| Unidentified("no SO_PEERPIDFD"))? {
        PeerProcess::Known(pidfd) if pidfd.is_alive() => Some(pidfd),
        PeerProcess::Known(_) | PeerProcess::Dead => {
            return Err(Unidentified("the process has exited"));
        }
        PeerProcess::Unsupported => None,
    };
    // 0 is what a sibling PID namespace looks like.
    let pid = cred.pid().filter(|pid| *pid > 0);
    Ok(Peer::attested(Uid(cred.uid()), Gid(cred.gid()), groups, pid, pidfd))
}

fn is_exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}
