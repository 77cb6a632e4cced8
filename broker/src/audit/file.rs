//! The log file: one that only this broker writes, with room kept behind its end.
//!
//! Blocks are reserved ahead of what is written (fallocate(2), keeping the size), so that on a
//! full disk the records of what takes rights away still fit. After each write the path must name
//! this very file, with exactly the bytes that were written: a file that was deleted, replaced,
//! cut or written by somebody else takes no record that anybody would rely on.

#![forbid(unsafe_code)]

use std::fs::{DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, FlockOperation, OFlags, fallocate, fdatasync, flock};
use rustix::io::Errno;
use thiserror::Error;
use tracing::warn;

#[cfg(any(test, fuzzing))]
pub(super) use self::end::end_of;
use self::end::{End, read};
use super::chain::Link;

mod end;

/// Room for about a thousand records of what takes rights away.
const RESERVE: u64 = 512 * 1024;
/// How much more is reserved at a time.
const STEP: u64 = 64 * 1024;
/// How much of torn or foreign bytes is kept.
const MAX_KEPT: u64 = 16 * 1024;

/// The log could not be opened.
#[derive(Debug, Error)]
pub(crate) enum SinkError {
    /// A system call failed.
    #[error("{path}: cannot open the audit log: {source}; make its directory writable for uid {uid}, or change audit.path", path = .path.display(), uid = crate::peer::Uid::own())]
    Open {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another broker has it open.
    #[error("{path}: another broker is writing this audit log: give each its own audit.path", path = .path.display())]
    InUse {
        /// Which file.
        path: PathBuf,
    },
    /// The last line is not a record, or its hash is wrong.
    #[error("{path}: the last record does not verify, so the log was edited or damaged: keep it for inquiry, and move it away to begin a new chain", path = .path.display())]
    BrokenTail {
        /// Which file.
        path: PathBuf,
    },
    /// The key that signs checkpoints.
    #[error(transparent)]
    Signer(#[from] super::signer::SignerError),
}

impl SinkError {
    /// Whether it is about who may write, rather than about what is there.
    #[must_use]
    pub(crate) fn is_permission(&self) -> bool {
        match self {
            Self::Open { source, .. } => source.kind() == io::ErrorKind::PermissionDenied,
            Self::Signer(error) => error.is_permission(),
            Self::InUse { .. } | Self::BrokenTail { .. } => false,
        }
    }
}

/// Something had to be mended, and a record must say so.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mended {
    pub(super) what: &'static str,
    /// Bytes that belonged to no record, as far as they are kept.
    pub(super) bytes: Vec<u8>,
    /// How many there were.
    pub(super) len: u64,
}

#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    file: File,
    /// Device and inode.
    id: (u64, u64),
    /// Where the last whole line ends.
    len: u64,
    /// Where the reserved blocks end. `None` where the filesystem cannot reserve any.
    reserved: Option<u64>,
    /// Whether the last attempt to reserve worked.
    is_whole: bool,
    unsynced: bool,
}

/// What [`LogFile::open`] found.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) file: LogFile,
    pub(super) head: Option<Link>,
    pub(super) mended: Option<Mended>,
}

impl LogFile {
    /// Opens or makes the file at `path`, locks it and looks at its end. A chain whose last file
    /// was rotated away goes on.
    pub(super) fn open(path: &Path) -> Result<Opened, SinkError> {
        let mut opened = Self::open_at(path)?;
        let before = rotated(path, 1);
        if opened.head.is_none() && before.exists() {
            // Either the broker ended between the steps of a rotation, or somebody took the file
            // away; which of them cannot be told.
            let failed = |source| SinkError::Open { path: before.clone(), source };
            let file =
                File::options().read(true).custom_flags(flags()).open(&before).map_err(failed)?;
            let end = End::of(&file).map_err(failed)?;
            opened.head = end.head(&before)?;
            opened.mended.get_or_insert(Mended { what: "missing", bytes: Vec::new(), len: 0 });
        }
        Ok(opened)
    }

