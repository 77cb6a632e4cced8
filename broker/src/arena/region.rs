//! One locked mapping between two guard pages: memfd_secret(2), or a memfd that is mlock(2)ed.
//!
//! Its first bytes are the canary: random, chosen when it is mapped, and copied before and after
//! each slot. A write that runs out of its slot breaks one on its way to a neighbour.

#![allow(unsafe_code, reason = "mapping memory is what this module is for")]

use std::fmt;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap, mmap_anonymous, munmap};
use rustix::process::{Resource, getrlimit};
use rustix::rand::{GetRandomFlags, getrandom};
use serde::Deserialize;
use thiserror::Error;
use zeroize::Zeroize as _;

use super::MIN_CAPACITY;
use super::slab::{CANARY, Extent};
use super::vm_flags::{self, VmFlags};

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

/// Why an arena is not of memfd_secret(2). The kernel's different answers mean different things
/// to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoSecretMemory {
    /// `arena.backend = "memfd"`.
    NotAskedFor,
    /// ENOSYS.
    Absent,
    /// EPERM or EACCES.
    Forbidden,
    /// EAGAIN, which is how a used-up RLIMIT_MEMLOCK shows.
    LimitReached,
    /// Any other answer to this step.
    Failed(&'static str),
}

impl NoSecretMemory {
    fn of(step: &Step) -> Self {
        match step.errno {
            Errno::NOSYS => Self::Absent,
            Errno::PERM | Errno::ACCESS => Self::Forbidden,
            Errno::AGAIN => Self::LimitReached,
            _ => Self::Failed(step.step),
        }
    }
}

