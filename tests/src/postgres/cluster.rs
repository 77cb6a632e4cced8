//! A server that this process makes, runs and stops.

use std::fs::{self, DirBuilder};
use std::io::{self, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;

use super::{Method, START_LIMIT, SUPERUSER, Server, TlsIdentity};
use crate::canary::Canary;
use crate::identity::{Identity, give, several};
use crate::process::{Process, output, transcript};
use crate::wait;

const DEBIAN_PROGRAMS: &str = "/usr/lib/postgresql";

/// A server that this process owns; stopped on drop.
#[derive(Debug)]
pub struct Cluster {
    server: Server,
    process: Process,
}

impl Cluster {
    /// Makes a cluster below `directory`, which other uids must be able to pass through, and
    /// starts it: as the user `postgres` when root, for PostgreSQL refuses to run as root.
    ///
    /// # Panics
    /// When that fails; the message has what PostgreSQL said.
    #[must_use]
    pub fn start(directory: &Path) -> Self {
        Self::start_with(directory, &rules(), &[])
    }

    /// The same with this `pg_hba.conf` and, beyond its own, these settings.
    ///
    /// # Panics
    /// When that fails; the message has what PostgreSQL said.
    #[must_use]
    pub fn start_with(directory: &Path, hba: &str, more: &[(&str, &str)]) -> Self {
        let owner = owner();
        let programs = programs();
        let home = directory.join("pg");
        let owned = |path: &Path, mode: u32| {
            DirBuilder::new().mode(mode).create(path).expect("a directory of the cluster");
            give(path, &owner).expect("the cluster's owner gets its directory");
        };
        owned(&home, 0o755);
        let superuser_password = Canary::random().reveal().to_owned();
        let data = home.join("data");
        let socket_dir = home.join("socket");
        owned(&data, 0o700);
        owned(&socket_dir, 0o755);

        let password_file = home.join("superuser");
        write_for(&owner, &password_file, &superuser_password, 0o600).expect("a password file");
        let made = output(
            owner
                .command(programs.join("initdb"))
                .arg("--pgdata")
                .arg(&data)
                .args(["--username", SUPERUSER, "--auth=scram-sha-256", "--no-sync"])
                .args(["--encoding=UTF8", "--locale=C.UTF-8", "--pwfile"])
                .arg(&password_file),
            START_LIMIT,
        );
        assert!(made.status.success(), "initdb failed:\n{}", transcript(&made));
        fs::remove_file(&password_file).expect("the password file was ours");

        let ca_file = home.join("ca.pem");
        let identity = TlsIdentity::generate();
        fs::write(&ca_file, &identity.ca).expect("the CA's certificate");
        fs::set_permissions(&ca_file, fs::Permissions::from_mode(0o644)).expect("chmod");
        write_for(&owner, &data.join("server.crt"), &identity.certificate, 0o600).expect("a file");
        write_for(&owner, &data.join("server.key"), &identity.key, 0o600).expect("a file");
        write_for(&owner, &data.join("pg_hba.conf"), hba, 0o600).expect("a file");

        let log = home.join("pg.err");
        for _attempt in 0..5 {
            let port = free_port();
            let server = Server {
                socket_dir: socket_dir.clone(),
                port,
                ca_file: ca_file.clone(),
                log: log.clone(),
                superuser_password: superuser_password.clone(),
            };
            let mut command = owner.command_with_death_signal(programs.join("postgres"), "INT");
            command.arg("-D").arg(&data);
            for (key, value) in settings(&socket_dir, port) {
                command.arg("-c").arg(format!("{key}={value}"));
            }
            for (key, value) in more {
                command.arg("-c").arg(format!("{key}={value}"));
            }
            let mut process = Process::start("pg", &mut command, &home);
            let ready = wait::until(START_LIMIT, || {
                if process.ended().is_some() {
                    return Some(false);
                }
                server.try_admin("postgres").is_ok().then_some(true)
            });
            if ready == Some(true) {
                for method in Method::ALL {
                    let create = format!("CREATE ROLE {} NOLOGIN", method.group());
                    server.admin("postgres").batch_execute(&create).expect("a role can be made");
                }
                return Self { server, process };
            }
        }
        panic!("PostgreSQL does not start:\n{}", fs::read_to_string(&log).unwrap_or_default());
    }

    /// How to reach it.
    #[must_use]
    pub fn server(&self) -> &Server {
        &self.server
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // SIGINT: a fast shutdown, which ends the server's children too.
        self.process.signal(Signal::INT);
        let _or_killed = wait::until(Duration::from_secs(10), || self.process.ended());
    }
}

/// Where PostgreSQL's server programs are: beside `pg_config`, or where Debian puts them.
///
/// # Panics
/// When there are none.
#[must_use]
pub fn programs() -> PathBuf {
    let debian = fs::read_dir(DEBIAN_PROGRAMS).into_iter().flatten().flatten();
    let mut versions: Vec<PathBuf> = debian.map(|entry| entry.path().join("bin")).collect();
    versions.retain(|path| path.join("initdb").exists());
    versions.sort();
    if let Some(newest) = versions.pop() {
        return newest;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .find(|directory| directory.join("initdb").exists())
        .expect("PostgreSQL's initdb is installed (Debian: apt-get install postgresql)")
}

/// `pg_hba.conf`: SCRAM for all, but for the members of a [`Method`]'s group.
fn rules() -> String {
    let of = |method: &Method| {
        format!("hostssl all +{} 127.0.0.0/8 {}\n", method.group(), method.name())
    };
    let groups: String = Method::ALL.iter().map(of).collect();
    format!("{groups}local all all scram-sha-256\nhostssl all all 127.0.0.0/8 scram-sha-256\n")
}

/// Who owns the server's files and runs it.
fn owner() -> Identity {
    if !several() {
        return Identity::own();
    }
    let id = |flag: &str| -> u32 {
        let printed = output(Command::new("id").args([flag, "postgres"]), START_LIMIT);
        let text = String::from_utf8_lossy(&printed.stdout).trim().to_owned();
        text.parse().expect("there is a user postgres (Debian's package makes it)")
    };
    Identity::exactly(id("-u"), id("-g"))
}

fn settings(socket_dir: &Path, port: u16) -> Vec<(&'static str, String)> {
    vec![
        ("listen_addresses", "127.0.0.1,127.0.0.2".into()),
        ("port", port.to_string()),
        ("unix_socket_directories", socket_dir.display().to_string()),
        ("unix_socket_permissions", "0777".into()),
        ("password_encryption", "scram-sha-256".into()),
        ("ssl", "on".into()),
        // A thousand sessions of one test, and what the others have open.
        ("max_connections", "1400".into()),
        ("log_connections", "on".into()),
        ("log_statement", "all".into()),
        // Nothing here outlives the run.
        ("fsync", "off".into()),
        ("full_page_writes", "off".into()),
        ("synchronous_commit", "off".into()),
        ("autovacuum", "off".into()),
        ("shared_buffers", "32MB".into()),
    ]
}

fn free_port() -> u16 {
    let probe = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    probe.local_addr().expect("a bound socket has an address").port()
}

pub(super) fn write_for(owner: &Identity, path: &Path, text: &str, mode: u32) -> io::Result<()> {
    let mut file =
        fs::File::options().write(true).create(true).truncate(true).mode(mode).open(path)?;
    file.write_all(text.as_bytes())?;
    give(path, owner)
}
