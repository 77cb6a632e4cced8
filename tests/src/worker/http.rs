//! An MCP client over streamable HTTP that can also misbehave: HTTP/1.1 by hand, one connection
//! a request, so that dropping an exchange is losing the client.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::{Value, json};

use super::{Era, ToolResult};

const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A client with a bearer token and, in the era that has them, a session.
#[derive(Debug, Clone)]
pub struct Http {
    /// Where the worker listens.
    pub address: SocketAddr,
    /// The token; it is sent as it is.
    pub bearer: String,
    /// `Mcp-Session-Id`.
    pub session: Option<String>,
    era: Era,
    next_id: u64,
}

/// A request that was sent, and whose answer was not read yet. Dropping it hangs up.
#[derive(Debug)]
pub struct Exchange(BufReader<TcpStream>);

/// The events of a request, as they come. Dropping it hangs up.
#[derive(Debug)]
pub struct Events {
    exchange: Exchange,
    unread: Vec<u8>,
}

/// An event of a stream (HTML, "Server-sent events").
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Event {
    /// By which it is remembered.
    pub id: String,
    /// After how many milliseconds a client that lost the stream may come back.
    pub retry: Option<u64>,
    /// A message, or nothing.
    pub data: String,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The header lines, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body, without its transfer coding.
    pub body: String,
}

impl Http {
    /// Greets, where the era has a greeting.
    ///
    /// # Panics
    /// When the worker does not answer.
    #[must_use]
    pub fn greet(era: Era, address: SocketAddr, bearer: &str) -> Self {
        let mut http = Self { address, bearer: bearer.to_owned(), session: None, era, next_id: 1 };
        if era == Era::Legacy {
            let id = http.id();
            let hello = json!({ "jsonrpc": "2.0", "id": id, "method": "initialize",
                "params": super::greeting() });
            let response = http.post(&hello).response();
            http.session = response.header("mcp-session-id").map(str::to_owned);
            assert!(http.session.is_some(), "no session: {response:?}");
            let accepted = http.notify("notifications/initialized", &json!({}));
            assert_eq!(accepted.status, 202, "{accepted:?}");
        }
        http
    }

    /// Calls a tool.
    ///
    /// # Panics
    /// When the worker answers with a JSON-RPC error, or not at all.
    pub fn call(&mut self, tool: &str, arguments: &Value) -> ToolResult {
        ToolResult::of(tool, &self.start_call(tool, arguments).answer())
    }

    /// Starts a call without waiting.
    pub fn start_call(&mut self, tool: &str, arguments: &Value) -> Exchange {
        self.start("tools/call", &json!({ "name": tool, "arguments": arguments }))
    }

    /// Makes a request and waits for its answer.
    pub fn request(&mut self, method: &str, parameters: &Value) -> Value {
        self.start(method, parameters).answer()
    }

    /// Starts a request without waiting.
    pub fn start(&mut self, method: &str, parameters: &Value) -> Exchange {
        let id = self.id();
        let parameters = self.era.parameters(parameters);
        self.post(&json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": parameters }))
    }

    /// Sends a notification.
    #[must_use]
    pub fn notify(&self, method: &str, parameters: &Value) -> Response {
        self.post(&json!({ "jsonrpc": "2.0", "method": method, "params": parameters })).response()
    }

    /// The id of the request that was made last.
    #[must_use]
    pub fn last_id(&self) -> u64 {
        self.next_id - 1
    }

    /// Posts a message with the headers that the protocol wants.
    #[must_use]
    pub fn post(&self, message: &Value) -> Exchange {
        self.send("POST", &self.headers_of(message), &message.to_string())
    }

    /// The headers of a request that posts `message`.
    #[must_use]
    pub fn headers_of(&self, message: &Value) -> Vec<(&'static str, String)> {
        let method = message["method"].as_str().unwrap_or_default();
        let mut headers = self.headers();
        headers.push(("Content-Type", "application/json".to_owned()));
        if self.era == Era::Stateless {
            headers.push(("Mcp-Method", method.to_owned()));
            if let Some(name) = message["params"]["name"].as_str() {
                headers.push(("Mcp-Name", name.to_owned()));
            }
        }
        headers
    }

    /// The headers of every request: host, bearer, session, version.
    #[must_use]
    pub fn headers(&self) -> Vec<(&'static str, String)> {
        let mut headers = vec![
            ("Host", self.address.to_string()),
            ("Authorization", format!("Bearer {}", self.bearer)),
            ("Accept", "application/json, text/event-stream".to_owned()),
        ];
        if self.session.is_some() || self.era == Era::Stateless {
            headers.push(("MCP-Protocol-Version", self.era.version().to_owned()));
        }
        headers.extend(self.session.clone().map(|session| ("Mcp-Session-Id", session)));
        headers
    }

    /// Comes back to the stream of which `last` was the last event that arrived.
    #[must_use]
    pub fn resume(&self, last: &Event) -> Events {
        let mut headers = self.headers();
        headers.push(("Last-Event-ID", last.id.clone()));
        self.send("GET", &headers, "").events()
    }

    /// Sends just this.
    ///
    /// # Panics
    /// When the worker cannot be reached.
    #[must_use]
    pub fn send(&self, method: &str, headers: &[(&str, String)], body: &str) -> Exchange {
        let headers = [&[("Connection", "close".to_owned())], headers].concat();
        self.send_and_stay(method, &headers, body)
    }

    /// As [`Http::send`], on a connection that the client does not ask to have closed.
    ///
    /// # Panics
    /// When the worker cannot be reached.
    #[must_use]
    pub fn send_and_stay(&self, method: &str, headers: &[(&str, String)], body: &str) -> Exchange {
        let mut stream = TcpStream::connect(self.address).expect("the worker listens");
        stream.set_read_timeout(Some(ANSWER_LIMIT)).expect("a read timeout");
        let mut request = format!("{method} /mcp HTTP/1.1\r\n");
        for (name, value) in headers {
            request += &format!("{name}: {value}\r\n");
        }
        request += &format!("Content-Length: {}\r\n\r\n{body}", body.len());
        // What is refused early is not read whole.
        let _refused = stream.write_all(request.as_bytes());
        Exchange(BufReader::new(stream))
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id - 1
    }
}

impl Exchange {
    /// The whole answer.
    ///
    /// # Panics
    /// When it does not come, or is not HTTP.
    #[must_use]
    pub fn response(mut self) -> Response {
        self.read()
    }

