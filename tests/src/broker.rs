//! A running `credbrokerd`, under its own uid.

use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use rustix::process::Signal;

pub use self::setup::{Grant, IntoToml, Setup, Via};
use crate::admin::Admin;
use crate::audit::AuditLog;
use crate::frontend::{Frontend, LoginError, Session};
use crate::handles::Handles;
use crate::identity::{Identity, several};
use crate::packet::Packets;
use crate::postgres::Database;
use crate::process::Process;
use crate::{binaries, wait};

mod setup;

const READY_LIMIT: Duration = Duration::from_secs(30);

/// A running broker; told to end on drop, and killed if it does not.
#[derive(Debug)]
pub struct Broker {
    process: Process,
    /// Absent only while it is being changed.
    setup: Option<Setup>,
}

impl Broker {
    /// A broker with one connection `main_db` to `database` over TLS, and one grant: the
    /// worker and the client may issue and open.
    #[must_use]
    pub fn usual(database: &Database) -> Self {
        Self::usual_setup(database, Via::Tls).start()
    }

    /// The setup of [`Broker::usual`], for additions.
    #[must_use]
    pub fn usual_setup(database: &Database, via: Via) -> Setup {
        let grant = |name: &str, identity: &Identity| {
            Grant::to(identity, &["issue", "open"], &["main_db"]).with("name", name)
        };
        let setup = Setup::new()
            .connection("main_db", database, via)
            .grant(grant("client", &Identity::client()));
        if several() { setup.grant(grant("worker", &Identity::worker())) } else { setup }
    }

    fn run(setup: Setup, command: &mut Command) -> Self {
        let process = Process::start("broker", command, &setup.path("logs"));
        let mut broker = Self { process, setup: Some(setup) };
        broker.wait_until_ready();
        broker
    }

    /// Its directories.
    ///
    /// # Panics
    /// After a change of the configuration that panicked.
    #[must_use]
    pub fn setup(&self) -> &Setup {
        self.setup.as_ref().expect("a setup")
    }

