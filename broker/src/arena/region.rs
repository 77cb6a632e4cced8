//! One locked mapping between two guard pages: memfd_secret(2), or a memfd that is mlock(2)ed.

#![allow(unsafe_code, reason = "mapping memory is what this module is for")]

use std::fmt;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap, mmap_anonymous, munmap};
use rustix::process::{Resource, getrlimit};
use serde::Deserialize;
use thiserror::Error;
use zeroize::Zeroize as _;

use super::MIN_CAPACITY;
use super::slab::Extent;

/// How an arena's memory is backed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// memfd_secret(2): out of the kernel's direct map, of /proc/PID/mem and of core dumps.
    MemfdSecret,
    /// A memfd, mlock(2)ed and kept out of core dumps.
    Memfd,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MemfdSecret => "memfd_secret",
            Self::Memfd => "memfd",
        })
    }
}

/// The key `arena.backend`: a named backend is required, not preferred.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackendChoice {
    /// The best there is.
    #[default]
    Auto,
    /// memfd_secret or nothing.
    MemfdSecret,
    /// A locked memfd. On laptops: an open memfd_secret keeps the machine from hibernating.
    Memfd,
}

/// Locked memory could not be had.
#[derive(Debug, Error)]
pub enum RegionError {
    /// The kernel refuses memfd_secret(2).
    #[error(
        "arena.backend = \"memfd_secret\" is not to be had here: {why}; use \"auto\" or \"memfd\""
    )]
    NoMemfdSecret {
        /// What the kernel's answer means.
        why: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// RLIMIT_MEMLOCK leaves too little.
    #[error(
        "RLIMIT_MEMLOCK allows {limit} bytes of locked memory and the arena needs at least {MIN_CAPACITY}: raise it (LimitMEMLOCK= in systemd)"
    )]
    MemlockTooSmall {
        /// The limit in bytes.
        limit: u64,
    },
    /// `arena.capacity` is too small to be of use.
    #[error("arena.capacity is {wanted} bytes and must be at least {MIN_CAPACITY}")]
    CapacityTooSmall {
        /// What was asked for, in bytes.
        wanted: usize,
    },
    /// A step of mapping failed.
    #[error("the arena could not be mapped: {step} failed")]
    Map {
        /// Which system call.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// The mapping. Owns its pages; wiped and unmapped when dropped.
pub(super) struct Region {
    base: NonNull<u8>,
    len: usize,
    wanted: usize,
    guard: usize,
    backend: Backend,
}

// SAFETY: the region owns its mapping, which is valid in every thread.
unsafe impl Send for Region {}
// SAFETY: shared access goes through `bytes` and `bytes_mut`, whose ranges are disjoint for
// disjoint extents; `Extents` hands none out twice.
unsafe impl Sync for Region {}

impl Region {
    pub(super) fn map(choice: BackendChoice, wanted: usize) -> Result<Self, RegionError> {
        if wanted < MIN_CAPACITY {
            return Err(RegionError::CapacityTooSmall { wanted });
        }
        let page = rustix::param::page_size();
        let wanted = wanted.next_multiple_of(page);
        let len = within_memlock(wanted, page)?;

        if choice != BackendChoice::Memfd {
            // memfd_secret's pages are locked by nature: the limit shows as EAGAIN at mmap, and
            // mlock(2) on them says ENOMEM and means nothing, so it is not called.
            let secret = memfd_secret()
                .and_then(|fd| Self::map_fd(&fd, len, wanted, page, Backend::MemfdSecret));
            match (secret, choice) {
                (Ok(region), _) => return Ok(region),
                (Err(step), BackendChoice::MemfdSecret) => return Err(step.required()),
                (Err(_), BackendChoice::Auto | BackendChoice::Memfd) => {}
            }
        }
        let fd = memfd_create("credbroker-arena", MemfdFlags::CLOEXEC)
            .map_err(Step::of("memfd_create"))?;
        Ok(Self::map_fd(&fd, len, wanted, page, Backend::Memfd)?)
    }

    /// Maps `fd` between two pages that cannot be touched. The descriptor is closed by the
    /// caller's drop: the mapping needs none, and an open one could be mapped by others.
    fn map_fd(
        fd: &OwnedFd,
        len: usize,
        wanted: usize,
        guard: usize,
        backend: Backend,
    ) -> Result<Self, Step> {
        ftruncate(fd, len as u64).map_err(Step::of("ftruncate"))?;
        let whole = len + 2 * guard;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches no
        // other memory.
        let reserved = unsafe {
            mmap_anonymous(std::ptr::null_mut(), whole, ProtFlags::empty(), MapFlags::PRIVATE)
        }
        .map_err(Step::of("mmap of the guard pages"))?;
        // SAFETY: `guard` is less than the length of the reservation.
        let inner = unsafe { reserved.add(guard) };
        // SAFETY: MAP_FIXED replaces only pages of the reservation just made, which nothing
        // else knows.
        let mapped = unsafe {
            mmap(
                inner,
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED,
                fd.as_fd(),
                0,
            )
        };
        let Some(base) =
            mapped.as_ref().ok().and_then(|address| NonNull::new(address.cast::<u8>()))
        else {
            // SAFETY: the reservation is ours and nothing points into it.
            let _ = unsafe { munmap(reserved, whole) };
            return Err(Step::of("mmap")(mapped.err().unwrap_or(rustix::io::Errno::NOMEM)));
        };
        // From here on `drop` unmaps, whichever step fails.
        let region = Self { base, len, wanted, guard, backend };
        let address = base.as_ptr().cast();
        // SAFETY: the range is the mapping just made.
        unsafe { madvise(address, len, Advice::LinuxDontFork) }
            .map_err(Step::of("madvise(MADV_DONTFORK)"))?;
        // SAFETY: the range is the mapping just made.
        unsafe { madvise(address, len, Advice::LinuxDontDump) }
            .map_err(Step::of("madvise(MADV_DONTDUMP)"))?;
        if backend == Backend::Memfd {
            // SAFETY: the range is the mapping just made.
            unsafe { mlock(address, len) }.map_err(Step::of("mlock"))?;
        }
        // Touch every page now: a kernel that cannot give one must say so at start.
        region.wipe();
        Ok(region)
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn wanted(&self) -> usize {
        self.wanted
    }

    pub(super) fn backend(&self) -> Backend {
        self.backend
    }

    /// The bytes of an extent, for reading.
    pub(super) fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        assert!(offset + len <= self.len, "an extent reaches past the arena");
        // SAFETY: the range was checked against the mapping.
        let start = unsafe { self.base.as_ptr().add(offset) };
        // SAFETY: the range is mapped and initialised (the kernel zeroes new pages), lives as
        // long as `self`, and only the slot that owns the extent can write to it, through
        // `bytes_mut`, which the slot's own borrow keeps apart from this one.
        unsafe { std::slice::from_raw_parts(start, len) }
    }

    /// The bytes of an extent, for writing. `extent` proves that the caller owns them.
    pub(super) fn bytes_mut<'a>(&'a self, extent: &'a mut Extent, len: usize) -> &'a mut [u8] {
        assert!(
            len <= extent.len() && extent.offset() + len <= self.len,
            "an extent reaches past the arena"
        );
        // SAFETY: the range was checked against the mapping.
        let start = unsafe { self.base.as_ptr().add(extent.offset()) };
        // SAFETY: as in `bytes`; `&mut Extent` makes this the only reference to the range.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }

    fn wipe(&self) {
        // SAFETY: the whole mapping is ours; called only before the first slot exists and after
        // the last is gone.
        let all = unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) };
        all.zeroize();
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.wipe();
        // SAFETY: the guard page below the base belongs to the same reservation.
        let start = unsafe { self.base.as_ptr().sub(self.guard) };
        // SAFETY: this is the reservation made in `map_fd`; no reference into it is left.
        let _ = unsafe { munmap(start.cast(), self.len + 2 * self.guard) };
    }
}

