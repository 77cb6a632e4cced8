//! G9: whoever changes the audit log is found out, by the command line, offline, in the log of a
//! broker that did real work.

use std::fs;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::thread;

use credbroker_e2e::assert_eventually;
use credbroker_e2e::audit::{Verified, verify};
use credbroker_e2e::broker::{Broker, Via};
use credbroker_e2e::canary::Pattern;
use credbroker_e2e::identity::{Identity, several_or_say};
use credbroker_e2e::memory;
use credbroker_e2e::postgres::Server;
use data_encoding::HEXLOWER;
use ring::digest::{SHA256, SHA512, digest};
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use rustix::process::Signal;
use tempfile::TempDir;

/// The log of a broker that issued, opened, refused, revoked, rotated its files, was killed once
/// and ended; in memory, for it is changed again and again.
struct Evidence {
    /// Oldest first.
    files: Vec<Vec<u8>>,
    /// What an operator noted while it ran, and at its end.
    noted: Vec<String>,
    /// `audit.pub`.
    keys: Vec<u8>,
    /// The public half of `audit.signing_key`.
    root: String,
}

/// A place to put files that were changed.
struct Desk(TempDir);

const SEED: [u8; 32] = [0x5e; 32];

fn evidence() -> &'static Evidence {
    static EVIDENCE: OnceLock<Evidence> = OnceLock::new();
    EVIDENCE.get_or_init(|| {
        let database = Server::shared().database();
        let setup = Broker::usual_setup(&database, Via::Tls)
            .set("audit.max_size", "64KiB")
            .set("limits.rate_per_second", 10_000_i64);
        let key = setup.broker_file("etc/audit-key", &HEXLOWER.encode(&SEED));
        let setup = setup.set("audit.signing_key.file", key.to_str().expect("ASCII"));
        let mut broker = setup.start();
        let client = Identity::client();
        let head = |broker: &Broker| {
            let records = broker.audit().records();
            let last = records.last().expect("a record");
            let hash = last.text("hash").expect("a hash").to_owned();
            format!("{}:{hash}", last.number("seq").expect("a number"))
        };
        let work = |broker: &Broker, handles: usize| {
            let service = broker.handles(&client);
            for number in 0..handles {
                let issued = service.issue("main_db").expect("a grant");
                if number % 10 == 0 {
                    drop(broker.session(&client, "main_db", &issued.token));
                    let _denied = service.issue("no_such_db").expect_err("no such connection");
                }
                service.revoke(&issued.token).expect("it is ours");
            }
        };
        // One in each file: what is missing shows against a head that was noted in it.
        work(&broker, 10);
        let mut noted = vec![head(&broker)];
        work(&broker, 70);
        noted.push(head(&broker));
        broker.restart_after(Signal::KILL);
        work(&broker, 70);
        broker.restart_after(Signal::TERM);
        work(&broker, 5);
        assert_eventually!(database.backends() == 0, "sessions stay");
        let _status = broker.end_with(Signal::TERM);
        noted.push(head(&broker));
        let files = broker.audit().files();
        assert!(files.len() > 1, "it was rotated: {files:?}");
        let read = |path: &PathBuf| fs::read(path).expect("a file of the log");
        let pair = Ed25519KeyPair::from_seed_unchecked(&SEED).expect("a seed");
        Evidence {
            files: files.iter().map(read).collect(),
            noted,
            keys: read(&broker.setup().path("state/audit.pub")),
            root: HEXLOWER.encode(pair.public_key().as_ref()),
        }
    })
}

impl Evidence {
    /// All lines, oldest first.
    fn lines(&self) -> Vec<String> {
        let text = |file: &Vec<u8>| String::from_utf8(file.clone()).expect("text");
        let files = self.files.iter().map(text);
        files.flat_map(|file| file.lines().map(str::to_owned).collect::<Vec<_>>()).collect()
    }
}

impl Desk {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    fn put(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, content).expect("a file");
        path
    }

    /// Puts the files as a log.
    fn log(&self, files: &[Vec<u8>]) -> Vec<PathBuf> {
        (0..).zip(files).map(|(n, file): (u32, _)| self.put(&format!("log.{n}"), file)).collect()
    }

    /// Verifies lines as one file.
    fn verify(&self, options: &[&str], lines: &[String]) -> Verified {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        verify(options, &[self.put("lines", text.as_bytes())])
    }

    fn key(&self, name: &str, content: &[u8]) -> String {
        self.put(name, content).to_str().expect("ASCII").to_owned()
    }
}

