//! What the measurements share: a server of their own, brokers before it, pgbouncer beside them.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use sqlx::ConnectOptions as _;
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use tempfile::TempDir;

use crate::broker::{Broker, Grant, Setup};
use crate::frontend::Frontend;
use crate::identity::{Identity, give};
use crate::postgres::{Cluster, Database, Server};
use crate::process::{Process, output, transcript};
use crate::{shared, wait};

/// Members of this role log in over the Unix socket without SCRAM: for floors.
const TRUSTED: &str = "cb_trusted";
const HBA: &str = "local all +cb_trusted trust\nlocal all all scram-sha-256\n\
                   host all all 127.0.0.0/8 scram-sha-256\n";
const SETTINGS: [(&str, &str); 5] = [
    ("shared_buffers", "256MB"),
    ("log_statement", "none"),
    ("log_connections", "off"),
    ("max_wal_size", "4GB"),
    ("jit", "off"),
];
/// For what starts.
const STARTS_WITHIN: Duration = Duration::from_secs(30);

/// The connections of a broker of [`Rig::setup`]: what is before `_`: with a handle or without,
/// and behind it: how the broker reaches the server.
pub(super) const HANDLE_UNIX: &str = "handle_unix";
pub(super) const HANDLE_TCP: &str = "handle_tcp";
pub(super) const FREE_UNIX: &str = "free_unix";
pub(super) const FREE_TCP: &str = "free_tcp";
const HANDLES: [&str; 2] = [HANDLE_UNIX, HANDLE_TCP];
const FREE: [&str; 2] = [FREE_UNIX, FREE_TCP];

/// A server with one role and one database.
#[derive(Debug)]
pub(super) struct Rig {
    // Dropped in this order.
    pub(super) database: Database,
    _cluster: Cluster,
    directory: TempDir,
}

impl Rig {
    pub(super) fn start() -> Self {
        let directory = temporary();
        let cluster = Cluster::start_with(directory.path(), HBA, &SETTINGS);
        let database = cluster.server().database();
        let make = format!("CREATE ROLE {TRUSTED}");
        database.admin().batch_execute(&make).expect("a role can be made");
        Self { database, _cluster: cluster, directory }
    }

    pub(super) fn server(&self) -> &Server {
        self.database.server()
    }

    /// Lets the role in without SCRAM from now on, or no longer.
    pub(super) fn trust(&self, trusted: bool) {
        let name = self.database.name();
        let change = match trusted {
            true => format!("GRANT {TRUSTED} TO {name}"),
            false => format!("REVOKE {TRUSTED} FROM {name}"),
        };
        self.database.admin().batch_execute(&change).expect("membership can be changed");
    }

    /// A broker whose limits nobody meets, with the four connections.
    pub(super) fn setup(&self) -> Setup {
        let client = Identity::client();
        let secret = self.database.secret();
        let mut setup = generous()
            .grant(
                Grant::to(&client, &["issue", "open"], &HANDLES)
                    .with("name", "handles")
                    .with("max_sessions", 1200),
            )
            .grant(Grant::to(&client, &["ambient"], &FREE).with("max_sessions", 1200));
        for name in HANDLES.into_iter().chain(FREE) {
            let key = |key: &str| format!("connections.{name}.{key}");
            let secret = setup.secret_file(name, &secret);
            let socket_dir = &self.server().socket_dir;
            let host = if name.ends_with("_unix") { ascii(socket_dir) } else { "127.0.0.1" };
            setup = setup
                .set(&key("type"), "postgresql")
                .set(&key("host"), host)
                .set(&key("port"), i64::from(self.server().port))
                .set(&key("database"), self.database.name())
                .set(&key("tls.mode"), "disable")
                .set(&key("secret.file"), ascii(&secret));
        }
        setup
    }