    fn open_at(path: &Path) -> Result<Opened, SinkError> {
        let failed = |source: io::Error| SinkError::Open { path: path.to_owned(), source };
        if let Some(parent) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(failed)?;
        }
        let file = create(path, false).map_err(failed)?;
        lock(&file, path)?;
        let end = End::of(&file).map_err(failed)?;
        let head = end.head(path)?;
        if end.torn_len > 0 {
            file.set_len(end.whole).map_err(failed)?;
        }
        let mended = (end.torn_len > 0).then_some(Mended {
            what: "torn",
            bytes: end.torn,
            len: end.torn_len,
        });
        let file = Self::new(path, file, end.whole).map_err(failed)?;
        Ok(Opened { file, head, mended })
    }

    fn new(path: &Path, file: File, len: u64) -> io::Result<Self> {
        let id = id(&file.metadata()?);
        let mut log = Self {
            path: path.to_owned(),
            file,
            id,
            len,
            reserved: Some(len),
            is_whole: false,
            unsynced: false,
        };
        // A disk that is full already shows at the first grant.
        let _ = log.reserve(0);
        Ok(log)
    }

    /// Sees to it that `bytes` fit, and the reserve behind them.
    pub(super) fn reserve(&mut self, bytes: u64) -> io::Result<()> {
        self.is_whole = false;
        let wanted = self.len + bytes + RESERVE;
        let Some(reserved) = self.reserved else {
            self.is_whole = true;
            return Ok(());
        };
        if reserved < wanted {
            let more = wanted + STEP - self.len;
            match fallocate(&self.file, FallocateFlags::KEEP_SIZE, self.len, more) {
                Ok(()) => self.reserved = Some(self.len + more),
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                    warn!(
                        "this filesystem reserves no room: a full disk holds up every audit record"
                    );
                    self.reserved = None;
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        self.is_whole = true;
        Ok(())
    }

    /// Whether the reserve is whole, so that grants may be written.
    pub(super) fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// Writes whole lines, all or none.
    pub(super) fn append(&mut self, lines: &[u8], sync: bool) -> io::Result<()> {
        // Before, so that what somebody else wrote is kept and not taken back with our lines; and
        // after, so that a record counts as written only in a file that is still there.
        self.check()?;
        let end = self.len + lines.len() as u64;
        let written = self.file.write_all(lines).and_then(|()| {
            self.check_end(end)?;
            if sync { Ok(fdatasync(&self.file)?) } else { Ok(()) }
        });
        if let Err(error) = written {
            // Half a line would break the chain for every reader, and a whole one that was
            // refused would be a grant that never was.
            self.take_back(self.len);
            return Err(error);
        }
        self.len = end;
        self.unsynced |= !sync;
        Ok(())
    }

    /// Undoes what was appended after `len`. Where somebody else wrote meanwhile, what they wrote
    /// is left for [`LogFile::recover`] to keep.
    pub(super) fn take_back(&mut self, len: u64) {
        self.len = len;
        let _ = self.file.set_len(len);
        // Truncation frees what was reserved behind the end.
        self.reserved = self.reserved.map(|_freed| len);
        let _ = self.reserve(0);
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    fn check_end(&self, end: u64) -> io::Result<()> {
        let named = std::fs::symlink_metadata(&self.path)?;
        if id(&named) != self.id {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the file was replaced"));
        }
        if named.len() != end {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the file was cut, or somebody else wrote to it",
            ));
        }
        Ok(())
    }

    /// Makes the file one that can be written again, if that is possible. `head` is what it must
    /// end with.
    pub(super) fn recover(&mut self, head: &Link) -> Result<Option<Mended>, SinkError> {
        let path = self.path.clone();
        let failed = |source: io::Error| SinkError::Open { path: path.clone(), source };
        let named = match std::fs::symlink_metadata(&self.path) {
            Ok(named) => Some(named),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        let own = self.file.metadata().map_err(failed)?;
        let mended = match named {
            Some(named) if id(&named) != self.id => {
                let Opened { file, head: found, mended } = Self::open_at(&self.path)?;
                if found.is_some_and(|found| found != *head) {
                    // Another log is in the place of ours; to go on in it would break both.
                    return Err(SinkError::BrokenTail { path });
                }
                *self = file;
                Some(mended.unwrap_or(Mended { what: "replaced", bytes: Vec::new(), len: 0 }))
            }
            None => {
                // A new file goes on with the chain: that its first record is not number 1 shows
                // that something is missing.
                *self = Self::open_at(&self.path)?.file;
                Some(Mended { what: "deleted", bytes: Vec::new(), len: 0 })
            }
            Some(_) if own.len() < self.len => {
                let lost = self.len - own.len();
                let end = End::of(&self.file).map_err(failed)?;
                self.take_back(end.whole);
                Some(Mended { what: "cut", bytes: end.torn, len: lost })
            }
            Some(_) if own.len() > self.len => {
                let bytes = read(&self.file, self.len, MAX_KEPT).map_err(failed)?;
                let len = own.len() - self.len;
                self.take_back(self.len);
                Some(Mended { what: "trailing", bytes, len })
            }
            Some(_) => None,
        };
        self.reserve(0).map_err(failed)?;
        Ok(mended)
    }

    /// A descriptor to sync, if something was written since the last time.
    pub(super) fn unsynced(&self) -> Option<File> {
        if self.unsynced { self.file.try_clone().ok() } else { None }
    }

    pub(super) fn synced(&mut self) {
        self.unsynced = false;
    }

    /// The path must still name this file, and it must end where its last record ends.
    pub(super) fn check(&self) -> io::Result<()> {
        self.check_end(self.len)
    }

    /// Brings what was written to the disk and gives back what was reserved.
    pub(super) fn close(&mut self) {
        let _ = self.file.set_len(self.len);
        let _ = fdatasync(&self.file);
        self.unsynced = false;
    }

    /// Moves this file to `.1`, the older ones one further, and goes on in a new one. Whatever
    /// step is the last before a crash, each record is in one file, and the next start finds the
    /// end of the chain.
    pub(super) fn rotate(&mut self, keep: u32) -> io::Result<()> {
        self.check()?;
        let fresh_path = self.path.with_extension("new");
        let _ = std::fs::remove_file(&fresh_path);
        let fresh = create(&fresh_path, true)?;
        flock(&fresh, FlockOperation::NonBlockingLockExclusive)?;
        let mut fresh = Self::new(&self.path, fresh, 0)?;
        if !fresh.is_whole {
            let _ = std::fs::remove_file(&fresh_path);
            return Err(io::ErrorKind::StorageFull.into());
        }
        let full = (1..=keep).find(|number| !rotated(&self.path, *number).exists());
        for number in (2..=full.unwrap_or(keep)).rev() {
            std::fs::rename(rotated(&self.path, number - 1), rotated(&self.path, number))?;
        }
        self.close();
        std::fs::rename(&self.path, rotated(&self.path, 1))?;
        std::fs::rename(&fresh_path, &self.path)?;
        sync_directory(&self.path);
        std::mem::swap(self, &mut fresh);
        Ok(())
    }
}

/// `audit.jsonl.1`, the newest of those that were rotated away.
fn rotated(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    PathBuf::from(name)
}

fn flags() -> i32 {
    i32::try_from((OFlags::NOFOLLOW | OFlags::CLOEXEC).bits()).unwrap_or_default()
}

fn create(path: &Path, new: bool) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .create_new(new)
        .mode(0o600)
        .custom_flags(flags())
        .open(path)
}

fn lock(file: &File, path: &Path) -> Result<(), SinkError> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(SinkError::InUse { path: path.to_owned() }),
        Err(errno) => Err(SinkError::Open { path: path.to_owned(), source: errno.into() }),
    }
}

fn id(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// A rename that a crash undoes would bring back a name that the chain has left.
fn sync_directory(path: &Path) {
    if let Some(Ok(directory)) = path.parent().map(File::open) {
        let _ = directory.sync_all();
    }
}
