//! What getsockopt(2) tells about the other end of a Unix socket, and a process by descriptor.

#![allow(unsafe_code, reason = "SO_PEERGROUPS and SO_PEERPIDFD have no safe wrapper")]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Gid;

/// `include/uapi/asm-generic/socket.h`, since Linux 6.5; libc has it for some targets only.
const SO_PEERPIDFD: libc::c_int = 77;
/// `include/uapi/asm-generic/socket.h`, since Linux 6.16.
const SO_PASSRIGHTS: libc::c_int = 83;
/// NGROUPS_MAX of limits.h: the kernel lets no process have more.
const MAX_GROUPS: usize = 65536;

/// A process by descriptor: it cannot come to mean another process.
#[derive(Debug)]
pub(super) struct PidFd(OwnedFd);

/// What SO_PEERPIDFD answered.
#[derive(Debug)]
pub(super) enum PeerProcess {
    /// A descriptor. That it was given does not mean that the process lives: poll it.
    Known(PidFd),
    /// The process was reaped before the kernel could name it.
    Dead,
    /// The kernel is too old.
    Unsupported,
}

impl PidFd {
    /// A pidfd becomes readable when its process exits (pidfd_open(2)); this is the one test
    /// that is right for zombies and across PID namespaces.
    pub(super) fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(poll(&mut fds, Some(&now)), Ok(0))
    }

    pub(super) fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Returns when the process has exited, or when nobody can tell any more: both mean that
    /// it must not be trusted longer.
    pub(super) async fn exited(&self) {
        // SAFETY: the descriptor is borrowed from `self`, so it stays open, and stays the same,
        // until the registration is dropped at the end of this function.
        let registered =
            unsafe { AsyncFd::register_with_interest(self.0.as_fd(), Interest::READABLE) };
        if let Ok(fd) = registered {
            let _ = fd.readable().await;
        }
    }
}

/// SO_PEERPIDFD of a connected socket.
pub(super) fn peer_process(socket: BorrowedFd<'_>) -> io::Result<PeerProcess> {
    let mut fd: libc::c_int = -1;
    let mut len = socklen(size_of::<libc::c_int>());
    // SAFETY: the option writes one int, and both pointers are to live locals of that size.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut len,
        )
    };
    if answer == 0 && fd >= 0 {
        // SAFETY: the kernel made this descriptor for us just now.
        return Ok(PeerProcess::Known(PidFd(unsafe { OwnedFd::from_raw_fd(fd) })));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // Up to 6.15 a reaped peer is EINVAL or ESRCH; taking it for "unsupported" would switch
        // the check off in exactly the case that it is for.
        Some(libc::EINVAL | libc::ESRCH | libc::ENODATA) => Ok(PeerProcess::Dead),
        Some(libc::ENOPROTOOPT) => Ok(PeerProcess::Unsupported),
        _ => Err(error),
    }
}

/// SO_PEERGROUPS of a connected socket: the supplementary groups at connect(2).
pub(super) fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<Gid>> {
    let mut groups: Vec<libc::gid_t> = vec![0; 64];
    loop {
        let mut len = socklen(groups.len() * size_of::<libc::gid_t>());
        // SAFETY: the option writes at most `len` bytes to a live buffer of that size.
        let answer = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        let count = usize::try_from(len).unwrap_or(0) / size_of::<libc::gid_t>();
        if answer == 0 {
            groups.truncate(count);
            return Ok(groups.into_iter().map(Gid).collect());
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || count > MAX_GROUPS || count <= groups.len()
        {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

/// Forbids descriptors to ride along, where the kernel knows how. Set on the listener: accepted
/// sockets inherit it, and what was sent before accept(2) is covered too.
pub(super) fn refuse_rights(listener: BorrowedFd<'_>) {
    let off: libc::c_int = 0;
    // SAFETY: the option reads one int from a live local. A kernel without the option answers
    // ENOPROTOOPT and nothing changes.
    let _ = unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            (&raw const off).cast(),
            socklen(size_of::<libc::c_int>()),
        )
    };
}

fn socklen(bytes: usize) -> libc::socklen_t {
    libc::socklen_t::try_from(bytes).unwrap_or(libc::socklen_t::MAX)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_pair_of_ones_own_is_alive_and_has_ones_own_groups() {
        let (a, _b) = UnixStream::pair().unwrap();
        match peer_process(a.as_fd()).unwrap() {
            PeerProcess::Known(pidfd) => assert!(pidfd.is_alive()),
            PeerProcess::Unsupported => {}
            PeerProcess::Dead => panic!("this process is alive"),
        }
        let own = rustix::process::getgroups().unwrap();
        assert_eq!(peer_groups(a.as_fd()).unwrap().len(), own.len());
    }
}
