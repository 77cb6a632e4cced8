//! Secrets in files: read(2) with the arena as the buffer. Also pipes and devices, which may
//! keep a reader waiting, for a while and not for ever.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Intake, IntakeFault, SourceFault, Taken};
use crate::arena::{Arena, Slot};

const WRITABLE_BY_ALL: u32 = 0o002;
/// How long a pipe may stay empty.
const READ_WITHIN: Duration = Duration::from_secs(10);

pub(super) fn read(path: &Path, arena: &Arena) -> Result<Slot, SourceFault> {
    let failed = |source| SourceFault::File { path: path.to_owned(), source };
    // A pipe that nobody writes to would keep open(2) waiting.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    // World-readable is how Kubernetes mounts secrets by default; world-writable is never meant.
    if metadata.is_file() && metadata.mode() & WRITABLE_BY_ALL != 0 {
        return Err(SourceFault::Untrusted { path: path.to_owned() });
    }
    // One byte more than there is, so that the end is seen and nothing has to grow.
    let expected = usize::try_from(metadata.len()).unwrap_or(usize::MAX).saturating_add(1);
    let mut intake = Intake::new(arena, expected)?;
    let is_pipe = metadata.file_type().is_fifo();
    let deadline = Instant::now() + READ_WITHIN;
    loop {
        match intake.take_from(&file) {
            Ok(Taken::Some) => {}
            // Before a writer has come a pipe reads as ended.
            Ok(Taken::End) if is_pipe && intake.is_empty() => {
                if !wait(&file, deadline).map_err(failed)? {
                    return Ok(intake.finish());
                }
            }
            Ok(Taken::End) => return Ok(intake.finish()),
            Ok(Taken::NothingYet) => {
                wait(&file, deadline).map_err(failed)?;
            }
            Err(IntakeFault::TooLong) => return Err(SourceFault::TooLong),
            Err(IntakeFault::ArenaFull(full)) => return Err(full.into()),
            Err(IntakeFault::Io(error)) => return Err(failed(error)),
        }
    }
}

/// Waits until there is something to read; `false` when the writers left without a word.
fn wait(file: &File, deadline: Instant) -> io::Result<bool> {
    let left = deadline.saturating_duration_since(Instant::now());
    let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
    let mut fds = [PollFd::new(file, PollFlags::IN)];
    match poll(&mut fds, Some(&left)) {
        Ok(0) => Err(io::ErrorKind::TimedOut.into()),
        Ok(_) => Ok(fds.iter().any(|fd| fd.revents().contains(PollFlags::IN))),
        Err(rustix::io::Errno::INTR) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}
