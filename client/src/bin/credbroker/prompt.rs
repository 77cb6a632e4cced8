//! Asks for a secret on the terminal, without echo.
//!
//! Invariants: the terminal is as it was before whenever this process is not asking, also while
//! it is stopped and after it was ended by a signal (but SIGKILL); what is typed passes only
//! through buffers that are wiped.

use std::fs::File;
use std::io::{self, Write as _};

use credbroker_client::Secret;
use credbroker_proto::MAX_SECRET;
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, QueueSelector, Termios, tcflush, tcgetattr, tcsetattr,
};
use zeroize::Zeroizing;

use crate::failure::Failure;
use crate::output::plain;

const TERMINAL: &str = "/dev/tty";
/// What a terminal gives at once: a line of at most 4095 bytes and its end (man termios(3)).
const LINE: usize = 4096;

/// Asks twice for the secret of `connection`, and compares.
pub(crate) fn secret_twice(connection: &str, username: Option<&str>) -> Result<Secret, Failure> {
    let terminal = Terminal::open()?;
    let what = match username {
        Some(username) => format!("password of {} for {}", plain(username), plain(connection)),
        None => format!(
            "secret of {} (username:password, unless its username is configured)",
            plain(connection)
        ),
    };
    let first = terminal.ask(&format!("{what}: "))?;
    if first.is_empty() {
        return Err(Failure::usage("no secret was typed"));
    }
    let second = terminal.ask(&format!("{what}, again: "))?;
    if *first != *second {
        return Err(Failure::usage("what was typed is not twice the same"));
    }
    // Moved, so that there is no other copy than the one that is wiped.
    Ok(Secret::from_bytes(into_bytes(first))?)
}

fn into_bytes(mut line: Zeroizing<Vec<u8>>) -> Vec<u8> {
    std::mem::take(&mut *line)
}

/// The controlling terminal, and the signals that it must be left in order for.
struct Terminal {
    file: File,
    signals: SigSet,
    arrived: SignalFd,
}

enum Input {
    Line,
    Signal(Signal),
}

impl Terminal {
    /// Blocks the signals in the calling thread, which must be the only one, until dropped.
    fn open() -> Result<Self, Failure> {
        let file = File::options().read(true).write(true).open(TERMINAL).map_err(|_none| {
            Failure::usage(
                "there is no terminal to ask on: give the secret with --secret-file FILE, or with \
                 --secret-file - on standard input",
            )
        })?;
        let signals: SigSet =
            [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGTSTP]
                .into_iter()
                .collect();
        let arrived =
            SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
                .map_err(|errno| failed(&errno.into()))?;
        signals.thread_block().map_err(|errno| failed(&errno.into()))?;
        Ok(Self { file, signals, arrived })
    }

    fn ask(&self, prompt: &str) -> Result<Zeroizing<Vec<u8>>, Failure> {
        loop {
            let mut line = Zeroizing::new(Vec::with_capacity(MAX_SECRET + LINE));
            let quiet = Quiet::begin(&self.file).map_err(|error| failed(&error))?;
            (&self.file).write_all(prompt.as_bytes()).map_err(|error| failed(&error))?;
            let input = self.read_line(&mut line);
            if !matches!(input, Ok(Input::Line)) {
                // Half a secret must not be left for the shell to show, or to run.
                let _gone = tcflush(&self.file, QueueSelector::IFlush);
            }
            drop(quiet);
            match input.map_err(|error| failed(&error))? {
                Input::Line => return Ok(line),
                Input::Signal(signal) => {
                    (&self.file).write_all(b"\n").map_err(|error| failed(&error))?;
                    self.obey(signal).map_err(|error| failed(&error))?;
                }
            }
        }
    }

    /// Reads up to a newline, which is dropped, or the end of input.
    fn read_line(&self, line: &mut Vec<u8>) -> io::Result<Input> {
        let mut buffer = Zeroizing::new([0; LINE]);
        loop {
            let mut ready =
                [PollFd::new(&self.arrived, PollFlags::IN), PollFd::new(&self.file, PollFlags::IN)];
            rustix::io::retry_on_intr(|| poll(&mut ready, None))?;
            if let Some(signal) = self.arrived.read_signal()? {
                let number = i32::try_from(signal.ssi_signo).map_err(io::Error::other)?;
                return Ok(Input::Signal(Signal::try_from(number)?));
            }
            if ready.last().is_none_or(|terminal| terminal.revents().is_empty()) {
                continue;
            }
            let count =
                rustix::io::retry_on_intr(|| rustix::io::read(&self.file, &mut buffer[..]))?;
            let typed = buffer.get(..count).unwrap_or_default();
            if let Some(typed) = typed.strip_suffix(b"\n") {
                line.extend_from_slice(typed);
                return Ok(Input::Line);
            }
            line.extend_from_slice(typed);
            // More than the broker takes is refused later; never more than the capacity.
            if count == 0 || line.len() > MAX_SECRET {
                return Ok(Input::Line);
            }
        }
    }

    /// Lets `signal` do what it does. Comes back after a stop, and when it is ignored.
    fn obey(&self, signal: Signal) -> io::Result<()> {
        self.signals.thread_unblock()?;
        let obeyed = raise(signal);
        self.signals.thread_block()?;
        Ok(obeyed?)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Fails for a wrong argument only.
        let _unblocked = self.signals.thread_unblock();
    }
}

/// While this lives, what is typed is not shown.
struct Quiet<'a> {
    terminal: &'a File,
    before: Termios,
}

impl Quiet<'_> {
    fn begin(terminal: &File) -> io::Result<Quiet<'_>> {
        let before = tcgetattr(terminal)?;
        let mut modes = before.clone();
        modes.local_modes.remove(LocalModes::ECHO);
        // The end of the line is shown, and a line is what is read.
        modes.local_modes.insert(LocalModes::ECHONL | LocalModes::ICANON | LocalModes::ISIG);
        modes.input_modes.insert(InputModes::ICRNL);
        // What was typed before the prompt was typed for somebody else.
        tcsetattr(terminal, OptionalActions::Flush, &modes)?;
        Ok(Quiet { terminal, before })
    }
}

impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        // When the terminal is gone, there is nothing to put in order.
        let _gone = tcsetattr(self.terminal, OptionalActions::Drain, &self.before);
    }
}

fn failed(error: &io::Error) -> Failure {
    Failure::system("cannot ask on the terminal", error)
}
