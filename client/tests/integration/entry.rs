//! `credbroker entry`: the page, driven by a plain HTTP client.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use credbroker_proto::v1;
use credbroker_proto::v1::packet_reply::Reply;
use credbroker_proto::v1::packet_request::Request;
use rustix::process::getuid;

use crate::broker::{Broker, PATIENCE};
use crate::commands::{credbroker, stderr, stdout};
use crate::packets::{Listener, refused};
use crate::put::count_in_memory;

/// Made of two, so that it stands in no program.
fn canary() -> String {
    ["canary", "90e2", "c4d7"].join("-")
}

/// The operators' packet socket of the scripted broker.
fn listen<T: Send + 'static>(
    broker: &Broker,
    script: impl FnOnce(Listener) -> T + Send + 'static,
) -> JoinHandle<T> {
    Listener::play(&broker.admin_dir().join(credbroker_proto::ADMIN_PACKET_SOCKET), script)
}

type Stored = (v1::PutRequest, Vec<u8>);

/// Takes one credential and gives what was asked and brought; whatever comes after it is counted.
fn store_one(broker: &Broker, reply: Reply) -> JoinHandle<(Stored, usize)> {
    listen(broker, move |listener| {
        let peer = listener.accept();
        let (id, request, descriptors) = peer.receive().unwrap();
        let Request::Put(request) = request else { panic!("{request:?}") };
        let [memfd] = descriptors.as_slice() else { panic!("{descriptors:?}") };
        let mut bytes = vec![0; credbroker_proto::MAX_SECRET + 1];
        let length = rustix::io::pread(memfd, &mut bytes[..], 0).unwrap();
        bytes.truncate(length);
        peer.reply(id, reply);
        let more = std::iter::from_fn(|| peer.receive()).count();
        ((request, bytes), more)
    })
}

/// Whom nothing is sent.
fn expect_nothing(broker: &Broker) -> JoinHandle<()> {
    listen(broker, |listener| assert!(listener.accept().receive().is_none()))
}

fn stored() -> Reply {
    Reply::Stored(v1::PutResponse { version: 3, persistent: true, sessions_to_cut: 0 })
}

/// A running command that has said where its page is.
struct Entry {
    child: Child,
    address: SocketAddr,
    path: String,
    code: String,
    said: JoinHandle<String>,
}

/// What was answered.
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.filter(|(own, _)| own.eq_ignore_ascii_case(name)).map(|(_, value)| value).next_back()
    }

    fn assert_status(&self, status: u16, tells: &str) {
        assert_eq!(self.status, status, "{}\n{}", self.head, self.body);
        assert!(self.body.contains(tells), "{tells}: {}", self.body);
    }
}

impl Entry {
    fn start(broker: &Broker, arguments: &[&str]) -> Self {
        let mut command = credbroker(broker);
        command.args(["entry", "main_db", "--opened-by", &getuid().as_raw().to_string()]);
        Self::start_by(command.args(arguments))
    }

    fn start_by(command: &mut Command) -> Self {
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let (mut told, mut url, mut code) = (String::new(), None, None);
        while url.is_none() || code.is_none() {
            let mut line = String::new();
            assert!(lines.read_line(&mut line).unwrap() > 0, "it ended: {told}");
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some(word) if word.starts_with("http://") => url = Some(word.to_owned()),
                Some("code") => code = words.next().map(str::to_owned),
                _ => {}
            }
            told.push_str(&line);
        }
        let said = thread::spawn(move || {
            lines.read_to_string(&mut told).unwrap();
            told
        });
        let url = url.unwrap();
        let (host, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
        let (address, path) = (host.parse().unwrap(), format!("/{path}"));
        Self { child, address, path, code: code.unwrap(), said }
    }

    fn head(&self, method: &str, path: &str) -> String {
        format!("{method} {path} HTTP/1.1\r\nHost: {}\r\n", self.address)
    }

