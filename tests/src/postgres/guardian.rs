//! The process that keeps the shared server for as long as somebody uses it.

use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use super::announcement;
use super::cluster::{Cluster, write_for};
use crate::identity::Identity;
use crate::shared;

/// How long a server is kept that nobody uses.
const IDLE: Duration = Duration::from_secs(3);

/// Runs the shared server until nobody holds the lease for some seconds. The body of the
/// guardian process.
///
/// # Errors
/// When the announcement cannot be written or the directory cannot be removed.
pub fn guard() -> io::Result<()> {
    let directory = tempfile::Builder::new().prefix("run-").tempdir_in(shared::directory())?;
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
    let cluster = Cluster::start(directory.path());
    let fresh = announcement().with_extension("new");
    write_for(&Identity::own(), &fresh, &serde_json::to_string(cluster.server())?, 0o600)?;
    fs::rename(&fresh, announcement())?;

    let lease = shared::lock_file(shared::LEASE_FILE);
    let start = shared::lock_file("start.lock");
    let mut idle_since = Instant::now();
    loop {
        thread::sleep(Duration::from_millis(200));
        if lease.try_lock().is_err() {
            idle_since = Instant::now();
            continue;
        }
        // Who starts now waits for these two locks, finds no announcement, and starts anew.
        if idle_since.elapsed() > IDLE && start.try_lock().is_ok() {
            fs::remove_file(announcement())?;
            drop(cluster);
            shared::remove_leftovers();
            return directory.close();
        }
        lease.unlock()?;
    }
}