    /// pgbouncer with session pooling. It asks its clients for a password in clear, as the door
    /// asks for a token, and logs in to the server by SCRAM, as the broker does.
    pub(super) fn pgbouncer(&self) -> Pgbouncer {
        let home = self.directory.path().join("pgbouncer");
        let owner = Identity::broker();
        fs::create_dir(&home).expect("a directory");
        give(&home, &owner).expect("pgbouncer gets its directory");
        let (name, server) = (self.database.name(), self.server());
        let users = format!("\"{name}\" \"{}\"\n", self.database.canary().reveal());
        let ini = format!(
            "[databases]\n{name} = host={} port={} dbname={name}\n[pgbouncer]\n\
             unix_socket_dir = {home}\nlisten_port = {PGBOUNCER_PORT}\nunix_socket_mode = 0777\n\
             auth_type = plain\nauth_file = {home}/users\npool_mode = session\n\
             default_pool_size = 100\nlog_connections = 0\nlog_disconnections = 0\n\
             log_stats = 0\npidfile = {home}/pid\n",
            server.socket_dir.display(),
            server.port,
            home = home.display(),
        );
        for (file, text) in [("users", users), ("ini", ini)] {
            let path = home.join(file);
            fs::write(&path, text).expect("a file for pgbouncer");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
            give(&path, &owner).expect("pgbouncer gets its file");
        }
        // Debian has it where an ordinary user's PATH does not look.
        let mut command = owner.command("/usr/sbin/pgbouncer");
        command.arg(home.join("ini"));
        let mut process = Process::start("pgbouncer", &mut command, self.directory.path());
        let socket = home.join(format!(".s.PGSQL.{PGBOUNCER_PORT}"));
        let up = wait::until(STARTS_WITHIN, || match process.ended() {
            Some(_) => Some(false),
            None => Frontend::connect(&Identity::client(), &socket).is_ok().then_some(true),
        });
        assert_eq!(up, Some(true), "pgbouncer does not start:\n{}", process.stderr());
        Pgbouncer { process, socket_dir: home }
    }

    /// A relay that does nothing but carry bytes to the server.
    pub(super) fn bare_relay(&self) -> BareRelay {
        let home = self.directory.path().join("relay");
        fs::create_dir(&home).expect("a directory");
        let port = self.server().port;
        let name = format!(".s.PGSQL.{port}");
        let (listen, upstream) = (home.join(&name), self.server().socket_dir.join(&name));
        let process = Helper::start(&["serve-relay", ascii(&listen), ascii(&upstream)]);
        wait::until(STARTS_WITHIN, || Frontend::connect(&Identity::client(), &listen).ok())
            .expect("the relay listens");
        BareRelay { process, socket_dir: home }
    }

    /// How a libpq program reaches the server itself.
    pub(super) fn direct(&self) -> Target {
        let server = self.server();
        self.target("direct", &server.socket_dir, server.port)
    }

    /// The same at another place, as the database's own role.
    pub(super) fn target(&self, name: &'static str, host: &Path, port: u16) -> Target {
        Target {
            name,
            host: ascii(host).to_owned(),
            port,
            user: self.database.name().to_owned(),
            database: self.database.name().to_owned(),
            password: self.database.canary().reveal().to_owned(),
        }
    }

    /// The same through the door, with a token or with none.
    pub(super) fn door(
        &self,
        name: &'static str,
        broker: &Broker,
        connection: &str,
        token: &str,
    ) -> Target {
        Target {
            name,
            host: ascii(&broker.runtime_dir().join("postgres")).to_owned(),
            port: 5432,
            user: connection.to_owned(),
            database: self.database.name().to_owned(),
            password: token.to_owned(),
        }
    }
}

const PGBOUNCER_PORT: u16 = 6432;

/// Where a libpq program is to connect, and as whom.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) name: &'static str,
    host: String,
    port: u16,
    user: String,
    database: String,
    password: String,
}

impl Target {
    /// A command of the client's that finds the target in its environment.
    pub(super) fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Identity::client().command(program.as_ref());
        command
            .env("PGHOST", &self.host)
            .env("PGPORT", self.port.to_string())
            .env("PGUSER", &self.user)
            .env("PGDATABASE", &self.database)
            .env("PGPASSWORD", &self.password)
            .env("PGSSLMODE", "disable")
            .env("PGGSSENCMODE", "disable");
        command
    }

    /// Runs it and gives what it printed.
    pub(super) fn run(&self, command: &mut Command) -> String {
        let done = output(command, Duration::from_secs(120));
        assert!(done.status.success(), "{}: {command:?}:\n{}", self.name, transcript(&done));
        String::from_utf8(done.stdout).expect("text")
    }

    /// The Unix socket itself.
    pub(super) fn socket(&self) -> PathBuf {
        Path::new(&self.host).join(format!(".s.PGSQL.{}", self.port))
    }

    /// For who connects by that.
    pub(super) fn config(&self) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config.user(&self.user).password(&self.password).dbname(&self.database);
        config
    }

    /// For sqlx, by the Unix socket.
    pub(super) fn sqlx(&self) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .socket(&self.host)
            .port(self.port)
            .username(&self.user)
            .password(&self.password)
            .database(&self.database)
            .ssl_mode(PgSslMode::Disable)
            .disable_statement_logging()
    }

    /// By TCP.
    pub(super) fn by_tcp(mut self, name: &'static str) -> Self {
        (self.name, self.host) = (name, "127.0.0.1".to_owned());
        self
    }
}

