//! MCP clients that cost as little as they can: one thread, no transcript.

use std::fmt;
use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use crate::worker::{Era, http};

/// A client whose messages are lines.
pub(super) struct Lines {
    input: Box<dyn Write>,
    output: BufReader<Box<dyn Read>>,
    sent: u64,
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lines").finish_non_exhaustive()
    }
}

impl Lines {
    /// Over a Unix socket.
    pub(super) fn of(stream: UnixStream) -> Self {
        Self::greet(stream.try_clone().expect("dup"), stream)
    }

    pub(super) fn greet(input: impl Write + 'static, output: impl Read + 'static) -> Self {
        let output = BufReader::new(Box::new(output) as Box<dyn Read>);
        let mut lines = Self { input: Box::new(input), output, sent: 0 };
        let hello = json!({ "protocolVersion": Era::Legacy.version(), "capabilities": {},
            "clientInfo": { "name": "credbroker-bench", "version": "0" } });
        lines.write(&json!({ "jsonrpc": "2.0", "id": 0, "method": "initialize", "params": hello }));
        assert!(lines.receive()["result"].is_object(), "no greeting");
        lines.write(&json!({ "jsonrpc": "2.0", "method": "notifications/initialized" }));
        lines
    }

    /// The result of `execute_sql`.
    pub(super) fn call(&mut self, arguments: &Value) -> Value {
        let _id = self.send(arguments);
        self.receive()["result"].take()
    }

    /// Starts `execute_sql`; gives the id of its answer.
    pub(super) fn send(&mut self, arguments: &Value) -> u64 {
        self.sent += 1;
        self.write(&json!({ "jsonrpc": "2.0", "id": self.sent, "method": "tools/call",
            "params": { "name": "execute_sql", "arguments": arguments } }));
        self.sent
    }

    pub(super) fn receive(&mut self) -> Value {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("the worker answers");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("no message ({error}): {line}"))
    }

    fn write(&mut self, message: &Value) {
        self.input.write_all(format!("{message}\n").as_bytes()).expect("the worker reads");
    }
}

/// A client over HTTP that keeps its connection.
#[derive(Debug)]
pub(super) struct Http {
    stream: BufReader<TcpStream>,
    head: String,
    sent: u64,
}

impl Http {
    /// As who greeted already.
    pub(super) fn connect(greeted: &http::Http) -> Self {
        let stream = TcpStream::connect(greeted.address).expect("the worker listens");
        stream.set_nodelay(true).expect("a TCP socket");
        let mut head = "POST /mcp HTTP/1.1\r\nContent-Type: application/json\r\n\
            Mcp-Method: tools/call\r\nMcp-Name: execute_sql\r\n"
            .to_owned();
        for (name, value) in greeted.headers() {
            head += &format!("{name}: {value}\r\n");
        }
        Self { stream: BufReader::new(stream), head, sent: 0 }
    }

    /// The result of `execute_sql`.
    pub(super) fn call(&mut self, arguments: &Value) -> Value {
        self.sent += 1;
        let parameters = json!({ "name": "execute_sql", "arguments": arguments });
        let body = json!({ "jsonrpc": "2.0", "id": self.sent, "method": "tools/call",
            "params": Era::Stateless.parameters(&parameters) })
        .to_string();
        let request = format!("{}Content-Length: {}\r\n\r\n{body}", self.head, body.len());
        self.stream.get_mut().write_all(request.as_bytes()).expect("the worker reads");
        let body = self.body();
        // As it is, or as the data of one event.
        let text = body.lines().find_map(|line| {
            let line = line.strip_prefix("data:").unwrap_or(line).trim();
            line.starts_with('{').then_some(line)
        });
        let text = text.unwrap_or_else(|| panic!("no message: {body}"));
        let mut message: Value = serde_json::from_str(text).expect("JSON");
        message["result"].take()
    }

    fn body(&mut self) -> String {
        let status = self.line();
        assert!(status.starts_with("HTTP/1.1 200"), "{status}");
        let mut length = None;
        loop {
            let line = self.line().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse::<usize>().ok();
            }
        }
        let mut body = Vec::new();
        match length {
            Some(length) => self.take(length, &mut body),
            None => loop {
                let length = usize::from_str_radix(&self.line(), 16).expect("a chunk's length");
                self.take(length, &mut body);
                let _separator = self.line();
                if length == 0 {
                    break;
                }
            },
        }
        String::from_utf8(body).expect("text")
    }

    fn take(&mut self, length: usize, body: &mut Vec<u8>) {
        let start = body.len();
        body.resize(start + length, 0);
        self.stream.read_exact(&mut body[start..]).expect("the body comes");
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("the worker answers");
        line.trim_end().to_owned()
    }
}
