//! Programs in a terminal. `credbroker exec`: keys reach the command, and job control works.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::broker::{Broker, PATIENCE};

pub(crate) const CTRL_C: &[u8] = b"\x03";
pub(crate) const CTRL_Z: &[u8] = b"\x1a";

/// A pseudoterminal, controlling a session whose first program is `command`.
pub(crate) struct Terminal {
    pub(crate) controller: File,
    pub(crate) child: Child,
    seen: String,
    /// All that was ever on the screen.
    pub(crate) screen: String,
}

impl Terminal {
    fn run(broker: &Broker, command: &[&str]) -> Self {
        Self::run_at(&broker.runtime_dir(), command)
    }

    pub(crate) fn run_at(runtime_dir: &Path, command: &[&str]) -> Self {
        let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&controller).unwrap();
        unlockpt(&controller).unwrap();
        let name = ptsname(&controller, Vec::new()).unwrap();
        let user = || open(&name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
        let child = Command::new("setsid")
            .arg("--ctty")
            .args(command)
            .env("CREDBROKER_RUNTIME_DIR", runtime_dir)
            .env("PS1", "$ ")
            .stdin(Stdio::from(user()))
            .stdout(Stdio::from(user()))
            .stderr(Stdio::from(user()))
            .spawn()
            .unwrap();
        Self {
            controller: File::from(controller),
            child,
            seen: String::new(),
            screen: String::new(),
        }
    }

    pub(crate) fn press(&mut self, keys: &[u8]) {
        self.controller.write_all(keys).unwrap();
    }

    /// Reads until `text` is on the screen, and forgets what came up to it.
    pub(crate) fn expect(&mut self, text: &str) {
        let mut buffer = [0; 1024];
        loop {
            if let Some((_, rest)) = self.seen.split_once(text) {
                self.seen = rest.to_owned();
                return;
            }
            // Fails with EIO when the last program has left the terminal.
            let count = self.controller.read(&mut buffer).unwrap_or(0);
            assert!(count > 0, "{text:?} did not come; on the screen: {:?}", self.seen);
            let shown = String::from_utf8_lossy(&buffer[..count]);
            self.seen.push_str(&shown);
            self.screen.push_str(&shown);
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Ended already, unless the test failed.
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}

/// Waits until the kernel says that the process is in `state` (man proc_pid_stat(5)).
fn wait_for_state(pid: i32, state: char) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let found = stat.rsplit_once(") ").unwrap().1.chars().next().unwrap();
        if found == state {
            return;
        }
        assert!(Instant::now() < deadline, "{stat}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn an_interrupt_reaches_the_command_once_and_exec_revokes() {
    let broker = Broker::start();
    let script = "trap 'n=$((n+1)); echo interrupt $n' INT; echo ready; \
                  read x; read x; echo last $n; exit 9";
    let mut terminal = Terminal::run(
        &broker,
        &[env!("CARGO_BIN_EXE_credbroker"), "exec", "main_db", "--", "bash", "-c", script],
    );
    let (id, _) = broker.wait_for_issue();
    terminal.expect("ready");
    terminal.press(CTRL_C);
    terminal.expect("interrupt 1");
    terminal.press(b"a\nb\nc\n");
    terminal.expect("last 1");
    broker.wait_for_revocation(&id);
    assert_eq!(terminal.child.wait().unwrap().code(), Some(9));
}

#[test]
fn the_command_and_exec_stop_and_go_on_together() {
    let broker = Broker::start();
    let mut terminal = Terminal::run(&broker, &["bash", "--norc", "--noprofile", "-i"]);
    terminal.press(concat!(env!("CARGO_BIN_EXE_credbroker"), " exec main_db -- cat\n").as_bytes());
    let (id, exec) = broker.wait_for_issue();
    terminal.press(b"one\n");
    terminal.expect("one\r\none\r\n");

    terminal.press(CTRL_Z);
    terminal.expect("Stopped");
    wait_for_state(exec, 'T');

    terminal.press(b"fg\n");
    wait_for_state(exec, 'S');
    terminal.press(b"two\n");
    terminal.expect("two\r\ntwo\r\n");
    terminal.press(b"\x04");
    broker.wait_for_revocation(&id);
    terminal.press(b"exit\n");
    assert!(terminal.child.wait().unwrap().success());
}
