//! What /proc tells about a peer's process beyond its ids: its program and its systemd unit.
//!
//! Both are read through a pid, which may come to mean another process at any time. So the order
//! is: ask the pidfd for the pid, read, and then poll the pidfd; what was read is believed only if
//! the process still lives, because until then its pid was nobody else's.
//!
//! Both are of the process that connected, as it was when it was first asked about. A process can
//! connect, pass the descriptor on, and then become another program: exe is a hint beside a uid,
//! and no boundary between programs of one uid.

#![forbid(unsafe_code)]

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use thiserror::Error;

use super::Uid;
use super::pidfd::PidFd;

const SYSTEM_SLICE: &str = "/system.slice/";
/// Where systemd mounts cgroup v2: alone, or beside v1.
const CGROUP2: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
/// `include/uapi/linux/magic.h`.
const CGROUP2_MAGIC: u64 = 0x6367_7270;
/// One line a hierarchy, each with a path.
const MAX_CGROUPS: u64 = 64 * 1024;
/// systemd.unit(5).
const MAX_UNIT: usize = 255;
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// Why something is not known of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Unknown {
    /// There is no pidfd, so nothing that is read could be believed.
    #[error("the kernel gives no pidfd for the peer")]
    NoPidfd,
    /// The pid means nothing in the /proc that is mounted here.
    #[error("the peer lives in another PID namespace")]
    OtherNamespace,
    /// The process has exited.
    #[error("the peer has exited")]
    Exited,
    /// The kernel does not let this process look.
    #[error("the broker may not read it: the peer has another uid, or a sandbox is between them")]
    NotPermitted,
    /// No systemd of this machine made a system.slice that is seen here.
    #[error("there is no system.slice of root's in the cgroup v2 that is mounted here")]
    NoSystemSlice,
    /// Reading failed, perhaps for this once.
    #[error("it could not be read")]
    Unreadable,
    /// A description leaves it out.
    #[error("it was not given")]
    NotGiven,
}

/// A file, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    device: u64,
    inode: u64,
}

/// A program that a grant names: absolute path of a file that only root can write or replace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program(PathBuf);

/// A system service, by its cgroup below `/system.slice/`: `foo.service`, or with the slices that
/// it is in, `system-foo.slice/foo@1.service`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit(String);

/// What has been read so far, each at most once.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    program: OnceLock<Result<FileId, Unknown>>,
    unit: OnceLock<Result<Option<Unit>, Unknown>>,
}

impl Gathered {
    pub(super) fn program(&self, process: Option<&PidFd>) -> Result<FileId, Unknown> {
        once(&self.program, || observe(process, |proc| file_at(&proc.join("exe"))))?;
        self.program.get().copied().unwrap_or(Err(Unknown::Unreadable))
    }

    pub(super) fn unit(&self, process: Option<&PidFd>) -> Result<Option<&Unit>, Unknown> {
        once(&self.unit, || {
            unit_can_be_known()?;
            observe(process, |proc| unit_at(&proc.join("cgroup")))
        })?;
        match self.unit.get() {
            Some(found) => found.as_ref().map(Option::as_ref).map_err(|why| *why),
            None => Err(Unknown::Unreadable),
        }
    }
}

/// Fills `cell`, but not with a failure that may be over the next time.
fn once<T>(
    cell: &OnceLock<Result<T, Unknown>>,
    gather: impl FnOnce() -> Result<T, Unknown>,
) -> Result<(), Unknown> {
    if cell.get().is_none() {
        match gather() {
            // The clone of a peer that has no process shares the cell with one that has.
            Err(passing @ (Unknown::Unreadable | Unknown::NoPidfd)) => return Err(passing),
            // Two that come at once have read the same, or one of them that the peer has exited.
            found => drop(cell.set(found)),
        }
    }
    Ok(())
}

/// Reads below /proc/PID, and believes it only if the process then still lives.
fn observe<T>(
    process: Option<&PidFd>,
    read: impl FnOnce(&Path) -> Result<T, Unknown>,
) -> Result<T, Unknown> {
    let process = process.ok_or(Unknown::NoPidfd)?;
    let pid = process.pid_in_proc().map_err(|_error| Unknown::Unreadable)?;
    let found = match pid {
        Some(pid) => read(&Path::new("/proc").join(pid.to_string())),
        None => Err(Unknown::OtherNamespace),
    };
    if process.is_alive() { found } else { Err(Unknown::Exited) }
}

fn file_at(path: &Path) -> Result<FileId, Unknown> {
    let metadata = fs::metadata(path).map_err(|error| why(&error))?;
    Ok(FileId { device: metadata.dev(), inode: metadata.ino() })
}

fn unit_at(path: &Path) -> Result<Option<Unit>, Unknown> {
    let mut text = String::new();
    let file = File::open(path).map_err(|error| why(&error))?;
    file.take(MAX_CGROUPS).read_to_string(&mut text).map_err(|error| why(&error))?;
    // cgroups(7): the line of v2 has neither a number nor controllers. No name has a line feed.
    let cgroup = text.lines().find_map(|line| line.strip_prefix("0::"));
    Ok(cgroup.and_then(|cgroup| cgroup.strip_prefix(SYSTEM_SLICE)).and_then(Unit::parse))
}

fn why(error: &io::Error) -> Unknown {
    // hidepid= of proc(5) says "not found" for what may not be seen.
    let hidden = [io::ErrorKind::PermissionDenied, io::ErrorKind::NotFound];
    if hidden.contains(&error.kind()) { Unknown::NotPermitted } else { Unknown::Unreadable }
}

