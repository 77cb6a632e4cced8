//! MCP clients of the real SQL worker, in both eras of the protocol, over each transport.

pub mod http;
pub mod lines;
pub mod served;

use std::fs::File;
use std::io::{self, Write};
use std::net::Shutdown;
use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use self::lines::Lines;
use crate::binaries;
use crate::broker::Broker;
use crate::identity::Identity;
use crate::process::Process;

/// How a client speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Era {
    /// 2025-11-25: `initialize` first.
    Legacy,
    /// 2026-07-28: every request says by itself who asks.
    Stateless,
}

impl Era {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Legacy, Self::Stateless];

    /// The revision of the protocol.
    #[must_use]
    pub fn version(self) -> &'static str {
        match self {
            Self::Legacy => "2025-11-25",
            Self::Stateless => "2026-07-28",
        }
    }

    /// A request's parameters with what the era wants in `_meta`.
    #[must_use]
    pub fn parameters(self, parameters: &Value) -> Value {
        let mut parameters = parameters.clone();
        if self == Self::Stateless {
            let prefix = "io.modelcontextprotocol";
            let meta = &mut parameters["_meta"];
            meta[format!("{prefix}/protocolVersion")] = self.version().into();
            meta[format!("{prefix}/clientCapabilities")] = json!({});
            meta[format!("{prefix}/clientInfo")] = client_info();
        }
        parameters
    }
}

fn client_info() -> Value {
    json!({ "name": "credbroker-e2e", "version": env!("CARGO_PKG_VERSION") })
}

/// The parameters of `initialize`.
fn greeting() -> Value {
    json!({
        "protocolVersion": Era::Legacy.version(),
        "capabilities": {},
        "clientInfo": client_info(),
    })
}

/// What a tool answered.
#[derive(Debug, Clone)]
pub struct ToolResult {
    /// `isError`.
    pub is_error: bool,
    /// `structuredContent`.
    pub content: Value,
    /// The whole result, as it came.
    pub raw: Value,
}

impl ToolResult {
    /// The result in the answer to a call.
    ///
    /// # Panics
    /// When it is a JSON-RPC error.
    #[must_use]
    pub fn of(tool: &str, answer: &Value) -> Self {
        let raw = answer["result"].clone();
        assert!(raw.is_object(), "{tool} gave no result: {answer}");
        let is_error = raw["isError"].as_bool().unwrap_or(false);
        Self { is_error, content: raw["structuredContent"].clone(), raw }
    }

    /// A text in the structured content, by its JSON pointer (RFC 6901); empty when absent.
    #[must_use]
    pub fn text(&self, pointer: &str) -> &str {
        self.content.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
    }
}

/// A running worker that has been greeted on its standard streams.
#[derive(Debug)]
pub struct Worker {
    process: Process,
    lines: Lines,
}

impl Worker {
    /// Starts the worker as `identity` and makes the handshake.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    pub fn start(broker: &Broker, identity: &Identity) -> Self {
        Self::start_with(broker, identity, &[])
    }

    /// As [`Worker::start`], with more options.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    pub fn start_with(broker: &Broker, identity: &Identity, options: &[&str]) -> Self {
        Self::start_in(Era::Legacy, broker, identity, options)
    }

    /// As [`Worker::start_with`], in either era.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    pub fn start_in(era: Era, broker: &Broker, identity: &Identity, options: &[&str]) -> Self {
        let mut command = command(broker, identity, options);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let (name, log, mut child) = spawn(&mut command, broker);
        let input = child.stdin.take().expect("stdin is a pipe");
        let output = child.stdout.take().expect("stdout is a pipe");
        let process = Process::adopt(&name, child, &broker.setup().path("logs"));
        Self { process, lines: Lines::greet(era, input, output, &log) }
    }

    /// As [`Worker::start_in`], with a Unix socket for its standard streams, as clients on Node.js
    /// have it.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    pub fn start_on_a_socket(
        era: Era,
        broker: &Broker,
        identity: &Identity,
        options: &[&str],
    ) -> Self {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        let also = theirs.try_clone().expect("dup");
        let mut command = command(broker, identity, options);
        command.stdin(OwnedFd::from(theirs)).stdout(OwnedFd::from(also));
        let (name, log, child) = spawn(&mut command, broker);
        // What is left of the worker's end is the worker's.
        drop(command);
        let process = Process::adopt(&name, child, &broker.setup().path("logs"));
        let reading = ours.try_clone().expect("dup");
        Self { process, lines: Lines::greet(era, Hangup(ours), reading, &log) }
    }

    /// The worker's process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }
}

impl Deref for Worker {
    type Target = Lines;

    fn deref(&self) -> &Lines {
        &self.lines
    }
}

impl DerefMut for Worker {
    fn deref_mut(&mut self) -> &mut Lines {
        &mut self.lines
    }
}

fn command(broker: &Broker, identity: &Identity, options: &[&str]) -> Command {
    let mut command = identity.command(binaries::sql_worker());
    command.args(["mcp", "--stdio", "--runtime-dir"]).arg(broker.runtime_dir()).args(options);
    broker.tell(&mut command);
    command
}

/// Its name, its log, and the child.
fn spawn(command: &mut Command, broker: &Broker) -> (String, PathBuf, Child) {
    let name = format!("worker-{}", crate::canary::random_word(6));
    let log = broker.setup().path("logs").join(format!("{name}.err"));
    let child =
        command.stderr(File::create(&log).expect("a log file")).spawn().expect("the worker starts");
    (name, log, child)
}

/// The writing half of a Unix socket; dropping it ends the connection, whoever else holds it.
#[derive(Debug)]
struct Hangup(UnixStream);

impl Write for Hangup {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Drop for Hangup {
    fn drop(&mut self) {
        let _ended = self.0.shutdown(Shutdown::Both);
    }
}
