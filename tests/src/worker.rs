//! An MCP client on the standard streams of the real SQL worker: JSON-RPC, one message a line.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::binaries;
use crate::broker::Broker;
use crate::identity::Identity;
use crate::process::Process;

/// The era of the protocol that begins with `initialize`.
const PROTOCOL_VERSION: &str = "2025-11-25";
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A running worker that has been greeted.
#[derive(Debug)]
pub struct Worker {
    process: Process,
    input: Option<ChildStdin>,
    answers: Receiver<String>,
    transcript: File,
    transcript_path: PathBuf,
    next_id: u64,
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
    /// A text in the structured content, by its JSON pointer (RFC 6901); empty when absent.
    #[must_use]
    pub fn text(&self, pointer: &str) -> &str {
        self.content.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
    }
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
        let mut command = identity.command(binaries::sql_worker());
        command.args(["mcp", "--stdio", "--runtime-dir"]).arg(broker.runtime_dir()).args(options);
        broker.tell(&mut command);
        Self::greet(&mut command, &broker.setup().path("logs"))
    }

    fn greet(command: &mut Command, logs: &Path) -> Self {
        let name = format!("worker-{}", crate::canary::random_word(6));
        let error = File::create(logs.join(format!("{name}.err"))).expect("a log file");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(error)
            .spawn()
            .expect("the worker starts");
        let input = child.stdin.take().expect("stdin is a pipe");
        let output = BufReader::new(child.stdout.take().expect("stdout is a pipe"));
        let (sender, answers) = mpsc::channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let transcript_path = logs.join(format!("{name}.transcript"));
        let transcript = File::create(&transcript_path).expect("a transcript");
        let process = Process::adopt(&name, child, logs);
        let mut worker =
            Self { process, input: Some(input), answers, transcript, transcript_path, next_id: 1 };
        let greeting = json!({
            "protocolVersion": PROTOCOL_VERSION,
            "capabilities": {},
            "clientInfo": { "name": "credbroker-e2e", "version": env!("CARGO_PKG_VERSION") },
        });
        let answer = worker.request("initialize", &greeting);
        assert!(answer.get("result").is_some(), "no greeting: {answer}");
        worker.notify("notifications/initialized", &json!({}));
        worker
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

    /// Everything that went over its standard streams so far.
    ///
    /// # Panics
    /// When the file is gone.
    #[must_use]
    pub fn transcript(&self) -> String {
        fs::read_to_string(&self.transcript_path).expect("the transcript is there")
    }

    /// The names of the tools, in their order.
    ///
    /// # Panics
    /// When the worker does not list them.
    pub fn tools(&mut self) -> Vec<String> {
        let answer = self.request("tools/list", &json!({}));
        let tools = answer["result"]["tools"].as_array().expect("a list of tools").clone();
        tools.iter().filter_map(|tool| tool["name"].as_str().map(str::to_owned)).collect()
    }

    /// Calls a tool.
    ///
    /// # Panics
    /// When the worker answers with a JSON-RPC error, or not at all.
    pub fn call(&mut self, tool: &str, arguments: &Value) -> ToolResult {
        let id = self.start_call(tool, arguments);
        let answer = self.answer_to(id);
        let raw = answer["result"].clone();
        assert!(raw.is_object(), "{tool} gave no result: {answer}");
        let is_error = raw["isError"].as_bool().unwrap_or(false);
        ToolResult { is_error, content: raw["structuredContent"].clone(), raw }
    }

    /// Starts a call without waiting; gives the id of its answer.
    pub fn start_call(&mut self, tool: &str, arguments: &Value) -> u64 {
        self.send_request("tools/call", &json!({ "name": tool, "arguments": arguments }))
    }

    /// Waits for the answer to a request. What else comes meanwhile is passed over.
    ///
    /// # Panics
    /// When it does not come in time.
    pub fn answer_to(&mut self, id: u64) -> Value {
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.answers.recv_timeout(left).unwrap_or_else(|error| {
                panic!("the worker does not answer ({error}):\n{}", self.process.stderr())
            });
            writeln!(self.transcript, "{line}").expect("the transcript is written");
            let message: Value = serde_json::from_str(&line)
                .unwrap_or_else(|error| panic!("stdout is not JSON-RPC ({error}): {line}"));
            if message["id"].as_u64() == Some(id) {
                return message;
            }
        }
    }

    /// Makes a request and waits for its answer.
    pub fn request(&mut self, method: &str, parameters: &Value) -> Value {
        let id = self.send_request(method, parameters);
        self.answer_to(id)
    }

    /// Sends a notification.
    pub fn notify(&mut self, method: &str, parameters: &Value) {
        self.send(&json!({ "jsonrpc": "2.0", "method": method, "params": parameters }));
    }

    /// Closes the worker's standard input, as an MCP client does to end it.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    fn send_request(&mut self, method: &str, parameters: &Value) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.send(&json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": parameters }));
        id
    }

    fn send(&mut self, message: &Value) {
        let line = format!("{message}\n");
        self.transcript.write_all(line.as_bytes()).expect("the transcript is written");
        let input = self.input.as_mut().expect("the input is still open");
        input.write_all(line.as_bytes()).unwrap_or_else(|error| {
            panic!("the worker takes no input ({error}):\n{}", self.process.stderr())
        });
    }
}
