//! The positive control of a memory scan: a process that has a secret, under another uid.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Stdio};

use crate::binaries;
use crate::identity::Identity;

/// A process that holds a secret in its heap until this is dropped.
#[derive(Debug)]
pub struct Holder {
    child: Child,
}

impl Holder {
    /// Starts it as the worker's identity; returns when it has the secret.
    ///
    /// # Panics
    /// When it does not start or does not answer.
    #[must_use]
    pub fn of(secret: &str) -> Self {
        let mut child = Identity::worker()
            .command(binaries::helper())
            .arg("hold")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the holder starts");
        let input = child.stdin.as_mut().expect("stdin is a pipe");
        writeln!(input, "{secret}").expect("the holder reads");
        let mut answer = String::new();
        let output = child.stdout.as_mut().expect("stdout is a pipe");
        BufReader::new(output).read_line(&mut answer).expect("the holder answers");
        assert_eq!(answer, "held\n");
        Self { child }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It has nothing to say any more; a failure means that it is gone already.
        let _killed = self.child.kill();
        let _status = self.child.wait();
    }
}
