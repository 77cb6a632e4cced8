//! A private PostgreSQL: SCRAM-SHA-256 only, TLS with a CA of its own, nothing shared with a
//! system cluster. All tests of a run share one server; each has its own role and database.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use postgres::{Client, Config, NoTls};
use serde::{Deserialize, Serialize};

pub use self::cluster::{Cluster, programs};
pub use self::database::{Database, Method};
pub use self::guardian::guard;
pub use self::tls::{ClientAuthority, TlsIdentity};
use crate::{binaries, shared};

mod cluster;
mod database;
mod guardian;
mod tls;

const SUPERUSER: &str = "observer";
const START_LIMIT: Duration = Duration::from_secs(60);

/// How to reach a running server.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Server {
    /// The directory of its Unix socket.
    pub socket_dir: PathBuf,
    /// Its TCP port, on 127.0.0.1 and 127.0.0.2; TLS only.
    pub port: u16,
    /// The certificate of the CA that signed for `localhost` and 127.0.0.1, not 127.0.0.2.
    pub ca_file: PathBuf,
    /// Its log.
    pub log: PathBuf,
    superuser_password: String,
}

impl Server {
    /// The server that all tests of this build share; started by whoever comes first.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn shared() -> &'static Self {
        static SERVER: OnceLock<Server> = OnceLock::new();
        SERVER.get_or_init(|| {
            let start = shared::lock_file("start.lock");
            start.lock().expect("the start lock");
            shared::hold_lease();
            Self::announced().unwrap_or_else(Self::start_guardian)
        })
    }

    /// The server that a guardian announced, if it still answers.
    fn announced() -> Option<Self> {
        let text = fs::read(announcement()).ok()?;
        let server: Self = serde_json::from_slice(&text).ok()?;
        server.try_admin("postgres").ok().map(|_| server)
    }

    #[allow(clippy::zombie_processes, reason = "the guardian outlives who started it")]
    fn start_guardian() -> Self {
        let _stale = fs::remove_file(announcement());
        let log = shared::directory().join("guardian.log");
        let out = fs::File::create(&log).expect("the guardian's log");
        let mut guardian = Command::new(binaries::built().join("credbroker-e2e-helper"))
            .arg("guard-postgres")
            .env(binaries::BIN_DIR_ENV, binaries::built())
            .env(shared::DIRECTORY_ENV, shared::directory())
            .stdin(Stdio::null())
            .stdout(out.try_clone().expect("a second handle of the log"))
            .stderr(out)
            .process_group(0)
            .spawn()
            .expect("the guardian starts");
        let deadline = Instant::now() + START_LIMIT;
        loop {
            if let Some(server) = Self::announced() {
                return server;
            }
            let ended = guardian.try_wait().expect("waitpid on our own child");
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "PostgreSQL did not start:\n{}",
                fs::read_to_string(&log).unwrap_or_default()
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// A superuser's connection, over the Unix socket.
    ///
    /// # Panics
    /// When the server does not let it in.
    #[must_use]
    pub fn admin(&self, database: &str) -> Client {
        self.try_admin(database).expect("the superuser can log in")
    }

    fn try_admin(&self, database: &str) -> Result<Client, postgres::Error> {
        Config::new()
            .host_path(&self.socket_dir)
            .port(self.port)
            .user(SUPERUSER)
            .password(&self.superuser_password)
            .dbname(database)
            .application_name("observer")
            .connect(NoTls)
    }

    /// Makes a role and a database of the same random name, with a canary as the password.
    ///
    /// # Panics
    /// When the server refuses.
    #[must_use]
    pub fn database(&self) -> Database {
        Database::create(self)
    }
}

fn announcement() -> PathBuf {
    shared::directory().join("postgres.json")
}
