//! A worker that listens: on a Unix socket for any uid of a group, with MCP or gRPC, or on
//! loopback HTTP.

use std::fs::{self, DirBuilder};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::http::Http;
use super::lines::Lines;
use super::{Era, Hangup};
use crate::binaries;
use crate::broker::Broker;
use crate::identity::{Identity, SOCKET_GROUP, give, several};
use crate::process::Process;
use crate::wait::{PATIENCE, until};

/// Its process, and where it listens.
#[derive(Debug)]
pub struct Served {
    process: Process,
    at: At,
    log: PathBuf,
}

#[derive(Debug)]
enum At {
    Unix(PathBuf),
    Http { address: SocketAddr, bearers: Vec<(String, String)> },
}

impl Served {
    /// Starts a worker on a Unix socket that the socket group may connect to. `config` is more
    /// of its configuration.
    ///
    /// # Panics
    /// When it does not come to listen.
    #[must_use]
    pub fn unix(broker: &Broker, identity: &Identity, config: &str) -> Self {
        Self::unix_with(broker, identity, &[], config)
    }

    /// As [`Served::unix`], with more options.
    ///
    /// # Panics
    /// When it does not come to listen.
    #[must_use]
    pub fn unix_with(broker: &Broker, identity: &Identity, options: &[&str], config: &str) -> Self {
        let directory = directory(broker, identity);
        let socket = directory.join("mcp.sock");
        let group = if several() { SOCKET_GROUP } else { identity.gid() };
        let config = format!("{config}\n[unix]\ngroup = \"{group}\"\n");
        let choice = ["mcp", "--unix", socket.to_str().expect("an ASCII path")];
        let choice = [&choice, options].concat();
        let (process, log) = start(broker, identity, &directory, &choice, &config);
        // The file is there a moment before the group may connect.
        until(PATIENCE, || process.stderr().contains("serving MCP").then_some(()))
            .unwrap_or_else(|| panic!("it does not serve:\n{}", process.stderr()));
        Self { process, at: At::Unix(socket), log }
    }

    /// As [`Served::unix`], with the gRPC service.
    ///
    /// # Panics
    /// When it does not come to listen.
    #[must_use]
    pub fn rpc(broker: &Broker, identity: &Identity, config: &str) -> Self {
        let directory = directory(broker, identity);
        let socket = directory.join("sql.sock");
        let group = if several() { SOCKET_GROUP } else { identity.gid() };
        let config = format!("{config}\n[unix]\ngroup = \"{group}\"\n");
        let listen = format!("unix:{}", socket.display());
        let choice = ["serve", "--listen", &listen];
        let (process, log) = start(broker, identity, &directory, &choice, &config);
        until(PATIENCE, || process.stderr().contains("serving gRPC").then_some(()))
            .unwrap_or_else(|| panic!("it does not serve:\n{}", process.stderr()));
        Self { process, at: At::Unix(socket), log }
    }

    /// Starts a worker on loopback HTTP, with a bearer token for each name.
    ///
    /// # Panics
    /// When it does not come to listen.
    #[must_use]
    pub fn http(broker: &Broker, identity: &Identity, names: &[&str], config: &str) -> Self {
        Self::http_with(broker, identity, names, &[], config)
    }

    /// As [`Served::http`], with more options.
    ///
    /// # Panics
    /// When it does not come to listen.
    #[must_use]
    pub fn http_with(
        broker: &Broker,
        identity: &Identity,
        names: &[&str],
        options: &[&str],
        config: &str,
    ) -> Self {
        let directory = directory(broker, identity);
        let mut config = format!("{config}\n[http.bearers]\n");
        let bearers = names.iter().map(|name| {
            let token = crate::canary::random_word(40);
            let file = directory.join(format!("{name}.bearer"));
            fs::write(&file, format!("{token}\n")).expect("a bearer's file");
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("chmod");
            give(&file, identity).expect("the worker gets it");
            config += &format!("{name} = \"{}\"\n", file.display());
            ((*name).to_owned(), token)
        });
        let bearers = bearers.collect();
        let choice = [&["mcp", "--http", "127.0.0.1:0"], options].concat();
        let (process, log) = start(broker, identity, &directory, &choice, &config);
        let address = until(PATIENCE, || {
            let log = process.stderr();
            let (_, rest) = log.split_once("\"address\":\"")?;
            rest.split_once('"')?.0.parse().ok()
        });
        let address = address.unwrap_or_else(|| panic!("no address:\n{}", process.stderr()));
        Self { process, at: At::Http { address, bearers }, log }
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// What it said on standard error.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.stderr()
    }

    /// A client of the Unix socket, as `identity`.
    ///
    /// # Panics
    /// When it is not let in, or the worker listens elsewhere.
    #[must_use]
    pub fn connect(&self, era: Era, identity: &Identity) -> Lines {
        let stream = self.dial(identity);
        let reading = stream.try_clone().expect("dup");
        Lines::greet(era, Hangup(stream), reading, &self.log)
    }

    /// A connection to the Unix socket, as `identity`.
    ///
    /// # Panics
    /// When it is not let in, or the worker listens elsewhere.
    #[must_use]
    pub fn dial(&self, identity: &Identity) -> UnixStream {
        identity.connect(self.socket()).expect("the socket takes connections")
    }

    /// The Unix socket.
    ///
    /// # Panics
    /// When the worker listens elsewhere.
    #[must_use]
    pub fn socket(&self) -> &Path {
        let At::Unix(socket) = &self.at else { panic!("it serves no Unix socket") };
        socket
    }

    /// A client of HTTP, with the bearer token of `name`.
    ///
    /// # Panics
    /// When it is not let in, or the worker listens elsewhere.
    #[must_use]
    pub fn client(&self, era: Era, name: &str) -> Http {
        let At::Http { address, bearers } = &self.at else { panic!("it serves no HTTP") };
        let (_, token) = bearers.iter().find(|(found, _)| found == name).expect("a bearer");
        Http::greet(era, *address, token)
    }
}

fn directory(broker: &Broker, identity: &Identity) -> PathBuf {
    let name = format!("worker-{}", crate::canary::random_word(6));
    let directory = broker.setup().path(&name);
    DirBuilder::new().mode(0o755).create(&directory).expect("a directory for the worker");
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).expect("chmod");
    give(&directory, identity).expect("the worker gets its directory");
    directory
}

fn start(
    broker: &Broker,
    identity: &Identity,
    directory: &Path,
    choice: &[&str],
    config: &str,
) -> (Process, PathBuf) {
    let file = directory.join("worker.toml");
    fs::write(&file, config).expect("the worker's configuration");
    give(&file, identity).expect("the worker gets its configuration");
    let mut command = identity.command(binaries::sql_worker());
    command.args(choice).arg("--config").arg(&file);
    command.arg("--runtime-dir").arg(broker.runtime_dir());
    broker.tell(&mut command);
    let logs = broker.setup().path("logs");
    let name = directory.file_name().and_then(|name| name.to_str()).expect("its name");
    (Process::start(name, &mut command, &logs), logs.join(format!("{name}.err")))
}
