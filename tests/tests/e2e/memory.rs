//! Locked memory where there is little of it, and what the broker says of what it got.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use credbroker_e2e::binaries;
use credbroker_e2e::broker::{Broker, Setup, Via};
use credbroker_e2e::identity::{Identity, several_or_say};
use credbroker_e2e::memory;
use credbroker_e2e::postgres::Server;
use credbroker_e2e::process::{output, transcript};
use credbroker_e2e::wait::PATIENCE;

/// sysexits(3), EX_UNAVAILABLE.
const UNAVAILABLE: i32 = 69;

/// The daemon under a limit of so many bytes of locked memory. Lowering it takes no privilege.
fn run_with_memlock(setup: &Setup, bytes: u32) -> Command {
    let mut command = Identity::broker().command_with_death_signal("prlimit", "TERM");
    command.arg(format!("--memlock={bytes}:{bytes}")).arg(binaries::credbrokerd());
    command.args(["run", "--config"]).arg(setup.path("etc/broker.toml"));
    command
}

/// The facts of the posture, as the first record of the audit log has them.
fn recorded_facts(broker: &Broker) -> BTreeMap<String, String> {
    let started = broker.audit().of("broker.started");
    let record = started.first().expect("the first record").line();
    let record: serde_json::Value = serde_json::from_str(&record).expect("a record is JSON");
    let detail = record["detail"].as_object().expect("details").clone();
    let text = |value: serde_json::Value| value.as_str().map(str::to_owned);
    detail.into_iter().filter_map(|(name, value)| Some((name, text(value)?))).collect()
}

#[test]
fn a_broker_with_64_kib_of_locked_memory_serves_and_says_what_it_got() {
    if !several_or_say("a broker without CAP_IPC_LOCK") {
        return;
    }
    let database = Server::shared().database();
    for backend in ["auto", "memfd"] {
        let setup = Broker::usual_setup(&database, Via::Tls).set("arena.backend", backend);
        let _written = setup.write();
        let command = run_with_memlock(&setup, 64 * 1024);
        let broker = setup.start_by(command);
        let client = Identity::client();
        let token = broker.handles(&client).issue("main_db").expect("a grant").token;
        for _round in 0..5 {
            broker.session(&client, "main_db", &token).query("SELECT 1").expect("a query");
        }

        let status = fs::read_to_string(format!("/proc/{}/status", broker.pid())).expect("alive");
        assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
        let facts = recorded_facts(&broker);
        assert_eq!(facts["memlock"], "65536");
        assert_eq!(facts["arena_bytes"], "49152", "three quarters: {facts:?}");
        assert_eq!(facts["arena_wanted_bytes"], "1048576");
        assert!(broker.log().contains("RLIMIT_MEMLOCK caps it"), "{}", broker.log());
        if backend == "memfd" {
            assert_eq!(facts["arena"], "memfd");
            assert!(facts["memfd_secret"].starts_with("no: "), "{facts:?}");
        }
    }
}

#[test]
fn too_little_locked_memory_is_a_refusal_to_start() {
    if !several_or_say("a broker without CAP_IPC_LOCK") {
        return;
    }
    let database = Server::shared().database();
    let setup = Broker::usual_setup(&database, Via::Tls);
    let _written = setup.write();
    let done = output(&mut run_with_memlock(&setup, 16 * 1024), PATIENCE);
    let said = transcript(&done);
    assert_eq!(done.status.code(), Some(UNAVAILABLE), "{said}");
    assert!(said.contains("RLIMIT_MEMLOCK allows 16384 bytes"), "{said}");
}

#[test]
fn the_arena_is_locked_and_stays_out_of_children_and_cores() {
    if !several_or_say("memory of other processes can be looked at") {
        return;
    }
    let database = Server::shared().database();
    for backend in ["auto", "memfd"] {
        let broker = Broker::usual_setup(&database, Via::Tls).set("arena.backend", backend).start();
        let arenas = memory::arena_flags(broker.pid()).expect("the broker is there");
        assert_eq!(arenas.len(), 1, "{arenas:?}");
        for flag in ["lo", "dc", "dd"] {
            assert!(arenas[0].iter().any(|found| found == flag), "{flag}: {arenas:?}");
        }
        assert_eq!(recorded_facts(&broker)["arena_vm_flags"], "lo dc dd");
        // Nobody can map it again: the descriptor is closed.
        let open = fs::read_dir(format!("/proc/{}/fd", broker.pid())).expect("its descriptors");
        let targets = open.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
        let names: Vec<String> = targets.map(|path| path.display().to_string()).collect();
        let arena = |name: &String| name.contains("memfd") || name.contains("secretmem");
        assert!(!names.iter().any(arena), "{names:?}");
    }
}

#[test]
fn the_posture_says_the_same_everywhere_and_hides_nothing() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let recorded = recorded_facts(&broker);
    let done = output(&mut broker.setup().command("posture"), PATIENCE);
    assert!(done.status.success(), "{}", transcript(&done));
    let said = String::from_utf8(done.stdout).expect("text");
    let mut names = Vec::new();
    for line in said.lines() {
        let (name, found) = line.split_once(' ').expect("a name and a fact");
        let recorded = recorded.get(name).unwrap_or_else(|| panic!("{name} is not recorded"));
        assert!(found.trim_start().starts_with(recorded.as_str()), "{line}: {recorded}");
        assert!(broker.log().contains(line), "not logged: {line}\n{}", broker.log());
        names.push(name.to_owned());
    }
    let extra: Vec<_> = recorded.keys().filter(|name| !names.contains(name)).collect();
    assert_eq!(extra, ["key", "version"]);
    for (name, expected) in [
        ("dumpable", "no"),
        ("core_limit", "0"),
        ("no_new_privs", "yes"),
        ("seccomp", "on"),
        ("plaintext_tcp", "none"),
        ("secrets_from_environment", "none"),
        ("metrics", "off"),
    ] {
        assert_eq!(recorded[name], expected, "{name}");
    }
}