impl fmt::Display for NoSecretMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAskedFor => f.write_str("arena.backend does not ask for it"),
            Self::Absent => f.write_str(
                "the kernel has none, or it is switched off (ENOSYS; secretmem.enable=1 switches it on)",
            ),
            Self::Forbidden => f.write_str("a seccomp filter or a policy forbids it (EPERM)"),
            Self::LimitReached => f.write_str("RLIMIT_MEMLOCK is used up (EAGAIN)"),
            Self::Failed(step) => write!(f, "{step} failed"),
        }
    }
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
        why: NoSecretMemory,
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
    /// Neither backend is allowed, as in a container whose filter of system calls knows neither.
    #[error(
        "neither memfd_secret(2) nor mlock(2) is allowed here: let the filter of system calls \
         pass one of them (systemd: SystemCallFilter=@memlock memfd_secret)"
    )]
    Forbidden,
    /// The kernel took the advice and did not follow it.
    #[error(
        "the arena is not protected as it must be: /proc/self/smaps does not say that it {lacks}"
    )]
    Unprotected {
        /// What the mapping must be and is not.
        lacks: &'static str,
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
    why_not_secret: Option<NoSecretMemory>,
    flags: VmFlags,
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

        let mut why_not_secret = NoSecretMemory::NotAskedFor;
        if choice != BackendChoice::Memfd {
            // memfd_secret's pages are locked by nature: the limit shows as EAGAIN at mmap, and
            // mlock(2) on them says ENOMEM and means nothing, so it is not called.
            let secret = memfd_secret()
                .and_then(|fd| Self::map_fd(&fd, len, wanted, page, Backend::MemfdSecret));
            match secret {
                Ok(region) => return region.checked(),
                Err(step) => {
                    why_not_secret = NoSecretMemory::of(&step);
                    if choice == BackendChoice::MemfdSecret {
                        let source = step.errno.into();
                        return Err(RegionError::NoMemfdSecret { why: why_not_secret, source });
                    }
                }
            }
        }
        let fd = memfd_create("credbroker-arena", MemfdFlags::CLOEXEC)
            .map_err(Step::of("memfd_create"))?;
        let mut region = Self::map_fd(&fd, len, wanted, page, Backend::Memfd)?;
        region.why_not_secret = Some(why_not_secret);
        region.checked()
    }

    /// Reads back what the kernel made of the mapping, and lays the canary.
    fn checked(mut self) -> Result<Self, RegionError> {
        self.flags = vm_flags::of(self.base.addr().get(), self.len);
        if let VmFlags::Lacking(lacks) = self.flags {
            return Err(RegionError::Unprotected { lacks });
        }
        // SAFETY: the mapping is longer than a canary, and no slot exists yet.
        let canary = unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), CANARY) };
        match getrandom(canary, GetRandomFlags::empty()) {
            Ok(CANARY) => Ok(self),
            Ok(_) => Err(Step::of("getrandom")(Errno::INTR).into()),
            Err(errno) => Err(Step::of("getrandom")(errno).into()),
        }
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
            return Err(Step::of("mmap")(mapped.err().unwrap_or(Errno::NOMEM)));
        };
        // From here on `drop` unmaps, whichever step fails.
        let region = Self {
            base,
            len,
            wanted,
            guard,
            backend,
            why_not_secret: None,
            flags: VmFlags::Unknown,
        };
        let address = base.as_ptr().cast();
        // SAFETY: the range is the mapping just made.
        unsafe { madvise(address, len, Advice::LinuxDontFork) }
            .map_err(Step::of("madvise(MADV_DONTFORK)"))?;
        // SAFETY: the range is the mapping just made.
        unsafe { madvise(address, len, Advice::LinuxDontDump) }
            .map_err(Step::of("madvise(MADV_DONTDUMP)"))?;
        if backend == Backend::Memfd {
            // SAFETY: the range is the mapping just made.
            unsafe { mlock(address, len) }.map_err(Step::of(MLOCK))?;
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

    pub(super) fn why_not_secret(&self) -> Option<NoSecretMemory> {
        self.why_not_secret
    }

    pub(super) fn flags(&self) -> VmFlags {
        self.flags
    }

    /// Where slots may begin.
    pub(super) fn first(&self) -> usize {
        CANARY
    }

    /// The secret of an extent, for reading.
    pub(super) fn bytes(&self, extent: &Extent, len: usize) -> &[u8] {
        assert!(len <= extent.room(), "a slot is longer than its place");
        self.range(extent.start(), len)
    }

    /// `offset` and `len` are those of a slot's secret, or of a canary.
    fn range(&self, offset: usize, len: usize) -> &[u8] {
        assert!(offset + len <= self.len, "an extent reaches past the arena");
        // SAFETY: the range was checked against the mapping.
        let start = unsafe { self.base.as_ptr().add(offset) };
        // SAFETY: the range is mapped and initialised (the kernel zeroes new pages), lives as
        // long as `self`, and only the slot that owns the extent can write to it, through
        // `bytes_mut`, which the slot's own borrow keeps apart from this one.
        unsafe { std::slice::from_raw_parts(start, len) }
    }

    /// The secret of an extent, for writing. `extent` proves that the caller owns it.
    pub(super) fn bytes_mut<'a>(&'a self, extent: &'a mut Extent, len: usize) -> &'a mut [u8] {
        assert!(len <= extent.room(), "a slot is longer than its place");
        let start = extent.start();
        self.range_mut(extent, start, len)
    }

    /// Lays the canaries of an extent, around what is zero.
    pub(super) fn arm(&self, extent: &mut Extent) {
        let (before, after) = canaries(extent.offset(), extent.len());
        for place in [before, after] {
            self.range_mut(extent, place, CANARY).copy_from_slice(self.range(0, CANARY));
        }
    }

    /// Whether both canaries of a range stand, and what lies behind the secret is zero. `len` is
    /// the secret's, where it is known.
    pub(super) fn is_intact(&self, offset: usize, whole: usize, len: Option<usize>) -> bool {
        let canary = self.range(0, CANARY);
        let (before, after) = canaries(offset, whole);
        let behind = before + CANARY + len.unwrap_or(whole - 2 * CANARY);
        self.range(before, CANARY) == canary
            && self.range(after, CANARY) == canary
            && self.range(behind, after - behind).iter().all(|byte| *byte == 0)
    }

    /// Wipes an extent, canaries and all.
    pub(super) fn clear(&self, extent: &mut Extent) {
        let (offset, len) = (extent.offset(), extent.len());
        self.range_mut(extent, offset, len).zeroize();
    }

    fn range_mut<'a>(&'a self, _owned: &'a mut Extent, offset: usize, len: usize) -> &'a mut [u8] {
        assert!(offset + len <= self.len, "an extent reaches past the arena");
        // SAFETY: the range was checked against the mapping.
        let start = unsafe { self.base.as_ptr().add(offset) };
        // SAFETY: as in `range`; `&mut Extent` makes this the only reference to any part of
        // the extent, and the callers in this module stay within it.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }

    /// Wipes everything, whoever still has a slot: the process must end now. Volatile, for
    /// nobody reads it again.
    pub(super) fn dangerous_wipe_for_abort(&self) {
        for offset in 0..self.len {
            // SAFETY: the offset is within the mapping.
            let byte = unsafe { self.base.as_ptr().add(offset) };
            // SAFETY: the byte is mapped and writable. Another thread may be reading it: it gets
            // a zero in place of a secret, and no time to use it.
            unsafe { byte.write_volatile(0) };
        }
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

const MLOCK: &str = "mlock";

/// A failed step, before it is known whether another backend may be tried.
struct Step {
    step: &'static str,
    errno: Errno,
}

impl Step {
    fn of(step: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self { step, errno }
    }
}

impl From<Step> for RegionError {
    fn from(step: Step) -> Self {
        // A limit of nothing, the other cause, was found before.
        if step.step == MLOCK && step.errno == Errno::PERM {
            return Self::Forbidden;
        }
        Self::Map { step: step.step, source: step.errno.into() }
    }
}

fn memfd_secret() -> Result<OwnedFd, Step> {
    // SAFETY: memfd_secret(2) takes one flags argument; FD_CLOEXEC is its close-on-exec flag.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    let Ok(fd) = i32::try_from(fd) else {
        return Err(Step::of("memfd_secret")(Errno::BADF));
    };
    if fd < 0 {
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::ENOSYS);
        return Err(Step::of("memfd_secret")(Errno::from_raw_os_error(errno)));
    }
    // SAFETY: the call succeeded, so the descriptor is open and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Where the canaries of an extent are.
fn canaries(offset: usize, len: usize) -> (usize, usize) {
    (offset, offset + len - CANARY)
}

/// `wanted`, or what RLIMIT_MEMLOCK leaves of it: three quarters, so that libraries that lock a
/// page find room. Both backends count against the limit.
fn within_memlock(wanted: usize, page: usize) -> Result<usize, RegionError> {
    let Some(limit) = getrlimit(Resource::Memlock).current else { return Ok(wanted) };
    let allowed = usize::try_from(limit).unwrap_or(usize::MAX) / 4 * 3;
    let allowed = allowed - allowed % page;
    if allowed < MIN_CAPACITY {
        return Err(RegionError::MemlockTooSmall { limit });
    }
    Ok(wanted.min(allowed))
}

#[cfg(test)]
mod tests {
    use rustix::process::{Rlimit, setrlimit};
    use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};

    use super::*;
    use crate::isolated;

    #[test]
    fn each_backend_maps_and_is_zeroed() {
        for choice in [BackendChoice::Auto, BackendChoice::Memfd] {
            let region = Region::map(choice, MIN_CAPACITY).unwrap();
            assert!(region.range(CANARY, region.len() - CANARY).iter().all(|byte| *byte == 0));
            assert!(region.range(0, CANARY).iter().any(|byte| *byte != 0));
            assert_eq!(region.flags(), VmFlags::Confirmed);
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

    /// What the kernel answers in a sandbox, on an old kernel, and where the limit is used up.
    #[test]
    fn the_answers_to_memfd_secret_are_told_apart_and_memfd_takes_its_place() {
        let name = "arena::region::tests::the_answers_to_memfd_secret_are_told_apart_and_memfd_takes_its_place";
        let Some(role) = isolated::role() else {
            let has = memfd_secret().is_ok();
            for (role, why) in [
                ("ENOSYS", "Absent"),
                ("EPERM", "Forbidden"),
                ("both", "Forbidden"),
                ("limit", "LimitReached"),
            ] {
                let done = isolated::again(name, role);
                assert!(done.success, "{role}: {}", done.said);
                let why = if has || role != "limit" { why } else { "Absent" };
                let required = format!("required: {why}\n");
                assert!(done.said.contains(&required), "{role}: {}", done.said);
            }
            return;
        };
        let answer = match role.as_str() {
            "ENOSYS" => Some(libc::ENOSYS),
            "EPERM" | "both" => Some(libc::EPERM),
            _ => None,
        };
        if let Some(errno) = answer {
            let refused = SeccompAction::Errno(errno.unsigned_abs());
            let mut calls = vec![(libc::SYS_memfd_secret, Vec::new())];
            if role == "both" {
                calls.push((libc::SYS_mlock, Vec::new()));
            }
            let calls = calls.into_iter().collect();
            let arch = TargetArch::try_from(std::env::consts::ARCH).unwrap();
            let filter = SeccompFilter::new(calls, SeccompAction::Allow, refused, arch).unwrap();
            apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
        } else {
            // An unprivileged process, as in a container.
            let limit = Rlimit { current: Some(64 * 1024), maximum: Some(64 * 1024) };
            setrlimit(Resource::Memlock, limit).unwrap();
            let none = CapabilitySet::empty();
            let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
            set_capabilities(None, sets).unwrap();
        }
        let region = Region::map(BackendChoice::Auto, 1 << 20);
        if role == "both" {
            assert!(matches!(region, Err(RegionError::Forbidden)));
        } else if answer.is_some() {
            let region = region.as_ref().unwrap();
            assert_eq!(region.flags(), VmFlags::Confirmed);
            assert_eq!(region.backend(), Backend::Memfd);
        } else {
            let region = region.as_ref().unwrap();
            assert_eq!(region.flags(), VmFlags::Confirmed);
            assert_eq!(region.len(), 48 * 1024);
            let more = Region::map(BackendChoice::Auto, 1 << 20);
            assert!(matches!(more, Err(RegionError::Map { .. })), "a refusal and no crash");
        }
        match Region::map(BackendChoice::MemfdSecret, 1 << 20) {
            Err(RegionError::NoMemfdSecret { why, .. }) => println!("required: {why:?}"),
            other => panic!("{:?}", other.map(|region| region.backend())),
        }
    }
}
