//! Memfds from peers, and one to them: how a secret crosses the border of a process.
//!
//! A peer keeps its own descriptor of what it sends: it can truncate the file while it is read,
//! change what was checked, and claim any size. So a memfd is never mapped, and nothing that was
//! learned of it is believed later: its bytes go by one bounded pread(2) straight into the arena
//! and are judged there; then zeros are written over them.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use credbroker_proto::MAX_SECRET;
use rustix::fs::{
    FileType, MemfdFlags, OFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fcntl_getfl, fstat,
    memfd_create,
};
use rustix::io::{Errno, pread, pwrite, retry_on_intr};

use crate::arena::Slot;
use crate::core::Why;

static ZEROS: [u8; MAX_SECRET + 1] = [0; MAX_SECRET + 1];

/// Tells memfds from all else.
#[derive(Clone, Copy, Debug)]
pub(super) struct Memfds {
    /// The device of the file system that the kernel keeps memfds in. Files of other tmpfs mounts
    /// have the same operations, and so do huge pages; neither is what was asked for.
    device: u64,
}

/// A memfd that may be read: its kind, mode, seals and size were right when they were looked at.
#[derive(Debug)]
pub(super) struct Incoming {
    memfd: OwnedFd,
    len: usize,
}

/// What is wrong with a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// None, or several.
    NotOne,
    /// Not a memfd of ordinary pages.
    Kind,
    /// Not open for reading and writing, or only for appending.
    Mode,
    /// It could not be wiped.
    WriteSealed,
    /// Nothing in it.
    Empty,
    /// More than a secret has.
    TooLong,
    /// Its size changed while it was read.
    Resized,
    /// It could be read and not be wiped.
    NotWiped,
    /// Reading failed.
    Unreadable,
}

impl Fault {
    /// For the caller, who can do something about it.
    pub(super) fn why(self) -> Why {
        let must = match self {
            Self::NotOne => "be one memfd",
            Self::Kind => "be a memfd_create(2) file without MFD_HUGETLB",
            Self::Mode => "be open for reading and writing, and not for appending",
            Self::WriteSealed => "not be sealed against writing: the broker wipes it",
            Self::Empty => "hold a secret: it is empty",
            Self::TooLong => "hold at most 16384 bytes",
            Self::Resized => "keep its size while it is read",
            Self::NotWiped => "stay writable until the broker has wiped it",
            Self::Unreadable => "be readable",
        };
        Why::InvalidRequest { field: "descriptor", must }
    }
}

impl Memfds {
    /// Looks where the kernel keeps them.
    ///
    /// # Errors
    /// When no memfd can be made.
    pub(super) fn find() -> io::Result<Self> {
        let own = memfd_create("credbroker", MemfdFlags::CLOEXEC)?;
        Ok(Self { device: fstat(&own)?.st_dev })
    }

    /// Looks at what came with a request: exactly one memfd, one that can be read and wiped.
    /// Whatever is not taken stays in `descriptors`, to be closed elsewhere.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub(super) fn check(&self, descriptors: &mut Vec<OwnedFd>) -> Result<Incoming, Fault> {
        let [descriptor] = descriptors.as_slice() else { return Err(Fault::NotOne) };
        let len = self.inspect(descriptor)?;
        match descriptors.pop() {
            Some(memfd) => Ok(Incoming { memfd, len }),
            None => Err(Fault::NotOne),
        }
    }

    /// Nothing in here can block: what the kind rules out is not looked at any further.
    fn inspect(&self, descriptor: &OwnedFd) -> Result<usize, Fault> {
        // Fails for every file that does not lie in memory, and for O_PATH.
        let seals = fcntl_get_seals(descriptor).map_err(|_errno| Fault::Kind)?;
        let stat = fstat(descriptor).map_err(|_errno| Fault::Kind)?;
        if !FileType::from_raw_mode(stat.st_mode).is_file() || stat.st_dev != self.device {
            return Err(Fault::Kind);
        }
        let flags = fcntl_getfl(descriptor).map_err(|_errno| Fault::Mode)?;
        // With O_APPEND pwrite(2) writes to the end, wherever it is told to.
        if flags & OFlags::ACCMODE != OFlags::RDWR || flags.contains(OFlags::APPEND) {
            return Err(Fault::Mode);
        }
        if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
            return Err(Fault::WriteSealed);
        }
        match usize::try_from(stat.st_size) {
            Ok(0) => Err(Fault::Empty),
            Ok(len @ 1..=MAX_SECRET) => Ok(len),
            Ok(_) | Err(_) => Err(Fault::TooLong),
        }
    }
}

