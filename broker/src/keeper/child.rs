//! The keeper's own side: a loop over one socket and the programs that run, and a thread for
//! sockets ([`hold`]). No secret: what a program prints goes through a pipe whose reading end is
//! the broker's.

#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, WaitOptions, WaitStatus, kill_process, kill_process_group,
    set_child_subreaper, waitid, waitpid,
};

use super::message::{Fate, Reply, Request};
use super::packet::{Received, receive, send};
use super::{MAX_RUNNING, hold};
use crate::harden;
use crate::source::ExecSource;
use crate::sys;

/// How often running programs are looked at. Polling works on every kernel and takes neither a
/// signal handler nor pidfds, and nothing is polled while nothing runs.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };

/// All that a program finds in its environment.
const ENVIRONMENT: [(&str, &str); 2] =
    [("PATH", "/usr/local/bin:/usr/bin:/bin"), ("LANG", "C.UTF-8")];

/// The life of the keeper, in the process that was forked off: gives up what it does not need,
/// says that it is ready, and serves until the broker is gone. Gives the exit status.
pub(super) fn main(socket: OwnedFd, commands: &[ExecSource]) -> u8 {
    match prepare(socket) {
        Ok(socket) => {
            serve(&socket, commands);
            0
        }
        Err(why) => {
            let line = format!("credbrokerd: the keeper cannot start: {why}\n");
            let _ = sys::write_without_waiting(&io::stderr(), line.as_bytes());
            70
        }
    }
}

fn prepare(socket: OwnedFd) -> io::Result<OwnedFd> {
    sys::wipe_environment();
    let socket = sys::keep_only(socket)?;
    // The service manager and the terminal signal everybody; the end comes with the socket.
    sys::ignore_termination();
    let _ = rustix::thread::set_name(c"credbroker-keep");
    // What a program leaves behind becomes ours, to be ended and not to be inherited by the
    // broker where that is the first process of a container.
    set_child_subreaper(Some(rustix::process::getpid()))?;
    let sandbox = harden::keeper().map_err(io::Error::other)?;
    send(&socket, &Reply::Ready(sandbox).encode(), None)?;
    Ok(socket)
}

/// A program, and where its end is told.
struct Running {
    reply: OwnedFd,
    /// Leads a process group of its own.
    leader: Pid,
    deadline: Instant,
    timed_out: bool,
    killed: bool,
}

/// Serves requests until the other side of `socket` is closed, then ends whatever runs.
pub(super) fn serve(socket: &OwnedFd, commands: &[ExecSource]) {
    let mut running: Vec<Running> = Vec::new();
    let mut holding = None;
    while let Ok(asked) = wait(socket, &mut running) {
        running.retain_mut(|program| !program.is_over());
        if asked {
            match receive(socket) {
                Ok(Received::End) => break,
                Ok(Received::Packet { bytes, fd: Some(reply) }) => {
                    match Request::decode(&bytes) {
                        Some(Request::Run(number)) => {
                            running.extend(start(number, reply, commands, running.len()));
                        }
                        Some(Request::Channel) if holding.is_none() => {
                            holding = hold_sockets(reply);
                        }
                        // What is not a request is answered by the end of its reply socket.
                        Some(Request::Channel | Request::Hold(_) | Request::Drop(_)) | None => {}
                    }
                }
                Ok(Received::Packet { fd: None, .. } | Received::Oversized) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_gone) => break,
            }
        }
        if running.is_empty() {
            // Not while others run, whose helper it may be.
            end_orphans();
        }
    }
    running.iter_mut().for_each(Running::kill);
    // Its channel ended when the socket here did.
    let _ = holding.map(JoinHandle::join);
    end_orphans();
}

/// In the sandbox: the thread inherits it. Without one the broker sees its channel end.
fn hold_sockets(channel: OwnedFd) -> Option<JoinHandle<()>> {
    let name = "credbroker-hold".to_owned();
    thread::Builder::new().name(name).spawn(move || hold::serve(&channel)).ok()
}

