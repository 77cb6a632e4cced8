//! Where a credential comes from, and reading it: from the kernel straight into the arena.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::arena::{Arena, ArenaFull, Slot};
use crate::credential::Credential;
use crate::sys;

mod env;
mod file;

/// Longest secret text in bytes.
pub(crate) const MAX_SECRET: usize = 16 * 1024;

/// Where a connection's credential comes from.
#[derive(Debug)]
pub(crate) struct Source {
    /// The configuration file and key, for messages.
    pub(crate) config: PathBuf,
    pub(crate) key: String,
    pub(crate) kind: SourceKind,
    pub(crate) username: UsernameSource,
}

#[derive(Debug)]
pub(crate) enum SourceKind {
    File(PathBuf),
    Env(String),
    /// Peers bring their own, or an operator puts one.
    Absent,
}

#[derive(Debug)]
pub(crate) enum UsernameSource {
    /// The secret text is `username:password`.
    InSecret,
    Named(String),
    File(PathBuf),
}

/// A credential could not be read.
#[derive(Debug, Error)]
#[error("{config}: {key}: {fault}", config = .config.display())]
pub(crate) struct SourceError {
    config: PathBuf,
    key: String,
    /// What went wrong.
    #[source]
    pub(crate) fault: SourceFault,
}

/// What can go wrong with a source.
#[derive(Debug, Error)]
pub(crate) enum SourceFault {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}; make it readable for uid {uid}", path = .path.display(), uid = crate::peer::Uid::own())]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody else could have written the file.
    #[error("{path} can be written by every user: chmod o-w it", path = .path.display())]
    Untrusted {
        /// Which file.
        path: PathBuf,
    },
    /// The variable is not set.
    #[error("the environment variable {variable} is not set")]
    NoVariable {
        /// Which variable.
        variable: String,
    },
    /// More than a secret has.
    #[error("the secret is longer than {MAX_SECRET} bytes")]
    TooLong,
    /// Nothing to log in with.
    #[error("the secret is empty")]
    Empty,
    /// No colon.
    #[error(
        "the secret is not of the form username:password: add the username, or set the key username"
    )]
    NoUsername,
    /// NUL or not UTF-8.
    #[error("the user name is not text of 1 to 63 bytes")]
    BadUsername,
    /// NUL would end it early on the wire.
    #[error("the secret holds a NUL byte")]
    NulByte,
    /// No room.
    #[error(transparent)]
    ArenaFull(#[from] ArenaFull),
}

impl SourceFault {
    /// Whether it is about access, rather than about what is there.
    #[must_use]
    pub(crate) fn is_permission(&self) -> bool {
        match self {
            Self::File { source, .. } => source.kind() == io::ErrorKind::PermissionDenied,
            Self::Untrusted { .. } => true,
            Self::NoVariable { .. }
            | Self::TooLong
            | Self::Empty
            | Self::NoUsername
            | Self::BadUsername
            | Self::NulByte
            | Self::ArenaFull(_) => false,
        }
    }
}

impl Source {
    /// Reads the credential into the arena.
    ///
    /// # Errors
    /// When there is no credential, or none that could be used.
    pub(crate) fn load(&self, arena: &Arena) -> Result<Credential, SourceError> {
        self.read(arena).map_err(|fault| SourceError {
            config: self.config.clone(),
            key: self.key.clone(),
            fault,
        })
    }

    /// Removes what a read leaves outside the arena. After this an environment variable is empty.
    pub(crate) fn wipe(&self) {
        match &self.kind {
            SourceKind::Env(variable) => sys::wipe_env(variable),
            SourceKind::File(_) | SourceKind::Absent => {}
        }
    }

    /// The files that a read needs.
    pub(crate) fn file(&self) -> Option<&Path> {
        match &self.kind {
            SourceKind::File(path) => Some(path),
            SourceKind::Env(_) | SourceKind::Absent => None,
        }
    }

    /// Whether the secret stood in the broker's environment.
    pub(crate) fn is_environment(&self) -> bool {
        matches!(self.kind, SourceKind::Env(_))
    }

    /// Whether there is none.
    pub(crate) fn is_absent(&self) -> bool {
        matches!(self.kind, SourceKind::Absent)
    }

