//! Feeding a verifier from files: in the order in which they were written, whatever the order in
//! which they are given, a line at a time.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::line::Line;
use super::{Broken, Fault, Head, Keys, MAX_LINE, Report, Verifier};

/// A file could not be read, which says nothing about the log.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The operating system refused.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is no key in the file.
    #[error("{}: a line is not a public key: give a copy of audit.pub, or one key a line in hexadecimal", path.display())]
    NoKeys {
        /// Which file.
        path: PathBuf,
    },
}

/// Lines of a file, in bounded memory.
struct Lines {
    path: PathBuf,
    file: BufReader<File>,
    line: u64,
    bytes: Vec<u8>,
}

/// Verifies the log in `paths`, rotated files included, in any order.
///
/// # Errors
/// When a file cannot be read. A broken log is no error: the report says so.
pub fn verify(
    paths: &[impl AsRef<Path>],
    keys: Keys,
    noted: impl IntoIterator<Item = Head>,
) -> Result<Report, ReadError> {
    let mut verifier = Verifier::new(keys, noted);
    let mut begin = Vec::new();
    for path in paths {
        let mut lines = Lines::open(path.as_ref())?;
        match lines.next()? {
            None => {}
            Some(line) => match line.and_then(Line::parse) {
                Ok(line) => begin.push((line.seq, lines.path)),
                Err(fault) => return Ok(verifier.break_off(lines.broken(fault))),
            },
        }
    }
    begin.sort();
    for (_, path) in begin {
        let mut lines = Lines::open(&path)?;
        while let Some(line) = lines.next()? {
            if let Err(fault) = line.and_then(|line| verifier.line(line)) {
                return Ok(verifier.break_off(lines.broken(fault)));
            }
        }
    }
    Ok(verifier.finish())
}

impl Lines {
    fn open(path: &Path) -> Result<Self, ReadError> {
        let file =
            File::open(path).map_err(|source| ReadError::Io { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), file: BufReader::new(file), line: 0, bytes: Vec::new() })
    }

    /// The next line without its newline.
    fn next(&mut self) -> Result<Option<Result<&[u8], Fault>>, ReadError> {
        self.bytes.clear();
        self.line += 1;
        let most = MAX_LINE as u64 + 1;
        let read = self.file.by_ref().take(most).read_until(b'\n', &mut self.bytes);
        let read = read.map_err(|source| ReadError::Io { path: self.path.clone(), source })?;
        if read == 0 {
            return Ok(None);
        }
        Ok(Some(match self.bytes.strip_suffix(b"\n") {
            Some(line) => Ok(line),
            None if read > MAX_LINE => Err(Fault::TooLong),
            None => Err(Fault::Torn),
        }))
    }

    fn broken(&self, fault: Fault) -> Broken {
        Broken { file: Some(self.path.clone()), line: self.line, fault }
    }
}
