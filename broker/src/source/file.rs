//! Secrets in files: read(2) with the arena as the buffer.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::{MAX_SECRET, SourceFault};
use crate::arena::{Arena, Slot};

const WRITABLE_BY_ALL: u32 = 0o002;

pub(super) fn read(path: &Path, arena: &Arena) -> Result<Slot, SourceFault> {
    let failed = |source| SourceFault::File { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    // World-readable is how Kubernetes mounts secrets by default; world-writable is never meant.
    if metadata.is_file() && metadata.mode() & WRITABLE_BY_ALL != 0 {
        return Err(SourceFault::Untrusted { path: path.to_owned() });
    }
    // A pipe has no length; a file may grow while it is read: one byte more shows it.
    let expected = usize::try_from(metadata.len()).unwrap_or(usize::MAX);
    let room = if metadata.is_file() { expected.min(MAX_SECRET) + 1 } else { MAX_SECRET + 1 };
    let mut slot = arena.allocate(room)?;
    let len = slot.fill(|buffer| fill(&mut file, buffer)).map_err(failed)?;
    if len >= room {
        return Err(SourceFault::TooLong);
    }
    slot.truncate(len);
    Ok(slot)
}

fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while let Some(rest) = buffer.get_mut(len..).filter(|rest| !rest.is_empty()) {
        match file.read(rest) {
            Ok(0) => break,
            Ok(count) => len += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}
