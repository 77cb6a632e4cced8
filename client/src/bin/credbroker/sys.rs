//! The unsafe code of this program: what happens between fork and exec, and signals.
#![allow(unsafe_code, reason = "pre_exec, sigaction and AsyncFd have no safe form")]

use std::io;
use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::ptr;

use nix::libc;
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::sys::signalfd::SignalFd;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Makes the command die with the calling thread, by SIGKILL, which it cannot ignore; and
/// gives it `mask` as its blocked signals.
///
/// The kernel forgets this when the command gains privileges by its execution (sudo); the
/// handles still end with us, since they are bound to our life.
pub(crate) fn tie_to_parent(command: &mut Command, mask: SigSet) {
    let parent = rustix::process::getpid();
    let tie = move || {
        mask.thread_set_mask()?;
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        // Had the parent died before that call, nobody would tell us any more.
        if rustix::process::getppid() != Some(parent) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(())
    };
    // SAFETY: pre_exec requires that the closure does what is safe after fork in a process
    // that may have had threads: it makes three system calls (rt_sigprocmask, prctl, getppid),
    // takes no lock and allocates nothing, since an error from an errno is not on the heap.
    unsafe { command.pre_exec(tie) };
}

/// Whether this process was started with `signal` ignored.
pub(crate) fn is_ignored(signal: Signal) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: sigaction(2) with no new action only writes the present one to the third
    // argument, which points to memory of that type; the signal number is a valid one.
    let status = unsafe { libc::sigaction(signal as i32, ptr::null(), action.as_mut_ptr()) };
    // SAFETY: all zeroes is a valid sigaction, and whatever the kernel wrote is one.
    let action = unsafe { action.assume_init() };
    status == 0 && action.sa_sigaction == libc::SIG_IGN
}

/// Gives `which` its default action again.
pub(crate) fn restore_default(which: Signal) -> io::Result<()> {
    // SAFETY: signal(2) is unsafe for what a handler may do; the default action is none.
    unsafe { signal(which, SigHandler::SigDfl) }?;
    Ok(())
}

/// Lets the runtime, inside which this must be called, tell when a signal can be read.
pub(crate) fn watch(fd: SignalFd) -> io::Result<AsyncFd<SignalFd>> {
    // SAFETY: the descriptor must stay open and the same for as long as the AsyncFd has it:
    // a SignalFd owns its descriptor, has no way to exchange it, and closes it on drop.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}