/// Whether a path below `/system.slice/` can only have been given by the machine's systemd:
/// whoever could make directories there could name a cgroup as he likes.
pub(crate) fn unit_can_be_known() -> Result<(), Unknown> {
    let is_roots = |mount: &str| {
        let is_v2 = rustix::fs::statfs(mount)
            .is_ok_and(|found| u64::try_from(found.f_type).is_ok_and(|kind| kind == CGROUP2_MAGIC));
        let slice = format!("{mount}{SYSTEM_SLICE}");
        is_v2
            && fs::metadata(slice).is_ok_and(|slice| {
                slice.is_dir() && slice.uid() == 0 && slice.mode() & WRITABLE_BY_OTHERS == 0
            })
    };
    if CGROUP2.into_iter().any(is_roots) { Ok(()) } else { Err(Unknown::NoSystemSlice) }
}

/// Why the program of a peer with this uid cannot be read, if that is known beforehand.
pub(crate) fn program_can_be_known(of: Option<Uid>, landlocked: bool) -> Result<(), &'static str> {
    if of != Some(Uid::own()) {
        return Err(
            "the broker gives up CAP_SYS_PTRACE, without which nobody can read the program of another uid",
        );
    }
    if landlocked {
        return Err(
            "landlock, which confines the broker, lets it read the program of no process outside",
        );
    }
    Ok(())
}

impl Program {
    /// What is wrong with the path, and what to do, if anything is.
    ///
    /// # Errors
    /// When it is not absolute, not a file, or not root's alone to write or replace.
    pub fn at(path: PathBuf) -> Result<Self, String> {
        if !path.is_absolute() {
            return Err("must be an absolute path".to_owned());
        }
        let program = Self(path);
        program.file().map(|_now| program)
    }

    /// The path, as configured.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Whether it is this file, by the name as it is at this moment: an update may have replaced
    /// it. A file that is not root's alone any more is nobody's program.
    pub(crate) fn is(&self, file: FileId) -> bool {
        self.file().is_ok_and(|now| now == file)
    }

    fn file(&self) -> Result<FileId, String> {
        let missing = |error: io::Error| format!("cannot be used: {error}");
        let real = fs::canonicalize(&self.0).map_err(missing)?;
        let metadata = fs::metadata(&real).map_err(missing)?;
        if !metadata.is_file() {
            return Err("is not a regular file".to_owned());
        }
        // Who can write to a directory can put another of root's files in this one's place.
        for path in real.ancestors() {
            let metadata = fs::metadata(path).map_err(missing)?;
            let path = path.display();
            if metadata.uid() != 0 {
                return Err(format!(
                    "cannot be believed: {path} belongs to uid {}, and must belong to root",
                    metadata.uid()
                ));
            }
            if metadata.mode() & WRITABLE_BY_OTHERS != 0 {
                return Err(format!(
                    "cannot be believed: others can write to {path}: chmod go-w it"
                ));
            }
        }
        Ok(FileId { device: metadata.dev(), inode: metadata.ino() })
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

impl Unit {
    /// `None` when it is not the name of a service, alone or below slices. `/system.slice/` may
    /// stand before it.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let path = text.strip_prefix(SYSTEM_SLICE).unwrap_or(text);
        let (slices, service) = path.rsplit_once('/').map_or((None, path), |(a, b)| (Some(a), b));
        let named = |name: &str, suffix: &str| {
            let known = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
            name.strip_suffix(suffix).is_some_and(|stem| !stem.is_empty())
                && name.len() <= MAX_UNIT
                && name.bytes().all(known)
        };
        let good = named(service, ".service")
            && slices.is_none_or(|slices| slices.split('/').all(|slice| named(slice, ".slice")));
        good.then(|| Self(path.to_owned()))
    }

    /// The path below `/system.slice/`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn units_are_services_of_the_system_slice_in_full() {
        for good in ["app.service", "/system.slice/app.service", "system-app.slice/app@1.service"] {
            let parsed = Unit::parse(good).unwrap();
            assert_eq!(Unit::parse(&format!("{SYSTEM_SLICE}{parsed}")), Some(parsed), "{good}");
        }
        for bad in [
            "",
            ".service",
            "app",
            "app.scope",
            "/app.service",
            "/user.slice/app.service",
            "app.service/child",
            "app.service/child.service",
            "../app.service",
            "a//b.service",
            "app.service (deleted)",
            "app.service\n",
            "/system.slice/",
        ] {
            assert_eq!(Unit::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn only_the_line_of_cgroup_v2_below_the_system_slice_counts() {
        let dir = tempfile::tempdir().unwrap();
        let read = |text: &str| {
            fs::write(dir.path().join("cgroup"), text).unwrap();
            unit_at(&dir.path().join("cgroup")).unwrap().map(|unit| unit.to_string())
        };
        let found = Some("app.service".to_owned());
        assert_eq!(read("9:name=systemd:/\n0::/system.slice/app.service\n"), found);
        assert_eq!(read("1:name=systemd:/system.slice/app.service\n0::/\n"), None);
        assert_eq!(read("0::/user.slice/user-1.slice/system.slice/app.service\n"), None);
        assert_eq!(read("0::/../system.slice/app.service\n"), None);
        assert_eq!(read(""), None);
    }

    #[test]
    fn programs_are_roots_alone_to_write() {
        assert_eq!(Program::at("bin/sh".into()).unwrap_err(), "must be an absolute path");
        assert_eq!(Program::at("/usr".into()).unwrap_err(), "is not a regular file");
        let shell = Program::at("/bin/sh".into()).unwrap();
        assert_eq!(shell.file().unwrap(), file_at(Path::new("/bin/sh")).unwrap());
        // Below /tmp everybody can put a file in another's place.
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        fs::write(&program, "").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(Program::at(program).unwrap_err().contains("cannot be believed"));
    }
}
