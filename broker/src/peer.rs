//! Who is calling, as the kernel says it.
//!
//! A [`Peer`] is made by accepting a connection and by nothing else: there is no public
//! constructor, so a request without an identity does not compile. The identity is that of the
//! process that called connect(2), wherever its descriptor is passed later (unix(7)).

use std::fmt;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio_util::sync::CancellationToken;

pub(crate) use self::listener::{Accepted, Accepting, SocketAccess};
pub use self::listener::{BindError, Listener};
use self::pidfd::PidFd;

mod listener;
mod pidfd;

/// A user id, as the kernel gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Uid(u32);

/// A group id, as the kernel gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Gid(u32);

impl Uid {
    /// What the kernel shows for a user that the reader's namespace does not map
    /// (/proc/sys/kernel/overflowuid): nobody in particular, so never an identity.
    pub const OVERFLOW: Self = Self(65534);

    /// The uid as a number.
    #[must_use]
    pub fn as_raw(self) -> u32 {
        self.0
    }

    /// A uid that an operator wrote or a request names; it identifies nobody by itself.
    #[must_use]
    pub fn from_raw(uid: u32) -> Self {
        Self(uid)
    }

    /// The effective uid of this process.
    #[must_use]
    pub fn own() -> Self {
        Self(rustix::process::geteuid().as_raw())
    }
}

impl Gid {
    /// The gid as a number.
    #[must_use]
    pub fn as_raw(self) -> u32 {
        self.0
    }

    /// A gid that an operator wrote.
    #[must_use]
    pub fn from_raw(gid: u32) -> Self {
        Self(gid)
    }
}

impl fmt::Display for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One accepted connection's process. Cheap to clone; clones are the same peer.
#[derive(Clone, Debug)]
pub struct Peer {
    inner: Arc<Inner>,
}

/// Tells the connections of one start of the broker apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PeerId(u64);

#[derive(Debug)]
struct Inner {
    id: PeerId,
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
    /// Absent when the peer lives in a PID namespace that this process cannot see into.
    pid: Option<i32>,
    pidfd: Option<PidFd>,
    watched: AtomicBool,
    /// Cancelled when nobody refers to this peer any more.
    gone: CancellationToken,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.gone.cancel();
    }
}

impl Peer {
    /// Only [`Listener`] calls this, with what the kernel answered for an accepted socket.
    fn attested(
        uid: Uid,
        gid: Gid,
        groups: Vec<Gid>,
        pid: Option<i32>,
        pidfd: Option<PidFd>,
    ) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = PeerId(NEXT.fetch_add(1, Ordering::Relaxed));
        let gone = CancellationToken::new();
        Self {
            inner: Arc::new(Inner {
                id,
                uid,
                gid,
                groups,
                pid,
                pidfd,
                watched: AtomicBool::new(false),
                gone,
            }),
        }
    }

    /// A peer that no kernel vouched for.
    #[cfg(test)]
    pub(crate) fn dangerous_for_test(uid: u32, gid: u32, groups: &[u32]) -> Self {
        let groups = groups.iter().copied().map(Gid).collect();
        Self::attested(Uid(uid), Gid(gid), groups, None, None)
    }

    pub(crate) fn id(&self) -> PeerId {
        self.inner.id
    }

    /// Effective uid at connect(2).
    #[must_use]
    pub fn uid(&self) -> Uid {
        self.inner.uid
    }

    /// Effective gid at connect(2).
    #[must_use]
    pub fn gid(&self) -> Gid {
        self.inner.gid
    }

    /// Supplementary groups at connect(2).
    #[must_use]
    pub fn groups(&self) -> &[Gid] {
        &self.inner.groups
    }

    /// Process id, for people to read: it is no identity, and absent across PID namespaces.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.inner.pid
    }

    /// Whether the process that connected still runs. Where the kernel gives no pidfd, nobody
    /// can tell, and what needs to know is refused elsewhere.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.inner.pidfd.as_ref().is_none_or(PidFd::is_alive)
    }

    /// Whether both are the same process.
    pub(crate) fn same_process(&self, other: &Self) -> bool {
        self.id() == other.id()
    }

    /// The same peer without its process: for what outlives the connection and must not keep a
    /// descriptor open for it.
    pub(crate) fn without_process(&self) -> Self {
        let Inner { id, uid, gid, ref groups, pid, .. } = *self.inner;
        let groups = groups.clone();
        let (watched, gone) = (AtomicBool::new(true), CancellationToken::new());
        Self { inner: Arc::new(Inner { id, uid, gid, groups, pid, pidfd: None, watched, gone }) }
    }

    /// Whether the kernel gave a way to learn that the process exits.
    pub(crate) fn can_be_watched(&self) -> bool {
        self.inner.pidfd.is_some()
    }

    /// A way to wait for the process to exit, once for each peer: whoever asks again is told
    /// that it is being watched.
    pub(crate) fn watch(&self) -> Watch {
        let Some(pidfd) = &self.inner.pidfd else { return Watch::Impossible };
        if self.inner.watched.swap(true, Ordering::AcqRel) {
            return Watch::Already;
        }
        match pidfd.try_clone() {
            Ok(pidfd) => Watch::Begin(Exit { pidfd, gone: self.inner.gone.clone() }),
            Err(_out_of_descriptors) => {
                self.inner.watched.store(false, Ordering::Release);
                Watch::Impossible
            }
        }
    }
}

/// The answer to [`Peer::watch`].
#[must_use]
#[derive(Debug)]
pub(crate) enum Watch {
    /// Somebody must wait for this.
    Begin(Exit),
    /// Somebody waits already.
    Already,
    /// The kernel gives no pidfd, or no more descriptors.
    Impossible,
}

/// Whether this kernel answers SO_PEERPIDFD.
pub(crate) fn pidfd_is_supported(socket: &impl AsFd) -> bool {
    matches!(pidfd::peer_process(socket.as_fd()), Ok(pidfd::PeerProcess::Known(_)))
}

/// Waits for a peer's process to exit, as long as somebody refers to that peer.
#[derive(Debug)]
pub(crate) struct Exit {
    pidfd: PidFd,
    gone: CancellationToken,
}

/// The process of a peer has exited.
#[derive(Debug)]
pub(crate) struct Exited;

impl Exit {
    /// `None` when the last reference to the peer was dropped first: nobody cares any more.
    pub(crate) async fn wait(self) -> Option<Exited> {
        tokio::select! {
            biased;
            () = self.gone.cancelled() => None,
            () = self.pidfd.exited() => Some(Exited),
        }
    }
}
