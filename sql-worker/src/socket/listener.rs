//! Binding the socket where nobody else can interfere.
//!
//! It is bound under a umask that lets nobody but the owner connect, in a directory that only
//! the owner and root can write; a group is given its right before listen(2), until which
//! connect(2) is refused to everybody.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, chmodat, chownat, unlink};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Gid, umask};
use tokio::net::UnixListener;

/// sun_path of unix(7), less the terminating NUL.
const MAX_PATH: usize = 107;
const BACKLOG: i32 = 128;

/// A Unix socket that listens and is not served yet.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: Bound,
}

/// The file of a socket of ours, removed when this is dropped.
#[derive(Debug)]
pub(super) struct Bound {
    path: PathBuf,
    /// Device and inode: somebody else's socket at the path is left alone.
    file: (u64, u64),
}

/// Why a socket cannot be bound.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub struct BindError {
    path: PathBuf,
    problem: String,
}

impl Listener {
    /// Binds a socket at `path`: mode 0600, or 0660 for `group`. A directory that is missing is
    /// made, and a socket that nobody serves any more is replaced. To be called while the process
    /// has one thread: the umask is the whole process's.
    ///
    /// # Errors
    /// When the path is too long, when others can write its directory, when something that is
    /// not a dead socket of this user is there already, and when the kernel refuses.
    pub fn bind(path: &Path, group: Option<&str>) -> Result<Self, BindError> {
        let failed = |problem: String| BindError { path: path.to_owned(), problem };
        let failure = |what: &'static str| {
            move |errno: rustix::io::Errno| failed(format!("{what}: {}", io::Error::from(errno)))
        };
        let length = path.as_os_str().as_bytes().len();
        if length > MAX_PATH {
            let problem =
                format!("a socket's path may have {MAX_PATH} bytes and this has {length}");
            return Err(failed(problem));
        }
        let group = group.map(gid).transpose().map_err(failed)?;
        directory(path, group).map_err(failed)?;
        make_room(path).map_err(failed)?;

        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(failure("cannot make a socket"))?;
        let address = SocketAddrUnix::new(path).map_err(failure("cannot bind"))?;
        let before = umask(Mode::from_raw_mode(0o177));
        let bound = rustix::net::bind(&socket, &address);
        umask(before);
        bound.map_err(failure("cannot bind"))?;
        let file = std::fs::symlink_metadata(path).map_err(|error| failed(error.to_string()))?;
        let path = Bound { path: path.to_owned(), file: (file.dev(), file.ino()) };
        if let Some(group) = group {
            let file = path.path.as_path();
            chownat(CWD, file, None, Some(group), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(failure("cannot give it to the group"))?;
            chmodat(CWD, file, Mode::from_raw_mode(0o660), AtFlags::empty())
                .map_err(failure("cannot open it to the group"))?;
        }
        rustix::net::listen(&socket, BACKLOG).map_err(failure("cannot listen"))?;
        Ok(Self { socket, path })
    }

    pub(super) fn into_parts(self, protocol: &str) -> io::Result<(UnixListener, Bound)> {
        tracing::info!(socket = %self.path.path.display(), "serving {protocol}");
        let listener = UnixListener::from_std(StdListener::from(self.socket))?;
        Ok((listener, self.path))
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let found = std::fs::symlink_metadata(&self.path);
        if found.is_ok_and(|found| (found.dev(), found.ino()) == self.file) {
            let _ = unlink(&self.path);
        }
    }
}

