//! The command's life: its start, its signals, its stops, its end.
//!
//! The command stays in our process group, so that it is in the foreground wherever we are
//! (a terminal, a pipeline). The terminal's keys therefore reach it without us; what is sent
//! to us alone is passed on.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::process::{self, ExitCode};

use nix::sys::signal::{Signal, kill, raise};
use nix::unistd::Pid;
use rustix::process::{WaitOptions, WaitStatus};

use super::login::Renewals;
use super::signals::{Blocked, Origin, Received, Signals, exit_code};
use crate::failure::{Exit, Failure};
use crate::output::Output;
use crate::sys;

/// A command that runs. It dies when this process dies.
pub(crate) struct Child {
    pid: Pid,
}

impl Child {
    /// Starts `command`, with `variables` set or, where they are `None`, removed.
    ///
    /// The kernel ties the child to the calling thread: it must be the main one.
    pub(crate) fn spawn(
        command: &[OsString],
        variables: Vec<(OsString, Option<OsString>)>,
        blocked: &Blocked,
    ) -> Result<Self, Failure> {
        let (program, arguments) =
            command.split_first().ok_or_else(|| Failure::usage("no command is given"))?;
        let mut start = process::Command::new(program);
        start.args(arguments);
        for (key, value) in variables {
            match value {
                Some(value) => start.env(key, value),
                None => start.env_remove(key),
            };
        }
        sys::tie_to_parent(&mut start, blocked.inherited());
        let child = start.spawn().map_err(|error| {
            let (exit, reason) = if error.kind() == io::ErrorKind::NotFound {
                (Exit::NotFound, "COMMAND_NOT_FOUND")
            } else {
                (Exit::NotExecutable, "COMMAND_NOT_EXECUTABLE")
            };
            Failure::new(exit, reason, format!("{}: {error}", program.display()))
        })?;
        let pid = i32::try_from(child.id()).map_err(|_too_big| lost("its process id is no pid"))?;
        Ok(Self { pid: Pid::from_raw(pid) })
    }

    /// Waits for the end of the command and gives its status, 128+n for signal n.
    ///
    /// Renewal stops when this returns.
    pub(crate) async fn supervise(
        self,
        signals: &mut Signals,
        mut renewals: Renewals,
        output: Output,
    ) -> Result<ExitCode, Failure> {
        loop {
            tokio::select! {
                received = signals.next() => {
                    let received = received?;
                    if received.signal == Signal::SIGCHLD {
                        if let Some(code) = self.reap()? {
                            return Ok(code);
                        }
                    } else if self.needs(received) {
                        // It can only fail when the command has ended, which is told next.
                        let _ended = kill(self.pid, received.signal);
                    }
                },
                Some(ended) = renewals.join_next() => {
                    if let Ok(ended) = ended {
                        ended.report(output);
                    }
                },
            }
        }
    }

    /// Whether the command has not got this signal already.
    fn needs(&self, received: Received) -> bool {
        match received.origin {
            // A hang-up goes to the session's leader alone, and twice does no harm.
            Origin::Kernel => received.signal == Signal::SIGHUP,
            // A script that signals its whole group does not mean itself a second time.
            Origin::Process(sender) => i32::try_from(sender) != Ok(self.pid.as_raw()),
        }
    }

    /// Takes the news of all children; as PID 1 of a container we inherit foreign ones.
    fn reap(&self) -> Result<Option<ExitCode>, Failure> {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG | WaitOptions::UNTRACED) {
                Ok(Some((pid, status))) if pid.as_raw_pid() == self.pid.as_raw() => {
                    if let Some(code) = ended(status) {
                        return Ok(Some(code));
                    }
                    stop_with_it()?;
                }
                Ok(Some(_foreign)) => {}
                Ok(None) => return Ok(None),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(lost(&error.to_string())),
            }
        }
    }
}

fn ended(status: WaitStatus) -> Option<ExitCode> {
    let exited = status
        .exit_status()
        .map(|code| u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from));
    exited.or_else(|| status.terminating_signal().map(exit_code))
}

/// Ctrl-Z: the shell takes its terminal back when we, its own child, have stopped as well.
/// We stop after the command, which may first have to put the terminal in order, and not at
/// all where no shell can continue us: renewal would stop for good.
fn stop_with_it() -> Result<(), Failure> {
    if File::open("/dev/tty").is_err() {
        return Ok(());
    }
    raise(Signal::SIGSTOP).map_err(|errno| Failure::system("cannot stop", &errno.into()))
}

fn lost(why: &str) -> Failure {
    Failure::new(Exit::Software, "SYSTEM", format!("the command was lost sight of: {why}"))
}