fn random(below: usize) -> usize {
    let mut bytes = [0; 8];
    SystemRandom::new().fill(&mut bytes).expect("the kernel has randomness");
    usize::try_from(u64::from_be_bytes(bytes) % u64::try_from(below).expect("small"))
        .expect("small")
}

/// For the run's log.
#[expect(clippy::print_stdout, reason = "each proof prints its number")]
fn say(number: &str) {
    println!("{number}");
}

#[test]
fn g9_the_log_as_it_was_written_is_whole() {
    let (evidence, desk) = (evidence(), Desk::new());
    let files = desk.log(&evidence.files);
    let by_itself = verify(&[], &files);
    assert_eq!(by_itself.message(), "", "{}", by_itself.report);
    assert_eq!(by_itself.report["trusted"], false);
    assert_eq!(by_itself.number("unsigned"), 0, "a checkpoint is the last record");
    let mut backwards = files.clone();
    backwards.reverse();
    for key in [desk.key("audit.pub", &evidence.keys), desk.key("root", evidence.root.as_bytes())] {
        let mut options = vec!["--key", key.as_str()];
        evidence.noted.iter().for_each(|noted| options.extend(["--head", noted.as_str()]));
        let verified = verify(&options, &backwards);
        assert_eq!(verified.message(), "", "{}", verified.report);
        assert_eq!(verified.report["trusted"], true);
    }
    println!(
        "{} records in {} files, {} checkpoints",
        by_itself.number("records"),
        files.len(),
        by_itself.number("checkpoints")
    );
}

#[test]
fn g9_each_of_a_thousand_edits_of_a_byte_is_found() {
    const EDITS: usize = 1000;
    const THREADS: usize = 4;
    let evidence = evidence();
    let edit = |edits: Range<usize>| {
        let desk = Desk::new();
        let paths = desk.log(&evidence.files);
        for number in edits {
            if number % 100 == 0 {
                assert_eq!(verify(&[], &paths).message(), "", "the control");
            }
            let index = random(paths.len());
            let (path, file) = (&paths[index], &evidence.files[index]);
            let (at, change) = (random(file.len()), random(255) + 1);
            let mut edited = file.clone();
            edited[at] ^= u8::try_from(change).expect("a byte");
            fs::write(path, &edited).expect("the edit");
            let found = verify(&[], &paths);
            assert_ne!(found.message(), "", "byte {at} of file {index} xor {change}");
            fs::write(path, file).expect("the file as it was");
        }
        EDITS / THREADS
    };
    let found: usize = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|n| scope.spawn(move || edit(n * EDITS / THREADS..(n + 1) * EDITS / THREADS)))
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("each is found")).sum()
    });
    println!("{found} of {EDITS} edits found");
    assert_eq!(found, EDITS);
}

#[test]
fn g9_each_line_that_is_cut_out_moved_or_put_in_is_found() {
    let (evidence, desk) = (evidence(), Desk::new());
    let lines = evidence.lines();
    assert_eq!(desk.verify(&[], &lines).message(), "", "the control");
    let mut found = 0;
    let mut assert_found = |what: &str, changed: &[String]| {
        let verified = desk.verify(&[], changed);
        assert_ne!(verified.message(), "", "{what}: {}", verified.report);
        found += 1;
    };
    for at in (1..lines.len() - 1).step_by(7) {
        let mut changed = lines.clone();
        changed.remove(at);
        assert_found("taken out", &changed);
        changed.insert(at - 1, lines[at].clone());
        assert_found("moved", &changed);
        let mut changed = lines.clone();
        changed.insert(at, lines[at].clone());
        assert_found("doubled", &changed);
        let mut changed = lines.clone();
        changed.insert(at, lines[(at * 31) % lines.len()].clone());
        assert_found("put in", &changed);
        let mut changed = lines.clone();
        let cut = lines.len().min(at + 1 + random(20)) - 1;
        changed.drain(at..=cut.max(at));
        if cut + 1 < lines.len() {
            assert_found("cut in the middle", &changed);
        }
    }
    println!("{found} changes of lines found");
}

