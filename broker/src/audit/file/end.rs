//! How a log file ends: the last whole line, and what stands torn behind it.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use super::super::chain::{Chain, Link, MAX_LINE};
use super::{MAX_KEPT, SinkError};

/// How a file ends.
pub(super) struct End {
    /// The last whole line, if there is one.
    pub(super) line: Option<Vec<u8>>,
    /// Where it ends.
    pub(super) whole: u64,
    /// What stands behind it, as far as it is kept.
    pub(super) torn: Vec<u8>,
    pub(super) torn_len: u64,
}

/// What is kept of a torn end, the last whole line, and the head that it makes.
#[cfg(any(test, fuzzing))]
pub(in super::super) type Ended = (Vec<u8>, Option<Vec<u8>>, Option<Link>);

/// How `file` ends, for inputs of the fuzzer.
#[cfg(any(test, fuzzing))]
pub(in super::super) fn end_of(file: &File) -> io::Result<Ended> {
    let End { line, whole, torn, torn_len } = End::of(file)?;
    assert_eq!(whole + torn_len, file.metadata()?.len());
    assert!(torn.len() as u64 == torn_len.min(MAX_KEPT) && !torn.contains(&b'\n'));
    let head = End { line: line.clone(), whole, torn: Vec::new(), torn_len }.head(Path::new("/"));
    Ok((torn, line, head.ok().flatten()))
}

impl End {
    pub(super) fn of(file: &File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        let whole = last_newline(file, len)?;
        let torn = read(file, whole, MAX_KEPT)?;
        let mut line = None;
        if whole > 0 {
            // A line of ours is not longer; of a longer one the end alone does not verify.
            let start = whole.saturating_sub(MAX_LINE as u64);
            let mut bytes = read(file, start, whole - start)?;
            bytes.pop();
            line = bytes.rsplit(|byte| *byte == b'\n').next().map(<[u8]>::to_vec);
        }
        Ok(Self { line, whole, torn, torn_len: len - whole })
    }

    pub(super) fn head(&self, path: &Path) -> Result<Option<Link>, SinkError> {
        let Some(line) = &self.line else { return Ok(None) };
        let head = std::str::from_utf8(line).ok().and_then(Chain::head_of);
        head.map(Some).ok_or_else(|| SinkError::BrokenTail { path: path.to_owned() })
    }
}

/// Where the last newline before `len` ends; 0 when there is none.
fn last_newline(file: &File, len: u64) -> io::Result<u64> {
    let mut end = len;
    while end > 0 {
        let start = end.saturating_sub(MAX_KEPT);
        let block = read(file, start, end - start)?;
        if let Some(newline) = block.iter().rposition(|byte| *byte == b'\n') {
            return Ok(start + newline as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

pub(super) fn read(mut file: &File, start: u64, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(start))?;
    file.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}
