//! An MCP client whose messages are lines: over standard streams, or over a Unix socket.

use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Era, ToolResult};

const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A connection to a worker.
pub struct Lines {
    /// Closing it is what the worker notices.
    input: Option<Box<dyn Write + Send>>,
    answers: Receiver<String>,
    /// What came while something else was waited for.
    passed: Vec<Value>,
    era: Era,
    transcript: File,
    transcript_path: PathBuf,
    log: PathBuf,
    next_id: u64,
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lines").field("transcript", &self.transcript_path).finish_non_exhaustive()
    }
}

impl Lines {
    /// Greets, where the era has a greeting. `log` is what the worker says on standard error.
    ///
    /// # Panics
    /// When the worker does not answer.
    #[must_use]
    pub fn greet(
        era: Era,
        input: impl Write + Send + 'static,
        output: impl Read + Send + 'static,
        log: &Path,
    ) -> Self {
        let (sender, answers) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let name = format!("mcp-{}.transcript", crate::canary::random_word(6));
        let transcript_path = log.with_file_name(name);
        let transcript = File::create(&transcript_path).expect("a transcript");
        let mut lines = Self {
            input: Some(Box::new(input)),
            answers,
            passed: Vec::new(),
            era,
            transcript,
            transcript_path,
            log: log.to_owned(),
            next_id: 1,
        };
        if era == Era::Legacy {
            let answer = lines.request("initialize", &super::greeting());
            assert!(answer.get("result").is_some(), "no greeting: {answer}");
            lines.notify("notifications/initialized", &json!({}));
        }
        lines
    }

    /// Everything that went over the connection so far, as far as it was looked at.
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
        ToolResult::of(tool, &self.answer_to(id))
    }

    /// Starts a call without waiting; gives the id of its answer.
    pub fn start_call(&mut self, tool: &str, arguments: &Value) -> u64 {
        self.send_request("tools/call", &json!({ "name": tool, "arguments": arguments }))
    }

    /// Waits for the answer to a request. What else comes meanwhile is kept.
    ///
    /// # Panics
    /// When it does not come in time.
    pub fn answer_to(&mut self, id: u64) -> Value {
        self.until(|message| message["id"].as_u64() == Some(id))
    }

    /// Waits for a message, among those that came already first.
    ///
    /// # Panics
    /// When it does not come in time.
    pub fn until(&mut self, mut wanted: impl FnMut(&Value) -> bool) -> Value {
        if let Some(at) = self.passed.iter().position(&mut wanted) {
            return self.passed.remove(at);
        }
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.answers.recv_timeout(left).unwrap_or_else(|error| {
                panic!("the worker does not answer ({error}):\n{}", self.log())
            });
            writeln!(self.transcript, "{line}").expect("the transcript is written");
            let message: Value = serde_json::from_str(&line)
                .unwrap_or_else(|error| panic!("this is not JSON-RPC ({error}): {line}"));
            if wanted(&message) {
                return message;
            }
            self.passed.push(message);
        }
    }

    /// Makes a request and waits for its answer.
    pub fn request(&mut self, method: &str, parameters: &Value) -> Value {
        let id = self.send_request(method, parameters);
        self.answer_to(id)
    }

    /// Sends a request; gives the id of its answer.
    pub fn send_request(&mut self, method: &str, parameters: &Value) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let parameters = self.era.parameters(parameters);
        self.send(&json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": parameters }));
        id
    }

    /// Sends a notification.
    pub fn notify(&mut self, method: &str, parameters: &Value) {
        self.send(&json!({ "jsonrpc": "2.0", "method": method, "params": parameters }));
    }

    /// Sends `notifications/cancelled` for a request.
    pub fn cancel(&mut self, id: u64) {
        self.notify("notifications/cancelled", &json!({ "requestId": id, "reason": "a test" }));
    }

    /// Closes what the worker reads from, as an MCP client does to end it.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    fn send(&mut self, message: &Value) {
        self.send_line(&message.to_string());
    }

    /// Sends any text as a line.
    ///
    /// # Panics
    /// When the worker takes no input.
    pub fn send_line(&mut self, text: &str) {
        let line = format!("{text}\n");
        self.transcript.write_all(line.as_bytes()).expect("the transcript is written");
        let input = self.input.as_mut().expect("the input is still open");
        let sent = input.write_all(line.as_bytes());
        sent.unwrap_or_else(|error| panic!("the worker takes no input ({error}):\n{}", self.log()));
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}
