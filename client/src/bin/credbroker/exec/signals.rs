//! Every signal as a value, with who sent it.
//!
//! Invariant: from [`Blocked::block`] on no signal but SIGKILL and SIGSTOP ends or stops this
//! process behind its back: they wait in a signalfd (man signalfd(2)), which tells what a
//! handler of tokio would not, namely whether a signal came from the terminal.

use std::io;
use std::process::ExitCode;

use nix::libc;
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tokio::io::unix::AsyncFd;

use crate::failure::Failure;
use crate::sys;

/// What is taken from the default action. SIGTTOU is never read: blocked, it lets a warning
/// be written while the terminal belongs to another job, instead of stopping renewal.
const TAKEN: [Signal; 11] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
    Signal::SIGCONT,
    Signal::SIGTSTP,
    Signal::SIGTTOU,
    Signal::SIGCHLD,
];

/// Signals are blocked in this thread, and in all threads that it will start.
pub(crate) struct Blocked {
    taken: SigSet,
    /// What was blocked before, and is to be again in the command.
    inherited: SigSet,
}

/// The signals that have arrived.
pub(crate) struct Signals(AsyncFd<SignalFd>);

/// One signal.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received {
    pub(crate) signal: Signal,
    pub(crate) origin: Origin,
}

/// Who sent a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The kernel: for a key, a hang-up or a resize of the terminal, to the whole foreground
    /// process group.
    Kernel,
    /// A process; 0 is one that this PID namespace cannot see.
    Process(u32),
}

impl Blocked {
    /// Must be called before a second thread exists.
    pub(crate) fn block() -> Result<Self, Failure> {
        // Whoever ignores SIGCHLD is not told when its child ends.
        sys::restore_default(Signal::SIGCHLD).map_err(|error| cannot(&error))?;
        // What we were started to ignore (nohup) the command ignores too.
        let taken: SigSet = TAKEN.into_iter().filter(|signal| !sys::is_ignored(*signal)).collect();
        let inherited =
            taken.thread_swap_mask(SigmaskHow::SIG_BLOCK).map_err(|errno| cannot(&errno.into()))?;
        Ok(Self { taken, inherited })
    }

    /// Must be called inside the runtime.
    pub(crate) fn listen(&self) -> Result<Signals, Failure> {
        let mut read = self.taken;
        read.remove(Signal::SIGTTOU);
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let fd = SignalFd::with_flags(&read, flags).map_err(|errno| cannot(&errno.into()))?;
        Ok(Signals(sys::watch(fd).map_err(|error| cannot(&error))?))
    }

    pub(crate) fn inherited(&self) -> SigSet {
        self.inherited
    }
}

impl Signals {
    /// The next signal. Cancelling loses none.
    pub(crate) async fn next(&mut self) -> Result<Received, Failure> {
        loop {
            let mut ready = self.0.readable().await.map_err(|error| cannot(&error))?;
            match ready.get_inner().read_signal() {
                Ok(Some(info)) => {
                    if let Some(received) = Received::parse(&info) {
                        return Ok(received);
                    }
                }
                Ok(None) => ready.clear_ready(),
                Err(errno) => return Err(cannot(&errno.into())),
            }
        }
    }

    /// Waits for a signal that asks a program to end, and gives the exit code for it.
    pub(crate) async fn told_to_end(&mut self) -> Result<ExitCode, Failure> {
        loop {
            let signal = self.next().await?.signal;
            if ends(signal) {
                return Ok(exit_code(signal as i32));
            }
        }
    }
}

impl Received {
    fn parse(info: &libc::signalfd_siginfo) -> Option<Self> {
        let signal = Signal::try_from(i32::try_from(info.ssi_signo).ok()?).ok()?;
        let kernel = info.ssi_code == libc::SI_KERNEL;
        let origin = if kernel { Origin::Kernel } else { Origin::Process(info.ssi_pid) };
        Some(Self { signal, origin })
    }
}

/// 128+n, as shells tell of a death by signal n.
pub(crate) fn exit_code(signal: i32) -> ExitCode {
    u8::try_from(signal.saturating_add(128)).map_or(ExitCode::FAILURE, ExitCode::from)
}

fn ends(signal: Signal) -> bool {
    [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM].contains(&signal)
}

fn cannot(error: &io::Error) -> Failure {
    Failure::system("cannot receive signals", error)
}
