//! Where a credential comes from, and reading it: from the kernel straight into the arena.

#![forbid(unsafe_code)]

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub(crate) use self::exec::ExecSource;
pub(crate) use self::fault::{SourceError, SourceFault};
pub(crate) use self::intake::{Intake, IntakeFault, Taken};
pub(crate) use self::material::{Material, scram_keys};
pub(crate) use self::stamp::{Stamp, directories};
pub(crate) use self::systemd::is_name as is_systemd_name;
use crate::arena::{Arena, Slot};
use crate::credential::SecretForm;
use crate::keeper::{Keeper, Run};
use crate::sys;

mod env;
mod exec;
mod fault;
mod file;
mod intake;
mod material;
mod stamp;
mod systemd;

/// Longest secret text in bytes.
pub(crate) const MAX_SECRET: usize = 16 * 1024;
/// How often files that change while they are read are read again.
const TRIES: usize = 3;

/// Where a connection's credential comes from.
#[derive(Debug)]
pub(crate) struct Source {
    /// The configuration file and key, for messages.
    pub(crate) config: PathBuf,
    pub(crate) key: String,
    pub(crate) kind: SourceKind,
    pub(crate) username: UsernameSource,
    /// What its secret is.
    pub(crate) form: SecretForm,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum SourceKind {
    File(PathBuf),
    /// The files `username` and `password` of a directory.
    Dir(PathBuf),
    Env(String),
    /// A file of $CREDENTIALS_DIRECTORY.
    Systemd(String),
    /// What a program prints, and how often it is asked again.
    Exec {
        command: ExecSource,
        refresh: Duration,
    },
    /// An operator puts it.
    Store,
    /// The connection has no credential of its own: peers register theirs.
    Absent,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum UsernameSource {
    /// The secret text is `username:password`; a directory has a file for it.
    InSecret,
    Named(String),
    File(PathBuf),
}

/// What was read, and how the files looked before.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) material: Material,
    pub(crate) stamp: Stamp,
}

/// A read that may not have ended yet.
#[derive(Debug)]
pub(crate) enum Begun {
    /// There is nothing to read.
    Nothing,
    Read(Box<Loaded>),
    Runs(Run),
}

impl Source {
    /// Reads the credential, or starts what will print it; before there is a runtime.
    ///
    /// # Errors
    /// When there is no credential, or none that could be used.
    pub(crate) fn begin(&self, arena: &Arena, keeper: &Keeper) -> Result<Begun, SourceError> {
        Ok(match &self.kind {
            SourceKind::Store | SourceKind::Absent => Begun::Nothing,
            SourceKind::Exec { command, .. } => {
                Begun::Runs(keeper.begin(command, arena).map_err(|fault| self.error(fault.into()))?)
            }
            SourceKind::File(_)
            | SourceKind::Dir(_)
            | SourceKind::Env(_)
            | SourceKind::Systemd(_) => Begun::Read(Box::new(self.read(arena)?)),
        })
    }

    /// The end of [`Source::begin`]. `None` where there is nothing to read.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn finish(
        &self,
        begun: Begun,
        arena: &Arena,
    ) -> Result<Option<Loaded>, SourceError> {
        match begun {
            Begun::Nothing => Ok(None),
            Begun::Read(loaded) => Ok(Some(*loaded)),
            Begun::Runs(run) => {
                let text = run.finish().map_err(|fault| self.error(fault.into()))?;
                self.parse(&text, arena).map(Some)
            }
        }
    }

    /// Reads the credential anew. `None` where there is nothing to read. What may block does so
    /// on a thread of its own; dropping the future leaves nothing outside the arena.
    ///
    /// # Errors
    /// When there is no credential, or none that could be used.
    pub(crate) async fn load(
        self: &Arc<Self>,
        arena: &Arena,
        keeper: &Keeper,
    ) -> Result<Option<Loaded>, SourceError> {
        let text = match &self.kind {
            SourceKind::Store | SourceKind::Absent => return Ok(None),
            SourceKind::Exec { command, .. } => {
                let ran = keeper.run(command, arena).await;
                Some(ran.map_err(|fault| self.error(fault.into()))?)
            }
            SourceKind::File(_)
            | SourceKind::Dir(_)
            | SourceKind::Env(_)
            | SourceKind::Systemd(_) => None,
        };
        let (source, arena) = (Arc::clone(self), arena.clone());
        let read = tokio::task::spawn_blocking(move || match text {
            Some(text) => source.parse(&text, &arena),
            None => source.read(&arena),
        });
        read.await.unwrap_or_else(|_gone| Err(self.error(SourceFault::BrokenOff))).map(Some)
    }

    /// Removes what a read leaves outside the arena. After this an environment variable is empty.
    pub(crate) fn wipe(&self) {
        if let SourceKind::Env(variable) = &self.kind {
            sys::wipe_env(variable);
        }
    }

