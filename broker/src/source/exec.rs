//! Secrets that a program prints: which program, and how long it may take. It runs in the keeper.

#![forbid(unsafe_code)]

use std::time::Duration;

/// A command as the keeper knows it. Equal commands are one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExecSource {
    /// The program's absolute path, and its arguments. Not empty.
    pub(crate) argv: Vec<String>,
    /// When it is killed.
    pub(crate) timeout: Duration,
}

impl ExecSource {
    /// The program's path.
    pub(crate) fn program(&self) -> &str {
        self.argv.first().map_or("", String::as_str)
    }
}
