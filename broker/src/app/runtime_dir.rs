//! The runtime directory: whose it is, who may enter, and that only one broker uses it.

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

/// The directory is ours to bind in, until this is dropped.
#[derive(Debug)]
pub(super) struct RuntimeDir {
    access: SocketAccess,
    _lock: File,
}

/// The directory cannot be used.
#[derive(Debug, Error)]
pub(super) enum RuntimeDirError {
    #[error("{config}: broker.runtime_dir: {path} {why}", config = .config.display(), path = .path.display())]
    Config { config: PathBuf, path: PathBuf, why: &'static str },
    #[error("{config}: broker.runtime_dir: {path} {why}", config = .config.display(), path = .path.display())]
    Untrusted { config: PathBuf, path: PathBuf, why: String },
    #[error("{config}: broker.runtime_dir: another broker serves {path}: stop it, or give this one another directory", config = .config.display(), path = .path.display())]
    InUse { config: PathBuf, path: PathBuf },
    #[error("{config}: broker.runtime_dir: cannot prepare {path}: {source}; make its parent writable for uid {uid}, or choose another", config = .config.display(), path = .path.display(), uid = Uid::own())]
    Io { config: PathBuf, path: PathBuf, source: io::Error },
}

impl RuntimeDirError {
    pub(super) fn is_permission(&self) -> bool {
        match self {
            Self::Untrusted { .. } => true,
            Self::Io { source, .. } => source.kind() == io::ErrorKind::PermissionDenied,
            Self::Config { .. } | Self::InUse { .. } => false,
        }
    }
}

impl RuntimeDir {
    /// Makes or checks the directory and the door's below it, and takes the lock.
    pub(super) fn prepare(config: &Config) -> Result<Self, RuntimeDirError> {
        let path = config.runtime_dir.clone();
        let io = |path: &Path| {
            let (config, path) = (config.file.clone(), path.to_owned());
            move |source| RuntimeDirError::Io { config, path, source }
        };
        if config.postgres_socket().as_os_str().len() > 107 {
            let why = "is too long: with the sockets' names a path must not exceed 107 bytes";
            return Err(RuntimeDirError::Config { config: config.file.clone(), path, why });
        }
        let postgres = path.join(Config::POSTGRES_DOOR);
        let access =
            if config.socket_group.is_some() { SocketAccess::Group } else { SocketAccess::Owner };
        for dir in [&path, &postgres] {
            make_dir(dir).map_err(io(dir))?;
            check(dir, config)?;
            // A directory that the service manager or another user made for us stays as it is.
            if fs::symlink_metadata(dir).map_err(io(dir))?.uid() == Uid::own().as_raw() {
                open_to(dir, config.socket_group).map_err(io(dir))?;
            }
        }
        let lock = lock(&path.join(LOCK)).map_err(|source| {
            let (config, path) = (config.file.clone(), path.clone());
            if source.kind() == io::ErrorKind::WouldBlock {
                RuntimeDirError::InUse { config, path }
            } else {
                RuntimeDirError::Io { config, path, source }
            }
        })?;
        Ok(Self { access, _lock: lock })
    }

    pub(super) fn access(&self) -> SocketAccess {
        self.access
    }
}

/// Whoever could write in the directory could replace a socket by one of their own.
fn check(dir: &Path, config: &Config) -> Result<(), RuntimeDirError> {
    let untrusted = |why: String| RuntimeDirError::Untrusted {
        config: config.file.clone(),
        path: dir.to_owned(),
        why,
    };
    let io =
        |source| RuntimeDirError::Io { config: config.file.clone(), path: dir.to_owned(), source };
    let metadata = fs::symlink_metadata(dir).map_err(io)?;
    if !metadata.is_dir() {
        return Err(untrusted("is not a directory: remove it".into()));
    }
    match distrust(&metadata) {
        Some(why) => Err(untrusted(why)),
        None => Ok(()),
    }
}

/// Mode 2750 and the group, so that sockets bound in it get that group; without one 0700.
fn open_to(dir: &Path, group: Option<Gid>) -> io::Result<()> {
    match group {
        None => fs::set_permissions(dir, Permissions::from_mode(0o700)),
        Some(gid) => {
            chown(dir, None, Some(gid.as_raw())).map_err(|error| {
                if error.kind() != io::ErrorKind::PermissionDenied {
                    return error;
                }
                let why = format!(
                    "broker.socket_group is {gid}, and the broker is not a member of it: add it (SupplementaryGroups=)"
                );
                io::Error::new(error.kind(), why)
            })?;
            fs::set_permissions(dir, Permissions::from_mode(0o2750))
        }
    }
}

/// The lock that lets this broker take over stale sockets: nobody else is serving them.
fn lock(path: &Path) -> io::Result<File> {
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
