//! One run of a program, seen from the broker: its output goes from the pipe into the arena, and
//! is believed only when the program ended well.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_setfl};
use thiserror::Error;

use super::message::{Fate, Reply};
use super::packet::{Received, receive};
use crate::arena::{Arena, ArenaFull, Slot};
use crate::source::{ExecSource, Intake, IntakeFault, MAX_SECRET, Taken};
use crate::sys;

/// How much longer than the program's own time the broker waits for the keeper to say so.
const GRACE: Duration = Duration::from_secs(5);
/// What most secrets fit in.
const USUAL: usize = 1024;

/// A program gave nothing that can be used. Nothing that it printed is in here.
#[derive(Debug, Error)]
#[error("the program {program} {why}")]
pub(crate) struct ExecFault {
    program: String,
    #[source]
    why: Why,
}

#[derive(Debug, Error)]
enum Why {
    #[error("cannot be run, because the keeper process is gone: restart the broker")]
    KeeperGone,
    #[error("is not one that the keeper knows: restart required")]
    Unknown,
    #[error("cannot be run now: too many programs run already")]
    Busy,
    #[error("cannot be run: {0}")]
    CannotRun(#[source] io::Error),
    #[error("ended with status {0}")]
    Status(i32),
    #[error("was ended by signal {0}")]
    Signal(i32),
    #[error("ran longer than {}", humantime::format_duration(*.0))]
    TimedOut(Duration),
    #[error("printed more than {MAX_SECRET} bytes")]
    TooLong,
    #[error("could not be listened to: {0}")]
    Io(#[source] io::Error),
    #[error("gave a secret that has no place")]
    ArenaFull(#[source] ArenaFull),
}

/// A program that runs. Dropped before its end, it is killed.
pub(crate) struct Run {
    program: String,
    timeout: Duration,
    deadline: Instant,
    /// The keeper's answers; the keeper ends the program when it is closed.
    reply: OwnedFd,
    /// Absent before the program runs, and after its output ended.
    pipe: Option<OwnedFd>,
    output: Intake,
    started: bool,
    fate: Option<Fate>,
}

impl fmt::Debug for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Run").field("program", &self.program).finish_non_exhaustive()
    }
}

impl Run {
    pub(super) fn new(
        command: &ExecSource,
        reply: OwnedFd,
        arena: &Arena,
    ) -> Result<Self, ExecFault> {
        let output = Intake::new(arena, USUAL)
            .map_err(|full| fault(command.program(), Why::ArenaFull(full)))?;
        Ok(Self {
            program: command.program().to_owned(),
            timeout: command.timeout,
            deadline: Instant::now() + command.timeout + GRACE,
            reply,
            pipe: None,
            output,
            started: false,
            fate: None,
        })
    }

    /// Waits for the end, as long as there is no runtime.
    pub(crate) fn finish(mut self) -> Result<Slot, ExecFault> {
        while !self.advance()? {
            let left = self.deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
            let mut fds = vec![PollFd::new(&self.reply, PollFlags::IN)];
            fds.extend(self.pipe.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
            match poll(&mut fds, Some(&left)) {
                Ok(0) => return Err(self.fault(Why::TimedOut(self.timeout))),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(self.fault(Why::Io(errno.into()))),
            }
        }
        self.conclude()
    }

    /// Waits for the end.
    pub(crate) async fn finished(mut self) -> Result<Slot, ExecFault> {
        while !self.advance()? {
            let readable = async {
                let Some(pipe) = &self.pipe else {
                    return sys::readable(self.reply.as_fd()).await;
                };
                tokio::select! {
                    readable = sys::readable(self.reply.as_fd()) => readable,
                    readable = sys::readable(pipe.as_fd()) => readable,
                }
            };
            match tokio::time::timeout_at(self.deadline.into(), readable).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return Err(self.fault(Why::Io(error))),
                Err(_elapsed) => return Err(self.fault(Why::TimedOut(self.timeout))),
            }
        }
        self.conclude()
    }

    /// Takes what is there. Whether nothing more will come.
    ///
    /// The keeper is listened to first: what is in the pipe when the program has ended is all
    /// that it said, though something that it started may hold the pipe open for long.
    fn advance(&mut self) -> Result<bool, ExecFault> {
        while self.fate.is_none() && self.read_reply()? {}
        while self.read_output()? {}
        Ok(self.fate.is_some())
    }

    fn read_output(&mut self) -> Result<bool, ExecFault> {
        let Some(pipe) = &self.pipe else { return Ok(false) };
        match self.output.take_from(pipe) {
            Ok(Taken::Some) => Ok(true),
            Ok(Taken::End) => {
                self.pipe = None;
                Ok(false)
            }
            Ok(Taken::NothingYet) => Ok(false),
            Err(IntakeFault::TooLong) => Err(self.fault(Why::TooLong)),
            Err(IntakeFault::ArenaFull(full)) => Err(self.fault(Why::ArenaFull(full))),
            Err(IntakeFault::Io(error)) => Err(self.fault(Why::Io(error))),
        }
    }

    fn read_reply(&mut self) -> Result<bool, ExecFault> {
        let (bytes, fd) = match receive(&self.reply) {
            Ok(Received::Packet { bytes, fd }) => (bytes, fd),
            Ok(Received::End | Received::Oversized) => return Err(self.fault(Why::KeeperGone)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(self.fault(Why::Io(error))),
        };
        match (Reply::decode(&bytes), fd) {
            (Some(Reply::Started), Some(pipe)) if !self.started => {
                let flags = fcntl_setfl(&pipe, OFlags::NONBLOCK);
                flags.map_err(|errno| self.fault(Why::Io(errno.into())))?;
                (self.pipe, self.started) = (Some(pipe), true);
            }
            (Some(Reply::Ended(fate)), None) => self.fate = Some(fate),
            (Some(Reply::Failed(errno)), None) => {
                return Err(self.fault(Why::CannotRun(io::Error::from_raw_os_error(errno))));
            }
            (Some(Reply::Unknown), None) => return Err(self.fault(Why::Unknown)),
            (Some(Reply::Busy), None) => return Err(self.fault(Why::Busy)),
            // A keeper that talks nonsense is none.
            (
                Some(
                    Reply::Ready(_)
                    | Reply::Started
                    | Reply::Held(_)
                    | Reply::Full(_)
                    | Reply::Dropped(_),
                ),
                _,
            )
            | (Some(_), Some(_))
            | (None, _) => {
                return Err(self.fault(Why::KeeperGone));
            }
        }
        Ok(true)
    }

    /// The output, if the program said that all is well.
    fn conclude(self) -> Result<Slot, ExecFault> {
        match self.fate {
            Some(Fate::Exited(0)) if self.started => Ok(self.output.finish()),
            Some(Fate::Exited(status)) => Err(self.fault(Why::Status(status))),
            Some(Fate::Killed(signal)) => Err(self.fault(Why::Signal(signal))),
            Some(Fate::TimedOut) => Err(self.fault(Why::TimedOut(self.timeout))),
            None => Err(self.fault(Why::KeeperGone)),
        }
    }

    fn fault(&self, why: Why) -> ExecFault {
        fault(&self.program, why)
    }
}

fn fault(program: &str, why: Why) -> ExecFault {
    ExecFault { program: program.to_owned(), why }
}

impl ExecFault {
    pub(super) fn keeper_gone(program: &str) -> Self {
        fault(program, Why::KeeperGone)
    }

    pub(super) fn unknown(program: &str) -> Self {
        fault(program, Why::Unknown)
    }

    pub(super) fn io(program: &str, error: io::Error) -> Self {
        fault(program, Why::Io(error))
    }
}
