//! The directories of sockets: whose they are, who may enter, and that only one broker uses them.

#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};
use thiserror::Error;

use crate::config::Config;
use crate::peer::{Gid, SocketAccess, Uid};
use crate::trusted::distrust;

const LOCK: &str = ".lock";
/// sun_path of unix(7), less the terminating NUL.
const MAX_SOCKET_PATH: usize = 107;
const GROUP_MAY_ENTER: u32 = 0o010;

/// The directory is ours to bind in, until this is dropped.
#[derive(Debug)]
pub(super) struct RuntimeDir {
    access: SocketAccess,
    _lock: File,
}

/// The directory cannot be used.
#[derive(Debug, Error)]
pub(super) enum RuntimeDirError {
    #[error("{config}: {key}: {path} is too long: with the sockets' names a path must not exceed 107 bytes", config = .at.config.display(), key = .at.key, path = .at.path.display())]
    TooLong { at: Place },
    #[error("{config}: {key}: {path} {why}", config = .at.config.display(), key = .at.key, path = .at.path.display())]
    Untrusted { at: Place, why: String },
    #[error("{config}: {key}: another broker serves {path}: stop it, or give this one another directory", config = .at.config.display(), key = .at.key, path = .at.path.display())]
    InUse { at: Place },
    #[error("{config}: {key}: cannot prepare {path}: {source}; make its parent writable for uid {uid}, or choose another", config = .at.config.display(), key = .at.key, path = .at.path.display(), uid = Uid::own())]
    Io { at: Place, source: io::Error },
}

/// A directory, and where it was named.
#[derive(Clone, Debug)]
pub(super) struct Place {
    config: PathBuf,
    key: &'static str,
    path: PathBuf,
}

impl RuntimeDirError {
    pub(super) fn is_permission(&self) -> bool {
        match self {
            Self::Untrusted { .. } => true,
            Self::Io { source, .. } => source.kind() == io::ErrorKind::PermissionDenied,
            Self::TooLong { .. } | Self::InUse { .. } => false,
        }
    }
}

impl RuntimeDir {
    /// Makes or checks the workloads' directory and the door's below it, and takes the lock.
    pub(super) fn prepare(config: &Config) -> Result<Self, RuntimeDirError> {
        let place = |path: &Path| Place {
            config: config.file.clone(),
            key: "broker.runtime_dir",
            path: path.to_owned(),
        };
        let path = &config.runtime_dir;
        if config.postgres_socket().as_os_str().len() > MAX_SOCKET_PATH {
            return Err(RuntimeDirError::TooLong { at: place(path) });
        }
        for dir in [path, &path.join(Config::POSTGRES_DOOR)] {
            make_and_check(&place(dir))?;
            open_to(&place(dir), config.socket_group)?;
        }
        let access =
            if config.socket_group.is_some() { SocketAccess::Group } else { SocketAccess::Owner };
        Ok(Self { access, _lock: lock(&place(path))? })
    }

    /// The same for the operators' directory. One that somebody made for a group of operators
    /// stays as it is, and its sockets are that group's too.
    pub(super) fn prepare_admin(config: &Config) -> Result<Self, RuntimeDirError> {
        let place = Place {
            config: config.file.clone(),
            key: "broker.admin_dir",
            path: config.admin_dir.clone(),
        };
        if config.admin_packet_socket().as_os_str().len() > MAX_SOCKET_PATH {
            return Err(RuntimeDirError::TooLong { at: place });
        }
        make_and_check(&place)?;
        open_to(&place, None)?;
        let metadata = fs::symlink_metadata(&place.path)
            .map_err(|source| RuntimeDirError::Io { at: place.clone(), source })?;
        let access = if metadata.mode() & GROUP_MAY_ENTER == 0 {
            SocketAccess::Owner
        } else {
            SocketAccess::Group
        };
        Ok(Self { access, _lock: lock(&place)? })
    }

    pub(super) fn access(&self) -> SocketAccess {
        self.access
    }
}

/// Whoever could write in the directory could replace a socket by one of their own.
fn make_and_check(at: &Place) -> Result<(), RuntimeDirError> {
    let io = |source| RuntimeDirError::Io { at: at.clone(), source };
    make_dir(&at.path).map_err(io)?;
    let metadata = fs::symlink_metadata(&at.path).map_err(io)?;
    let untrusted = |why: String| RuntimeDirError::Untrusted { at: at.clone(), why };
    if !metadata.is_dir() {
        return Err(untrusted("is not a directory: remove it".into()));
    }
    match distrust(&metadata) {
        Some(why) => Err(untrusted(why)),
        None => Ok(()),
    }
}

/// Mode 2750 and the group, so that sockets bound in it get that group; without one 0700.
///
/// A directory that the service manager or another user made for us stays as it is.
fn open_to(at: &Place, group: Option<Gid>) -> Result<(), RuntimeDirError> {
    let io = |source| RuntimeDirError::Io { at: at.clone(), source };
    let dir = at.path.as_path();
    if fs::symlink_metadata(dir).map_err(io)?.uid() != Uid::own().as_raw() {
        return Ok(());
    }
    let opened = match group {
        None => fs::set_permissions(dir, Permissions::from_mode(0o700)),
        Some(gid) => {
            let given = chown(dir, None, Some(gid.as_raw())).map_err(|error| {
                if error.kind() != io::ErrorKind::PermissionDenied {
                    return error;
                }
                let why = format!(
                    "broker.socket_group is {gid}, and the broker is not a member of it: add it (SupplementaryGroups=)"
                );
                io::Error::new(error.kind(), why)
            });
            given.and_then(|()| fs::set_permissions(dir, Permissions::from_mode(0o2750)))
        }
    };
    opened.map_err(io)
}

/// The lock that lets this broker take over stale sockets: nobody else is serving them.
fn lock(at: &Place) -> Result<File, RuntimeDirError> {
    try_lock(&at.path.join(LOCK)).map_err(|source| {
        if source.kind() == io::ErrorKind::WouldBlock {
            RuntimeDirError::InUse { at: at.clone() }
        } else {
            RuntimeDirError::Io { at: at.clone(), source }
        }
    })
}

fn try_lock(path: &Path) -> io::Result<File> {
    let flags = i32::try_from((OFlags::NOFOLLOW | OFlags::CLOEXEC).bits()).unwrap_or_default();
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(flags)
        .open(path)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(file)
}

/// The last directory only: what it stands in is the operator's.
fn make_dir(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}