impl Incoming {
    /// Bytes of the arena that [`Incoming::read`] needs: one more than there ought to be shows
    /// that the file grew.
    pub(super) fn room(&self) -> usize {
        self.len + 1
    }

    /// Moves the secret into `slot` and wipes it where it was. May wait for the kernel: swapped
    /// pages are read back, and a peer may be busy with the file.
    ///
    /// # Errors
    /// When the size changed, or the file could not be wiped.
    pub(super) fn read(&self, mut slot: Slot) -> Result<Slot, Fault> {
        let read = slot.fill(|place| retry_on_intr(|| pread(&self.memfd, &mut *place, 0)));
        let wiped = self.wipe();
        let read = read.map_err(|_errno| Fault::Unreadable)?;
        if read != self.len {
            return Err(Fault::Resized);
        }
        if !wiped {
            return Err(Fault::NotWiped);
        }
        slot.truncate(read);
        Ok(slot)
    }

    /// The descriptor, to be closed where that may take its time.
    pub(super) fn into_descriptor(self) -> OwnedFd {
        self.memfd
    }

    /// Writes zeros over what was read, and over no more, however long the file is now.
    fn wipe(&self) -> bool {
        let zeros = ZEROS.get(..self.len).unwrap_or(&ZEROS);
        matches!(retry_on_intr(|| pwrite(&self.memfd, zeros, 0)), Ok(count) if count == self.len)
    }
}