    fn send(&self, head: &str, body: &[u8]) -> Answer {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(format!("{head}\r\n").as_bytes()).unwrap();
        // Who refuses without reading closes the connection.
        let _refused = stream.write_all(body);
        let mut bytes = Vec::new();
        let _reset = stream.read_to_end(&mut bytes);
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        Answer { status, head: head.into(), body: body.into() }
    }

    fn get(&self, path: &str) -> Answer {
        self.send(&self.head("GET", path), b"")
    }

    /// The token that the form carries.
    fn token(&self) -> String {
        let page = self.get(&self.path);
        page.assert_status(200, "name=\"token\"");
        let (_, rest) = page.body.split_once("name=\"token\" value=\"").unwrap();
        rest.split_once('"').unwrap().0.to_owned()
    }

    fn form(&self, code: &str, secret: &str, again: &str) -> String {
        format!("token={}&code={code}&username=&secret={secret}&again={again}", self.token())
    }

    fn post(&self, body: &str) -> Answer {
        self.post_with(body, &format!("Origin: http://{}\r\n", self.address))
    }

    fn post_with(&self, body: &str, headers: &str) -> Answer {
        let head = self.head("POST", &self.path);
        let head = format!(
            "{head}Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n{headers}",
            body.len()
        );
        self.send(&head, body.as_bytes())
    }

    fn done(&self) -> Answer {
        self.get(&format!("{}/done", self.path))
    }

    fn finish(mut self) -> Output {
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "it does not end");
            thread::sleep(std::time::Duration::from_millis(10));
        }
        let mut output = self.child.wait_with_output().unwrap();
        output.stderr = self.said.join().unwrap().into_bytes();
        output
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
fn a_secret_is_typed_into_a_page_and_stored() {
    let broker = Broker::start();
    let script = store_one(&broker, stored());
    let entry = Entry::start(&broker, &["--username", "app"]);
    let page = entry.get(&entry.path);
    for told in ["main_db", "db.internal:5432/mydb", "app", "and nobody else"] {
        page.assert_status(200, told);
    }
    assert!(!page.body.contains("name=\"username\""), "the command line has it");
    assert!(!page.body.contains(&entry.code), "the terminal alone has it");

    let code = entry.code.to_lowercase();
    let sent = entry.post(&entry.form(&code, "%2Fcorrect+horse%3d", "%2Fcorrect%20horse="));
    let done = format!("{}/done", entry.path);
    assert_eq!((sent.status, sent.header("location")), (303, Some(done.as_str())));
    entry.done().assert_status(200, "version 3");
    let output = entry.finish();
    assert!(output.status.success(), "{}", stderr(&output));
    let expected = "stored        main_db\nversion       3\nkept          beyond the broker's end\nsessions cut  0\n";
    assert_eq!(stdout(&output), expected);
    assert!(!stderr(&output).contains("horse"));
    let ((request, secret), more) = script.join().unwrap();
    assert_eq!((request.connection.as_str(), request.username.as_str()), ("main_db", "app"));
    assert_eq!((secret.as_slice(), more), (&b"/correct horse="[..], 0));
}

#[test]
fn a_user_name_can_be_typed_too_and_a_refusal_is_told() {
    let broker = Broker::start();
    let script = store_one(&broker, refused(v1::Reason::InvalidRequest));
    let entry = Entry::start(&broker, &[]);
    let form = entry.form(&entry.code, "x", "x").replace("username=", "username=b%C3%A4r");
    assert_eq!(entry.post(&form).status, 303);
    entry.done().assert_status(502, "as the test wants it");
    let output = entry.finish();
    assert_eq!(output.status.code(), Some(64), "{}", stderr(&output));
    assert_eq!(script.join().unwrap().0.0.username, "bär");
}

