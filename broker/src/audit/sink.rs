//! Where lines go: a file that only this broker writes, and standard output.

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};
use thiserror::Error;

use super::Durability;
use super::chain::{Chain, Head};
use crate::config::AuditConfig;
use crate::sys;

/// No line is longer: every field of a record is bounded.
const MAX_LINE: u64 = 64 * 1024;
/// How much of a torn line is kept.
const MAX_TORN: usize = 16 * 1024;

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
}

impl SinkError {
    /// Whether it is about who may write, rather than about what is there.
    #[must_use]
    pub(crate) fn is_permission(&self) -> bool {
        match self {
            Self::Open { source, .. } => source.kind() == io::ErrorKind::PermissionDenied,
            Self::InUse { .. } | Self::BrokenTail { .. } => false,
        }
    }
}

/// How the log ended when it was opened.
#[derive(Debug, Default)]
pub(super) struct Tail {
    pub(super) head: Option<Head>,
    /// What stood behind the last newline, in base64.
    pub(super) torn: Option<String>,
}

#[derive(Debug)]
pub(super) struct Sinks {
    file: Option<LogFile>,
    stdout: bool,
}

#[derive(Debug)]
struct LogFile {
    path: PathBuf,
    file: File,
    /// Where the last whole line ends: a line that was cut short by a full disk is taken back.
    len: u64,
    dirty: bool,
    durability: Durability,
}

impl Sinks {
    pub(super) fn open(config: &AuditConfig) -> Result<(Self, Tail), SinkError> {
        let mut tail = Tail::default();
        let mut file = None;
        if let Some(path) = &config.file {
            let (opened, found) = LogFile::open(path, config.durability)?;
            (file, tail) = (Some(opened), found);
        }
        Ok((Self { file, stdout: config.stdout }, tail))
    }

    /// Writes one line to every sink; the file's comes first and must succeed whole.
    pub(super) fn write(&mut self, line: &str) -> io::Result<()> {
        if let Some(file) = &mut self.file {
            file.append(line.as_bytes())?;
        }
        if self.stdout
            && let Err(error) = sys::write_without_waiting(&io::stdout(), line.as_bytes())
        {
            // A line that one sink has and the other has not was not written.
            if let Some(file) = &mut self.file {
                file.take_back(line.len());
            }
            return Err(error);
        }
        Ok(())
    }

    /// Tries to come by a file that can be written again.
    pub(super) fn recover(&mut self) -> Result<(), SinkError> {
        self.file.as_mut().map_or(Ok(()), LogFile::recover)
    }

    /// A descriptor to sync, if something was written since the last time.
    pub(super) fn dirty_file(&mut self) -> Option<File> {
        let log = self.file.as_mut().filter(|log| log.dirty)?;
        let file = log.file.try_clone().ok()?;
        log.dirty = false;
        Some(file)
    }

    /// A sink that takes nothing.
    #[cfg(test)]
    pub(super) fn failing() -> Self {
        let file = File::open("/dev/null").unwrap();
        Self {
            file: Some(LogFile {
                path: "/dev/null".into(),
                file,
                len: 0,
                dirty: false,
                durability: Durability::Write,
            }),
            stdout: false,
        }
    }
}

impl LogFile {
    fn open(path: &Path, durability: Durability) -> Result<(Self, Tail), SinkError> {
        let failed = |source: io::Error| SinkError::Open { path: path.to_owned(), source };
        if let Some(parent) = path.parent() {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(parent)
                .map_err(failed)?;
        }
        let flags = i32::try_from((OFlags::NOFOLLOW | OFlags::CLOEXEC).bits()).unwrap_or_default();
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(flags)
            .open(path)
            .map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(SinkError::InUse { path: path.to_owned() });
            }
            Err(errno) => return Err(failed(errno.into())),
        }
        let broken = || SinkError::BrokenTail { path: path.to_owned() };
        let (whole, torn) = last_line(&mut file).map_err(failed)?;
        let head = match &whole.text {
            None => None,
            Some(line) => Some(Chain::head_of(line).ok_or_else(broken)?),
        };
        let torn = (!torn.is_empty())
            .then(|| data_encoding::BASE64.encode(torn.get(..MAX_TORN).unwrap_or(&torn)));
        if torn.is_some() {
            file.set_len(whole.end).map_err(failed)?;
        }
        Ok((
            Self { path: path.to_owned(), file, len: whole.end, dirty: false, durability },
            Tail { head, torn },
        ))
    }

    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        if self.is_deleted() {
            // The write would succeed, and nobody would ever read it.
            return Err(io::Error::new(io::ErrorKind::NotFound, "the file was deleted"));
        }
        let written = self.file.write_all(line).and_then(|()| match self.durability {
            Durability::Write => Ok(()),
            Durability::Fsync => rustix::fs::fdatasync(&self.file).map_err(io::Error::from),
        });
        if let Err(error) = written {
            // Half a line would break the chain for every reader, and a whole one that was
            // refused would be a grant that never was.
            let _ = self.file.set_len(self.len);
            return Err(error);
        }
        self.len += line.len() as u64;
        self.dirty = self.durability == Durability::Write;
        Ok(())
    }
}

impl LogFile {
    /// Undoes the last append.
    fn take_back(&mut self, len: usize) {
        self.len = self.len.saturating_sub(len as u64);
        let _ = self.file.set_len(self.len);
    }

    fn is_deleted(&self) -> bool {
        rustix::fs::fstat(&self.file).is_ok_and(|stat| stat.st_nlink == 0)
    }

    /// Makes a new file where a deleted one was. The chain goes on in it: that its first record
    /// is not number 1 shows that something is missing.
    fn recover(&mut self) -> Result<(), SinkError> {
        if self.is_deleted() {
            let (fresh, tail) = Self::open(&self.path, self.durability)?;
            if tail.head.is_some() || tail.torn.is_some() {
                // Somebody else's log is in the place of ours.
                return Err(SinkError::InUse { path: self.path.clone() });
            }
            *self = fresh;
        }
        Ok(())
    }
}

struct WholeLine {
    text: Option<String>,
    end: u64,
}

/// The last whole line and where it ends, and the bytes behind it.
fn last_line(file: &mut File) -> io::Result<(WholeLine, Vec<u8>)> {
    let len = file.metadata()?.len();
    let start = len.saturating_sub(2 * MAX_LINE);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(2 * MAX_LINE).read_to_end(&mut bytes)?;
    let end = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
    let torn = bytes.split_off(end);
    let line =
        bytes.strip_suffix(b"\n").and_then(|lines| lines.rsplit(|byte| *byte == b'\n').next());
    let text = line.map(|line| String::from_utf8_lossy(line).into_owned());
    Ok((WholeLine { text, end: start + end as u64 }, torn))
}
