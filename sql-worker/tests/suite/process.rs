//! The program itself: its streams, its signals, its exit codes. No broker is there.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

fn worker(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_credbroker-sql-worker"));
    command.args(arguments).env_remove("PGOPTIONS");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn start() -> Child {
    worker(&["mcp", "--stdio", "--runtime-dir", "/nonexistent/credbroker"]).spawn().unwrap()
}

fn wait(mut child: Child) -> (Output, Duration) {
    let started = Instant::now();
    drop(child.stdin.take());
    let output = child.wait_with_output().unwrap();
    (output, started.elapsed())
}

const HELLO: &str = r#"{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"t","version":"0"}}}
{"jsonrpc":"2.0","method":"notifications/initialized"}
"#;

#[test]
fn standard_output_is_the_protocol_and_standard_error_is_json() {
    let mut child = start();
    let calls = [
        json!({"jsonrpc": "2.0", "id": 2, "method": "tools/list"}),
        json!({"jsonrpc": "2.0", "id": 3, "method": "tools/call", "params":
            {"name": "execute_sql", "arguments": {"database": "main_db",
             "sql": "select 'canary-sql'", "credential_token": "canary-token",
             "params": ["canary-value"]}}}),
        json!({"jsonrpc": "2.0", "id": 4, "method": "tools/call", "params":
            {"name": "list_connections", "arguments": {}}}),
    ];
    let stdin = child.stdin.as_mut().unwrap();
    stdin.write_all(HELLO.as_bytes()).unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut answers: Vec<Value> =
        vec![serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap()];
    for call in calls {
        writeln!(child.stdin.as_mut().unwrap(), "{call}").unwrap();
        answers.push(serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap());
    }
    assert_eq!(answers[1]["result"]["tools"][1]["name"], "execute_sql");
    let code = |answer: &Value| answer["result"]["structuredContent"]["error"]["code"].clone();
    assert_eq!(code(&answers[2]), "HANDLE_INVALID");
    assert_eq!(code(&answers[3]), "BROKER_UNREACHABLE");

    let mut errors = child.stderr.take().unwrap();
    let (output, elapsed) = wait(child);
    assert!(output.status.success() && elapsed < Duration::from_secs(1), "{elapsed:?}");
    assert!(lines.next().is_none());
    let mut log = String::new();
    errors.read_to_string(&mut log).unwrap();
    assert!(!log.contains("canary"), "{log}");
    for line in log.lines() {
        assert!(serde_json::from_str::<Value>(line).is_ok(), "{line}");
    }
    assert!(log.contains("\"tool\":\"execute_sql\""), "{log}");
}

/// As `printf … | credbroker-sql-worker mcp --stdio`: the input is over before anything ran.
#[test]
fn what_was_asked_before_the_end_of_input_is_answered() {
    let prefix = "io.modelcontextprotocol";
    let meta = json!({
        format!("{prefix}/protocolVersion"): "2026-07-28",
        format!("{prefix}/clientCapabilities"): {},
        format!("{prefix}/clientInfo"): { "name": "t", "version": "0" },
    });
    let ask = |method: &str| {
        let request =
            json!({"jsonrpc": "2.0", "id": 7, "method": method, "params": {"_meta": meta}});
        format!("{request}\n")
    };
    let list = "{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"tools/list\"}\n";
    for input in [ask("server/discover"), ask("tools/list"), format!("{HELLO}{list}")] {
        let mut child = start();
        child.stdin.as_mut().unwrap().write_all(input.as_bytes()).unwrap();
        let (output, elapsed) = wait(child);
        assert!(output.status.success() && elapsed < Duration::from_secs(2), "{elapsed:?}");
        let answer = String::from_utf8(output.stdout).unwrap();
        let answer: Value = serde_json::from_str(answer.lines().last().unwrap()).unwrap();
        assert!(answer["id"] == 7 && answer["result"].is_object(), "{answer}");
    }
}

#[test]
fn it_ends_with_its_input_and_by_signal() {
    let (output, elapsed) = wait(start());
    assert!(output.status.success() && elapsed < Duration::from_secs(2), "{elapsed:?}");

    let mut child = start();
    child.stdin.as_mut().unwrap().write_all(HELLO.as_bytes()).unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    // Held open, so that only the signal can end it.
    let stdin = child.stdin.take();
    let started = Instant::now();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let status = child.wait().unwrap();
    assert!(status.success() && started.elapsed() < Duration::from_secs(1), "{status}");
    drop(stdin);
}

#[test]
fn exit_codes_are_sysexits() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("worker.toml");
    std::fs::write(&config, "[limits]\nmax_rows = 0\n").unwrap();
    let config = config.to_str().unwrap();
    let (bad_config, _) = wait(worker(&["mcp", "--stdio", "--config", config]).spawn().unwrap());
    assert_eq!(bad_config.status.code(), Some(78));
    let text = String::from_utf8(bad_config.stderr).unwrap();
    assert_eq!(
        text,
        format!("credbroker-sql-worker: {config}: limits.max_rows: 0 is not between 1 and 50000\n")
    );
    let (usage, _) = wait(worker(&["mcp"]).spawn().unwrap());
    assert_eq!(usage.status.code(), Some(64));
    let mut command = worker(&["mcp", "--stdio"]);
    let (options, _) = wait(command.env("PGOPTIONS", "-c x=y").spawn().unwrap());
    assert_eq!(options.status.code(), Some(78));
    let (version, _) = wait(worker(&["--version"]).spawn().unwrap());
    assert!(version.status.success() && !version.stdout.is_empty());
}
