//! What the process gives up: [`early`] before there is a thread or a secret, [`late`] when
//! everything is open that it will ever need to open.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::Mode;
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit, umask,
};
use rustix::thread::set_no_new_privs;
use thiserror::Error;

pub(crate) use self::caps::Dropped;
pub(crate) use self::landlock::{Enforced, Paths, is_available as landlock_is_available};
use crate::sys;

mod caps;
mod landlock;
mod seccomp;

/// A step that must not fail has failed.
#[derive(Debug, Error)]
#[error("cannot harden the process: {step} failed")]
pub(crate) struct HardenError {
    step: &'static str,
    #[source]
    source: io::Error,
}

/// Sockets that the service manager passed, with their names.
#[derive(Debug)]
pub(crate) struct Inherited(Vec<(String, OwnedFd)>);

impl Inherited {
    /// Whether a socket of that name was passed.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(own, _)| own == name)
    }

    /// Takes the socket of that name out.
    pub(crate) fn take(&mut self, name: &str) -> Option<OwnedFd> {
        let place = self.0.iter().position(|(own, _)| own == name)?;
        Some(self.0.swap_remove(place).1)
    }

    /// The names of those that nobody took.
    pub(crate) fn left(&self) -> Vec<&str> {
        self.0.iter().map(|(name, _)| name.as_str()).collect()
    }
}

/// What the kernel gave of the sandbox, for the posture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sandbox {
    pub(crate) landlock: Enforced,
    pub(crate) seccomp: bool,
    pub(crate) capabilities: Dropped,
}

impl fmt::Display for Sandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "landlock={} seccomp={} capabilities={}",
            self.landlock,
            if self.seccomp { "on" } else { "off" },
            self.capabilities
        )
    }
}

/// First thing in the process: nothing made later is readable by others, no core is written, no
/// privilege can be gained, and no descriptor is open that nobody named.
pub(crate) fn early() -> Result<Inherited, HardenError> {
    let failed = |step| move |errno: rustix::io::Errno| HardenError { step, source: errno.into() };
    umask(Mode::from_raw_mode(0o077));
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, none).map_err(failed("setrlimit(RLIMIT_CORE)"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(failed("prctl(PR_SET_DUMPABLE)"))?;
    set_no_new_privs(true).map_err(failed("prctl(PR_SET_NO_NEW_PRIVS)"))?;
    raise_descriptors();
    let inherited = sys::inherited_sockets()
        .map_err(|source| HardenError { step: "taking over LISTEN_FDS", source })?;
    sys::close_strays(inherited.len());
    Ok(Inherited(inherited))
}

/// When all is open: no capabilities, no files but those named, no new program.
pub(crate) fn late(paths: &Paths) -> Result<Sandbox, HardenError> {
    let capabilities =
        caps::drop_all().map_err(|source| HardenError { step: "dropping capabilities", source })?;
    let landlock =
        landlock::restrict(paths).map_err(|source| HardenError { step: "landlock", source })?;
    seccomp::install().map_err(|source| HardenError { step: "seccomp", source })?;
    Ok(Sandbox { landlock, seccomp: true, capabilities })
}

/// For the keeper, which starts programs: they too have no capabilities, write nothing but
/// temporary files, and reach no other process. Reading stays as the uid has it, for a program
/// that fetches a secret brings its own configuration, certificates and interpreter; so does
/// the network. What [`early`] did was inherited by the fork.
pub(crate) fn keeper() -> Result<Sandbox, HardenError> {
    let capabilities =
        caps::drop_all().map_err(|source| HardenError { step: "dropping capabilities", source })?;
    let landlock =
        landlock::restrict_writing().map_err(|source| HardenError { step: "landlock", source })?;
    seccomp::install_but_for_programs()
        .map_err(|source| HardenError { step: "seccomp", source })?;
    Ok(Sandbox { landlock, seccomp: true, capabilities })
}

/// A session takes three descriptors; the soft limit of 1024 is for select(2), not used here.
fn raise_descriptors() {
    let Rlimit { maximum, .. } = rustix::process::getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}