/// Waits for a request or, while programs run, a moment. Ends those that nobody waits for any
/// more, and gives whether there is a request.
fn wait(socket: &OwnedFd, running: &mut [Running]) -> io::Result<bool> {
    let mut fds = vec![PollFd::new(socket, PollFlags::IN)];
    // One that was killed and does not end, as on a dead network disk, is not asked about again:
    // its closed socket would make this a busy loop.
    let watched = running.iter().filter(|program| !program.killed);
    fds.extend(watched.map(|program| PollFd::new(&program.reply, PollFlags::empty())));
    match poll(&mut fds, if running.is_empty() { None } else { Some(&TICK) }) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let said: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    let watched = running.iter_mut().filter(|program| !program.killed);
    for (program, abandoned) in watched.zip(said.iter().skip(1)) {
        if *abandoned {
            program.kill();
        }
    }
    Ok(said.first().copied().unwrap_or(true))
}

fn start(number: u32, reply: OwnedFd, commands: &[ExecSource], already: usize) -> Option<Running> {
    let answer = |answer: Reply| {
        let _ = send(&reply, &answer.encode(), None);
    };
    let Some(command) = usize::try_from(number).ok().and_then(|number| commands.get(number)) else {
        answer(Reply::Unknown);
        return None;
    };
    if already >= MAX_RUNNING {
        answer(Reply::Busy);
        return None;
    }
    let deadline = Instant::now() + command.timeout;
    match spawn(command) {
        Ok((leader, output)) => {
            let running = Running { reply, leader, deadline, timed_out: false, killed: false };
            // A broker that cannot be told has closed its end, and the next look ends the run.
            let _ = send(&running.reply, &Reply::Started.encode(), Some(output.as_fd()));
            Some(running)
        }
        Err(error) => {
            answer(Reply::Failed(error.raw_os_error().unwrap_or(libc::EIO)));
            None
        }
    }
}

