//! Those who are nobody's: connections to the HTTP port that never show a bearer.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

const TOKEN: &str = "alice-alice-alice-alice-alice-alice";

struct Server {
    child: Child,
    address: String,
    _directory: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let private = |name: &str, text: &str| {
            let path = directory.path().join(name);
            let mut options = std::fs::OpenOptions::new();
            let mut file = options.write(true).create_new(true).mode(0o600).open(&path).unwrap();
            file.write_all(text.as_bytes()).unwrap();
            path
        };
        let token = private("token", TOKEN);
        let config =
            private("worker.toml", &format!("[http]\nbearers = {{ alice = {token:?} }}\n"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_credbroker-sql-worker"));
        command.args(["mcp", "--http", "127.0.0.1:0", "--runtime-dir", "/nonexistent/credbroker"]);
        command.arg("--config").arg(config).env_remove("PGOPTIONS").stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
        let line: Value = serde_json::from_str(&line).unwrap();
        let address = line["fields"]["address"].as_str().unwrap().to_owned();
        Self { child, address, _directory: directory }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream
    }

    /// The status of a ping, over `stream`.
    fn ping(&self, stream: &mut TcpStream) -> String {
        let body = r#"{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"t","version":"0"}}}"#;
        let request = format!(
            "POST /mcp HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: \
             application/json\r\nAccept: application/json, text/event-stream\r\nContent-Length: \
             {}\r\n\r\n{body}",
            self.address,
            body.len()
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut status = [0; 12];
        stream.read_exact(&mut status).unwrap();
        String::from_utf8_lossy(&status).into_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn strangers_do_not_keep_a_client_out() {
    let server = Server::start();
    let strangers: Vec<TcpStream> = (0..600)
        .map(|at| {
            let mut stream = server.connect();
            if at % 2 == 0 {
                stream.write_all(b"POST /mcp HTTP/1.1\r\n").unwrap();
            }
            stream
        })
        .collect();
    // Strangers may take half a minute for their heads; a client does not read for so long.
    let mut client = server.connect();
    assert_eq!(server.ping(&mut client), "HTTP/1.1 200");
    // The oldest of them was closed.
    let mut first = &strangers[0];
    assert_eq!(first.read(&mut [0]).unwrap_or(0), 0);
    drop(strangers);
}
