//! What an operator has suspended: kept on disk, so that a restart does not undo it.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::Mutex;

use crate::connection::ConnectionName;

const FILE: &str = "suspended.json";
const MAX_LEN: u64 = 1024 * 1024;

/// The suspended connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Suspended {
    all: bool,
    names: BTreeSet<ConnectionName>,
}

/// What an operator names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    Connection(ConnectionName),
    All,
}

/// Where it is kept.
#[derive(Debug)]
pub(crate) struct SuspensionFile {
    path: PathBuf,
    /// Held from the moment when what is to be written is known until it is in force.
    pub(super) one_at_a_time: Mutex<()>,
}

/// It could not be read. To go on without it would be to resume what an operator has suspended.
#[derive(Debug, Error)]
#[error("{path}: cannot read what is suspended: {why}; mend it, or remove it to resume everything", path = .path.display())]
pub(crate) struct SuspensionError {
    path: PathBuf,
    why: String,
}

/// It could not be written, and why not.
#[derive(Debug, Error)]
#[error("{path}: {source}", path = .path.display())]
pub(super) struct NotWritten {
    path: PathBuf,
    source: io::Error,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    all: bool,
    connections: Vec<String>,
}

impl Suspended {
    pub(crate) fn of(scope: &Scope) -> Self {
        match scope {
            Scope::All => Self { all: true, names: BTreeSet::new() },
            Scope::Connection(name) => Self { all: false, names: BTreeSet::from([name.clone()]) },
        }
    }

    pub(crate) fn covers(&self, name: &ConnectionName) -> bool {
        self.all || self.names.contains(name)
    }

    pub(super) fn add(&mut self, more: &Self) {
        self.all |= more.all;
        self.names.extend(more.names.iter().cloned());
    }

    /// To resume all ends suspensions of single connections too. To resume one leaves a
    /// suspension of all as it is.
    pub(super) fn remove(&mut self, scope: &Scope) {
        match scope {
            Scope::All => *self = Self::default(),
            Scope::Connection(name) => drop(self.names.remove(name)),
        }
    }

    /// For people: `*` for all, and the names.
    pub(crate) fn names(&self) -> Vec<String> {
        let all = self.all.then(|| "*".to_owned());
        all.into_iter().chain(self.names.iter().map(ToString::to_string)).collect()
    }
}

impl SuspensionFile {
    /// Reads what was suspended before the last end of the broker.
    ///
    /// # Errors
    /// When there is a file that cannot be understood.
    pub(crate) fn open(state_dir: &Path) -> Result<(Self, Suspended), SuspensionError> {
        let path = state_dir.join(FILE);
        let wrong = |why: String| SuspensionError { path: path.clone(), why };
        let suspended = match read(&path) {
            Ok(text) => {
                let written: Written =
                    serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
                let names = written.connections.iter().map(|name| {
                    ConnectionName::parse(name)
                        .ok_or_else(|| wrong("it names what is no connection".to_owned()))
                });
                Suspended { all: written.all, names: names.collect::<Result<_, _>>()? }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Suspended::default(),
            Err(error) => return Err(wrong(error.to_string())),
        };
        Ok((Self { path, one_at_a_time: Mutex::default() }, suspended))
    }

    /// Replaces the file; whole, or as it was. Blocks for as long as the disk takes.
    ///
    /// # Errors
    /// With the path that could not be written.
    pub(super) fn write(&self, suspended: &Suspended) -> Result<(), NotWritten> {
        let fresh = self.path.with_extension("json.new");
        let at = |path: &Path| {
            let path = path.to_owned();
            |source| NotWritten { path, source }
        };
        write_new(&fresh, suspended).map_err(at(&fresh))?;
        self.put_in_place(&fresh).map_err(at(&self.path))
    }

    fn put_in_place(&self, fresh: &Path) -> io::Result<()> {
        fs::rename(fresh, &self.path)?;
        // The rename itself must be on the disk too.
        self.path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
    }
}

fn write_new(fresh: &Path, suspended: &Suspended) -> io::Result<()> {
    let written = Written {
        all: suspended.all,
        connections: suspended.names.iter().map(ToString::to_string).collect(),
    };
    let text = serde_json::to_vec(&written).map_err(io::Error::other)?;
    let flags = i32::try_from((OFlags::NOFOLLOW | OFlags::CLOEXEC).bits()).unwrap_or_default();
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(flags)
        .open(fresh)?;
    file.write_all(&text)?;
    file.sync_all()
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_LEN).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ConnectionName {
        ConnectionName::parse(text).unwrap()
    }

    #[test]
    fn it_is_still_there_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let (file, mut suspended) = SuspensionFile::open(dir.path()).unwrap();
        assert!(!suspended.covers(&name("main_db")));
        suspended.add(&Suspended::of(&Scope::Connection(name("main_db"))));
        file.write(&suspended).unwrap();
        let (_, again) = SuspensionFile::open(dir.path()).unwrap();
        assert_eq!(again, suspended);
        assert!(again.covers(&name("main_db")) && !again.covers(&name("other")));
        assert_eq!(again.names(), ["main_db"]);
    }

    #[test]
    fn resuming_one_leaves_all() {
        let mut suspended = Suspended::of(&Scope::All);
        suspended.add(&Suspended::of(&Scope::Connection(name("a"))));
        suspended.remove(&Scope::Connection(name("a")));
        assert!(suspended.covers(&name("a")));
        suspended.remove(&Scope::All);
        assert_eq!(suspended, Suspended::default());
    }

    #[test]
    fn a_file_that_cannot_be_understood_is_no_reason_to_resume() {
        let dir = tempfile::tempdir().unwrap();
        for text in
            ["", "{", r#"{"all":1,"connections":[]}"#, r#"{"all":false,"connections":["*"]}"#]
        {
            fs::write(dir.path().join(FILE), text).unwrap();
            assert!(SuspensionFile::open(dir.path()).is_err(), "{text}");
        }
    }
}