/// A failed step, before it is known whether another backend may be tried.
struct Step {
    step: &'static str,
    errno: rustix::io::Errno,
}

impl Step {
    fn of(step: &'static str) -> impl Fn(rustix::io::Errno) -> Self {
        move |errno| Self { step, errno }
    }

    fn required(self) -> RegionError {
        use rustix::io::Errno;
        let why = match self.errno {
            Errno::NOSYS => "the kernel has none, or it is switched off (secretmem.enable=1)",
            Errno::PERM | Errno::ACCESS => "a seccomp filter forbids it",
            Errno::AGAIN => "RLIMIT_MEMLOCK is used up",
            _ => self.step,
        };
        RegionError::NoMemfdSecret { why, source: self.errno.into() }
    }
}

impl From<Step> for RegionError {
    fn from(step: Step) -> Self {
        Self::Map { step: step.step, source: step.errno.into() }
    }
}

fn memfd_secret() -> Result<OwnedFd, Step> {
    // SAFETY: memfd_secret(2) takes one flags argument; FD_CLOEXEC is its close-on-exec flag.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    let Ok(fd) = i32::try_from(fd) else {
        return Err(Step::of("memfd_secret")(rustix::io::Errno::BADF));
    };
    if fd < 0 {
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::ENOSYS);
        return Err(Step::of("memfd_secret")(rustix::io::Errno::from_raw_os_error(errno)));
    }
    // SAFETY: the call succeeded, so the descriptor is open and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `wanted`, or what RLIMIT_MEMLOCK leaves of it: half, so that TLS libraries and tools that
/// lock a page find room. Both backends count against the limit.
fn within_memlock(wanted: usize, page: usize) -> Result<usize, RegionError> {
    let Some(limit) = getrlimit(Resource::Memlock).current else { return Ok(wanted) };
    let allowed = usize::try_from(limit).unwrap_or(usize::MAX) / 2;
    let allowed = allowed - allowed % page;
    if allowed < MIN_CAPACITY {
        return Err(RegionError::MemlockTooSmall { limit });
    }
    Ok(wanted.min(allowed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_backend_maps_and_is_zeroed() {
        for choice in [BackendChoice::Auto, BackendChoice::Memfd] {
            let region = Region::map(choice, MIN_CAPACITY).unwrap();
            assert!(region.bytes(0, region.len()).iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn the_capacity_is_fitted_to_the_limit() {
        let limit = getrlimit(Resource::Memlock).current;
        let region = Region::map(BackendChoice::Auto, 1 << 24).unwrap();
        match limit {
            Some(limit) => assert!(region.len() as u64 <= limit),
            None => assert_eq!(region.len(), 1 << 24),
        }
        assert_eq!(region.wanted(), 1 << 24);
    }

    #[test]
    fn too_small_a_capacity_is_refused() {
        assert!(matches!(
            Region::map(BackendChoice::Auto, 100),
            Err(RegionError::CapacityTooSmall { wanted: 100 })
        ));
    }
}
