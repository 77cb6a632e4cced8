//! What getsockopt(2) tells about the other end of a Unix socket, and a process by descriptor.

#![allow(
    unsafe_code,
    reason = "SO_PEERCRED with pid 0, SO_PEERGROUPS and SO_PEERPIDFD have no safe wrapper"
)]

use std::io::{self, Read as _};
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{fstat, fstatfs};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{Gid, Uid};

/// `include/uapi/asm-generic/socket.h`, since Linux 6.5; libc has it for some targets only.
const SO_PEERPIDFD: libc::c_int = 77;
/// `include/uapi/asm-generic/socket.h`, since Linux 6.16.
const SO_PASSRIGHTS: libc::c_int = 83;
/// NGROUPS_MAX of limits.h: the kernel lets no process have more.
const MAX_GROUPS: usize = 65536;
/// `include/uapi/linux/magic.h`, since Linux 6.9: pidfds have inode numbers of their own.
const PIDFS_MAGIC: u64 = 0x5049_4446;
/// An fdinfo of a pidfd has a handful of short lines.
const MAX_FDINFO: u64 = 4096;

/// SO_PEERCRED of a connected socket: who called connect(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PeerCred {
    pub(super) uid: Uid,
    pub(super) gid: Gid,
    /// Absent when the process lives in a PID namespace that this process cannot see into,
    /// which the kernel tells as 0.
    pub(super) pid: Option<i32>,
}

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

    /// The process id by which this process's /proc knows it, while it lives: `None` where that
    /// /proc is of a PID namespace that does not see it. SO_PEERCRED numbers by the namespace
    /// of the reader instead, whose /proc need not be the one that is mounted.
    pub(super) fn pid_in_proc(&self) -> io::Result<Option<i32>> {
        let fd = self.0.as_raw_fd();
        let file = std::fs::File::open(format!("/proc/self/fdinfo/{fd}"))?;
        let mut text = String::new();
        file.take(MAX_FDINFO).read_to_string(&mut text)?;
        let pid = text.lines().find_map(|line| line.strip_prefix("Pid:"));
        // 0 is a process outside, -1 one that has been reaped.
        Ok(pid.and_then(|pid| pid.trim().parse().ok()).filter(|pid| *pid > 0))
    }

    /// Whether both mean one process, as far as it can be told: a "no" may be a "cannot tell".
    pub(super) fn is_same_process(&self, other: &Self) -> bool {
        match (self.inode(), other.inode()) {
            (Some(own), Some(other)) => own == other,
            // Two processes share no number while both live.
            (None, None) => {
                let pid = |process: &Self| process.pid_in_proc().ok().flatten();
                let same = pid(self).is_some_and(|own| pid(other) == Some(own));
                same && self.is_alive() && other.is_alive()
            }
            (Some(_), None) | (None, Some(_)) => false,
        }
    }

    /// Device and inode on pidfs, which no two processes of one boot share. Before Linux 6.9
    /// all pidfds have the same, so nothing is told; nor is it where an inode has 32 bits.
    fn inode(&self) -> Option<(u64, u64)> {
        let kind = fstatfs(&self.0).ok()?.f_type;
        let on_pidfs = u64::try_from(kind).is_ok_and(|kind| kind == PIDFS_MAGIC);
        let stat = fstat(&self.0).ok()?;
        (on_pidfs && cfg!(target_pointer_width = "64")).then_some((stat.st_dev, stat.st_ino))
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

/// SO_PEERCRED of a connected socket, of whatever type. (Wrappers elsewhere refuse pid 0.)
pub(super) fn peer_cred(socket: BorrowedFd<'_>) -> io::Result<PeerCred> {
    let mut cred = libc::ucred { pid: 0, uid: libc::uid_t::MAX, gid: libc::gid_t::MAX };
    let mut len = socklen(size_of::<libc::ucred>());
    // SAFETY: the option writes one ucred, and both pointers are to live locals of that size.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut cred).cast(),
            &raw mut len,
        )
    };
    if answer != 0 {
        return Err(io::Error::last_os_error());
    }
    // A socket that nobody has connected has an owner of -1 (unix(7)).
    if len != socklen(size_of::<libc::ucred>()) || cred.uid == libc::uid_t::MAX {
        return Err(io::ErrorKind::NotConnected.into());
    }
    Ok(PeerCred {
        uid: Uid(cred.uid),
        gid: Gid(cred.gid),
        pid: Some(cred.pid).filter(|pid| *pid > 0),
    })
}

/// Whether a test wants this kernel to be one of before 6.5. A release build cannot be told so.
#[cfg(debug_assertions)]
fn plays_an_old_kernel() -> bool {
    static PLAYS: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *PLAYS.get_or_init(|| {
        std::env::var_os("CREDBROKERD_TEST_NO_PEERPIDFD").is_some_and(|value| value == "1")
    })
}

#[cfg(not(debug_assertions))]
const fn plays_an_old_kernel() -> bool {
    false
}

/// SO_PEERPIDFD of a connected socket.
pub(super) fn peer_process(socket: BorrowedFd<'_>) -> io::Result<PeerProcess> {
    if plays_an_old_kernel() {
        return Ok(PeerProcess::Unsupported);
    }
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

    #[test]
    fn the_connector_of_a_packet_socket_is_known_too() {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let (a, _b) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        let cred = peer_cred(a.as_fd()).unwrap();
        assert_eq!(cred.uid, Uid::own());
        assert_eq!(cred.pid, i32::try_from(std::process::id()).ok());
    }

    #[test]
    fn a_socket_without_a_peer_has_no_identity() {
        use rustix::net::{AddressFamily, SocketType, socket};
        let alone = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        assert!(peer_cred(alone.as_fd()).is_err());
    }

    #[test]
    fn two_descriptors_of_one_process_are_the_same_and_those_of_two_are_not() {
        let pidfd = |process: rustix::process::Pid| {
            let flags = rustix::process::PidfdFlags::empty();
            PidFd(rustix::process::pidfd_open(process, flags).unwrap())
        };
        let own = || pidfd(rustix::process::getpid());
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let other = pidfd(rustix::process::Pid::from_child(&child));
        assert!(own().is_same_process(&own()));
        assert!(own().is_same_process(&own().try_clone().unwrap()));
        assert!(!own().is_same_process(&other) && !other.is_same_process(&own()));
        assert_eq!(own().pid_in_proc().unwrap(), i32::try_from(std::process::id()).ok());
        assert_eq!(other.pid_in_proc().unwrap(), i32::try_from(child.id()).ok());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!other.is_alive());
        assert_eq!(other.pid_in_proc().unwrap(), None);
    }
}
