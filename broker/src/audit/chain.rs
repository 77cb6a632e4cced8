//! The hash chain: each line carries the hash of the one before, and its own.
//!
//! `hash` is SHA-256, in hexadecimal, over the bytes of the line without its last member: what
//! stands before `,"hash":` and the closing brace. So a line is checked as it was written, and
//! nobody has to agree on how JSON is put back together.

#![forbid(unsafe_code)]

use std::time::SystemTime;

use data_encoding::HEXLOWER;
use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use super::{Record, Seq};

const VERSION: u32 = 1;
/// `prev` of the first record.
const GENESIS: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// Where a chain stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) seq: u64,
    pub(crate) hash: String,
}

/// The chain being written.
#[derive(Debug)]
pub(crate) struct Chain {
    head: Head,
    broker: String,
}

/// A line that would be the next one.
#[derive(Debug)]
pub(super) struct Link {
    line: String,
    head: Head,
}

#[derive(Serialize)]
struct Line<'a> {
    v: u32,
    seq: u64,
    time: String,
    broker: &'a str,
    #[serde(flatten)]
    record: &'a Record,
    prev: &'a str,
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

impl Link {
    /// With its newline.
    pub(super) fn line(&self) -> &str {
        &self.line
    }
}

impl Chain {
    /// `broker` names this broker's host in every record.
    pub(crate) fn continuing(head: Option<Head>, broker: String) -> Self {
        Self { head: head.unwrap_or(Head { seq: 0, hash: GENESIS.to_owned() }), broker }
    }

    /// The line for `record`, if it came next. Nothing changes until [`Chain::advance`].
    pub(super) fn link(&self, record: &Record, now: SystemTime) -> Link {
        let line = Line {
            v: VERSION,
            seq: self.head.seq + 1,
            time: humantime::format_rfc3339_micros(now).to_string(),
            broker: &self.broker,
            record,
            prev: &self.head.hash,
        };
        // Every field is a string, a number or a map with string keys: JSON has them all.
        let mut text = serde_json::to_string(&line).unwrap_or_default();
        text.pop();
        let hash = hash(text.as_bytes());
        text.push_str(&format!(",\"hash\":\"{hash}\"}}\n"));
        Link { line: text, head: Head { seq: line.seq, hash } }
    }

    pub(super) fn advance(&mut self, link: Link) -> Seq {
        self.head = link.head;
        Seq(self.head.seq)
    }

    /// How many records there are so far.
    pub(super) fn records(&self) -> u64 {
        self.head.seq
    }

    /// The head that `line` makes, if its own hash is right.
    pub(crate) fn head_of(line: &str) -> Option<Head> {
        let links = read(line)?;
        Some(Head { seq: links.seq, hash: links.hash })
    }

    /// How many lines form a whole chain from the first record on, or where it breaks.
    #[cfg(test)]
    pub(crate) fn verify<'a>(lines: impl Iterator<Item = &'a str>) -> Result<u64, Broken> {
        let mut head = Head { seq: 0, hash: GENESIS.to_owned() };
        for (line, text) in lines.enumerate() {
            let links = read(text).ok_or(Broken { line })?;
            if links.seq != head.seq + 1 || links.prev != head.hash {
                return Err(Broken { line });
            }
            head = Head { seq: links.seq, hash: links.hash };
        }
        Ok(head.seq)
    }
}

fn read(line: &str) -> Option<Links> {
    let line = line.trim_end_matches('\n');
    let links: Links = serde_json::from_str(line).ok()?;
    let tail = format!(",\"hash\":\"{}\"}}", links.hash);
    let body = line.strip_suffix(&tail)?;
    (hash(body.as_bytes()) == links.hash).then_some(links)
}

fn hash(bytes: &[u8]) -> String {
    HEXLOWER.encode(digest(&SHA256, bytes).as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::{Event, Outcome};

    fn log(count: usize) -> Vec<String> {
        let mut chain = Chain::continuing(None, "host".into());
        (0..count)
            .map(|_| {
                let link = chain.link(
                    &Record::new(Event::AccessDenied, Outcome::Denied).reason("no_grant"),
                    SystemTime::UNIX_EPOCH,
                );
                let line = link.line().to_owned();
                chain.advance(link);
                line
            })
            .collect()
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