#[test]
fn g9_a_file_that_is_missing_swapped_or_cut_is_found() {
    let (evidence, desk) = (evidence(), Desk::new());
    let noted: Vec<&str> =
        evidence.noted.iter().flat_map(|noted| ["--head", noted.as_str()]).collect();
    let files = &evidence.files;
    assert_eq!(verify(&noted, &desk.log(files)).message(), "", "the control");
    // In the middle, at the beginning, at the end.
    for missing in 0..files.len() {
        let mut left = files.clone();
        left.remove(missing);
        let verified = verify(&noted, &desk.log(&left));
        assert_ne!(verified.message(), "", "file {missing} is missing");
    }
    // A cut tail shows against a noted head, and only so.
    let lines = evidence.lines();
    for cut in [1, 2, 10] {
        let left = &lines[..lines.len() - cut];
        assert_eq!(desk.verify(&[], left).message(), "");
        let verified = desk.verify(&noted, left);
        assert!(verified.message().contains("cut off"), "{}", verified.report);
    }
    // What no checkpoint covers is counted.
    let report = desk.verify(&[], &lines[..lines.len() - 3]);
    assert!(report.number("unsigned") > 0, "{}", report.report);
    assert_eq!(
        report.number("unsigned") + report.number("signed_to"),
        u64::try_from(lines.len() - 3).expect("small")
    );
    // The last line is torn.
    let text = lines.join("\n");
    assert!(verify(&[], &[desk.put("torn", text.as_bytes())]).message().contains("does not end"));
}

/// Makes the log anew after `edit`, as somebody would who knows all but the broker's keys: hashes
/// are right, and checkpoints are signed with another key, which starts announce if they are to.
fn forge(lines: &[String], edit: impl Fn(&str) -> String, announce: bool) -> Vec<String> {
    let pair = Ed25519KeyPair::from_seed_unchecked(&[9; 32]).expect("a seed");
    let own = HEXLOWER.encode(pair.public_key().as_ref());
    let mut before = [0; 32];
    let mut forged = Vec::new();
    for line in lines {
        let mut body = edit(line);
        let value: serde_json::Value = serde_json::from_str(line).expect("a record");
        let text = |path: &str| value.pointer(path).and_then(|text| text.as_str());
        if let Some(signature) = text("/detail/signature") {
            let (broker, time) = (text("/broker").expect("a name"), text("/time").expect("a time"));
            let mut message = b"credbroker audit checkpoint v1\0".to_vec();
            for text in [broker, time] {
                message.extend(u64::try_from(text.len()).expect("short").to_be_bytes());
                message.extend(text.as_bytes());
            }
            message.extend(value["seq"].as_u64().expect("a number").to_be_bytes());
            message.extend(before);
            body = body.replace(signature, &HEXLOWER.encode(pair.sign(&message).as_ref()));
            body = body.replace(text("/detail/key").expect("a key"), &own);
        } else if let (true, Some(key)) = (announce, text("/detail/key")) {
            body = body.replace(key, &own);
        }
        body = body.replace(text("/prev").expect("a hash"), &HEXLOWER.encode(&before));
        let (body, _) = body.rsplit_once(",\"hash\":").expect("a hash");
        before = digest(&SHA256, body.as_bytes()).as_ref().try_into().expect("32 bytes");
        forged.push(format!("{body},\"hash\":\"{}\"}}", HEXLOWER.encode(&before)));
    }
    forged
}

#[test]
fn g9_a_log_that_is_made_anew_with_a_foreign_key_is_found() {
    let (evidence, desk) = (evidence(), Desk::new());
    let lines = evidence.lines();
    let clean =
        |line: &str| line.replace("\"event\":\"handle.issued\"", "\"event\":\"handle.expired\"");
    let announced = forge(&lines, clean, true);
    // The control: it is forged so well that by itself it is whole.
    let by_itself = desk.verify(&[], &announced);
    assert_eq!(by_itself.message(), "", "{}", by_itself.report);
    for key in [desk.key("audit.pub", &evidence.keys), desk.key("root", evidence.root.as_bytes())] {
        let verified = desk.verify(&["--key", &key], &announced);
        assert!(verified.message().contains("foreign"), "{}", verified.report);
    }
    let noted = desk.verify(&["--head", &evidence.noted[0]], &announced);
    assert!(noted.message().contains("not the one that was noted"), "{}", noted.report);
    // Who leaves the announcement as it is, is found without any key.
    let verified = desk.verify(&[], &forge(&lines, clean, false));
    assert!(verified.message().contains("foreign"), "{}", verified.report);
    println!("{} lines made anew, found by key, by head and by announcement", lines.len());
}

