//! `credbroker put`.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;

use credbroker_proto::v1;
use credbroker_proto::v1::packet_reply::Reply;
use credbroker_proto::v1::packet_request::Request;
use rustix::process::{Pid, Signal, kill_process};
use rustix::termios::{LocalModes, tcgetattr};

use crate::commands::{stderr, stdout};
use crate::packets::{Listener, Place, borrow};
use crate::terminal::{CTRL_C, CTRL_Z, Terminal};

const CREDBROKER: &str = env!("CARGO_BIN_EXE_credbroker");
const PASSWORD: &str = "correct horse";

/// Takes one credential, and gives what was asked and brought.
fn store_one(place: &Place, persistent: bool) -> JoinHandle<(v1::PutRequest, Vec<u8>)> {
    Listener::play(&place.admin_packet_socket(), move |listener| {
        let peer = listener.accept();
        let (id, request, descriptors) = peer.receive().unwrap();
        let Request::Put(request) = request else { panic!("{request:?}") };
        let [memfd] = descriptors.as_slice() else { panic!("{descriptors:?}") };
        let mut bytes = vec![0; credbroker_proto::MAX_SECRET + 1];
        let length = rustix::io::pread(memfd, &mut bytes[..], 0).unwrap();
        bytes.truncate(length);
        let stored = v1::PutResponse { version: 3, persistent, sessions_to_cut: 2 };
        peer.reply(id, Reply::Stored(stored));
        (request, bytes)
    })
}

/// Whom nothing is sent.
fn expect_nothing(place: &Place) -> JoinHandle<()> {
    Listener::play(&place.admin_packet_socket(), |listener| {
        assert!(listener.accept().receive().is_none());
    })
}

fn put(place: &Place, arguments: &[&str]) -> Command {
    let mut command = Command::new(CREDBROKER);
    command.arg("--runtime-dir").arg(place.runtime_dir()).args(["put", "main_db"]);
    command.args(arguments).env_remove("CREDBROKER_SERVER_UID").env_remove("CREDBROKER_ADMIN_DIR");
    command
}