#[test]
fn every_answer_forbids_scripts_frames_and_caches() {
    let broker = Broker::start();
    let script = expect_nothing(&broker);
    let entry = Entry::start(&broker, &[]);
    for answer in [
        entry.get(&entry.path),
        entry.get("/"),
        entry.done(),
        entry.post("token=x"),
        entry.send(&entry.head("PUT", &entry.path), b""),
    ] {
        let policy = answer.header("content-security-policy").unwrap();
        for part in [
            "default-src 'none'",
            "style-src 'sha256-",
            "form-action 'self'",
            "frame-ancestors 'none'",
            "base-uri 'none'",
        ] {
            assert!(policy.contains(part), "{policy}");
        }
        for (name, value) in [
            ("cache-control", "no-store"),
            ("referrer-policy", "same-origin"),
            ("x-content-type-options", "nosniff"),
            ("x-frame-options", "DENY"),
            ("cross-origin-opener-policy", "same-origin"),
            ("cross-origin-resource-policy", "same-origin"),
            ("content-type", "text/html; charset=utf-8"),
            ("connection", "close"),
        ] {
            assert_eq!(answer.header(name), Some(value), "{name}: {}", answer.head);
        }
        assert_eq!(answer.header("set-cookie"), None);
        assert!(!answer.body.contains("<script") && !answer.body.contains("javascript:"));
    }
    entry.kill();
    script.join().unwrap();
}

#[test]
fn what_is_not_the_pages_own_form_is_refused() {
    let broker = Broker::start();
    let script = expect_nothing(&broker);
    let entry = Entry::start(&broker, &[]);
    let form = entry.form(&entry.code, &canary(), &canary());
    let own = format!("Origin: http://{}\r\n", entry.address);
    let other_port = format!("Origin: http://127.0.0.1:{}\r\n", entry.address.port() ^ 1);
    for origin in [
        "",
        "Origin: null\r\n",
        "Origin: http://evil.example\r\n",
        &other_port,
        &format!("Origin: https://{}\r\n", entry.address),
        &format!("{own}Sec-Fetch-Site: cross-site\r\n"),
        &format!("{own}Sec-Fetch-Site: same-site\r\n"),
    ] {
        entry.post_with(&form, origin).assert_status(403, "did not come from the page");
    }
    let plain = entry.head("POST", &entry.path);
    let plain =
        format!("{plain}{own}Content-Type: text/plain\r\nContent-Length: {}\r\n", form.len());
    entry.send(&plain, form.as_bytes()).assert_status(403, "did not come from the page");

    let no_token = form.replacen("token=", "token=A", 1);
    for wrong in [no_token.as_str(), "", "token=&code=", &format!("{form}&code=1"), "secret=%zz"] {
        entry.post(wrong).assert_status(400, "not the form");
    }
    let long = format!("{form}{}", "x".repeat(20 << 10));
    entry.post(&long).assert_status(413, "20 KiB");
    let lie = format!(
        "{}{own}Content-Type: application/x-www-form-urlencoded\r\n",
        entry.head("POST", &entry.path)
    );
    let lie = entry.send(&format!("{lie}Content-Length: 99999999999\r\n"), b"token=");
    assert_eq!(lie.status, 413, "{}", lie.head);
    // It is still good for its owner.
    entry.get(&entry.path).assert_status(200, "<form");
    entry.kill();
    script.join().unwrap();
}

#[test]
fn another_name_that_leads_here_is_another_site() {
    let broker = Broker::start();
    let script = expect_nothing(&broker);
    let entry = Entry::start(&broker, &[]);
    let port = entry.address.port();
    for host in ["evil.example", &format!("evil.example:{port}"), "127.0.0.1", "127.0.0.1:1", ""] {
        let head = format!("GET {} HTTP/1.1\r\nHost: {host}\r\n", entry.path);
        entry.send(&head, b"").assert_status(404, "no such page");
    }
    entry.send(&format!("GET {} HTTP/1.0\r\n", entry.path), b"").assert_status(404, "no such page");
    let absolute = format!("GET http://{}{} HTTP/1.1\r\nHost: x\r\n", entry.address, entry.path);
    entry.send(&absolute, b"").assert_status(404, "no such page");
    let by_name = format!("GET {} HTTP/1.1\r\nHost: localhost:{port}\r\n", entry.path);
    entry.send(&by_name, b"").assert_status(200, "<form");
    entry.kill();
    script.join().unwrap();
}

