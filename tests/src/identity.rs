//! Who acts: a uid, a gid and groups, for commands and for sockets.
//!
//! `SO_PEERCRED` tells who called connect(2), and on Linux credentials belong to a thread. So
//! a socket of another uid needs no other process: a thread of its own takes the identity,
//! connects, and ends.

use std::ffi::OsStr;
use std::io::{self, IoSlice, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::process::{geteuid, getgid};
use rustix::thread::{Gid, Uid, set_thread_groups, set_thread_res_gid, set_thread_res_uid};

/// The numeric gid that may connect to the broker's sockets. It needs no entry in /etc/group.
pub const SOCKET_GROUP: u32 = 64_100;

/// Who a process or a connection is, for the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

impl Identity {
    /// The identity of the running process.
    #[must_use]
    pub fn own() -> Self {
        Self { uid: geteuid().as_raw(), gid: getgid().as_raw(), groups: Vec::new() }
    }

    /// The broker's uid.
    #[must_use]
    pub fn broker() -> Self {
        Self::numbered(64_101)
    }

    /// The uid of a SQL worker.
    #[must_use]
    pub fn worker() -> Self {
        Self::numbered(64_102)
    }

    /// The uid of an ordinary client.
    #[must_use]
    pub fn client() -> Self {
        Self::numbered(64_103)
    }

    /// A uid that has no grant. It is in the socket group, or it could not knock at all.
    #[must_use]
    pub fn attacker() -> Self {
        Self::numbered(64_104)
    }

    /// Any other uid of the socket group; without root, the own one.
    #[must_use]
    pub fn numbered(uid: u32) -> Self {
        if several() { Self { uid, gid: uid, groups: vec![SOCKET_GROUP] } } else { Self::own() }
    }

    /// A uid with this gid and no other group.
    #[must_use]
    pub fn exactly(uid: u32, gid: u32) -> Self {
        Self { uid, gid, groups: Vec::new() }
    }

    /// The same, and in one more group.
    #[must_use]
    pub fn in_group(mut self, gid: u32) -> Self {
        self.groups.push(gid);
        self
    }

    /// The same uid and gid without the socket group.
    #[must_use]
    pub fn without_groups(mut self) -> Self {
        self.groups.clear();
        self
    }

    /// The uid.
    #[must_use]
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// The primary gid.
    #[must_use]
    pub fn gid(&self) -> u32 {
        self.gid
    }

    /// A command that runs under this identity, with an empty environment but for `PATH` and
    /// `LANG`, and is killed when the thread that starts it ends.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        self.command_with_death_signal(program, "KILL")
    }

    /// As [`Identity::command`], with the signal that it gets when its parent ends.
    pub fn command_with_death_signal(&self, program: impl AsRef<OsStr>, signal: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.env_clear().env("LANG", "C.UTF-8").env(
            "PATH",
            std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into()),
        );
        command.args(["--pdeathsig", signal]);
        self.add_to(&mut command);
        command.arg("--").arg(program);
        command
    }

    /// As [`Identity::command`], below `unshare` with these options: in namespaces of its own. The
    /// process that is started is unshare's, which ends the program when it is killed.
    pub fn command_apart(&self, options: &[&str], program: impl AsRef<OsStr>) -> Command {
        let mut command = Self::own().command("unshare");
        command.args(options).args(["--kill-child", "--", "setpriv"]);
        self.add_to(&mut command);
        command.arg("--").arg(program);
        command
    }

    /// Gives the `setpriv` options that take this identity to `command`.
    fn add_to(&self, command: &mut Command) {
        if *self == Self::own() {
            return;
        }
        command.arg(format!("--reuid={}", self.uid)).arg(format!("--regid={}", self.gid));
        if self.groups.is_empty() {
            command.arg("--clear-groups");
        } else {
            let groups: Vec<String> = self.groups.iter().map(u32::to_string).collect();
            command.arg(format!("--groups={}", groups.join(",")));
        }
    }

    /// Runs `action` on a thread that has this identity, and ends the thread.
    pub fn act<T: Send>(&self, action: impl FnOnce() -> T + Send) -> io::Result<T> {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.assume()?;
                Ok(action())
            });
            thread.join().expect("the acting thread does not panic")
        })
    }

    /// Connects to a Unix socket as this identity.
    pub fn connect(&self, socket: &Path) -> io::Result<UnixStream> {
        self.act(|| UnixStream::connect(socket))?
    }

    /// Changes the credentials of the calling thread, and of no other.
    fn assume(&self) -> io::Result<()> {
        if *self == Self::own() {
            return Ok(());
        }
        let groups: Vec<Gid> = self.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        set_thread_groups(&groups)?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)?;
        Ok(())
    }
}

/// Sends a byte, and a descriptor with it.
pub fn pass_descriptor(over: impl AsFd, passed: impl AsFd) -> io::Result<()> {
    let passed = [passed.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&passed)), "there is room for one");
    sendmsg(over, &[IoSlice::new(b"!")], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives what [`pass_descriptor`] sent.
pub fn take_descriptor(from: impl AsFd) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(from, &mut [IoSliceMut::new(&mut [0])], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut passed = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
            passed = descriptors.next();
        }
    }
    passed.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Whether this process may act as several uids, that is: whether it is root.
#[must_use]
pub fn several() -> bool {
    geteuid().is_root()
}

/// Says on standard error that a promise cannot be proved without root, and why. `true` when
/// it can.
#[must_use]
pub fn several_or_say(promise: &str) -> bool {
    if !several() {
        // Not eprintln!, which the test harness would keep to itself: a test that proves nothing
        // must not look as if it did.
        let note = format!("NOT PROVED without root (one uid is no boundary): {promise}\n");
        let _unheard = io::stderr().write_all(note.as_bytes());
    }
    several()
}

/// Gives a path to an identity, as chown(1). Does nothing without root.
pub fn give(path: &Path, owner: &Identity) -> io::Result<()> {
    if several() {
        std::os::unix::fs::chown(path, Some(owner.uid()), Some(owner.gid()))?;
    }
    Ok(())
}
