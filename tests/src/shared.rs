//! What the tests of one build share: a directory, and a lease that keeps it alive.
//!
//! nextest runs each test in a process of its own, `cargo test` runs them as threads of one,
//! and either may be killed. So nobody has to clean up in the end: every test process holds a
//! shared lock on the lease file, which the kernel drops with the process, and the guardian
//! ([`crate::postgres::guard`]) stops the server and leaves when nobody has held the lease
//! for a few seconds.

use std::fs::{self, DirBuilder, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::process::geteuid;

use crate::binaries;

/// Names the shared directory; without it the name is derived from where the programs are.
pub const DIRECTORY_ENV: &str = "CREDBROKER_E2E_DIR";

/// The lock file that every test process holds shared.
pub(crate) const LEASE_FILE: &str = "lease.lock";

/// How the names of temporary directories begin. Short, for socket paths end at 107 bytes.
pub(crate) const TEMPORARY: &str = "cb-";

/// The directory that tests of this build share; made on first use, 0755, so that other uids
/// can pass through it.
///
/// # Panics
/// When it is not ours: its name can be guessed, and somebody else may have made it first.
pub fn directory() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        if let Some(given) = std::env::var_os(DIRECTORY_ENV) {
            return given.into();
        }
        let mut hasher = DefaultHasher::new();
        binaries::built().hash(&mut hasher);
        let name = format!("credbroker-e2e-{}-{:08x}", geteuid().as_raw(), hasher.finish() >> 32);
        let path = std::env::temp_dir().join(name);
        let _exists = DirBuilder::new().mode(0o755).create(&path);
        let metadata = fs::symlink_metadata(&path)
            .unwrap_or_else(|error| panic!("cannot use {}: {error}", path.display()));
        assert!(
            metadata.is_dir() && metadata.uid() == geteuid().as_raw(),
            "{} belongs to somebody else; remove it",
            path.display()
        );
        path
    })
}

/// Keeps what is shared alive for as long as this process lives.
///
/// # Panics
/// When the lease cannot be had.
pub fn hold_lease() {
    static LEASE: OnceLock<File> = OnceLock::new();
    let _held = LEASE.get_or_init(|| {
        let lease = lock_file(LEASE_FILE);
        lease.lock_shared().expect("the lease");
        lease
    });
}

/// Removes what tests that were killed left behind. Only for who holds the lease alone.
pub(crate) fn remove_leftovers() {
    for entry in fs::read_dir(directory()).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
            let _next_time = fs::remove_dir_all(entry.path());
        }
    }
}

/// Opens a lock file of the shared directory.
///
/// # Panics
/// When the file cannot be opened.
#[must_use]
pub fn lock_file(name: &str) -> File {
    let path = directory().join(name);
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .unwrap_or_else(|error| panic!("cannot open {}: {error}", path.display()))
}
