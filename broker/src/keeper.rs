//! The keeper: a small process, forked before there is an arena, a thread or a secret, that does
//! what the broker's sandbox no longer can.
//!
//! It runs the programs of `exec` sources. Which ones is settled at the fork: the broker can only
//! name a number, so that nobody who takes the broker over can make the keeper run anything
//! else, and a changed command needs a restart. The keeper never sees a secret: a program's
//! output is a pipe whose end it passes on.
//!
//! It holds a dup of every socket that was handed over, and shuts them down when the broker ends.
//! It ends when its socket to the broker closes, with
//! everything it runs, so also when the broker is killed; and it is never forked again, for
//! after the arena exists nothing may be.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, WaitOptions, waitpid};
use thiserror::Error;
use tokio::sync::Semaphore;

pub(crate) use self::holding::{Held, Holding, NotHeld};
use self::message::{Reply, Request};
use self::packet::{Received, receive, send};
pub(crate) use self::run::{ExecFault, Run};
use crate::arena::{Arena, Slot};
use crate::harden::Sandbox;
use crate::source::ExecSource;
use crate::sys;

mod child;
mod hold;
mod holding;
pub(crate) mod message;
mod packet;
mod run;

/// How many programs run at once; more wait for their turn.
pub(crate) const MAX_RUNNING: usize = 8;
/// How long the keeper may take to say that it is ready.
const READY_WITHIN: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// The broker's hold on its keeper. Cheap to clone; the keeper ends with the last clone.
#[derive(Clone)]
pub(crate) struct Keeper {
    shared: Arc<Shared>,
}

struct Shared {
    socket: OwnedFd,
    pid: Pid,
    commands: Vec<ExecSource>,
    sandbox: Sandbox,
    turns: Semaphore,
    /// Whether its end was noticed: it is reaped once.
    reaped: AtomicBool,
}

/// There is no keeper.
#[derive(Debug, Error)]
pub(crate) enum KeeperError {
    /// It could not be forked.
    #[error("cannot start the keeper process: {0}")]
    Fork(#[from] io::Error),
    /// It ended before it was ready, and said why on standard error.
    #[error("the keeper process ended before it was ready")]
    NotReady,
}

impl Keeper {
    /// Forks it off, and waits until it is sandboxed. Before there is a thread or a secret.
    ///
    /// # Errors
    /// When it cannot be forked, or cannot lock itself down.
    pub(crate) fn fork(commands: Vec<ExecSource>) -> Result<Self, KeeperError> {
        let (socket, theirs) = sockets()?;
        let pid = sys::fork_off(|| child::main(theirs, &commands))?;
        let mut fds = [PollFd::new(&socket, PollFlags::IN)];
        poll(&mut fds, Some(&READY_WITHIN)).map_err(io::Error::from)?;
        let Ok(Received::Packet { bytes, fd: None }) = receive(&socket) else {
            return Err(KeeperError::NotReady);
        };
        let Some(Reply::Ready(sandbox)) = Reply::decode(&bytes) else {
            return Err(KeeperError::NotReady);
        };
        let turns = Semaphore::new(MAX_RUNNING);
        let shared =
            Shared { socket, pid, commands, sandbox, turns, reaped: AtomicBool::new(false) };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// What the kernel gave of its sandbox.
    pub(crate) fn sandbox(&self) -> Sandbox {
        self.shared.sandbox
    }

    /// Whether it is there. It is not started again: without it `exec` sources keep what they
    /// have.
    pub(crate) fn is_alive(&self) -> bool {
        if self.shared.reaped.load(Ordering::Relaxed) {
            return false;
        }
        // After it is ready it says nothing on this socket, so whatever there is, is its end.
        let mut fds = [PollFd::new(&self.shared.socket, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if matches!(poll(&mut fds, Some(&now)), Ok(0) | Err(rustix::io::Errno::INTR)) {
            return true;
        }
        if matches!(waitpid(Some(self.shared.pid), WaitOptions::NOHANG), Ok(Some(_)) | Err(_)) {
            self.shared.reaped.store(true, Ordering::Relaxed);
        }
        false
    }

    /// Whether the keeper was forked with exactly this command and time-out. If not, using it
    /// takes a restart.
    pub(crate) fn knows(&self, command: &ExecSource) -> bool {
        self.number(command).is_some()
    }

    /// Begins a run; [`Run::finish`] gives its output. At most [`MAX_RUNNING`] at once, which is
    /// for the caller to see to: this is for the start, when there is no runtime to wait in.
    ///
    /// # Errors
    /// When the keeper is gone or does not know the command.
    pub(crate) fn begin(&self, command: &ExecSource, arena: &Arena) -> Result<Run, ExecFault> {
        let program = command.program();
        let number = self.number(command).ok_or_else(|| ExecFault::unknown(program))?;
        let (ours, theirs) = sockets().map_err(|error| ExecFault::io(program, error))?;
        let run = Run::new(command, ours, arena)?;
        let request = Request::Run(number).encode();
        send(&self.shared.socket, &request, Some(theirs.as_fd())).map_err(|error| {
            if self.is_alive() {
                ExecFault::io(program, error)
            } else {
                ExecFault::keeper_gone(program)
            }
        })?;
        Ok(run)
    }

    /// Runs a command, when it is its turn, and gives what it printed. Dropping the future ends
    /// the program.
    ///
    /// # Errors
    /// When there is no output that can be believed.
    pub(crate) async fn run(&self, command: &ExecSource, arena: &Arena) -> Result<Slot, ExecFault> {
        // It is never closed.
        let _turn = self.shared.turns.acquire().await;
        self.begin(command, arena)?.finished().await
    }

    fn number(&self, command: &ExecSource) -> Option<u32> {
        let index = self.shared.commands.iter().position(|known| known == command)?;
        u32::try_from(index).ok()
    }
}

#[cfg(test)]
impl Keeper {
    /// One on a thread of the test, with no sandbox: tests have threads, so they cannot fork.
    pub(crate) fn on_a_thread(commands: Vec<ExecSource>) -> Self {
        let (socket, theirs) = sockets().unwrap();
        let known = commands.clone();
        std::thread::spawn(move || child::serve(&theirs, &known));
        Self::of_socket(socket, commands)
    }

    /// One that whoever has the other end of `socket` plays.
    fn of_socket(socket: OwnedFd, commands: Vec<ExecSource>) -> Self {
        use crate::harden::{Dropped, Enforced};

        let sandbox =
            Sandbox { landlock: Enforced::Not, seccomp: false, capabilities: Dropped::None };
        let turns = Semaphore::new(MAX_RUNNING);
        let pid = rustix::process::getpid();
        let shared =
            Shared { socket, pid, commands, sandbox, turns, reaped: AtomicBool::new(false) };
        Self { shared: Arc::new(shared) }
    }
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper").field("pid", &self.shared.pid).finish_non_exhaustive()
    }
}

fn sockets() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}