/// What a seed is worth: itself, and what Ed25519 makes of it (RFC 8032 §5.1.5), the scalar both
/// as it comes and as it is used.
fn worth(seed: &[u8]) -> Vec<Pattern> {
    let expanded = digest(&SHA512, seed);
    let (scalar, prefix) = expanded.as_ref().split_at(32);
    let mut clamped = scalar.to_vec();
    clamped[0] &= 248;
    clamped[31] = (clamped[31] & 127) | 64;
    vec![
        Pattern::new("seed", seed),
        Pattern::new("seed, hexadecimal", HEXLOWER.encode(seed).as_bytes()),
        Pattern::new("hash of the seed", scalar),
        Pattern::new("scalar", &clamped),
        Pattern::new("prefix", prefix),
    ]
}

#[test]
fn g2_the_keys_that_sign_lie_in_the_arena_only() {
    if !several_or_say("memory of other processes can be read") {
        return;
    }
    let database = Server::shared().database();
    let mut root = [0; 32];
    SystemRandom::new().fill(&mut root).expect("the kernel has randomness");
    let setup = Broker::usual_setup(&database, Via::Tls)
        .set("audit.max_size", "64KiB")
        .set("limits.rate_per_second", 10_000_i64)
        // Of the other kind nobody can read the key, this test included.
        .set("arena.backend", "memfd")
        .set("arena.capacity", "64KiB");
    let key = setup.broker_file("etc/audit-key", &HEXLOWER.encode(&root));
    let setup = setup.set("audit.signing_key.file", key.to_str().expect("ASCII"));
    let broker = setup.start();
    let service = broker.handles(&Identity::client());
    let signed = || {
        let files = broker.audit().files();
        let text = |path: &PathBuf| fs::read_to_string(path).unwrap_or_default();
        files.iter().map(|path| text(path).matches("\"checkpoint\"").count()).sum::<usize>()
    };
    for _ in 0..150 {
        for _ in 0..10 {
            let issued = service.issue("main_db").expect("a grant");
            service.revoke(&issued.token).expect("it is ours");
        }
        if signed() >= 5 {
            break;
        }
    }
    let signatures = signed();
    assert!(signatures >= 5, "{signatures}");

    // The key of the start: the place in the arena that makes the public key that was published.
    let published = fs::read_to_string(broker.setup().path("state/audit.pub")).expect("keys");
    let start = published.lines().last().and_then(|line| line.get(..64)).expect("a key");
    let arena = memory::read_arena(broker.pid()).expect("the arena can be read");
    let makes_it = |seed: &&[u8]| {
        let pair = Ed25519KeyPair::from_seed_unchecked(seed);
        pair.is_ok_and(|pair| HEXLOWER.encode(pair.public_key().as_ref()) == start)
    };
    let seed = (0..arena.len() - 32).step_by(8).map(|at| &arena[at..at + 32]);
    let seed = seed.filter(|seed| seed.iter().any(|byte| *byte != 0)).find(makes_it);
    let seed = seed.expect("the arena holds the key of the start");

    let live = memory::scan(broker.pid(), &worth(seed)).expect("the broker can be read");
    assert_eq!(live.in_arena(), 1, "the control: the search finds it: {:?}", live.hits);
    assert!(live.outside_arena().is_empty(), "{:?}", live.outside_arena());
    // The signing key has done its work: not even the arena has it.
    let gone = memory::scan(broker.pid(), &worth(&root)).expect("the broker can be read");
    assert!(gone.hits.is_empty(), "{:?}", gone.hits);
    say(&format!("after {signatures} signatures 0 copies in {} bytes", live.bytes_read));
}