#[test]
fn who_guesses_at_paths_ends_it() {
    let broker = Broker::start();
    let script = expect_nothing(&broker);
    let entry = Entry::start(&broker, &[]);
    let short = entry.path.strip_suffix(|_last| true).unwrap().to_owned();
    let long = format!("{}A", entry.path);
    for guess in ["/", "/favicon.ico", "/index.html", &short, &long, &format!("/x{}", entry.path)] {
        entry.get(guess).assert_status(404, "no such page");
    }
    entry.get(&entry.path).assert_status(200, "<form");
    let mut left = 11;
    while left > 0 {
        entry.get("/guess").assert_status(404, "no such page");
        left -= 1;
    }
    let output = entry.finish();
    assert_eq!(output.status.code(), Some(77), "{}", stderr(&output));
    assert!(stderr(&output).contains("nothing was stored"), "{}", stderr(&output));
    script.join().unwrap();
}

#[test]
fn the_code_can_be_tried_five_times() {
    let broker = Broker::start();
    let script = expect_nothing(&broker);
    let entry = Entry::start(&broker, &[]);
    let wrong = if entry.code == "222-222" { "333-333" } else { "222-222" };
    let form = entry.form(wrong, &canary(), &canary());
    for left in [4, 3, 2, 1] {
        let answer = entry.post(&form);
        answer.assert_status(403, &format!("{left} more tries"));
        assert!(!answer.body.contains(&canary()), "nothing comes back");
    }
    entry.post(&form).assert_status(403, "wrong too often");
    let output = entry.finish();
    assert_eq!(output.status.code(), Some(77), "{}", stderr(&output));
    assert!(stderr(&output).contains("the code was wrong"), "{}", stderr(&output));
    script.join().unwrap();
}

#[test]
fn what_is_typed_wrongly_can_be_typed_again() {
    let broker = Broker::start();
    let script = store_one(&broker, stored());
    let entry = Entry::start(&broker, &[]);
    let differ = entry.post(&entry.form(&entry.code, "one", "two"));
    differ.assert_status(422, "not the same");
    assert!(differ.body.contains("<form"));
    entry.post(&entry.form(&entry.code, "", "")).assert_status(422, "No password");
    assert_eq!(entry.post(&entry.form(&entry.code, "three", "three")).status, 303);
    entry.done().assert_status(200, "Stored");
    assert!(entry.finish().status.success());
    assert_eq!(script.join().unwrap().0.1, b"three");
}

#[test]
fn of_two_forms_one_is_stored_and_the_page_is_used_up() {
    let broker = Broker::start();
    let script = store_one(&broker, stored());
    let entry = Entry::start(&broker, &[]);
    let forms = ["first", "second"].map(|secret| entry.form(&entry.code, secret, secret));
    let [first, second] = thread::scope(|scope| {
        let sent = forms.each_ref().map(|form| scope.spawn(|| entry.post(form).status));
        sent.map(|sent| sent.join().unwrap())
    });
    assert!(matches!((first, second), (303, 410) | (410, 303)), "{first} {second}");
    entry.get(&entry.path).assert_status(410, "has been used");
    entry.post(&forms[0]).assert_status(410, "has been used");
    entry.done().assert_status(200, "Stored");
    assert!(entry.finish().status.success());
    let ((_, secret), more) = script.join().unwrap();
    let expected: &[u8] = if first == 303 { b"first" } else { b"second" };
    assert_eq!((secret.as_slice(), more), (expected, 0));
}

#[test]
fn it_ends_by_itself_when_nobody_asks_for_the_outcome() {
    let broker = Broker::start();
    let script = store_one(&broker, stored());
    let entry = Entry::start(&broker, &[]);
    assert_eq!(entry.post(&entry.form(&entry.code, "x", "x")).status, 303);
    assert!(entry.finish().status.success());
    script.join().unwrap();
}

