//! Child processes that end with the test and whose output is kept for inspection.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::wait;

/// A running child. Killed, and reaped, on drop.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

impl Process {
    /// Starts `command` with no input and its output in `logs/NAME.out` and `logs/NAME.err`.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(name: &str, command: &mut Command, logs: &Path) -> Self {
        let child = command
            .stdin(Stdio::null())
            .stdout(append(&logs.join(format!("{name}.out"))))
            .stderr(append(&logs.join(format!("{name}.err"))))
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {name} ({command:?}): {error}"));
        Self::adopt(name, child, logs)
    }

    /// Takes over a child that was started otherwise, with its output, as far as it is kept,
    /// in the same places.
    #[must_use]
    pub fn adopt(name: &str, child: Child, logs: &Path) -> Self {
        let kept = |kind: &str| logs.join(format!("{name}.{kind}"));
        Self { name: name.into(), child, out: kept("out"), err: kept("err") }
    }

    /// The process id. `setpriv` becomes the program by exec, so it is the program's own.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote to standard output so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        read_lossy(&self.out)
    }

    /// What it wrote to standard error so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        read_lossy(&self.err)
    }

    /// Sends a signal. A process that is gone is no error.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw);
        let _gone = kill_process(pid.expect("a child has a pid"), signal);
    }

    /// Its exit status, if it has ended.
    ///
    /// # Panics
    /// When waitpid(2) fails.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("waitpid on our own child")
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it runs longer than `limit`.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        wait::until(limit, || self.ended()).unwrap_or_else(|| {
            panic!("{} still runs after {limit:?}; it said:\n{}", self.name, self.stderr())
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Runs `command` to its end and gives its output.
///
/// # Panics
/// When it cannot be started, or runs longer than `limit`.
#[must_use]
pub fn output(command: &mut Command, limit: Duration) -> Output {
    let logs = tempfile::tempdir().expect("a temporary directory for the output");
    let mut process = Process::start("command", command, logs.path());
    let status = process.wait(limit);
    let read = |path: &Path| fs::read(path).expect("output was captured");
    Output { status, stdout: read(&process.out), stderr: read(&process.err) }
}

/// Standard output and standard error of a finished command, as one text.
#[must_use]
pub fn transcript(output: &Output) -> String {
    let both = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    String::from_utf8_lossy(&both).into_owned()
}

fn append(path: &Path) -> Stdio {
    let open = |path| -> io::Result<File> { File::options().append(true).create(true).open(path) };
    open(path).unwrap_or_else(|error| panic!("cannot open {}: {error}", path.display())).into()
}

fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}