    /// Changes `broker.toml`, which the broker does not read before it is told to.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn reconfigure(&mut self, change: impl FnOnce(Setup) -> Setup) {
        let setup = change(self.setup.take().expect("a setup"));
        setup.replace();
        self.setup = Some(setup);
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What it logged.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.stderr() + &self.process.stdout()
    }

    /// The runtime directory.
    #[must_use]
    pub fn runtime_dir(&self) -> PathBuf {
        self.setup().path("run/credbroker")
    }

    /// The gRPC socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.runtime_dir().join(credbroker_proto::BROKER_SOCKET)
    }

    /// The packet socket.
    #[must_use]
    pub fn packet_socket(&self) -> PathBuf {
        self.runtime_dir().join(credbroker_proto::PACKET_SOCKET)
    }

    /// The directory of the operators' sockets.
    #[must_use]
    pub fn admin_dir(&self) -> PathBuf {
        let mut dir = self.runtime_dir().into_os_string();
        dir.push(credbroker_proto::ADMIN_DIR_SUFFIX);
        PathBuf::from(dir)
    }

    /// The operators' gRPC socket.
    #[must_use]
    pub fn admin_socket(&self) -> PathBuf {
        self.admin_dir().join(credbroker_proto::ADMIN_SOCKET)
    }

    /// The operators' packet socket.
    #[must_use]
    pub fn admin_packet_socket(&self) -> PathBuf {
        self.admin_dir().join(credbroker_proto::ADMIN_PACKET_SOCKET)
    }

    /// The operators' service as `identity`.
    ///
    /// # Panics
    /// When the socket does not take the connection.
    #[must_use]
    pub fn admin(&self, identity: &Identity) -> Admin {
        Admin::connect(identity, &self.admin_socket())
            .unwrap_or_else(|error| panic!("{} is closed: {error}\n{}", identity.uid(), self.log()))
    }

    /// The operators' service, as the uid of the tests.
    #[must_use]
    pub fn operator(&self) -> Admin {
        self.admin(&Identity::own())
    }

    /// A connection to the packet socket as `identity`.
    ///
    /// # Panics
    /// When the socket does not take the connection.
    #[must_use]
    pub fn packets(&self, identity: &Identity) -> Packets {
        Packets::connect(identity, &self.packet_socket())
            .unwrap_or_else(|error| panic!("{} is closed: {error}\n{}", identity.uid(), self.log()))
    }

    /// The socket of the Postgres door.
    #[must_use]
    pub fn door(&self) -> PathBuf {
        self.runtime_dir().join("postgres/.s.PGSQL.5432")
    }

    /// Its audit log.
    #[must_use]
    pub fn audit(&self) -> AuditLog {
        AuditLog::at(self.setup().path("state/audit.jsonl"))
    }

    /// The gRPC service as `identity`.
    ///
    /// # Panics
    /// When the socket does not take the connection.
    #[must_use]
    pub fn handles(&self, identity: &Identity) -> Handles {
        Handles::connect(identity, &self.socket())
            .unwrap_or_else(|error| panic!("{} is closed: {error}\n{}", identity.uid(), self.log()))
    }

    /// A connection to the door as `identity`.
    ///
    /// # Panics
    /// When the socket does not take the connection.
    #[must_use]
    pub fn knock(&self, identity: &Identity) -> Frontend {
        Frontend::connect(identity, &self.door()).expect("the door takes connections")
    }

    /// Logs in through the door.
    pub fn login(
        &self,
        identity: &Identity,
        connection: &str,
        token: &str,
    ) -> Result<Session, LoginError> {
        self.knock(identity).login(connection, None, token)
    }

    /// Logs in through the door, as a test that is about something else.
    ///
    /// # Panics
    /// When that is refused.
    #[must_use]
    pub fn session(&self, identity: &Identity, connection: &str, token: &str) -> Session {
        self.login(identity, connection, token)
            .unwrap_or_else(|error| panic!("no session: {error:?}\n{}", self.log()))
    }

    /// A psql command as `identity` through the door, with the token as its password, and
    /// neither a `.psqlrc` nor anything else of the environment.
    #[must_use]
    pub fn psql(&self, identity: &Identity, connection: &str, token: &str) -> Command {
        let door = self.runtime_dir().join("postgres");
        let mut command = identity.command("psql");
        command.args(["--no-psqlrc", "--no-password", "--tuples-only", "--no-align"]).arg(format!(
            "postgresql:///{connection}?host={}&user={connection}&password={token}",
            door.display()
        ));
        command
    }

    /// The command line as `identity`, told where the runtime directory is.
    #[must_use]
    pub fn cli(&self, identity: &Identity) -> Command {
        let mut command = identity.command(binaries::credbroker());
        self.tell(&mut command);
        command
    }

    /// Tells a client's command where the broker is, and that it runs under its own uid.
    pub fn tell(&self, command: &mut Command) {
        command
            .env(credbroker_proto::RUNTIME_DIR_ENV, self.runtime_dir())
            .env("CREDBROKER_SERVER_UID", Identity::broker().uid().to_string());
    }

    /// Ends the broker and starts it again with the same directories.
    ///
    /// # Panics
    /// When it does not come back.
    pub fn restart_after(&mut self, signal: Signal) {
        let _status = self.end_with(signal);
        let mut command = self.setup().command("run");
        let logs = self.setup().path("logs");
        self.process = Process::start("broker", &mut command, &logs);
        self.wait_until_ready();
    }

    /// Sends a signal and waits for the end.
    ///
    /// # Panics
    /// When it does not end.
    pub fn end_with(&mut self, signal: Signal) -> ExitStatus {
        self.process.signal(signal);
        self.process.wait(READY_LIMIT)
    }

    fn wait_until_ready(&mut self) {
        let mut health = Identity::broker().command(binaries::credbrokerd());
        health.args(["health", "--wait", "30s"]);
        health.env(credbroker_proto::RUNTIME_DIR_ENV, self.runtime_dir());
        let logs = self.setup().path("logs");
        let mut health = Process::start("health", &mut health, &logs);
        let ready = wait::until(READY_LIMIT, || {
            let ended = self.process.ended().map(|status| Err(status.to_string()));
            ended.or_else(|| health.ended().map(|status| Ok(status.success())))
        });
        assert!(
            ready == Some(Ok(true)),
            "the broker is not ready ({ready:?}); it said:\n{}\nhealth said:\n{}{}",
            self.log(),
            health.stdout(),
            health.stderr()
        );
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.process.signal(Signal::TERM);
        let _or_killed = wait::until(Duration::from_secs(5), || self.process.ended());
    }
}
