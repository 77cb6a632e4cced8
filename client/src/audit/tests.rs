use std::fs;

use ring::digest::{SHA256, digest};
use ring::signature::{Ed25519KeyPair, KeyPair as _};

use super::*;

/// Writes a log as a broker does.
struct Log {
    key: Ed25519KeyPair,
    root: Option<Ed25519KeyPair>,
    head: Head,
    lines: Vec<String>,
}

const TIME: &str = "2026-11-24T00:00:00.000000Z";

fn pair(seed: u8) -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap()
}

fn public(pair: &Ed25519KeyPair) -> String {
    HEXLOWER.encode(pair.public_key().as_ref())
}

fn keys(pair: &Ed25519KeyPair) -> Keys {
    Keys::parse(&public(pair)).unwrap()
}

fn prefixed(domain: &str, texts: &[&str]) -> Vec<u8> {
    let mut message = domain.as_bytes().to_vec();
    for text in texts {
        message.extend((text.len() as u64).to_be_bytes());
        message.extend(text.as_bytes());
    }
    message
}

impl Log {
    fn new(key: u8, root: Option<u8>) -> Self {
        let head = Head { seq: 0, hash: Hash::default() };
        Self { key: pair(key), root: root.map(pair), head, lines: Vec::new() }
    }

    /// A start, `records` records and a checkpoint.
    fn usual(key: u8, root: Option<u8>, records: u64) -> Self {
        let mut log = Self::new(key, root);
        log.start();
        (0..records).for_each(|_| log.record(r#""event":"handle.issued","outcome":"allowed""#));
        log.checkpoint();
        log
    }

    fn record(&mut self, said: &str) {
        let Head { seq, hash } = self.head;
        let body = format!(
            "{{\"v\":1,\"seq\":{},\"time\":\"{TIME}\",\"broker\":\"host\",{said},\"prev\":\"{}\"",
            seq + 1,
            HEXLOWER.encode(&hash)
        );
        let hash: Hash = digest(&SHA256, body.as_bytes()).as_ref().try_into().unwrap();
        self.lines.push(format!("{body},\"hash\":\"{}\"}}", HEXLOWER.encode(&hash)));
        self.head = Head { seq: seq + 1, hash };
    }

    fn certificate(&self) -> String {
        let Some(root) = &self.root else { return String::new() };
        let mut message = prefixed("credbroker audit key v1\0", &["host"]);
        message.extend(self.key.public_key().as_ref());
        format!("\"certificate\":\"{}\",", HEXLOWER.encode(root.sign(&message).as_ref()))
    }

    fn start(&mut self) {
        let (certificate, key) = (self.certificate(), public(&self.key));
        self.record(&format!(
            r#""event":"broker.started","outcome":"done","detail":{{{certificate}"key":"{key}"}}"#
        ));
    }

    fn checkpoint(&mut self) {
        let mut message = prefixed("credbroker audit checkpoint v1\0", &["host", TIME]);
        message.extend((self.head.seq + 1).to_be_bytes());
        message.extend(self.head.hash);
        let signature = HEXLOWER.encode(self.key.sign(&message).as_ref());
        let (certificate, key) = (self.certificate(), public(&self.key));
        self.record(&format!(
            r#""event":"checkpoint","outcome":"done","detail":{{{certificate}"key":"{key}","signature":"{signature}"}}"#
        ));
    }

    fn verify(&self, keys: Keys, noted: &[Head]) -> Report {
        check(&self.lines, keys, noted)
    }
}

fn check(lines: &[String], keys: Keys, noted: &[Head]) -> Report {
    let mut verifier = Verifier::new(keys, noted.iter().copied());
    for (line, text) in (1..).zip(lines) {
        if let Err(fault) = verifier.line(text.as_bytes()) {
            return verifier.break_off(Broken { file: None, line, fault });
        }
    }
    verifier.finish()
}

/// What a line says, without its place in the chain.
fn said(line: &str) -> &str {
    let (_, said) = line.split_once("\"broker\":\"host\",").unwrap();
    said.split_once(",\"prev\"").unwrap().0
}

fn fault(report: &Report) -> Option<&Fault> {
    report.broken.as_ref().map(|broken| &broken.fault)
}

#[test]
fn a_whole_log_is_whole_and_what_is_not_signed_is_counted() {
    let mut log = Log::usual(1, None, 5);
    log.record(r#""event":"handle.revoked","outcome":"done""#);
    let report = log.verify(Keys::none(), &[log.head]);
    assert_eq!(report.broken, None);
    assert_eq!((report.records, report.first), (8, Some(1)));
    assert_eq!((report.signed_to, report.unsigned, report.checkpoints), (Some(7), 1, 1));
    assert_eq!(report.head, Some(log.head));
    assert!(!report.trusted);
    assert!(log.verify(keys(&log.key), &[]).trusted);
    assert_eq!(fault(&check(&[], Keys::none(), &[])), Some(&Fault::Empty));
}

#[test]
fn every_change_of_a_byte_is_found() {
    let log = Log::usual(1, Some(2), 3);
    for (index, line) in log.lines.iter().enumerate() {
        for at in 0..line.len() {
            for change in [1, 0x20, 0x80] {
                let mut bytes = line.clone().into_bytes();
                bytes[at] ^= change;
                let mut verifier = Verifier::new(Keys::none(), []);
                for (other, line) in log.lines.iter().enumerate() {
                    let bytes = if other == index { &bytes } else { line.as_bytes() };
                    let answer = verifier.line(bytes);
                    assert_eq!(answer.is_err(), other == index, "line {index} byte {at}");
                    if answer.is_err() {
                        break;
                    }
                }
            }
        }
    }
}

#[test]
fn every_line_that_is_taken_out_moved_or_doubled_is_found() {
    let log = Log::usual(1, None, 10);
    let changed = |change: &dyn Fn(&mut Vec<String>)| {
        let mut lines = log.lines.clone();
        change(&mut lines);
        check(&lines, Keys::none(), &[log.head])
    };
    for at in 0..log.lines.len() {
        let gone = changed(&|lines| drop(lines.remove(at)));
        assert!(gone.broken.is_some() || (at == 0 && gone.first == Some(2)), "{at}");
        assert!(changed(&|lines| lines.insert(at, lines[at].clone())).broken.is_some());
        if at > 0 {
            assert!(changed(&|lines| lines.swap(at - 1, at)).broken.is_some());
        }
    }
    let cut = check(&log.lines[..5], Keys::none(), &[log.head]);
    assert_eq!(fault(&cut), Some(&Fault::CutOff { noted: 12, end: 5 }));
    let old = check(&log.lines[3..], Keys::none(), &[Head { seq: 1, hash: [0; 32] }]);
    assert_eq!(fault(&old), Some(&Fault::Before { noted: 1, first: 4 }));
    let other = Head { hash: [1; 32], seq: 3 };
    assert_eq!(fault(&log.verify(Keys::none(), &[other])), Some(&Fault::NotTheNoted { seq: 3 }));
}

#[test]
fn who_makes_the_chain_anew_needs_the_key() {
    let ours = Log::usual(1, None, 3);
    let theirs = Log::usual(9, None, 2);
    assert_eq!(theirs.verify(Keys::none(), &[]).broken, None, "by itself it is a log");
    assert_eq!(fault(&theirs.verify(keys(&ours.key), &[])), Some(&Fault::ForeignKey));
    // The start stands, and the checkpoints are by another key.
    let mut mixed = Log::new(1, None);
    mixed.start();
    mixed.key = pair(9);
    mixed.checkpoint();
    for keys in [Keys::none(), keys(&ours.key)] {
        assert_eq!(fault(&mixed.verify(keys, &[])), Some(&Fault::ForeignKey));
    }
    // The right key is named, and another one signs.
    let mut forged = Log::new(1, None);
    forged.start();
    forged.key = pair(9);
    forged.checkpoint();
    let line = forged.lines.pop().unwrap().replace(&public(&pair(9)), &public(&ours.key));
    forged.head = Head { seq: 1, ..forged.head };
    let said = said(&line);
    let mut again = Log::new(1, None);
    again.start();
    again.record(said);
    assert_eq!(fault(&again.verify(Keys::none(), &[])), Some(&Fault::ForgedSignature));
}

#[test]
fn a_signing_key_vouches_for_the_keys_of_starts() {
    let root = pair(7);
    let mut log = Log::usual(1, Some(7), 2);
    log.key = pair(2);
    log.start();
    log.checkpoint();
    assert_eq!(log.verify(keys(&root), &[]).broken, None);
    // A file from the middle, whose start was rotated away.
    assert_eq!(check(&log.lines[2..4], keys(&root), &[]).broken, None);
    assert_eq!(check(&log.lines[2..4], keys(&pair(1)), &[]).broken, None);
    assert_eq!(fault(&check(&log.lines[2..4], keys(&pair(8)), &[])), Some(&Fault::ForeignKey));
    let uncertified = Log::usual(1, None, 2);
    assert_eq!(fault(&uncertified.verify(keys(&root), &[])), Some(&Fault::ForeignKey));
}

#[test]
fn a_checkpoint_cannot_be_moved_to_another_place() {
    let log = Log::usual(1, None, 2);
    let line = log.lines.last().unwrap();
    let said = said(line);
    let mut moved = Log::usual(1, None, 3);
    moved.lines.pop();
    let before = moved.lines.last().unwrap();
    moved.head = Head { seq: 4, hash: Line::parse(before.as_bytes()).unwrap().hash };
    moved.record(said);
    assert_eq!(fault(&moved.verify(Keys::none(), &[])), Some(&Fault::ForgedSignature));
}

#[test]
fn a_record_that_can_be_read_in_two_ways_is_none() {
    let key = public(&pair(1));
    for said in [
        r#""event":"a","outcome":"done","event":"b""#.to_owned(),
        r#""event":"a","outcome":"done","seq":7"#.to_owned(),
        r#""event":"a","outcome":"done","peer":{"uid":1,"uid":0}"#.to_owned(),
        r#""event":"a","outcome":"done","detail":{"x":[{"y":1,"y":2}]}"#.to_owned(),
        r#""event":"a","outcome":"done","ev\u0065nt":"b""#.to_owned(),
        r#""outcome":"done","event":"a""#.to_owned(),
        format!(r#""event":"checkpoint","outcome":"done","detail":{{"key":"{key}"}}"#),
        r#""event":"checkpoint","outcome":"done""#.to_owned(),
    ] {
        let mut log = Log::new(1, None);
        log.record(&said);
        assert_eq!(fault(&log.verify(Keys::none(), &[])), Some(&Fault::NotARecord), "{said}");
    }
    // Its key and signature are right, and there is more beside them.
    let mut log = Log::usual(1, None, 0);
    let line = log.lines.pop().unwrap();
    let said = said(&line);
    log.head = Head { seq: 1, hash: Line::parse(log.lines[0].as_bytes()).unwrap().hash };
    for said in [
        said.replace("\"detail\":{", "\"detail\":{\"a\":1,"),
        said.replace("\"detail\":{", "\"detail\": {"),
        said.replace("done", "failed"),
        format!("{said},\"purpose\":\"x\""),
    ] {
        let mut changed = Log { lines: log.lines.clone(), ..Log::new(1, None) };
        changed.head = log.head;
        changed.record(&said);
        let report = changed.verify(Keys::none(), &[]);
        assert_eq!(fault(&report), Some(&Fault::NotARecord), "{said}");
    }
}

#[test]
fn files_are_read_in_the_order_of_their_numbers() {
    let log = Log::usual(1, None, 10);
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let lines = |range: std::ops::Range<usize>| log.lines[range].join("\n") + "\n";
    let files = [write("new", lines(8..12)), write("old", lines(0..4)), write("mid", lines(4..8))];
    let report = verify(&files, Keys::none(), []).unwrap();
    assert_eq!((report.broken, report.records), (None, 12));

    let missing = verify(&files[..2], Keys::none(), []).unwrap().broken.unwrap();
    assert_eq!((missing.file, missing.line), (Some(files[0].clone()), 1));
    assert_eq!(missing.fault, Fault::Order { expected: 5, found: 9 });
    let twice = [&files[0], &files[1], &files[2], &files[0]];
    assert!(verify(&twice, Keys::none(), []).unwrap().broken.is_some());

    let torn = write("torn", log.lines[0].clone());
    let broken = verify(&[torn], Keys::none(), []).unwrap().broken.unwrap();
    assert_eq!((broken.fault, broken.line), (Fault::Torn, 1));
    let long = write("long", lines(0..2) + &"x".repeat(10 * MAX_LINE) + "\n" + &lines(2..3));
    let broken = verify(&[long], Keys::none(), []).unwrap().broken.unwrap();
    assert_eq!((broken.fault, broken.line), (Fault::TooLong, 3));
    let empty = write("empty", String::new());
    let with_empty = [&files[0], &files[1], &files[2], &empty];
    assert_eq!(verify(&with_empty, Keys::none(), []).unwrap().broken, None);
    assert!(verify(&[dir.path().join("none")], Keys::none(), []).is_err());
}

#[test]
fn keys_are_hexadecimal_or_base64() {
    let pair = pair(1);
    let texts = [
        format!("{} {TIME}\n", public(&pair)),
        format!("{} {TIME} signing_key\n\n", public(&pair).to_uppercase()),
        data_encoding::BASE64.encode(pair.public_key().as_ref()),
    ];
    for text in texts {
        assert_eq!(Keys::parse(&text).unwrap().0, keys(&pair).0, "{text}");
    }
    for text in ["", "\n", "xyz", "00 00"] {
        assert!(Keys::parse(text).is_none(), "{text:?}");
    }
}

#[test]
fn heads_are_written_as_they_are_read() {
    let head = Head { seq: 7, hash: [0xab; 32] };
    assert_eq!(head.to_string().parse(), Ok(head));
    for wrong in ["", "7", "7:", "x:00", &format!("7:{}", "0".repeat(62))] {
        assert_eq!(wrong.parse::<Head>(), Err(NotAHead), "{wrong}");
    }
}