    fn read(&self, arena: &Arena) -> Result<Credential, SourceFault> {
        let text = match &self.kind {
            SourceKind::File(path) => file::read(path, arena)?,
            SourceKind::Env(variable) => env::read(variable, arena)?,
            SourceKind::Absent => return Err(SourceFault::Empty),
        };
        match &self.username {
            UsernameSource::InSecret => {
                let (username, password) = split(&text, arena)?;
                Ok(Credential::new(username, password))
            }
            UsernameSource::Named(name) => {
                Ok(Credential::new(username(name.as_bytes())?, password(&text, 0, arena)?))
            }
            UsernameSource::File(path) => {
                let name = file::read(path, arena)?.expose(|bytes| username(trimmed(bytes)))?;
                Ok(Credential::new(name, password(&text, 0, arena)?))
            }
        }
    }
}

impl fmt::Display for SourceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Env(variable) => write!(f, "environment variable {variable}"),
            Self::Absent => f.write_str("nowhere"),
        }
    }
}

/// One trailing newline is what editors and `echo` add; nobody means it.
fn trimmed(text: &[u8]) -> &[u8] {
    let text = text.strip_suffix(b"\n").unwrap_or(text);
    text.strip_suffix(b"\r").unwrap_or(text)
}

/// Takes `username:password` apart.
pub(crate) fn split(text: &Slot, arena: &Arena) -> Result<(String, Slot), SourceFault> {
    let (username, start) = text.expose(split_username)?;
    Ok((username, password(text, start, arena)?))
}

/// A text that is a password as a whole, but for a newline at its end.
pub(crate) fn whole(mut text: Slot) -> Result<Slot, SourceFault> {
    let len = text.expose(|bytes| {
        let password = trimmed(bytes);
        match password {
            [] => Err(SourceFault::Empty),
            _ if password.contains(&0) => Err(SourceFault::NulByte),
            _ => Ok(password.len()),
        }
    })?;
    text.truncate(len);
    Ok(text)
}

/// Whether a database could know a role by this name.
pub(crate) fn is_username(text: &str) -> bool {
    username(text.as_bytes()).is_ok()
}

/// The user name before the first colon, and where the password starts.
fn split_username(text: &[u8]) -> Result<(String, usize), SourceFault> {
    let colon = text.iter().position(|byte| *byte == b':').ok_or(SourceFault::NoUsername)?;
    let name = text.get(..colon).unwrap_or_default();
    Ok((username(name)?, colon + 1))
}

fn username(bytes: &[u8]) -> Result<String, SourceFault> {
    let text = std::str::from_utf8(bytes).map_err(|_not_text| SourceFault::BadUsername)?;
    if text.is_empty() || text.len() > 63 || text.contains(['\0', '\n']) {
        return Err(SourceFault::BadUsername);
    }
    Ok(text.to_owned())
}

/// Copies the password within the arena into a slot of its own size; `text` is wiped by its drop.
fn password(text: &Slot, start: usize, arena: &Arena) -> Result<Slot, SourceFault> {
    text.expose(|bytes| {
        let password = trimmed(bytes.get(start..).unwrap_or_default());
        if password.is_empty() {
            return Err(SourceFault::Empty);
        }
        if password.contains(&0) {
            return Err(SourceFault::NulByte);
        }
        let mut slot = arena.allocate(password.len())?;
        slot.fill(|place| place.copy_from_slice(password));
        Ok(slot)
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::arena::BackendChoice;

    fn load(text: &[u8], username: UsernameSource) -> Result<(String, Vec<u8>), SourceFault> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text).unwrap();
        let kind = SourceKind::File(file.path().to_owned());
        let source = Source {
            config: "broker.toml".into(),
            key: "connections.x.secret".into(),
            kind,
            username,
        };
        let arena = Arena::map(BackendChoice::Auto, 64 * 1024).unwrap();
        let credential = source.load(&arena).map_err(|error| error.fault)?;
        Ok((credential.username().to_owned(), credential.password().expose(<[u8]>::to_vec)))
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
    fn faults() {
        let fault = |text: &[u8]| load(text, UsernameSource::InSecret).unwrap_err().to_string();
        assert!(fault(b"justapassword").contains("username:password"));
        assert!(fault(b"app:\n").contains("empty"));
        assert!(fault(b":pw").contains("user name"));
        assert!(fault(b"app:p\0w").contains("NUL"));
        assert!(fault(&[b'a'; MAX_SECRET + 1]).contains("longer"));
    }

    #[test]
    fn no_fault_shows_the_secret() {
        let fault = format!("{:?}", load(b"canarypassword", UsernameSource::InSecret).unwrap_err());
        assert!(!fault.contains("canary"), "{fault}");
    }
}
