//! Who is calling, as the kernel says it.
//!
//! A [`Peer`] is made by accepting a connection and by nothing else: there is no public
//! constructor, so a request without an identity does not compile. The identity is that of the
//! process that called connect(2), wherever its descriptor is passed later (unix(7)).

use std::fmt;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use tokio_util::sync::CancellationToken;

use self::evidence::Gathered;
pub use self::evidence::{FileId, Program, Unit, Unknown};
pub(crate) use self::evidence::{program_can_be_known, unit_can_be_known};
pub(crate) use self::listener::{Accepted, Accepting, SocketAccess};
pub use self::listener::{BindError, Kind, Listener};
use self::pidfd::PidFd;

mod evidence;
mod listener;
mod pidfd;

/// `DEFAULT_OVERFLOWUID` and `DEFAULT_OVERFLOWGID` of the kernel.
const OVERFLOW: u32 = 65534;

/// Reads which ids stand for everybody who is not mapped, before the sandbox closes these files.
pub(crate) fn learn_overflow_ids() {
    let _ = (Uid(0).is_overflow(), Gid(0).is_overflow());
}

/// A number below /proc/sys/kernel.
fn setting(name: &str) -> Option<u32> {
    let text = std::fs::read_to_string(format!("/proc/sys/kernel/{name}")).ok()?;
    text.trim().parse().ok()
}

/// A user id, as the kernel gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Uid(u32);

/// A group id, as the kernel gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Gid(u32);

impl Uid {
    /// Whether the kernel shows this for every user that the reader's namespace does not map: it
    /// is nobody in particular, so never an identity. 65534 is that by default and by name on
    /// every system, /proc/sys/kernel/overflowuid what it is on this one.
    #[must_use]
    pub fn is_overflow(self) -> bool {
        static HERE: OnceLock<Option<u32>> = OnceLock::new();
        self.0 == OVERFLOW || Some(self.0) == *HERE.get_or_init(|| setting("overflowuid"))
    }

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

    /// The same for groups: /proc/sys/kernel/overflowgid.
    #[must_use]
    pub fn is_overflow(self) -> bool {
        static HERE: OnceLock<Option<u32>> = OnceLock::new();
        self.0 == OVERFLOW || Some(self.0) == *HERE.get_or_init(|| setting("overflowgid"))
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
    gathered: Arc<Gathered>,
    watched: AtomicBool,
    /// The same peer without its process, once somebody has asked for it.
    processless: OnceLock<Arc<Inner>>,
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
                gathered: Arc::default(),
                watched: AtomicBool::new(false),
                processless: OnceLock::new(),
                gone,
            }),
        }
    }

    /// A peer that no kernel vouched for.
    #[cfg(any(test, fuzzing))]
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

    /// The program that the process runs, by what the kernel lets this process see of it. Read at
    /// most once, when somebody asks first.
    ///
    /// # Errors
    /// Why it is not known.
    pub fn exe(&self) -> Result<FileId, Unknown> {
        self.inner.gathered.program(self.inner.pidfd.as_ref())
    }

    /// The system service that the process belongs to; `None` when it belongs to none. Read at
    /// most once, when somebody asks first.
    ///
    /// # Errors
    /// Why it is not known.
    pub fn unit(&self) -> Result<Option<&Unit>, Unknown> {
        self.inner.gathered.unit(self.inner.pidfd.as_ref())
    }

    /// Whether both connected from one process, for certain: where the kernel gives no pidfd, or
    /// either is a [`Peer::without_process`], the answer is no.
    pub(crate) fn same_process(&self, other: &Self) -> bool {
        match (&self.inner.pidfd, &other.inner.pidfd) {
            (Some(own), Some(other)) => own.is_same_process(other),
            (None, _) | (_, None) => false,
        }
    }

    /// The same peer without its process: for what outlives the connection and must not keep a
    /// descriptor open for it. What has been read of the process stays.
    pub(crate) fn without_process(&self) -> Self {
        let Inner { id, uid, gid, ref groups, pid, ref gathered, ref processless, .. } =
            *self.inner;
        if self.inner.pidfd.is_none() {
            return self.clone();
        }
        // One for all handles of a connection: there may be very many.
        let inner = processless.get_or_init(|| {
            let (groups, gathered) = (groups.clone(), Arc::clone(gathered));
            let (watched, gone) = (AtomicBool::new(true), CancellationToken::new());
            let (pidfd, processless) = (None, OnceLock::new());
            Arc::new(Inner {
                id,
                uid,
                gid,
                groups,
                pid,
                pidfd,
                gathered,
                watched,
                processless,
                gone,
            })
        });
        Self { inner: Arc::clone(inner) }
    }

    /// Whether the kernel gave a way to learn that the process exits.
    pub(crate) fn can_be_watched(&self) -> bool {
        self.inner.pidfd.is_some()
    }

    /// A way to wait for the process to exit, for what watches it for itself.
    pub(crate) fn exit(&self) -> Departure {
        let Some(pidfd) = &self.inner.pidfd else { return Departure::Unknown };
        match pidfd.try_clone() {
            Ok(pidfd) => Departure::Shown(Exit { pidfd, gone: self.inner.gone.clone() }),
            Err(_out_of_descriptors) => Departure::NoDescriptor,
        }
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

/// The answer to [`Peer::exit`].
#[must_use]
#[derive(Debug)]
pub(crate) enum Departure {
    /// This shows it.
    Shown(Exit),
    /// The kernel gives no pidfd.
    Unknown,
    /// There are no more descriptors.
    NoDescriptor,
}

/// Whether this kernel answers SO_PEERPIDFD (Linux 6.5).
pub(crate) fn pidfd_is_available() -> bool {
    UnixStream::pair().is_ok_and(|(ours, _theirs)| {
        matches!(pidfd::peer_process(ours.as_fd()), Ok(pidfd::PeerProcess::Known(_)))
    })
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