    /// Whether reading it again can give something else.
    pub(crate) fn is_rereadable(&self) -> bool {
        match self.kind {
            SourceKind::File(_)
            | SourceKind::Dir(_)
            | SourceKind::Systemd(_)
            | SourceKind::Exec { .. } => true,
            SourceKind::Env(_) | SourceKind::Store | SourceKind::Absent => false,
        }
    }

    /// How often it is read without a sign of change.
    pub(crate) fn refresh(&self) -> Option<Duration> {
        match self.kind {
            SourceKind::Exec { refresh, .. } => Some(refresh),
            SourceKind::File(_)
            | SourceKind::Dir(_)
            | SourceKind::Env(_)
            | SourceKind::Systemd(_)
            | SourceKind::Store
            | SourceKind::Absent => None,
        }
    }

    /// The program that it runs.
    pub(crate) fn command(&self) -> Option<&ExecSource> {
        match &self.kind {
            SourceKind::Exec { command, .. } => Some(command),
            SourceKind::File(_)
            | SourceKind::Dir(_)
            | SourceKind::Env(_)
            | SourceKind::Systemd(_)
            | SourceKind::Store
            | SourceKind::Absent => None,
        }
    }

    /// The user name that the configuration gives.
    pub(crate) fn configured_username(&self) -> Option<&str> {
        match &self.username {
            UsernameSource::Named(name) => Some(name),
            UsernameSource::InSecret | UsernameSource::File(_) => None,
        }
    }

    /// Whether both read the same things in the same way.
    pub(crate) fn is_same_as(&self, other: &Self) -> bool {
        self.kind == other.kind && self.username == other.username && self.form == other.form
    }

    /// How its files look now. Blocks as long as stat(2) does.
    pub(crate) fn stamp(&self) -> Stamp {
        Stamp::of(self.files().iter().map(PathBuf::as_path))
    }

    /// Whether there are files to watch.
    pub(crate) fn has_files(&self) -> bool {
        self.is_rereadable() && !self.files().is_empty()
    }

    /// Directories that must stay readable for its files to be read again.
    pub(crate) fn directories(&self) -> Vec<PathBuf> {
        self.files().iter().flat_map(|file| directories(file)).collect()
    }

    /// Whether the secret stood in the broker's environment.
    pub(crate) fn is_environment(&self) -> bool {
        matches!(self.kind, SourceKind::Env(_))
    }

    /// The same with the place of the configuration that is at fault.
    pub(crate) fn error(&self, fault: SourceFault) -> SourceError {
        fault.at(self.config.clone(), self.key.clone())
    }

    /// The files that a read needs.
    fn files(&self) -> Vec<PathBuf> {
        let mut files = match (&self.kind, &self.username) {
            (SourceKind::File(path), _) => vec![path.clone()],
            (SourceKind::Dir(dir), UsernameSource::InSecret) => {
                vec![dir.join(USERNAME), dir.join(PASSWORD)]
            }
            (SourceKind::Dir(dir), _) => vec![dir.join(PASSWORD)],
            (SourceKind::Systemd(name), _) => systemd::path(name).into_iter().collect(),
            (
                SourceKind::Env(_)
                | SourceKind::Exec { .. }
                | SourceKind::Store
                | SourceKind::Absent,
                _,
            ) => Vec::new(),
        };
        if let UsernameSource::File(path) = &self.username {
            files.push(path.clone());
        }
        files
    }

    /// Reads until nothing changed meanwhile: a user name and the password of another are none.
    fn read(&self, arena: &Arena) -> Result<Loaded, SourceError> {
        self.settled(|| {
            let text = match &self.kind {
                SourceKind::File(path) => file::read(path, arena)?,
                SourceKind::Dir(dir) => file::read(&dir.join(PASSWORD), arena)?,
                SourceKind::Systemd(name) => file::read(&systemd::path(name)?, arena)?,
                SourceKind::Env(variable) => env::read(variable, arena)?,
                SourceKind::Exec { .. } | SourceKind::Store | SourceKind::Absent => {
                    return Err(SourceFault::BrokenOff);
                }
            };
            self.material(&text, arena)
        })
    }

    /// The same for text that a program printed.
    fn parse(&self, text: &Slot, arena: &Arena) -> Result<Loaded, SourceError> {
        self.settled(|| self.material(text, arena))
    }

    fn settled(
        &self,
        read: impl Fn() -> Result<Material, SourceFault>,
    ) -> Result<Loaded, SourceError> {
        for _ in 0..TRIES {
            let stamp = self.stamp();
            let read = read();
            if self.stamp() == stamp {
                let material = read.map_err(|fault| self.error(fault))?;
                return Ok(Loaded { material, stamp });
            }
        }
        Err(self.error(SourceFault::Changing))
    }