fn with_input(mut command: Command, input: &[u8]) -> Output {
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // Who refuses without reading closes the pipe.
    let _refused = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

#[test]
fn a_credential_comes_from_standard_input_with_all_that_is_said_of_it() {
    let place = Place::new();
    let script = store_one(&place, true);
    let arguments = [
        "--username",
        "app",
        "--secret-file",
        "-",
        "--expires-at",
        "2027-01-31T00:00:00Z",
        "--label",
        "team=a",
        "--label",
        "why=b=c",
        "--grace",
        "30s",
    ];
    let output = with_input(put(&place, &arguments), PASSWORD.as_bytes());
    assert_eq!(stderr(&output), "");
    assert_eq!(
        stdout(&output),
        "stored        main_db\n\
         version       3\n\
         kept          beyond the broker's end\n\
         sessions cut  2, within 30s\n"
    );
    let (request, secret) = script.join().unwrap();
    assert_eq!(secret, PASSWORD.as_bytes());
    let label = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    let expected = v1::PutRequest {
        connection: "main_db".into(),
        username: "app".into(),
        expires_at: Some(prost_types::Timestamp { seconds: 1_801_353_600, nanos: 0 }),
        labels: [label("team", "a"), label("why", "b=c")].into(),
        grace: Some(prost_types::Duration { seconds: 30, nanos: 0 }),
    };
    assert_eq!(request, expected);
}

#[test]
fn what_is_kept_in_memory_only_is_told() {
    let place = Place::new();
    let script = store_one(&place, false);
    let file = place.runtime_dir().join("secret");
    fs::write(&file, "app:hunter2\n").unwrap();
    let output = put(&place, &["--secret-file", file.to_str().unwrap()]).output().unwrap();
    assert!(stdout(&output).contains("kept          in memory, until the broker ends\n"));
    let warning =
        "credbroker: kept in the broker's memory only: put it again when it has restarted\n";
    assert_eq!(stderr(&output), warning);
    let (request, secret) = script.join().unwrap();
    assert_eq!(secret, b"app:hunter2\n", "the broker drops the newline, and splits");
    assert_eq!((request.username.as_str(), request.grace), ("", None));

    fs::remove_file(place.admin_packet_socket()).unwrap();
    let script = store_one(&place, true);
    let mut command = put(&place, &["--output", "json", "--secret-file", file.to_str().unwrap()]);
    let output = command.output().unwrap();
    let stored: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let expected = serde_json::json!({
        "connection": "main_db", "version": 3, "persistent": true, "sessions_to_cut": 2
    });
    assert_eq!(stored, expected);
    script.join().unwrap();
}

#[test]
fn a_secret_on_the_command_line_is_refused_and_not_repeated() {
    let place = Place::new();
    for arguments in [
        &["hunter2"][..],
        &["--password", "hunter2"],
        &["--password=hunter2"],
        &["--secret", "hunter2"],
        &["--secret=-hunter2"],
        &["--secret-file", "-", "hunter2"],
    ] {
        let output = with_input(put(&place, arguments), b"");
        assert_eq!(output.status.code(), Some(64), "{arguments:?}: {}", stderr(&output));
        let text = stderr(&output);
        assert!(text.contains("every user can read"), "{arguments:?}: {text}");
        assert!(!text.contains("hunter2"), "{arguments:?}: {text}");
    }
}

#[test]
fn what_is_no_secret_is_not_sent() {
    for (input, code, told) in [
        (&b""[..], 64, "empty"),
        (&[7; credbroker_proto::MAX_SECRET + 1], 64, "longer than 16384 bytes"),
    ] {
        let place = Place::new();
        let script = expect_nothing(&place);
        let output = with_input(put(&place, &["--secret-file", "-"]), input);
        assert_eq!(output.status.code(), Some(code));
        assert!(stderr(&output).contains(told), "{}", stderr(&output));
        script.join().unwrap();
    }
    let place = Place::new();
    let script = expect_nothing(&place);
    let output = put(&place, &["--secret-file", "/nonexistent/file"]).output().unwrap();
    assert_eq!(output.status.code(), Some(74));
    assert!(stderr(&output).contains("/nonexistent/file"), "{}", stderr(&output));
    script.join().unwrap();
}

#[test]
fn without_a_terminal_nobody_is_asked() {
    let place = Place::new();
    let script = expect_nothing(&place);
    let put = put(&place, &[]);
    let mut command = Command::new("setsid");
    command.arg("--wait").arg(put.get_program()).args(put.get_args());
    let output = with_input(command, PASSWORD.as_bytes());
    assert_eq!(output.status.code(), Some(64));
    assert!(stderr(&output).contains("--secret-file -"), "{}", stderr(&output));
    script.join().unwrap();
}

#[test]
fn without_a_broker_nobody_is_asked() {
    let place = Place::new();
    let output = put(&place, &[]).output().unwrap();
    assert_eq!(output.status.code(), Some(69));
    assert!(stderr(&output).contains("admin-packet.sock"), "{}", stderr(&output));
}

#[test]
fn an_answer_whose_descriptors_do_not_fit_is_not_taken() {
    let place = Place::new();
    let script = Listener::play(&place.admin_packet_socket(), |listener| {
        let peer = listener.accept();
        let (id, _, _) = peer.receive().unwrap();
        let (_reader, writer) = std::io::pipe().unwrap();
        let writer = OwnedFd::from(writer);
        let many: Vec<OwnedFd> = (0..100).map(|_| writer.try_clone().unwrap()).collect();
        let stored = v1::PutResponse { version: 3, persistent: true, sessions_to_cut: 0 };
        peer.reply_with(id, Reply::Stored(stored), &borrow(&many));
    });
    let put = put(&place, &["--secret-file", "-"]);
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 40; exec \"$@\"", "sh"]);
    command.arg(put.get_program()).args(put.get_args());
    let output = with_input(command, PASSWORD.as_bytes());
    assert_eq!(output.status.code(), Some(70), "{}", stderr(&output));
    assert!(stderr(&output).contains("not all descriptors"), "{}", stderr(&output));
    script.join().unwrap();
}

const FIRST: &str = "password of app for main_db: ";
const SECOND: &str = "password of app for main_db, again: ";

fn ask(place: &Place) -> Terminal {
    let runtime_dir = place.runtime_dir();
    Terminal::run_at(&runtime_dir, &[CREDBROKER, "put", "main_db", "--username", "app"])
}

fn type_twice(terminal: &mut Terminal, first: &str, second: &str) {
    terminal.expect(FIRST);
    terminal.press(format!("{first}\n").as_bytes());
    terminal.expect(SECOND);
    terminal.press(format!("{second}\n").as_bytes());
}

fn shows_what_is_typed(terminal: &Terminal) -> bool {
    tcgetattr(&terminal.controller).unwrap().local_modes.contains(LocalModes::ECHO)
}

#[test]
fn a_secret_is_asked_for_twice_and_never_shown() {
    let place = Place::new();
    let script = store_one(&place, true);
    let mut terminal = ask(&place);
    terminal.expect(FIRST);
    assert!(!shows_what_is_typed(&terminal));
    terminal.press(format!("{PASSWORD}\n").as_bytes());
    terminal.expect(SECOND);
    terminal.press(format!("{PASSWORD}\n").as_bytes());
    terminal.expect("version       3\r\n");
    assert!(terminal.child.wait().unwrap().success());
    assert!(shows_what_is_typed(&terminal));
    assert!(!terminal.screen.contains("horse"), "{}", terminal.screen);
    assert_eq!(script.join().unwrap().1, PASSWORD.as_bytes());
}

