//! What the fuzzer and the tests that replay its inputs share: where the inputs are, one way to
//! spoil them, and the target that lies outside the broker.
//!
//! | directory | what is in it |
//! | --- | --- |
//! | `corpus/TARGET` | inputs to begin with, good ones and near misses |
//! | `regressions/TARGET` | what once broke a promise |
//! | `dictionaries/TARGET` | words that the fuzzer would take long to find |

#![forbid(unsafe_code)]
#![allow(
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a broken promise must end the run, loudly and at once"
)]

use std::path::{Path, PathBuf};
use std::{fs, io};

use credbroker_client::audit::{Fault, Keys, Verifier};
use data_encoding::HEXLOWER;
use ring::digest::{SHA256, digest};

const HASH: &[u8] = b",\"hash\":\"";

/// The inputs of a target that are kept, by name.
///
/// # Errors
/// When a directory or file cannot be read; a target without regressions has no directory of them.
pub fn inputs(target: &str) -> io::Result<Vec<(PathBuf, Vec<u8>)>> {
    let mut inputs = Vec::new();
    for kind in ["corpus", "regressions"] {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join(kind).join(target);
        if kind == "regressions" && !directory.exists() {
            continue;
        }
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            inputs.push((path.clone(), fs::read(path)?));
        }
    }
    inputs.sort();
    Ok(inputs)
}

/// Spoils inputs, in the same way each time (splitmix64).
#[derive(Debug)]
pub struct Spoiler(u64);

impl Spoiler {
    /// Begins at `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Less than `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end.max(1)).unwrap_or(u64::MAX);
        usize::try_from(self.next() % end).unwrap_or(0)
    }

    /// One to eight changes: a bit, a byte, a cut, a repetition, a piece of `other`.
    pub fn spoil(&mut self, input: &[u8], other: &[u8]) -> Vec<u8> {
        let mut bytes = input.to_vec();
        for _ in 0..=self.below(8) {
            let (at, to) = (self.below(bytes.len()), self.below(bytes.len() + 1));
            let (from, to) = (at.min(to), at.max(to));
            let byte = self.next().to_le_bytes()[0];
            match (self.below(6), bytes.get_mut(at)) {
                (0, Some(place)) => *place ^= 1 << (byte % 8),
                (1, Some(place)) => {
                    *place = match byte % 6 {
                        0 => 0,
                        1 => 1,
                        2 => 0x7f,
                        3 => 0x80,
                        4 => 0xff,
                        _ => self.next().to_le_bytes()[0],
                    }
                }
                (2, _) => bytes.insert(at, byte),
                (3, _) => drop(bytes.drain(from..to)),
                (4, _) => {
                    let again = bytes.get(from..to).unwrap_or_default().to_vec();
                    bytes.splice(to..to, again);
                }
                _ => {
                    let (start, end) = (self.below(other.len() + 1), self.below(other.len() + 1));
                    let piece = other.get(start.min(end)..start.max(end)).unwrap_or_default();
                    bytes.splice(from..to, piece.iter().copied());
                }
            }
            bytes.truncate(64 * 1024);
        }
        bytes
    }
}

/// The offline verifier over the lines of `bytes`, as they are and once more with chain and
/// hashes put right, which no fuzzer finds by itself. A line that it takes has its hash, and no
/// longer when one bit is another. Whether it took a line.
///
/// # Panics
/// When one of these promises does not hold.
#[must_use]
pub fn audit_verify(bytes: &[u8]) -> bool {
    let (flip, log) = bytes.split_first().unwrap_or((&0, &[]));
    let mut taken = false;
    let mut verifier = Verifier::new(Keys::default(), []);
    for line in log.split(|byte| *byte == b'\n') {
        if verifier.line(line).is_err() {
            break;
        }
        assert!(has_its_hash(line), "a line was taken whose hash is wrong");
        taken = true;
    }
    let report = verifier.finish();
    assert!(report.unsigned <= report.head.map_or(0, |head| head.seq));

    let mut verifier = Verifier::new(Keys::default(), []);
    let (mut prev, mut records) = (HEXLOWER.encode(&[0; 32]), 0);
    for body in log.split(|byte| *byte == b'\n') {
        let body = body.strip_suffix(b"}").unwrap_or(body);
        let mut line = [body, b",\"prev\":\"", prev.as_bytes(), b"\""].concat();
        prev = HEXLOWER.encode(digest(&SHA256, &line).as_ref());
        line.extend_from_slice(&[HASH, prev.as_bytes(), b"\"}"].concat());
        let took = verifier.line(&line);
        assert_ne!(took, Err(Fault::Edited), "a hash that is right was called wrong");
        if took.is_err() {
            break;
        }
        records += 1;
        let at = usize::from(*flip) * 257 % line.len();
        if let Some(byte) = line.get_mut(at) {
            *byte ^= 1 << (flip % 8);
        }
        let mut other = Verifier::new(Keys::default(), []);
        assert!(other.line(&line).is_err(), "byte {at} is another, and the line was taken");
    }
    assert_eq!(verifier.finish().records, records);
    taken || records > 0
}

/// Whether the last member of the line is the hash of what stands before it.
fn has_its_hash(line: &[u8]) -> bool {
    let at = line.windows(HASH.len()).rposition(|part| part == HASH);
    let Some((body, rest)) = at.and_then(|at| line.split_at_checked(at)) else { return false };
    let hash = HEXLOWER.encode(digest(&SHA256, body).as_ref());
    rest == [HASH, hash.as_bytes(), b"\"}"].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_inputs_hold_no_surprise() {
        let inputs = inputs("audit_verify").unwrap();
        let taken = inputs.iter().filter(|(_, bytes)| audit_verify(bytes)).count();
        assert!(taken > 0 && taken < inputs.len(), "{taken} of {}", inputs.len());
    }

    /// What the broker's test of this name does for its own targets.
    #[test]
    fn g7_ten_thousand_bad_inputs_for_the_verifier() {
        let (inputs, mut spoiler) = (inputs("audit_verify").unwrap(), Spoiler::new(7));
        let mut taken = 0;
        for case in 0..10_000 {
            let (one, other) = (&inputs[case % inputs.len()].1, spoiler.below(inputs.len()));
            taken += usize::from(audit_verify(&spoiler.spoil(one, &inputs[other].1)));
        }
        println!("G7: audit_verify: 10000 bad inputs, {taken} of them had a good line, 0 panics");
    }
}