    fn material(&self, text: &Slot, arena: &Arena) -> Result<Material, SourceFault> {
        let read_name = |path: &Path| {
            file::read(path, arena)?
                .expose(|bytes| material::parse_username(material::trimmed(bytes)))
        };
        let username = match (&self.username, &self.kind) {
            (UsernameSource::Named(name), _) => Some(name.clone()),
            (UsernameSource::File(path), _) => Some(read_name(path)?),
            (UsernameSource::InSecret, SourceKind::Dir(dir)) => {
                Some(read_name(&dir.join(USERNAME))?)
            }
            (UsernameSource::InSecret, _) => None,
        };
        Material::parse(text, username.as_deref(), self.form)
    }
}

/// Reads a file straight into the arena: at most [`MAX_SECRET`] bytes, and none that every user
/// could have written. Blocks.
pub(crate) fn read_file(path: &Path, arena: &Arena) -> Result<Slot, SourceFault> {
    file::read(path, arena)
}

/// Whether a role can have this name.
pub(crate) fn is_username(text: &str) -> bool {
    material::parse_username(text.as_bytes()).is_ok()
}

const USERNAME: &str = "username";
const PASSWORD: &str = "password";

impl fmt::Display for SourceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Dir(path) => write!(f, "directory {}", path.display()),
            Self::Env(variable) => write!(f, "environment variable {variable}"),
            Self::Systemd(name) => write!(f, "systemd credential {name}"),
            Self::Exec { command, .. } => write!(f, "program {}", command.program()),
            Self::Store => f.write_str("what an operator puts"),
            Self::Absent => f.write_str("none"),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;
    use std::io::Write as _;

    use super::*;
    use crate::arena::BackendChoice;

    pub(crate) fn source(kind: SourceKind, username: UsernameSource) -> Source {
        Source {
            config: "broker.toml".into(),
            key: "connections.x.secret".into(),
            kind,
            username,
            form: SecretForm::Password,
        }
    }

    fn arena() -> Arena {
        Arena::map(BackendChoice::Auto, 64 * 1024).unwrap()
    }

    fn read(source: &Source) -> Result<(String, Vec<u8>), SourceFault> {
        let loaded = source.read(&arena()).map_err(|error| error.fault)?;
        let Material { username, secret: password, .. } = loaded.material;
        Ok((username, password.expose(<[u8]>::to_vec)))
    }

    fn load(text: &[u8], username: UsernameSource) -> Result<(String, Vec<u8>), SourceFault> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text).unwrap();
        read(&source(SourceKind::File(file.path().to_owned()), username))
    }

    #[test]
    fn the_text_is_split_at_the_first_colon() {
        let split = load(b"app:pa:ss\n", UsernameSource::InSecret).unwrap();
        assert_eq!(split, ("app".into(), b"pa:ss".to_vec()));
    }

    #[test]
    fn with_a_username_the_whole_is_the_password() {
        let whole = load(b"pa:ss\n\n", UsernameSource::Named("app".into())).unwrap();
        assert_eq!(whole, ("app".into(), b"pa:ss\n".to_vec()));
    }

    #[test]
    fn a_directory_has_a_file_each() {
        let dir = tempfile::tempdir().unwrap();
        let of = |username| source(SourceKind::Dir(dir.path().to_owned()), username);
        fs::write(dir.path().join("password"), "pa:ss\n").unwrap();
        let fault = read(&of(UsernameSource::InSecret)).unwrap_err().to_string();
        assert!(fault.contains("/username: No such file"), "{fault}");
        let named = read(&of(UsernameSource::Named("other".into()))).unwrap();
        assert_eq!(named, ("other".into(), b"pa:ss".to_vec()));
        fs::write(dir.path().join("username"), "app\n").unwrap();
        let both = read(&of(UsernameSource::InSecret)).unwrap();
        assert_eq!(both, ("app".into(), b"pa:ss".to_vec()));
    }

    #[test]
    fn a_pipe_is_waited_for_and_read_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(made.success());
        let writer = std::thread::spawn({
            let path = path.clone();
            move || fs::write(path, [b"app:".as_slice(), &[b'x'; 5000]].concat())
        });
        let (_, password) =
            read(&source(SourceKind::File(path), UsernameSource::InSecret)).unwrap();
        assert_eq!(password.len(), 5000);
        writer.join().unwrap().unwrap();
    }

    #[test]
    fn faults() {
        let fault = |text: &[u8]| load(text, UsernameSource::InSecret).unwrap_err().to_string();
        assert!(fault(b"justapassword").contains("username:password"));
        assert!(fault(b"app:\n").contains("empty"));
        assert!(fault(b":pw").contains("user name"));
        assert!(fault(b"app:p\0w").contains("NUL"));
        assert!(fault(&[b'a'; MAX_SECRET + 1]).contains("longer"));
        let most = [b"app:".as_slice(), &[b'a'; MAX_SECRET - 4]].concat();
        assert!(load(&most, UsernameSource::InSecret).is_ok());
    }

    #[test]
    fn no_fault_shows_the_secret() {
        let fault = format!("{:?}", load(b"canarypassword", UsernameSource::InSecret).unwrap_err());
        assert!(!fault.contains("canary"), "{fault}");
    }
}
