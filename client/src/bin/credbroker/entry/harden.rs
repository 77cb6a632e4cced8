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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::process::Command;
    use std::thread;

    use super::*;

    fn landlock_knows(access: AccessNet) -> bool {
        let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
        ruleset.handle_access(access).and_then(Ruleset::create).is_ok()
    }

    /// On a thread of its own: the rules stay for as long as that lives.
    #[test]
    fn no_file_no_program_and_no_tcp_but_what_is_open() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        let thread = thread::spawn(move || {
            late().map_err(|failure| format!("{failure:?}")).unwrap();
            let refused = [
                File::open("/etc/passwd").is_err(),
                File::create(file).is_err(),
                Command::new("/bin/true").status().is_err(),
                TcpStream::connect(address).is_err(),
                TcpListener::bind("127.0.0.1:0").is_err(),
            ];
            UnixStream::pair().unwrap();
            (refused, listener)
        });
        let (refused, listener) = thread.join().unwrap();
        assert_eq!(refused, [landlock_knows(AccessNet::ConnectTcp); 5]);
        TcpStream::connect(address).unwrap();
        listener.accept().unwrap();
    }
}