    /// The whole answer; the connection stays as the worker leaves it.
    ///
    /// # Panics
    /// When it does not come, or is not HTTP.
    pub fn read(&mut self) -> Response {
        let (status, headers) = self.head();
        let mut response = Response { status, headers, body: String::new() };
        let mut rest = Vec::new();
        if response.header("transfer-encoding") == Some("chunked") {
            while let Some(chunk) = self.chunk() {
                rest.extend(chunk);
            }
        } else {
            let length = response.header("content-length").map(|text| text.parse::<u64>());
            let length = length.and_then(Result::ok).unwrap_or(u64::MAX);
            self.0.by_ref().take(length).read_to_end(&mut rest).expect("the body comes");
        }
        response.body = String::from_utf8(rest).expect("the body is text");
        response
    }

    /// The events of the answer, one after the other.
    ///
    /// # Panics
    /// When it is no stream of events.
    #[must_use]
    pub fn events(mut self) -> Events {
        let (status, headers) = self.head();
        let stream = ("content-type".to_owned(), "text/event-stream".to_owned());
        assert!(status == 200 && headers.contains(&stream), "{status} {headers:?}");
        Events { exchange: self, unread: Vec::new() }
    }

    /// The messages that came, in their order.
    #[must_use]
    pub fn messages(self) -> Vec<Value> {
        let response = self.response();
        if response.header("content-type") == Some("text/event-stream") {
            let data = response.body.lines().filter_map(|line| line.strip_prefix("data:"));
            return data.filter_map(|text| serde_json::from_str(text.trim()).ok()).collect();
        }
        vec![
            serde_json::from_str(&response.body)
                .unwrap_or_else(|error| panic!("no message ({error}): {response:?}")),
        ]
    }

    /// The answer to the request.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn answer(self) -> Value {
        let messages = self.messages();
        let answer = messages.iter().find(|message| message.get("method").is_none());
        answer.unwrap_or_else(|| panic!("no answer among {messages:?}")).clone()
    }

    fn head(&mut self) -> (u16, Vec<(String, String)>) {
        let status = self.line().split(' ').nth(1).and_then(|code| code.parse().ok());
        let mut headers = Vec::new();
        loop {
            let line = self.line();
            let Some((name, value)) = line.split_once(':') else { break };
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        (status.expect("a status line"), headers)
    }

    fn chunk(&mut self) -> Option<Vec<u8>> {
        let length = usize::from_str_radix(&self.line(), 16).unwrap_or(0);
        let mut chunk = vec![0; length];
        self.0.read_exact(&mut chunk).ok()?;
        let _separator = self.line();
        (length > 0).then_some(chunk)
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("the worker answers");
        line.trim_end().to_owned()
    }
}

impl Iterator for Events {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(end) = self.unread.windows(2).position(|two| two == b"\n\n") {
                let text: Vec<u8> = self.unread.drain(..end + 2).collect();
                let event = Event::read(std::str::from_utf8(&text).expect("an event is text"));
                // Comments keep the connection alive.
                if event != Event::default() {
                    return Some(event);
                }
            } else {
                self.unread.extend(self.exchange.chunk()?);
            }
        }
    }
}

impl Event {
    fn read(text: &str) -> Self {
        let mut event = Self::default();
        for (name, value) in text.lines().filter_map(|line| line.split_once(':')) {
            match (name, value.trim_start()) {
                ("id", id) => id.clone_into(&mut event.id),
                ("retry", retry) => event.retry = retry.parse().ok(),
                ("data", data) => event.data += data,
                _ => {}
            }
        }
        event
    }
}

impl Response {
    /// A header, by its name in lower case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }
}
