//! Where lines go: the file, and standard output, which never makes anybody wait.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::fs::File;
use std::io;

use super::Durability;
use super::chain::{Link, MAX_LINE};
pub(crate) use super::file::SinkError;
use super::file::{LogFile, Mended};
use crate::config::AuditConfig;
use crate::sys;

/// Lines that standard output may be behind the file.
const MAX_OWED: usize = 16 * 1024;

#[derive(Debug)]
pub(super) struct Sinks {
    file: Option<LogFile>,
    stdout: Option<Stdout>,
    durability: Durability,
}

#[derive(Debug, Default)]
struct Stdout {
    /// Lines that the file has and the reader of standard output has not taken yet.
    owed: VecDeque<String>,
    /// Whether the last line was taken.
    flows: bool,
}

/// How far a batch came.
#[derive(Debug)]
pub(super) struct Written {
    /// Lines that stand in every sink, or will.
    pub(super) lines: usize,
    /// Why the rest does not.
    pub(super) error: Option<io::Error>,
}

impl Sinks {
    /// Opens them and gives the head of the chain and what had to be mended.
    pub(super) fn open(
        config: &AuditConfig,
    ) -> Result<(Self, Option<Link>, Option<Mended>), SinkError> {
        let (mut file, mut head, mut mended) = (None, None, None);
        if let Some(path) = &config.file {
            let opened = LogFile::open(path)?;
            (head, mended) = (opened.head, opened.mended);
            file = Some(opened.file);
        }
        let stdout = config.stdout.then(|| Stdout { flows: true, ..Stdout::default() });
        Ok((Self { file, stdout, durability: config.durability }, head, mended))
    }

    /// Writes the lines of `text`, which end at `ends`. With `grants` among them each line stands
    /// in every sink or counts as not written; without, a file that has them is enough, and
    /// standard output gets them when it flows again.
    pub(super) fn write(&mut self, text: &str, ends: &[usize], grants: bool) -> Written {
        let none = |error| Written { lines: 0, error: Some(error) };
        let Self { file, stdout, durability } = self;
        if let Some(stdout) = stdout {
            let paid = stdout.pay();
            let behind = stdout.owed.len() + ends.len() > MAX_OWED;
            match paid {
                Err(error) if grants || behind || file.is_none() => return none(error),
                Ok(()) | Err(_) => {}
            }
        }
        let before = file.as_ref().map_or(0, LogFile::len);
        if let Some(file) = file {
            if let Err(error) = file.reserve(text.len() as u64)
                && grants
            {
                return none(error);
            }
            if let Err(error) = file.append(text.as_bytes(), *durability == Durability::Fsync) {
                return none(error);
            }
        }
        let Some(stdout) = stdout else { return Written { lines: ends.len(), error: None } };
        let (lines, error) = match stdout.offer(text, ends) {
            Ok(()) => return Written { lines: ends.len(), error: None },
            Err(stopped) => stopped,
        };
        let start = lines.checked_sub(1).and_then(|last| ends.get(last)).copied().unwrap_or(0);
        match file {
            Some(_) if !grants => {
                let rest = text.get(start..).unwrap_or_default();
                stdout.owed.extend(rest.split_inclusive('\n').map(str::to_owned));
                Written { lines: ends.len(), error: None }
            }
            Some(file) => {
                // A line that one sink has and the other has not was not written.
                file.take_back(before + start as u64);
                Written { lines, error: Some(error) }
            }
            None => Written { lines, error: Some(error) },
        }
    }

    /// Whether grants can be written: the reserve is whole, and standard output flows.
    pub(super) fn is_whole(&self) -> bool {
        self.file.as_ref().is_none_or(LogFile::is_whole)
            && self.stdout.as_ref().is_none_or(|stdout| stdout.owed.is_empty() && stdout.flows)
    }

    /// Looks for a way to write again. `head` is what the file must end with.
    pub(super) fn recover(&mut self, head: &Link) -> Result<Option<Mended>, SinkError> {
        if let Some(stdout) = &mut self.stdout {
            // Without lines that are owed, the next one shows.
            stdout.flows = stdout.pay().is_ok();
        }
        self.file.as_mut().map_or(Ok(None), |file| file.recover(head))
    }

    /// Bytes of the file; 0 when there is none.
    pub(super) fn len(&self) -> u64 {
        self.file.as_ref().map_or(0, LogFile::len)
    }

    pub(super) fn rotate(&mut self, keep: u32) -> io::Result<()> {
        self.file.as_mut().map_or(Ok(()), |file| file.rotate(keep))
    }

    /// Whether the file is still there as it was written.
    pub(super) fn check(&self) -> io::Result<()> {
        self.file.as_ref().map_or(Ok(()), LogFile::check)
    }

    /// A descriptor to sync in the background, until [`Sinks::synced`].
    pub(super) fn unsynced(&self) -> Option<File> {
        self.file.as_ref().and_then(LogFile::unsynced)
    }

    pub(super) fn synced(&mut self) {
        if let Some(file) = &mut self.file {
            file.synced();
        }
    }

    pub(super) fn close(&mut self) {
        if let Some(stdout) = &mut self.stdout {
            let _ = stdout.pay();
        }
        if let Some(file) = &mut self.file {
            file.close();
        }
    }
}

impl Stdout {
    /// Writes lines in pieces that a pipe takes whole or not at all; how many of them, and why no
    /// more.
    fn offer(&mut self, text: &str, ends: &[usize]) -> Result<(), (usize, io::Error)> {
        let (mut start, mut done) = (0, 0);
        while done < ends.len() {
            let fits = |end: &&usize| **end - start <= MAX_LINE;
            let rest = ends.get(done..).unwrap_or_default();
            let count = rest.iter().take_while(fits).count().max(1);
            let end = rest.get(count - 1).copied().unwrap_or(start);
            let piece = text.get(start..end).unwrap_or_default();
            let written = sys::write_without_waiting(&io::stdout(), piece.as_bytes());
            self.flows = written.is_ok();
            written.map_err(|error| (done, error))?;
            (start, done) = (end, done + count);
        }
        Ok(())
    }

    /// Writes what is owed.
    fn pay(&mut self) -> io::Result<()> {
        while let Some(line) = self.owed.front() {
            let written = sys::write_without_waiting(&io::stdout(), line.as_bytes());
            self.flows = written.is_ok();
            written?;
            self.owed.pop_front();
        }
        Ok(())
    }
}
