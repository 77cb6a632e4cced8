//! What the process of an entry gives up: [`early`] before it knows anything, [`late`] when all
//! is open that it will ever need.

use std::io;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, Ruleset, RulesetAttr as _,
};
use rustix::fs::Mode;
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit, umask,
};
use rustix::thread::set_no_new_privs;

use crate::failure::Failure;

/// No other process of the user may read this one (man prctl(2), PR_SET_DUMPABLE), no core is
/// written, and no privilege can be gained.
pub(super) fn early() -> Result<(), Failure> {
    let failed = |errno: rustix::io::Errno| Failure::system("cannot harden", &errno.into());
    umask(Mode::from_raw_mode(0o077));
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, none).map_err(failed)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed)?;
    set_no_new_privs(true).map_err(failed)
}

/// From here on this thread, and those that it makes, open no file, start no program, and
/// neither listen nor connect by TCP, as far as the kernel knows Landlock. What is open stays
/// so, and Unix sockets can be connected to: the broker may restart.
pub(super) fn late() -> Result<(), Failure> {
    let abi = ABI::V5;
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(abi)))
        .and_then(Ruleset::create)
        .and_then(landlock::RulesetCreated::restrict_self)
        .map_err(|error| Failure::system("cannot harden", &io::Error::other(error)))?;
    Ok(())
}
