//! A secret that a person types into a page: `credbroker entry` before a real broker, opened by
//! real uids. What the page itself accepts is tested beside the command.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::{Broker, Grant, Setup};
use credbroker_e2e::identity::{Identity, several_or_say};
use credbroker_e2e::memory;
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::process::{Process, output};
use credbroker_e2e::wait::{self, PATIENCE};
use rustix::process::Signal;

/// A running command and its page.
struct Entry {
    process: Process,
    address: SocketAddr,
    path: String,
    code: String,
    /// Whose browser it is.
    person: Identity,
}

fn broker(database: &Database) -> Broker {
    let client = Identity::client();
    Setup::new()
        .stored_connection("stored_db", database)
        .grant(Grant::to(&client, &["issue", "open"], &["stored_db"]))
        .start()
}

impl Entry {
    /// Started by the operator, for the browser of `person`.
    fn start(broker: &Broker, database: &Database, person: Identity) -> Self {
        let mut command = broker.cli(&Identity::own());
        command.args(["entry", "stored_db", "--username", database.name(), "--opened-by"]);
        command.arg(person.uid().to_string());
        let process = Process::start("entry", &mut command, &broker.setup().path("logs"));
        let find = |mark: &str| {
            let said = process.stderr();
            let mut words =
                said.split_ascii_whitespace().skip_while(|word| !word.starts_with(mark));
            Some((words.next()?.to_owned(), words.next()?.to_owned()))
        };
        let page = wait::until(PATIENCE, || Some((find("http://")?.0, find("code")?.1)));
        let (url, code) = page.unwrap_or_else(|| panic!("no page:\n{}", process.stderr()));
        let (host, path) = url.trim_start_matches("http://").split_once('/').expect("a path");
        let (address, path) = (host.parse().expect("an address"), format!("/{path}"));
        Self { process, address, path, code, person }
    }

    /// What is answered to a request of `who`.
    fn ask(&self, who: &Identity, request: &str) -> String {
        let connected = who.act(|| TcpStream::connect(self.address)).expect("the thread acts");
        let mut stream = connected.expect("the port is open");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let _closed = stream.write_all(request.as_bytes());
        let mut answer = Vec::new();
        let _reset = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    fn get(&self, who: &Identity, path: &str) -> String {
        self.ask(who, &format!("GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n", self.address))
    }

    fn post(&self, secret: &str) -> String {
        let page = self.get(&self.person, &self.path);
        let (_, rest) = page.split_once("name=\"token\" value=\"").expect("a form");
        let (token, _) = rest.split_once('"').expect("a token");
        let secret = secret.bytes().fold(String::new(), |mut encoded, byte| {
            write!(encoded, "%{byte:02X}").expect("a string takes everything");
            encoded
        });
        let body = format!("token={token}&code={}&secret={secret}&again={secret}", self.code);
        let request = format!(
            "POST {} HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\n\
             Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n\r\n{body}",
            self.path,
            body.len(),
            host = self.address
        );
        self.ask(&self.person, &request)
    }
}

fn password_works(broker: &Broker) -> bool {
    let client = Identity::client();
    let issued = broker.handles(&client).issue("stored_db").expect("a grant");
    let session = broker.login(&client, "stored_db", &issued.token);
    session.is_ok_and(|mut session| session.query("SELECT 1").is_ok())
}

#[test]
fn what_is_typed_into_the_page_goes_to_the_arena_and_nowhere_else() {
    if !several_or_say("the page is opened by the uid of its person, and memory can be read") {
        return;
    }
    let database = Server::shared().database();
    let broker = broker(&database);
    let mut entry = Entry::start(&broker, &database, Identity::client());
    assert!(!password_works(&broker), "there is none yet");
    let sent = entry.post(database.canary().reveal());
    assert!(sent.starts_with("HTTP/1.1 303"), "{sent}");
    assert_eventually!(
        entry.process.stdout().contains("version       1"),
        "{}",
        entry.process.stderr()
    );
    // It waits for a browser that asks for the outcome; now it waits as long as we look.
    entry.process.signal(Signal::STOP);
    let patterns = [database.canary().patterns(), database.derived_patterns()].concat();
    let found = memory::scan(entry.process.pid(), &patterns).expect("root may read it");
    assert!(found.hits.is_empty() && found.bytes_read > 1 << 20, "entry: {found:?}");
    let around = memory::scan_surroundings(entry.process.pid(), &patterns).expect("it is there");
    assert!(around.is_empty(), "{around:?}");
    entry.process.signal(Signal::CONT);
    let done = entry.get(&entry.person, &format!("{}/done", entry.path));
    assert!(done.starts_with("HTTP/1.1 200") && done.contains("Stored"), "{done}");
    assert!(entry.process.wait(PATIENCE).success(), "{}", entry.process.stderr());

    assert!(password_works(&broker), "{}", broker.log());
    let found = memory::scan(broker.pid(), &patterns).expect("root may read it");
    assert!(found.outside_arena().is_empty(), "broker: {:?}", found.outside_arena());
    assert!(found.unreadable_arena > 0 || found.in_arena() > 0, "it has it: {found:?}");
    let files = ["logs", "run", "state"].map(|name| broker.setup().path(name));
    let hits = memory::scan_files(&files, &patterns);
    assert!(hits.is_empty(), "{hits:?}");
    assert_eq!(broker.audit().of("secret.put").len(), 1);
}

#[test]
fn only_its_person_opens_the_page() {
    if !several_or_say("two uids have two browsers") {
        return;
    }
    let database = Server::shared().database();
    let broker = broker(&database);
    let mut entry = Entry::start(&broker, &database, Identity::client());
    for stranger in [Identity::attacker(), Identity::broker(), Identity::own()] {
        // With the whole address, and at once, as somebody would who has read the terminal.
        let answer = entry.get(&stranger, &entry.path);
        assert!(!answer.contains("<form"), "{answer}");
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 403"), "{answer}");
        let told = format!("a connection of uid {}", stranger.uid());
        assert_eventually!(entry.process.stderr().contains(&told), "{}", entry.process.stderr());
    }
    // A flood of them is no reason to close.
    for _ in 0..50 {
        entry.get(&Identity::attacker(), "/guess");
    }
    assert!(entry.process.stderr().matches("turned away").count() <= 5);
    let sent = entry.post(database.canary().reveal());
    assert!(sent.starts_with("HTTP/1.1 303"), "{sent}");
    let done = entry.get(&entry.person, &format!("{}/done", entry.path));
    assert!(done.contains("Stored"), "{done}");
    assert!(entry.process.wait(PATIENCE).success());
    assert!(password_works(&broker));
}

#[test]
fn who_may_not_put_gets_no_page() {
    if !several_or_say("an operator is another uid") {
        return;
    }
    let database = Server::shared().database();
    let broker = broker(&database);
    let mut command = broker.cli(&Identity::client());
    let done = output(command.args(["entry", "stored_db"]), PATIENCE);
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(77), "{said}");
    assert!(!said.contains("http://"), "{said}");
}
