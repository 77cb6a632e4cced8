//! Process exit codes: sysexits.h.

#![forbid(unsafe_code)]

use std::process::ExitCode;

/// How the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Well.
    Ok,
    /// EX_USAGE: the command line cannot be understood.
    Usage,
    /// EX_UNAVAILABLE: something that is needed is not there.
    Unavailable,
    /// EX_SOFTWARE: a fault of the program.
    Software,
    /// EX_NOPERM: somebody may not do something, or too many may.
    NoPermission,
    /// EX_CONFIG: the configuration cannot be used.
    Config,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Ok => 0,
            Exit::Usage => 64,
            Exit::Unavailable => 69,
            Exit::Software => 70,
            Exit::NoPermission => 77,
            Exit::Config => 78,
        })
    }
}