/// Starts the program with nothing but its standard output, and gives the end to read from.
/// Standard error goes nowhere: programs that are asked to be helpful print what they hold.
fn spawn(command: &ExecSource) -> io::Result<(Pid, OwnedFd)> {
    let (output, input) = pipe_with(PipeFlags::CLOEXEC)?;
    let (program, arguments) =
        command.argv.split_first().ok_or(io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(ENVIRONMENT)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(input)
        .stderr(Stdio::null())
        .process_group(0);
    let child = sys::spawn_tied(&mut command)?;
    let leader = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    Ok((leader.ok_or(io::Error::from(io::ErrorKind::InvalidData))?, output))
}

impl Running {
    /// Whether it has ended; if so its group is gone, and the broker was told.
    fn is_over(&mut self) -> bool {
        if !self.killed && Instant::now() >= self.deadline {
            self.timed_out = true;
            self.kill();
        }
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        if let Ok(None) = waitid(WaitId::Pid(self.leader), look) {
            return false;
        }
        // What it started goes with it. As long as the leader is not reaped, no other group can
        // have its number.
        self.kill();
        let status = waitpid(Some(self.leader), WaitOptions::empty()).ok().flatten();
        let fate = match status {
            _ if self.timed_out => Fate::TimedOut,
            Some((_, status)) => fate(status),
            None => Fate::Killed(0),
        };
        let _ = send(&self.reply, &Reply::Ended(fate).encode(), None);
        true
    }

    fn kill(&mut self) {
        self.killed = true;
        let _ = kill_process_group(self.leader, Signal::KILL);
    }
}

fn fate(status: WaitStatus) -> Fate {
    match status.exit_status() {
        Some(code) => Fate::Exited(code),
        None => Fate::Killed(status.terminating_signal().unwrap_or_default()),
    }
}

/// Ends processes that programs left behind, also those that have left their group: they have
/// become children of the keeper. Bounded, for a program that forks faster than it is killed.
fn end_orphans() {
    for _ in 0..100 {
        let children = fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
        let mut children = children.split_whitespace().filter_map(|pid| pid.parse().ok());
        let Some(first) = children.next() else { return };
        for child in std::iter::once(first).chain(children).filter_map(Pid::from_raw) {
            let _ = kill_process(child, Signal::KILL);
            let _ = waitpid(Some(child), WaitOptions::NOHANG);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    fn shell(script: &str, timeout: u64) -> ExecSource {
        let argv = ["/bin/sh", "-c", script].map(str::to_owned).into();
        ExecSource { argv, timeout: Duration::from_millis(timeout) }
    }

    /// Waits for the next answer.
    fn answer(socket: &OwnedFd) -> (Option<Reply>, Option<OwnedFd>) {
        let mut fds = [PollFd::new(socket, PollFlags::IN)];
        let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
        assert_eq!(poll(&mut fds, Some(&limit)).unwrap(), 1, "no answer");
        match receive(socket).unwrap() {
            Received::Packet { bytes, fd } => (Reply::decode(&bytes), fd),
            Received::End | Received::Oversized => (None, None),
        }
    }

    fn run(main: &OwnedFd, number: u32) -> OwnedFd {
        let (ours, theirs) = pair();
        send(main, &Request::Run(number).encode(), Some(theirs.as_fd())).unwrap();
        ours
    }

    fn text(pipe: OwnedFd) -> String {
        let mut text = String::new();
        std::fs::File::from(pipe).read_to_string(&mut text).unwrap();
        text
    }

    /// The same loop as in the keeper, without its sandbox, against a broker that may say
    /// anything.
    #[test]
    fn only_numbers_of_the_table_run_anything() {
        let commands = [
            shell("env; exit 3", 20_000),
            shell("sleep 300 & wait", 50),
            ExecSource { argv: vec!["/no/such/program".into()], timeout: Duration::from_secs(9) },
        ];
        let (main, theirs) = pair();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let theirs = theirs;
                serve(&theirs, &commands);
            });
            let first = run(&main, 0);
            let (started, pipe) = answer(&first);
            assert_eq!(started, Some(Reply::Started));
            let output = text(pipe.unwrap());
            // These are the shell's own.
            let own = |line: &&str| {
                ["PWD=", "OLDPWD", "SHLVL=", "_="].iter().all(|own| !line.starts_with(own))
            };
            let mut environment: Vec<_> = output.lines().filter(own).collect();
            environment.sort_unstable();
            assert_eq!(environment, ["LANG=C.UTF-8", "PATH=/usr/local/bin:/usr/bin:/bin"]);
            assert_eq!(answer(&first).0, Some(Reply::Ended(Fate::Exited(3))));

            let late = run(&main, 1);
            let (_, pipe) = answer(&late);
            // The pipe ends only when the sleep in the background is gone too.
            assert_eq!(text(pipe.unwrap()), "");
            assert_eq!(answer(&late).0, Some(Reply::Ended(Fate::TimedOut)));

            assert_eq!(answer(&run(&main, 2)).0, Some(Reply::Failed(libc::ENOENT)));
            assert_eq!(answer(&run(&main, 3)).0, Some(Reply::Unknown));
            assert_eq!(answer(&run(&main, u32::MAX)).0, Some(Reply::Unknown));
            // Nonsense, with and without a socket: refused, and the next request is served.
            let (ours, other) = pair();
            send(&main, b"R/bin/sh", Some(other.as_fd())).unwrap();
            drop(other);
            assert_eq!(answer(&ours).0, None);
            send(&main, &Request::Run(0).encode(), None).unwrap();
            send(&main, &[0; 100], Some(main.as_fd())).unwrap();
            assert_eq!(answer(&run(&main, 0)).0, Some(Reply::Started));
            drop(main);
        });
    }

    #[test]
    fn what_nobody_waits_for_is_ended_and_no_more_than_eight_run() {
        let commands = [shell("sleep 300", 300_000)];
        let (main, theirs) = pair();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let theirs = theirs;
                serve(&theirs, &commands);
            });
            let mut runs: Vec<_> = (0..MAX_RUNNING).map(|_| run(&main, 0)).collect();
            let pipes: Vec<_> = runs.iter().map(|run| answer(run).1.unwrap()).collect();
            assert_eq!(answer(&run(&main, 0)).0, Some(Reply::Busy));
            let last = runs.pop().unwrap();
            runs.clear();
            let mut pipes = pipes.into_iter();
            for pipe in pipes.by_ref().take(MAX_RUNNING - 1) {
                assert_eq!(text(pipe), "", "each ends when its socket is closed");
            }
            // The end of the broker ends the rest.
            drop(main);
            assert_eq!(text(pipes.next().unwrap()), "");
            drop(last);
        });
    }
}
