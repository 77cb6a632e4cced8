//! What can go wrong with reading a credential.

#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::MAX_SECRET;
use crate::arena::ArenaFull;
use crate::keeper::ExecFault;
use crate::upstream::tls::KeyFault;

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
    /// Not started by systemd, or not with credentials.
    #[error(
        "there is no $CREDENTIALS_DIRECTORY: start the broker as a systemd service with LoadCredential={name}:PATH"
    )]
    NoSystemd {
        /// Which credential.
        name: String,
    },
    /// Every read saw something else.
    #[error("its files changed whenever they were read")]
    Changing,
    /// A program gave nothing.
    #[error(transparent)]
    Exec(#[from] ExecFault),
    /// What was fixed at the start does not allow it.
    #[error("{0}: restart required")]
    RestartRequired(&'static str),
    /// The task that read it is gone.
    #[error("reading it was broken off")]
    BrokenOff,
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
    /// Not the two keys that the configuration says it is.
    #[error(
        "the secret is not CLIENT_KEY:SERVER_KEY, each 32 bytes in base64, as credential = \"scram-keys\" wants it"
    )]
    NoKeys,
    /// A file of a private key that holds none which could be used.
    #[error("{path} {fault}", path = .path.display())]
    PrivateKey {
        /// Which file.
        path: PathBuf,
        /// Why not.
        fault: KeyFault,
    },
    /// No room.
    #[error(transparent)]
    ArenaFull(#[from] ArenaFull),
}

impl SourceFault {
    /// The same with the place of the configuration that is at fault.
    pub(crate) fn at(self, config: PathBuf, key: String) -> SourceError {
        SourceError { config, key, fault: self }
    }

    /// Whether it is about access, rather than about what is there.
    #[must_use]
    pub(crate) fn is_permission(&self) -> bool {
        match self {
            Self::File { source, .. } => source.kind() == io::ErrorKind::PermissionDenied,
            Self::Untrusted { .. } => true,
            Self::NoVariable { .. }
            | Self::NoSystemd { .. }
            | Self::Changing
            | Self::Exec(_)
            | Self::RestartRequired(_)
            | Self::BrokenOff
            | Self::TooLong
            | Self::Empty
            | Self::NoUsername
            | Self::BadUsername
            | Self::NulByte
            | Self::NoKeys
            | Self::PrivateKey { .. }
            | Self::ArenaFull(_) => false,
        }
    }

    /// Whether the next try may succeed with nobody changing anything here: programs ask others.
    #[must_use]
    pub(crate) fn is_passing(&self) -> bool {
        matches!(self, Self::Exec(_) | Self::Changing)
    }
}
