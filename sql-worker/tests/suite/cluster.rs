//! A private PostgreSQL, shared by the tests that run at the same time.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use credbroker_sql_worker::error::Failure;
use credbroker_sql_worker::sql::{
    Answer, Format, Limits, Params, Policy, Pool, PoolSettings, Role, Statement, Target, execute,
};
use tempfile::TempDir;

pub(crate) const LIMITS: Limits = Limits {
    max_rows: 1000,
    max_bytes: 1 << 20,
    max_cell_bytes: 64 << 10,
    statement_timeout: Duration::from_secs(20),
};

pub(crate) const SETTINGS: PoolSettings =
    PoolSettings { size: 4, wait: Duration::from_secs(5), idle: Duration::from_secs(60) };

pub(crate) struct Cluster {
    server: Child,
    directory: TempDir,
}

static CURRENT: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());

impl Cluster {
    /// The running server, or a new one.
    pub(crate) fn get() -> Arc<Self> {
        let mut current = CURRENT.lock().unwrap();
        current.upgrade().unwrap_or_else(|| {
            let cluster = Arc::new(Self::start());
            *current = Arc::downgrade(&cluster);
            cluster
        })
    }

    fn start() -> Self {
        let directory = tempfile::Builder::new().prefix("cbw").tempdir_in("/tmp").unwrap();
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
        let data = directory.path().join("data");
        let status = unprivileged("initdb")
            .args(["--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8"])
            .args(["--locale=C", "--pgdata"])
            .arg(&data)
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success(), "initdb failed");
        let mut server = unprivileged("postgres");
        server.arg("-D").arg(&data).arg("-k").arg(directory.path());
        for setting in [
            "listen_addresses=",
            "fsync=off",
            "max_connections=60",
            // What the broker does with a client that is gone.
            "client_connection_check_interval=50ms",
        ] {
            server.args(["-c", setting]);
        }
        let server = server.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let cluster = Self { server, directory };
        let ready = || {
            let mut probe = unprivileged("pg_isready");
            probe
                .args(["-q", "-U", "postgres", "-h"])
                .arg(cluster.door())
                .status()
                .unwrap()
                .success()
        };
        for _ in 0..300 {
            if ready() {
                // The workers' role: it may do what it likes in its own database.
                let made = unprivileged("psql")
                    .args(["-qX", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-h"])
                    .arg(cluster.door())
                    .args(["-c", "create role app login createdb", "-c"])
                    .arg("alter database postgres owner to app")
                    .status();
                assert!(made.unwrap().success(), "the role was not made");
                return cluster;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("the server did not start");
    }

    /// A superuser's session, past the worker: to prepare, and to look.
    pub(crate) fn superuser(&self) -> Pool {
        let policy = Policy { allow_roles: [Role::Superuser].into(), ..Policy::read_write() };
        Pool::new(self.target_as("postgres").with_policy(Arc::new(policy)), SETTINGS)
    }

    pub(crate) fn door(&self) -> &Path {
        self.directory.path()
    }

    /// Read-write.
    pub(crate) fn target(&self) -> Target {
        self.target_as("app").with_policy(Arc::new(Policy::read_write()))
    }

    /// As another role, read-only.
    pub(crate) fn target_as(&self, role: &str) -> Target {
        Target::door(self.door(), "postgres", role, "token", &LIMITS)
    }

    /// The same, as connections are by default.
    pub(crate) fn read_only(&self) -> Pool {
        Pool::new(self.target_as("app"), SETTINGS)
    }

    pub(crate) fn pool(&self) -> Pool {
        Pool::new(self.target(), SETTINGS)
    }

    /// How many backends run a statement that contains `marker`.
    pub(crate) async fn running(&self, marker: &str) -> u64 {
        let sql = "select count(*)::int4 from pg_stat_activity \
                   where state = 'active' and query like '%' || $1 || '%' \
                   and pid <> pg_backend_pid()";
        let params = Params::List(vec![marker.into()]);
        let answer = run(&self.pool(), sql, params).await.unwrap();
        rows(answer)[0][0].as_u64().unwrap()
    }

    /// Waits until [`running`](Self::running) is `count`; panics after `limit`.
    pub(crate) async fn wait_running(&self, marker: &str, count: u64, limit: Duration) {
        let done = async {
            while self.running(marker).await != count {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        assert!(tokio::time::timeout(limit, done).await.is_ok(), "{marker}: not {count} in time");
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.server);
        // A fast shutdown; the child is ours and not yet waited for.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        let _ = self.server.wait();
    }
}

fn unprivileged(program: &str) -> Command {
    let bin = Command::new("pg_config").arg("--bindir").output().unwrap().stdout;
    let program = PathBuf::from(String::from_utf8(bin).unwrap().trim()).join(program);
    let mut command = if rustix::process::geteuid().is_root() {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]);
        command.arg(program);
        command
    } else {
        Command::new(program)
    };
    command.current_dir("/tmp").env_remove("PGOPTIONS");
    command
}

/// Runs one statement with [`LIMITS`].
pub(crate) async fn run(pool: &Pool, sql: &str, params: Params) -> Result<Answer, Failure> {
    run_within(pool, sql, params, Format::Json, &LIMITS).await
}

/// As [`run`], of what is to succeed.
pub(crate) async fn succeed(pool: &Pool, sql: &str, params: Params) -> Answer {
    run(pool, sql, params).await.unwrap_or_else(|failure| panic!("{sql}: {failure}"))
}

/// Runs what is to succeed, one after another.
pub(crate) async fn prepare(pool: &Pool, statements: &[&str]) {
    for sql in statements {
        succeed(pool, sql, Params::None).await;
    }
}

pub(crate) async fn run_within(
    pool: &Pool,
    sql: &str,
    params: Params,
    format: Format,
    limits: &Limits,
) -> Result<Answer, Failure> {
    let statement = Statement::parse(sql, &params)?;
    execute(pool.lease().await?, &statement, format, limits).await
}

pub(crate) fn rows(answer: Answer) -> Vec<serde_json::Value> {
    use credbroker_sql_worker::sql::Body;
    match answer {
        Answer::Rows(set) => match set.body {
            Body::Rows(rows) => rows,
            Body::Csv(text) => panic!("csv: {text}"),
        },
        Answer::Done { .. } => panic!("no rows"),
    }
}