/// The program that measures libpq; `tests/bench.sh` compiles it.
pub(super) fn libpq_client() -> PathBuf {
    shared::directory().join("libpq-client")
}

#[derive(Debug)]
pub(super) struct Pgbouncer {
    process: Process,
    pub(super) socket_dir: PathBuf,
}

impl Pgbouncer {
    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub(super) fn target(&self, rig: &Rig) -> Target {
        rig.target("pgbouncer", &self.socket_dir, PGBOUNCER_PORT)
    }
}

#[derive(Debug)]
pub(super) struct BareRelay {
    process: Helper,
    pub(super) socket_dir: PathBuf,
}

impl BareRelay {
    pub(super) fn pid(&self) -> u32 {
        self.process.0.id()
    }

    pub(super) fn target(&self, rig: &Rig) -> Target {
        rig.target("bare relay", &self.socket_dir, rig.server().port)
    }
}

/// This program in another role, as a process of its own.
#[derive(Debug)]
pub(super) struct Helper(Child);

impl Helper {
    pub(super) fn start(arguments: &[&str]) -> Self {
        let program = std::env::current_exe().expect("this program");
        let mut command = Identity::own().command(program);
        let child = command.args(arguments).stdin(Stdio::null()).spawn();
        Self(child.expect("this program starts again"))
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// A broker's setup whose limits no measurement meets, without a connection.
pub(super) fn generous() -> Setup {
    Setup::new()
        .set("limits.rate_per_second", 1_000_000)
        .set("limits.handles", 10_000_000)
        .set("limits.sessions", 1200)
}

/// A broker's setup with a connection `main_db` to nowhere, for what needs no server.
pub(super) fn without_server() -> Setup {
    let setup = generous();
    let secret = setup.secret_file("main_db", "app:password");
    setup
        .set("connections.main_db.type", "postgresql")
        .set("connections.main_db.host", "127.0.0.1")
        .set("connections.main_db.database", "mydb")
        .set("connections.main_db.tls.mode", "disable")
        .set("connections.main_db.secret.file", ascii(&secret))
        .grant(Grant::to(&Identity::client(), &["issue"], &["main_db"]))
}

/// Whether this broker takes a configuration: one that it is too old for is refused.
pub(super) fn is_taken(setup: &Setup) -> bool {
    let _written = setup.write();
    output(&mut setup.command("check-config"), STARTS_WITHIN).status.success()
}

/// A directory that other uids can pass through.
pub(super) fn temporary() -> TempDir {
    shared::hold_lease();
    let made = tempfile::Builder::new().prefix("b-").tempdir_in(shared::directory());
    let directory = made.expect("a directory");
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
    directory
}

/// Processor time that a process has taken so far, all its threads together, those that have
/// ended too (proc(5): utime and stime of /proc/PID/stat).
pub(super) fn cpu_time(pid: u32) -> Duration {
    let read = || -> io::Result<String> { fs::read_to_string(format!("/proc/{pid}/stat")) };
    let stat = read().expect("the process lives");
    // What is in the parentheses may hold spaces.
    let (_, fields) = stat.rsplit_once(')').expect("a name");
    let ticks = |index: usize| -> u64 {
        fields.split_whitespace().nth(index).and_then(|field| field.parse().ok()).expect("ticks")
    };
    // The third field of the line is the first after the name; utime is the 14th.
    Duration::from_secs(ticks(11) + ticks(12))
        / u32::try_from(rustix::param::clock_ticks_per_second()).expect("a small number")
}

/// The value in KiB of a line of /proc/PID/`file`.
pub(super) fn memory_kb(pid: u32, file: &str, key: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).expect("the process lives");
    let line = text.lines().find_map(|line| line.strip_prefix(key)).expect("the kernel tells it");
    line.trim_matches([':', ' ', '\t', 'k', 'B']).parse().expect("a number")
}

pub(super) fn ascii(path: &Path) -> &str {
    path.to_str().expect("the harness makes its paths of ASCII")
}