/// A memfd with the contents of `slot`, for whom it is revealed to: of a fixed size, and
/// writable, so that it can be wiped.
///
/// # Errors
/// When the kernel has no memory, or no descriptor.
pub(super) fn give(slot: &Slot) -> io::Result<OwnedFd> {
    let memfd = memfd_create("credbroker-secret", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let written = slot.expose(|bytes| retry_on_intr(|| pwrite(&memfd, bytes, 0)))?;
    if written != slot.len() {
        return Err(Errno::NOSPC.into());
    }
    fcntl_add_seals(memfd.as_fd(), SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(memfd)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;
    use std::sync::atomic::{AtomicBool, Ordering};

    use rustix::fs::{Mode, ftruncate, open};

    use super::*;
    use crate::arena::{Arena, BackendChoice};

    fn arena() -> Arena {
        Arena::map(BackendChoice::Auto, 64 * 1024).unwrap()
    }

    fn memfd(content: &[u8]) -> OwnedFd {
        let memfd = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        let file = File::from(memfd);
        file.write_all_at(content, 0).unwrap();
        file.into()
    }

    fn check(descriptor: OwnedFd) -> Result<Incoming, Fault> {
        Memfds::find().unwrap().check(&mut vec![descriptor])
    }

    fn again(memfd: &OwnedFd, flags: OFlags) -> OwnedFd {
        use std::os::fd::AsRawFd as _;
        open(format!("/proc/self/fd/{}", memfd.as_raw_fd()), flags, Mode::empty()).unwrap()
    }

    #[test]
    fn what_is_read_is_wiped_where_it_was() {
        let theirs = memfd(b"canary");
        let incoming = check(theirs.try_clone().unwrap()).unwrap();
        let slot = incoming.read(arena().allocate(incoming.room()).unwrap()).unwrap();
        slot.expose(|bytes| assert_eq!(bytes, b"canary"));
        let mut left = [1; 8];
        assert_eq!(File::from(theirs).read_at(&mut left, 0).unwrap(), 6);
        assert_eq!(left, [0, 0, 0, 0, 0, 0, 1, 1]);
    }

    #[test]
    fn what_is_no_memfd_is_refused_by_its_kind() {
        let (reader, writer) = io::pipe().unwrap();
        let kinds: Vec<(&str, OwnedFd)> = vec![
            ("a file", tempfile::tempfile().unwrap().into()),
            ("a file of a tmpfs", tempfile::tempfile_in("/dev/shm").unwrap().into()),
            ("a directory", File::open("/").unwrap().into()),
            ("/dev/zero", File::options().read(true).write(true).open("/dev/zero").unwrap().into()),
            ("a pipe", reader.into()),
            ("the pipe's other end", writer.into()),
            ("a socket", std::os::unix::net::UnixStream::pair().unwrap().0.into()),
            ("O_PATH", again(&memfd(b"x"), OFlags::PATH)),
        ];
        for (kind, descriptor) in kinds {
            assert_eq!(check(descriptor).unwrap_err(), Fault::Kind, "{kind}");
        }
        let huge = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB;
        if let Ok(huge) = memfd_create("huge", huge) {
            assert_eq!(check(huge).unwrap_err(), Fault::Kind);
        }
    }

    #[test]
    fn modes_seals_and_sizes() {
        let whole = memfd(b"canary");
        for flags in [OFlags::RDONLY, OFlags::WRONLY, OFlags::RDWR | OFlags::APPEND] {
            assert_eq!(check(again(&whole, flags)).unwrap_err(), Fault::Mode, "{flags:?}");
        }
        for seal in [SealFlags::WRITE, SealFlags::FUTURE_WRITE] {
            let sealed = memfd(b"canary");
            fcntl_add_seals(&sealed, seal).unwrap();
            assert_eq!(check(sealed).unwrap_err(), Fault::WriteSealed, "{seal:?}");
        }
        let resized = |len| {
            let memfd = memfd(b"");
            ftruncate(&memfd, len).unwrap();
            check(memfd).map(|incoming| incoming.len)
        };
        assert_eq!(resized(0), Err(Fault::Empty));
        assert_eq!(resized(1), Ok(1));
        assert_eq!(resized(MAX_SECRET as u64), Ok(MAX_SECRET));
        assert_eq!(resized(MAX_SECRET as u64 + 1), Err(Fault::TooLong));
        assert_eq!(resized(1 << 60), Err(Fault::TooLong));
        let fixed = memfd(b"canary");
        fcntl_add_seals(&fixed, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).unwrap();
        assert!(check(fixed).is_ok());
    }

    #[test]
    fn none_and_two_are_not_one() {
        let memfds = Memfds::find().unwrap();
        assert_eq!(memfds.check(&mut Vec::new()).unwrap_err(), Fault::NotOne);
        let mut two = vec![memfd(b"a"), memfd(b"b")];
        assert_eq!(memfds.check(&mut two).unwrap_err(), Fault::NotOne);
        assert_eq!(two.len(), 2, "nothing is closed here");
    }

    #[test]
    fn a_change_of_size_or_seals_after_the_check_is_seen() {
        let read = |change: fn(&OwnedFd)| {
            let theirs = memfd(b"canary");
            let incoming = check(theirs.try_clone().unwrap()).unwrap();
            change(&theirs);
            let slot = arena().allocate(incoming.room()).unwrap();
            (incoming.read(slot).map(|slot| slot.len()), fstat(&theirs).unwrap().st_size)
        };
        let cut = |theirs: &OwnedFd| ftruncate(theirs, 2).unwrap();
        let grow = |theirs: &OwnedFd| ftruncate(theirs, 1 << 40).unwrap();
        let seal = |theirs: &OwnedFd| fcntl_add_seals(theirs, SealFlags::WRITE).unwrap();
        assert_eq!(read(cut), (Err(Fault::Resized), 6), "the wipe makes it no longer than it was");
        assert_eq!(read(grow), (Err(Fault::Resized), 1 << 40));
        assert_eq!(read(seal), (Err(Fault::NotWiped), 6));
    }

    #[test]
    fn a_file_that_is_cut_and_grown_in_a_race_faults_nobody() {
        let theirs = memfd(&[b'x'; 8192]);
        let stop = AtomicBool::new(false);
        let arena = arena();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let _ = ftruncate(&theirs, 0);
                    let _ = ftruncate(&theirs, 8192);
                }
            });
            let (mut whole, mut refused) = (0, 0);
            while whole + refused < 2000 {
                let answer = check(theirs.try_clone().unwrap())
                    .and_then(|incoming| incoming.read(arena.allocate(incoming.room()).unwrap()));
                match answer {
                    Ok(_) => whole += 1,
                    Err(_) => refused += 1,
                }
            }
            stop.store(true, Ordering::Relaxed);
            println!("read {whole}, refused {refused}");
        });
    }

    #[test]
    fn what_is_given_cannot_be_resized_and_can_be_wiped() {
        let mut slot = arena().allocate(6).unwrap();
        slot.fill(|place| place.copy_from_slice(b"canary"));
        let given = give(&slot).unwrap();
        let seals = fcntl_get_seals(&given).unwrap();
        assert_eq!(seals, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL);
        assert!(ftruncate(&given, 1).is_err());
        let mut content = [0; 6];
        pread(&given, &mut content, 0).unwrap();
        assert_eq!(&content, b"canary");
        assert_eq!(pwrite(&given, &[0; 6], 0).unwrap(), 6);
        // What is given can be brought back: a program may pass it on.
        pwrite(&given, b"canary", 0).unwrap();
        assert!(check(given).is_ok());
    }
}
