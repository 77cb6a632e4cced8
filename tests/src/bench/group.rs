//! A control group for PostgreSQL, as a container runtime or a unit with an account of its
//! processor time makes one.
//!
//! Without, the kernel takes each session leader for a group (`sched_autogroup`, sched(7)): every
//! backend is one, and the whole broker is another, so that a thousand backends which end stand
//! against one broker.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::postgres::Server;

/// Where the controller is: by itself in version 1, with all others in version 2.
const ROOTS: [&str; 2] = ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup"];

/// A group with a server's processes in it, which leave it when this is dropped.
#[derive(Debug)]
pub(super) struct Group {
    path: PathBuf,
}

impl Group {
    /// `None` where no such group can be made.
    pub(super) fn of(server: &Server) -> Option<Self> {
        let name = format!("credbroker-bench-{}", std::process::id());
        let group = ROOTS.iter().find_map(|root| Self::make(Path::new(root), &name).ok())?;
        let postmaster = postmaster(server);
        // What it forks from now on is in the group as well.
        let all = children(postmaster).into_iter().chain([postmaster]);
        for process in all {
            // One may have ended meanwhile.
            let _ = enter(&group.path, process);
        }
        Some(group)
    }

    fn make(root: &Path, name: &str) -> io::Result<Self> {
        if root.join("cgroup.subtree_control").exists() {
            fs::write(root.join("cgroup.subtree_control"), "+cpu")?;
        }
        let path = root.join(name);
        fs::create_dir(&path)?;
        let group = Self { path };
        // Else it is a folder like any other, or another controller's.
        fs::metadata(group.path.join("cpu.stat"))?;
        Ok(group)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let processes = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        if let Some(parent) = self.path.parent() {
            for process in processes.lines().filter_map(|line| line.parse().ok()) {
                let _ = enter(parent, process);
            }
        }
        let _ = fs::remove_dir(&self.path);
    }
}

fn enter(group: &Path, process: u32) -> io::Result<()> {
    fs::write(group.join("cgroup.procs"), process.to_string())
}

fn postmaster(server: &Server) -> u32 {
    let row = server.admin("postgres").query_one("SHOW data_directory", &[]);
    let directory: String = row.expect("a superuser may").get(0);
    let file = fs::read_to_string(Path::new(&directory).join("postmaster.pid"));
    let pid = file.expect("the server runs").lines().next().map(str::parse);
    pid.expect("it has a first line").expect("its process id")
}

fn children(process: u32) -> Vec<u32> {
    let list = fs::read_to_string(format!("/proc/{process}/task/{process}/children"));
    list.unwrap_or_default().split_whitespace().filter_map(|child| child.parse().ok()).collect()
}
