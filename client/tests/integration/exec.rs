//! `credbroker exec`.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, SystemTime};

use credbroker_proto::v1;
use rustix::process::{Pid, Signal, kill_process};

use crate::broker::{Broker, Event};
use crate::commands::{credbroker, stderr, stdout};

fn exec(broker: &Broker, arguments: &[&str]) -> Command {
    let mut command = credbroker(broker);
    command.arg("exec").args(arguments);
    command
}

fn spawn(command: &mut Command) -> (Child, BufReader<ChildStdout>) {
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    (child, stdout)
}

fn line(from: &mut impl BufRead) -> String {
    let mut line = String::new();
    from.read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

fn pid(of: &Child) -> Pid {
    Pid::from_raw(of.id().try_into().unwrap()).unwrap()
}

/// The token of the nth handle, from 0, and its id.
fn issued(broker: &Broker, nth: usize) -> (String, String) {
    let log = broker.log();
    let mut issues = log.iter().filter_map(|event| match event {
        Event::Issued { id, token, .. } => Some((token.clone(), id.clone())),
        _ => None,
    });
    issues.nth(nth).unwrap()
}

/// The environment of a command that was started with `arguments` and `before` set.
fn environment(
    broker: &Broker,
    arguments: &[&str],
    before: &[(&str, &str)],
) -> HashMap<String, String> {
    let mut command = exec(broker, arguments);
    let output = command.envs(before.iter().copied()).args(["--", "env", "-0"]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stderr(&output), "");
    let text = stdout(&output);
    let pairs = text.split_terminator('\0').map(|pair| pair.split_once('=').unwrap());
    pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

#[test]
fn the_command_finds_its_login_and_nothing_that_leads_elsewhere() {
    let broker = Broker::start();
    let elsewhere = [
        ("PGHOSTADDR", "192.0.2.1"),
        ("PGSERVICE", "other"),
        ("PGSSLMODE", "require"),
        ("PGCHANNELBINDING", "require"),
        ("PGREQUIREAUTH", "scram-sha-256"),
        ("PGSSLROOTCERT", "system"),
    ];
    let mut before = elsewhere.to_vec();
    before.extend([("PGPORT", "1"), ("PGPASSWORD", "old"), ("PGOPTIONS", "-c x=y")]);
    let found = environment(&broker, &["main_db", "--env", "DSN={user}@{host}:{port}"], &before);

    let (token, _) = issued(&broker, 0);
    let door = broker.runtime_dir().join("postgres").to_str().unwrap().to_owned();
    let url = format!("postgresql:///mydb?host={door}&user=main_db&password={token}");
    for (key, value) in [
        ("PGHOST", door.as_str()),
        ("PGPORT", "5432"),
        ("PGUSER", "main_db"),
        ("PGPASSWORD", &token),
        ("PGDATABASE", "mydb"),
        ("DATABASE_URL", &url),
        ("DATABASE_URI", &url),
        ("MAIN_DB_URL", &url),
        ("DSN", &format!("main_db@{door}:5432")),
        ("PGOPTIONS", "-c x=y"),
    ] {
        assert_eq!(found.get(key).map(String::as_str), Some(value), "{key}");
    }
    for (key, _) in elsewhere {
        assert_eq!(found.get(key), None, "{key}");
    }
}

#[test]
fn several_names_have_their_own_variables() {
    let broker = Broker::start();
    let template = "BOTH={token} {reports.token}";
    let found = environment(&broker, &["main_db", "reports", "--env", template], &[]);
    let (first, second) = (issued(&broker, 0).0, issued(&broker, 1).0);
    assert_eq!(found["PGPASSWORD"], first);
    assert_eq!(found["BOTH"], format!("{first} {second}"));
    assert!(found["REPORTS_URL"].ends_with(&second));
    assert_eq!(broker.live_handles(), 0, "both are revoked");
}

#[test]
fn handles_are_bound_to_the_life_of_exec_and_revoked_at_its_end() {
    let broker = Broker::start();
    let output = exec(&broker, &["main_db", "--", "sh", "-c", "exit 7"]).output().unwrap();
    assert_eq!(output.status.code(), Some(7));
    assert_eq!((stdout(&output), stderr(&output)), (String::new(), String::new()));
    let log = broker.log();
    let [Event::Issued { request, id, .. }, Event::Revoked { id: revoked }] = log.as_slice() else {
        panic!("{log:?}")
    };
    assert_eq!(id, revoked);
    assert_eq!(request.bind(), v1::Bind::Lifetime);
    assert_eq!(request.purpose, "exec sh");
}

#[test]
fn without_pidfd_the_handle_is_not_bound_and_exec_says_so() {
    let broker = Broker::start();
    let output = exec(&broker, &["no_pidfd", "--", "echo", "ran"]).output().unwrap();
    assert_eq!(stdout(&output), "ran\n");
    assert!(stderr(&output).contains("cannot tie the handle"), "{}", stderr(&output));
    assert_eq!(stderr(&output).lines().count(), 1);
    assert_eq!(broker.live_handles(), 0);
}

#[test]
fn the_status_is_that_of_the_command() {
    let broker = Broker::start();
    let directory = tempfile::tempdir().unwrap();
    let plain_file = directory.path().join("plain");
    fs::write(&plain_file, "").unwrap();
    fs::set_permissions(&plain_file, fs::Permissions::from_mode(0o644)).unwrap();
    for (command, code) in [
        (&["true"][..], 0),
        (&["sh", "-c", "exit 255"], 255),
        (&["sh", "-c", "kill -TERM $$"], 143),
        (&["sh", "-c", "kill -KILL $$"], 137),
        (&["/nonexistent/command"], 127),
        (&[plain_file.to_str().unwrap()], 126),
    ] {
        let output = exec(&broker, &["main_db", "--"]).args(command).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{command:?}: {}", stderr(&output));
    }
    assert_eq!(broker.live_handles(), 0);
}

#[test]
fn without_a_login_the_command_is_not_started() {
    let broker = Broker::start();
    for (arguments, code) in [
        (&["denied"][..], 77),
        (&["main_db", "busy"], 69),
        (&["main_db", "--env", "X={ulr}"], 64),
        (&["main-db", "main_db"], 64),
    ] {
        let output = exec(&broker, arguments).args(["--", "echo", "ran"]).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        assert_eq!(stdout(&output), "");
        assert_eq!(stderr(&output).lines().count(), 1, "{}", stderr(&output));
    }
    assert_eq!(broker.live_handles(), 0, "what was issued before the refusal is revoked");
}

#[test]
fn the_token_is_on_no_command_line() {
    let broker = Broker::start();
    let script = "cat /proc/$$/cmdline /proc/$PPID/cmdline /proc/$PPID/environ";
    let output = exec(&broker, &["main_db", "--", "sh", "-c", script]).output().unwrap();
    let text = stdout(&output);
    assert!(text.contains("main_db"), "{text:?}");
    assert!(!text.contains("cbh_"), "{text:?}");
}

#[test]
fn the_command_has_the_signal_mask_that_exec_was_given() {
    let broker = Broker::start();
    let script = ["sh", "-c", "grep -E '^Sig(Blk|Ign)' /proc/self/status"];
    let alone = Command::new("env").args(script).output().unwrap();
    let output = exec(&broker, &["main_db", "--"]).args(script).output().unwrap();
    assert_eq!(stdout(&output), stdout(&alone));
}

#[test]
fn signals_are_passed_on() {
    let broker = Broker::start();
    for (signal, name) in [
        (Signal::TERM, "TERM"),
        (Signal::HUP, "HUP"),
        (Signal::INT, "INT"),
        (Signal::QUIT, "QUIT"),
        (Signal::USR1, "USR1"),
        (Signal::USR2, "USR2"),
        (Signal::WINCH, "WINCH"),
        (Signal::CONT, "CONT"),
    ] {
        // `wait` is what a trapped signal interrupts in every shell. SIGKILL, because before it
        // is `sleep`, that process is still a shell that could lose any other signal.
        let script =
            format!("trap 'echo got; kill -KILL $!; exit 5' {name}; sleep 1000 & echo ready; wait");
        let (mut child, mut out) =
            spawn(&mut exec(&broker, &["main_db", "--", "sh", "-c", &script]));
        assert_eq!(line(&mut out), "ready", "{name}");
        kill_process(pid(&child), signal).unwrap();
        assert_eq!(line(&mut out), "got", "{name}");
        assert_eq!(child.wait().unwrap().code(), Some(5), "{name}");
    }
    assert_eq!(broker.live_handles(), 0);
}

#[test]
fn exec_outlives_a_signal_that_the_command_ignores() {
    let broker = Broker::start();
    let script = "trap '' TERM; echo ready; read x; echo $x";
    let (mut child, mut out) =
        spawn(exec(&broker, &["main_db", "--", "sh", "-c", script]).stdin(Stdio::piped()));
    assert_eq!(line(&mut out), "ready");
    kill_process(pid(&child), Signal::TERM).unwrap();
    child.stdin.take().unwrap().write_all(b"still here\n").unwrap();
    assert_eq!(line(&mut out), "still here");
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_signal_before_the_command_starts_ends_exec() {
    let broker = Broker::start();
    let mut child = exec(&broker, &["main_db", "stuck", "--", "true"]).spawn().unwrap();
    let (id, _) = broker.wait_for_issue();
    kill_process(pid(&child), Signal::INT).unwrap();
    broker.wait_for_revocation(&id);
    // It may still wait for an answer to the second request, in order to revoke that too.
    kill_process(pid(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn the_handle_outlives_its_first_lifetime() {
    let broker = Broker::start();
    let mut command = exec(&broker, &["main_db", "--ttl", "2s", "--", "cat"]);
    let (mut child, mut out) = spawn(command.stdin(Stdio::piped()));
    broker.wait_for_issue();
    let first_end = SystemTime::now() + Duration::from_secs(2);
    let id = broker.wait_for("a renewal after the first lifetime", |event| match event {
        Event::Renewed { id, at } => (*at > first_end).then(|| id.clone()),
        _ => None,
    });
    drop(child.stdin.take());
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(rest, "");
    broker.wait_for_revocation(&id);
}

#[test]
fn a_handle_that_is_revoked_is_told_once_and_the_command_goes_on() {
    let broker = Broker::start();
    let mut command = exec(&broker, &["main_db", "--ttl", "1s", "--", "cat"]);
    let (mut child, mut out) = spawn(command.stdin(Stdio::piped()).stderr(Stdio::piped()));
    let (id, _) = broker.wait_for_issue();
    broker.forget(&id);
    let mut err = BufReader::new(child.stderr.take().unwrap());
    let told = line(&mut err);
    assert!(told.contains(&id) && told.contains("HANDLE_INVALID"), "{told}");

    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"still here\n").unwrap();
    assert_eq!(line(&mut out), "still here");
    drop(stdin);
    assert!(child.wait().unwrap().success());
    let mut rest = String::new();
    err.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "", "told once, and revoking what is gone is no news");
}

#[test]
fn the_command_dies_when_exec_is_killed() {
    let broker = Broker::start();
    let script = "trap '' TERM HUP INT; echo $$; while :; do read x; done";
    let mut command = exec(&broker, &["main_db", "--", "sh", "-c", script]);
    let (mut child, mut out) = spawn(command.stdin(Stdio::piped()));
    let stdin = child.stdin.take();
    let command: u32 = line(&mut out).parse().unwrap();
    assert!(fs::metadata(format!("/proc/{command}")).is_ok());
    child.kill().unwrap();
    child.wait().unwrap();
    // Its end of the pipe closes when it dies, and nobody else has one.
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "");
    drop(stdin);
}

#[test]
fn without_a_terminal_a_stopped_command_does_not_stop_renewal() {
    let broker = Broker::start();
    let mut command = Command::new("setsid");
    command.arg(env!("CARGO_BIN_EXE_credbroker")).arg("--runtime-dir").arg(broker.runtime_dir());
    command.args(["exec", "main_db", "--ttl", "1s", "--"]);
    command.args(["sh", "-c", "kill -STOP $$; echo continued $$"]);
    let (mut child, mut out) = spawn(command.stdin(Stdio::null()));
    let (_, exec) = broker.wait_for_issue();
    broker.wait_for("a renewal while the command is stopped", |event| match event {
        Event::Renewed { .. } => Some(()),
        _ => None,
    });
    let children = fs::read_to_string(format!("/proc/{exec}/task/{exec}/children")).unwrap();
    let stopped = Pid::from_raw(children.trim().parse().unwrap()).unwrap();
    kill_process(stopped, Signal::CONT).unwrap();
    assert_eq!(line(&mut out), format!("continued {}", stopped.as_raw_nonzero()));
    assert!(child.wait().unwrap().success());
}
