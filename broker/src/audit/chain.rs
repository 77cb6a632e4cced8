//! The hash chain: each line carries the hash of the one before, and its own.
//!
//! `hash` is SHA-256, in hexadecimal, over the bytes of the line without its last member: what
//! stands before `,"hash":` and the closing brace. So a line is checked as it was written, and
//! nobody has to agree on how JSON is put back together.

#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::time::SystemTime;

use data_encoding::HEXLOWER;
use ring::digest::{SHA256, digest};
use serde::Deserialize;

use super::Seq;
use super::record::{Text, json};

/// No line is longer, its newline included: PIPE_BUF, what a pipe takes whole or not at all.
pub(super) const MAX_LINE: usize = 4096;

/// Where a chain stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) seq: u64,
    pub(super) hash: [u8; 32],
}

impl Link {
    /// Before the first record: its `prev` is 64 zeros.
    pub(super) const GENESIS: Self = Self { seq: 0, hash: [0; 32] };

    pub(super) fn hex(&self) -> String {
        HEXLOWER.encode(&self.hash)
    }
}

/// The chain being written.
#[derive(Debug)]
pub(super) struct Chain {
    head: Link,
    /// Names this broker's host in every record.
    broker: String,
    /// The same as JSON, quotes included.
    broker_json: String,
}

/// What a reader needs of a line.
#[derive(Deserialize)]
struct Links {
    seq: u64,
    #[cfg(test)]
    prev: String,
    hash: String,
}

/// Where a chain is broken.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Broken {
    /// Index of the line, from 0.
    pub(crate) line: usize,
}

impl Chain {
    pub(super) fn continuing(head: Option<Link>, broker: &str) -> Self {
        Self {
            head: head.unwrap_or(Link::GENESIS),
            broker: broker.to_owned(),
            broker_json: json(broker),
        }
    }

    pub(super) fn head(&self) -> Link {
        self.head
    }

    pub(super) fn broker(&self) -> &str {
        &self.broker
    }

    /// Goes back to an earlier head: what was appended after it was not written.
    pub(super) fn go_back(&mut self, head: Link) {
        self.head = head;
    }

    /// Appends the line of the next record to `lines`, and makes it the head.
    pub(super) fn append(&mut self, seq: Seq, time: SystemTime, text: &Text, lines: &mut String) {
        let start = lines.len();
        // Writing to a String cannot fail.
        let _ = write!(
            lines,
            "{{\"v\":1,\"seq\":{seq},\"time\":\"{}\",\"broker\":{},",
            timestamp(time),
            self.broker_json
        );
        text.write_to(lines);
        let _ = write!(lines, ",\"prev\":\"{}\"", self.head.hex());
        let hash = hash(lines.as_bytes().get(start..).unwrap_or_default());
        self.head = Link { seq: seq.0, hash };
        let _ = writeln!(lines, ",\"hash\":\"{}\"}}", self.head.hex());
    }

    /// The head that `line` makes, if its own hash is right.
    pub(super) fn head_of(line: &str) -> Option<Link> {
        let links = read(line)?;
        let mut hash = [0; 32];
        let decoded = HEXLOWER.decode(links.hash.as_bytes()).ok()?;
        hash.copy_from_slice(decoded.get(..32)?);
        Some(Link { seq: links.seq, hash })
    }

    /// The number of the last of `lines` if they form a whole chain from the first record on, or
    /// where it breaks.
    #[cfg(test)]
    pub(crate) fn verify<'a>(lines: impl Iterator<Item = &'a str>) -> Result<u64, Broken> {
        let mut head = Link::GENESIS;
        for (line, text) in lines.enumerate() {
            let links = read(text).ok_or(Broken { line })?;
            if links.seq != head.seq + 1 || links.prev != head.hex() {
                return Err(Broken { line });
            }
            head = Self::head_of(text).ok_or(Broken { line })?;
        }
        Ok(head.seq)
    }
}

/// UTC, RFC 3339, to the microsecond.
pub(super) fn timestamp(time: SystemTime) -> impl std::fmt::Display {
    humantime::format_rfc3339_micros(time)
}

fn read(line: &str) -> Option<Links> {
    let line = line.strip_suffix('\n').unwrap_or(line);
    let links: Links = serde_json::from_str(line).ok()?;
    let tail = format!(",\"hash\":\"{}\"}}", links.hash);
    let body = line.strip_suffix(&tail)?;
    (HEXLOWER.encode(&hash(body.as_bytes())) == links.hash).then_some(links)
}

fn hash(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    hash
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::{Event, Outcome, Record};

    fn log(count: u64) -> Vec<String> {
        let mut chain = Chain::continuing(None, "host");
        let record = Record::new(Event::AccessDenied, Outcome::Denied).reason("no_grant");
        let line = |seq| {
            let mut line = String::new();
            chain.append(Seq(seq), SystemTime::UNIX_EPOCH, &record.text(), &mut line);
            line
        };
        (1..=count).map(line).collect()
    }

    fn verify(lines: &[String]) -> Result<u64, Broken> {
        Chain::verify(lines.iter().map(String::as_str))
    }

    #[test]
    fn a_line_looks_as_it_is_documented() {
        let line = &log(1)[0];
        assert!(
            line.starts_with(
                "{\"v\":1,\"seq\":1,\"time\":\"1970-01-01T00:00:00.000000Z\",\"broker\":\"host\",\
                 \"event\":\"access.denied\",\"outcome\":\"denied\",\"reason\":\"no_grant\",\"prev\":\"000"
            ),
            "{line}"
        );
        assert!(line.ends_with("\"}\n"));
    }

    #[test]
    fn every_single_byte_edit_is_found() {
        let lines = log(3);
        assert_eq!(verify(&lines), Ok(3));
        for index in 0..lines[1].len() - 1 {
            let mut bytes = lines[1].clone().into_bytes();
            bytes[index] ^= 1;
            let Ok(edited) = String::from_utf8(bytes) else { continue };
            let mut edited_lines = lines.clone();
            edited_lines[1] = edited;
            assert!(verify(&edited_lines).is_err(), "byte {index}");
        }
    }

    #[test]
    fn a_cut_a_swap_and_an_insertion_are_found() {
        let lines = log(4);
        let mut cut = lines.clone();
        cut.remove(1);
        assert_eq!(verify(&cut), Err(Broken { line: 1 }));
        let mut swapped = lines.clone();
        swapped.swap(1, 2);
        assert!(verify(&swapped).is_err());
        let mut inserted = lines.clone();
        inserted.insert(2, lines[1].clone());
        assert_eq!(verify(&inserted), Err(Broken { line: 2 }));
    }
}