#[test]
fn two_secrets_that_differ_and_none_are_not_sent() {
    for (first, second, told) in [(PASSWORD, "correct house", "twice the same"), ("", "", "typed")]
    {
        let place = Place::new();
        let script = expect_nothing(&place);
        let mut terminal = ask(&place);
        if first.is_empty() {
            terminal.expect(FIRST);
            terminal.press(b"\n");
        } else {
            type_twice(&mut terminal, first, second);
        }
        terminal.expect(told);
        assert_eq!(terminal.child.wait().unwrap().code(), Some(64));
        script.join().unwrap();
    }
}

#[test]
fn a_signal_leaves_the_terminal_in_order() {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT] {
        let place = Place::new();
        let script = expect_nothing(&place);
        let mut terminal = ask(&place);
        terminal.expect(FIRST);
        terminal.press(b"half a sec");
        if signal == Signal::INT {
            terminal.press(CTRL_C);
        } else {
            let pid = Pid::from_raw(terminal.child.id().try_into().unwrap()).unwrap();
            kill_process(pid, signal).unwrap();
        }
        assert_eq!(terminal.child.wait().unwrap().signal(), Some(signal.as_raw()));
        assert!(shows_what_is_typed(&terminal), "{signal:?}");
        script.join().unwrap();
    }
}

#[test]
fn a_stopped_command_asks_again_when_it_goes_on() {
    let place = Place::new();
    let script = store_one(&place, true);
    let mut terminal =
        Terminal::run_at(&place.runtime_dir(), &["bash", "--norc", "--noprofile", "-i"]);
    terminal.press(format!("{CREDBROKER} put main_db --username app\n").as_bytes());
    terminal.expect(FIRST);
    terminal.press(CTRL_Z);
    terminal.expect("Stopped");
    terminal.press(b"fg\n");
    type_twice(&mut terminal, PASSWORD, PASSWORD);
    terminal.expect("version       3\r\n");
    assert!(!terminal.screen.contains("horse"), "{}", terminal.screen);
    terminal.press(b"exit\n");
    terminal.child.wait().unwrap();
    assert_eq!(script.join().unwrap().1, PASSWORD.as_bytes());
}

/// How often `needle` is in the memory of a process.
pub(crate) fn count_in_memory(pid: u32, needle: &[u8]) -> usize {
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mut found = 0;
    for map in maps.lines().filter(|map| map.contains(" r") && !map.ends_with("[vvar]")) {
        let (from, to) = map.split(' ').next().unwrap().split_once('-').unwrap();
        let [from, to] = [from, to].map(|text| u64::from_str_radix(text, 16).unwrap());
        let mut bytes = vec![0; (to - from).try_into().unwrap()];
        // Some of the kernel's own cannot be read.
        if memory.read_exact_at(&mut bytes, from).is_ok() {
            found += bytes.windows(needle.len()).filter(|window| *window == needle).count();
        }
    }
    found
}

/// Takes a credential, tells that, and answers when it is told to.
fn hold_one(place: &Place) -> (JoinHandle<Vec<u8>>, mpsc::Receiver<()>, mpsc::Sender<()>) {
    let ((tell, taken), (go_on, told)) = (mpsc::channel(), mpsc::channel());
    let script = Listener::play(&place.admin_packet_socket(), move |listener| {
        let peer = listener.accept();
        let (id, _, descriptors) = peer.receive().unwrap();
        let mut bytes = vec![0; 100];
        let length = rustix::io::pread(&descriptors[0], &mut bytes[..], 0).unwrap();
        bytes.truncate(length);
        tell.send(()).unwrap();
        told.recv().unwrap();
        let stored = v1::PutResponse { version: 3, persistent: true, sessions_to_cut: 0 };
        peer.reply(id, Reply::Stored(stored));
        bytes
    });
    (script, taken, go_on)
}

#[test]
fn no_copy_of_the_secret_is_left_in_the_memory_of_the_command() {
    // Put together here, so that it stands in no program.
    let canary = ["canary", "7f3a", "b1c9"].join("-");

    let place = Place::new();
    let (script, taken, go_on) = hold_one(&place);
    let mut command = put(&place, &["--secret-file", "-"]);
    command.env("POSITIVE_CONTROL", format!("not-{canary}"));
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(canary.as_bytes()).unwrap();
    taken.recv_timeout(crate::broker::PATIENCE).unwrap();
    let control = count_in_memory(child.id(), format!("not-{canary}").as_bytes());
    assert!(control > 0, "the scan finds what is there");
    assert_eq!(count_in_memory(child.id(), canary.as_bytes()), control, "by pipe");
    go_on.send(()).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(script.join().unwrap(), canary.as_bytes());

    let place = Place::new();
    let (script, taken, go_on) = hold_one(&place);
    let mut terminal = ask(&place);
    type_twice(&mut terminal, &canary, &canary);
    taken.recv_timeout(crate::broker::PATIENCE).unwrap();
    assert_eq!(count_in_memory(terminal.child.id(), canary.as_bytes()), 0, "by terminal");
    go_on.send(()).unwrap();
    assert!(terminal.child.wait().unwrap().success());
    assert_eq!(script.join().unwrap(), canary.as_bytes());
}
