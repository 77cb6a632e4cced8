//! What can be wrong with a configuration: one line, naming file and key, saying what to do.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// A configuration that cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{file}: cannot read the configuration: {source}", file = .file.display())]
    Read {
        /// Which file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody else could have written the file.
    #[error("{file}: {why}", file = .file.display())]
    Untrusted {
        /// Which file.
        file: PathBuf,
        /// What is wrong with it, and what to do.
        why: String,
    },
    /// The file is longer than any configuration.
    #[error("{file}: longer than {limit} bytes", file = .file.display())]
    TooLong {
        /// Which file.
        file: PathBuf,
        /// The bound, in bytes.
        limit: u64,
    },
    /// The text is not TOML, or a key is unknown or of the wrong type.
    #[error("{file}{line}: {key}{message}", file = .file.display(), line = .line.map(|line| format!(":{line}")).unwrap_or_default(), key = if .key.is_empty() { String::new() } else { format!("{}: ", .key) })]
    Syntax {
        /// Which file.
        file: PathBuf,
        /// Line, from 1.
        line: Option<usize>,
        /// The key, dotted; may be empty.
        key: String,
        /// What is wrong.
        message: String,
    },
    /// A value that is well-formed and makes no sense.
    #[error("{file}: {key}: {message}", file = .file.display())]
    Value {
        /// Which file.
        file: PathBuf,
        /// The key, dotted.
        key: String,
        /// What is wrong, and what to do.
        message: String,
    },
}

impl ConfigError {
    /// Whether it is about who may write a file, rather than what is in it.
    #[must_use]
    pub fn is_permission(&self) -> bool {
        match self {
            Self::Untrusted { .. } => true,
            Self::Read { source, .. } => source.kind() == io::ErrorKind::PermissionDenied,
            Self::TooLong { .. } | Self::Syntax { .. } | Self::Value { .. } => false,
        }
    }
}