/// The directory of `path`, made if it is missing, and nobody's to write but ours and root's.
fn directory(path: &Path, group: Option<Gid>) -> Result<(), String> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = directory.ok_or("the path must name its directory")?;
    let mode = if group.is_some() { 0o750 } else { 0o700 };
    let own = rustix::process::geteuid().as_raw();
    match std::fs::DirBuilder::new().mode(mode).create(directory) {
        Ok(()) => {
            chownat(CWD, directory, None, group, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|errno| format!("cannot give its directory to the group: {errno}"))?;
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => {
            return Err(format!(
                "cannot make its directory: {error}: let root make it for uid {own}, mode {mode:04o}"
            ));
        }
    }
    let found = std::fs::metadata(directory).map_err(|error| error.to_string())?;
    let owner = found.uid();
    if owner != 0 && owner != own {
        return Err(format!(
            "its directory belongs to uid {owner}: it must belong to root or to uid {own}"
        ));
    }
    if found.mode() & 0o022 != 0 {
        let mode = found.mode() & 0o7777;
        return Err(format!(
            "others can write its directory (mode {mode:04o}): choose one of its own, mode 0750"
        ));
    }
    Ok(())
}

/// Removes a socket of ours that nobody listens on; refuses whatever else is there.
fn make_room(path: &Path) -> Result<(), String> {
    let found = match std::fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.to_string()),
    };
    if !found.file_type().is_socket() || found.uid() != rustix::process::geteuid().as_raw() {
        return Err("something that is not a socket of this user is there: move it away".into());
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            unlink(path).map_err(|errno| format!("cannot remove a dead socket: {errno}"))
        }
        Ok(_) => Err("another process serves it: stop that, or choose another path".into()),
        Err(error) => Err(format!("something is there, and cannot be asked: {error}")),
    }
}

/// A group's id, by number or name.
fn gid(group: &str) -> Result<Gid, String> {
    if let Ok(number) = group.parse::<u32>() {
        return Ok(Gid::from_raw(number));
    }
    match nix::unistd::Group::from_name(group) {
        Ok(Some(group)) => Ok(Gid::from_raw(group.gid.as_raw())),
        Ok(None) => Err(format!("unix.group: there is no group {group:?}")),
        Err(errno) => Err(format!("unix.group: the group cannot be looked up: {errno}")),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn private() -> tempfile::TempDir {
        tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).tempdir().unwrap()
    }

    fn refused(path: &Path, group: Option<&str>) -> String {
        Listener::bind(path, group).unwrap_err().to_string()
    }

    #[test]
    fn a_socket_is_its_owners_and_goes_with_its_listener() {
        let directory = private();
        let path = directory.path().join("made/mcp.sock");
        let listener = Listener::bind(&path, None).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        assert!(refused(&path, None).contains("another process serves it"));
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_group_is_let_in() {
        let directory = private();
        let path = directory.path().join("made/mcp.sock");
        let group = rustix::process::getegid().as_raw();
        let listener = Listener::bind(&path, Some(&group.to_string())).unwrap();
        let found = std::fs::metadata(&path).unwrap();
        assert_eq!((found.mode() & 0o777, found.gid()), (0o660, group));
        assert_eq!(std::fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777, 0o750);
        drop(listener);
        let missing = refused(&path, Some("no such group"));
        assert!(missing.contains("unix.group: there is no group"), "{missing}");
    }

    #[test]
    fn only_a_dead_socket_is_replaced() {
        let directory = private();
        let path = directory.path().join("mcp.sock");
        let listener = Listener::bind(&path, None).unwrap();
        // As after SIGKILL: the file stays, and nobody listens.
        let Listener { socket, path: bound } = listener;
        let dead = bound.file;
        let moved = directory.path().join("kept");
        std::fs::rename(&path, &moved).unwrap();
        drop(bound);
        drop(socket);
        std::fs::rename(&moved, &path).unwrap();
        let again = Listener::bind(&path, None).unwrap();
        assert!(again.path.file != dead || path.exists());
        drop(again);

        std::fs::write(&path, "precious").unwrap();
        assert!(refused(&path, None).contains("not a socket of this user"));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn faults_say_what_to_do() {
        let directory = private();
        let long = directory.path().join("x".repeat(120));
        assert!(refused(&long, None).contains("may have 107 bytes and this has"));
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
        let open = refused(&directory.path().join("mcp.sock"), None);
        assert!(open.contains("others can write its directory (mode 0777)"), "{open}");
        assert!(refused(Path::new("mcp.sock"), None).contains("must name its directory"));
    }
}