/// A minute is the least that can be asked for.
#[test]
fn a_page_that_nobody_uses_is_closed_in_time() {
    let broker = Broker::start();
    let script = listen(&broker, |listener| listener.accept());
    let mut entry = Entry::start(&broker, &["--expires", "60s"]);
    let started = Instant::now();
    let status = entry.child.wait().unwrap();
    assert!((55..80).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());
    assert_eq!(status.code(), Some(69));
    assert!(TcpStream::connect(entry.address).is_err());
    let said = entry.said.join().unwrap();
    assert!(said.contains("nobody used the page in time"), "{said}");
    assert!(script.join().unwrap().receive().is_none());
}

#[test]
fn without_a_broker_or_a_right_there_is_no_page() {
    let broker = Broker::start();
    let output = crate::commands::run(&broker, &["entry", "main_db"]);
    assert_eq!(output.status.code(), Some(69), "{}", stderr(&output));
    assert!(stderr(&output).contains("admin-packet.sock"), "{}", stderr(&output));
    let script = expect_nothing(&broker);
    let output = crate::commands::run(&broker, &["entry", "denied"]);
    assert_eq!(output.status.code(), Some(77), "{}", stderr(&output));
    assert!(!stderr(&output).contains("http://"), "{}", stderr(&output));
    script.join().unwrap();
}

#[test]
fn a_secret_on_the_command_line_is_refused_and_not_repeated() {
    let broker = Broker::start();
    for arguments in [&["hunter2"][..], &["--password", "hunter2"], &["--secret=-hunter2"]] {
        let output = crate::commands::run(&broker, &[&["entry", "main_db"], arguments].concat());
        assert_eq!(output.status.code(), Some(64), "{arguments:?}: {}", stderr(&output));
        let text = stderr(&output);
        assert!(text.contains("every user can read") && !text.contains("hunter2"), "{text}");
    }
}

#[test]
fn the_process_keeps_others_out_and_keeps_no_copy_of_the_secret() {
    let broker = Broker::start();
    let (go_on, told) = mpsc::channel();
    let script = listen(&broker, move |listener| {
        let peer = listener.accept();
        let (id, _, _memfd) = peer.receive().unwrap();
        told.recv().unwrap();
        peer.reply(id, stored());
    });
    let canary = canary();
    let mut command = credbroker(&broker);
    command.args(["entry", "main_db", "--opened-by", &getuid().as_raw().to_string()]);
    command.env("POSITIVE_CONTROL", format!("not-{canary}"));
    let entry = Entry::start_by(&mut command);
    let pid = entry.child.id();
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
    let status = read("status");
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    assert!(status.contains("Umask:\t0077"), "{status}");
    assert!(read("limits").lines().any(|line| {
        line.starts_with("Max core file size") && line.split_whitespace().nth(4) == Some("0")
    }));
    if !getuid().is_root() {
        std::fs::File::open(format!("/proc/{pid}/mem")).unwrap_err();
        entry.kill();
        return;
    }
    let control = count_in_memory(pid, format!("not-{canary}").as_bytes());
    assert!(control > 0, "the scan finds what is there");
    // A wrong try first: its buffers must be gone too.
    let wrong = if entry.code == "222-222" { "333-333" } else { "222-222" };
    assert_eq!(entry.post(&entry.form(wrong, &canary, &canary)).status, 403);
    assert_eq!(entry.post(&entry.form(&entry.code, &canary, &canary)).status, 303);
    // The connection is closed before its buffers are freed.
    let deadline = Instant::now() + PATIENCE;
    let copies = || count_in_memory(pid, canary.as_bytes()) - control;
    while copies() > 0 {
        assert!(Instant::now() < deadline, "{} copies while the broker has it", copies());
    }
    go_on.send(()).unwrap();
    entry.done().assert_status(200, "Stored");
    let output = entry.finish();
    assert!(output.status.success());
    assert!(!stderr(&output).contains(&canary) && !stdout(&output).contains(&canary));
    script.join().unwrap();
}
