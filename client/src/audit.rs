//! Verifying an audit log, offline: that no record was edited, cut out of the middle, moved or
//! put in, and who vouches for it.
//!
//! The records form a chain by SHA-256, whose checkpoints are signed with Ed25519. The chain alone
//! shows a change by somebody who does not know how it is made; checkpoints show a change by
//! somebody who does, up to the last one, if the key is known from elsewhere ([`Keys`]). That the
//! end was cut off shows against a head that was noted elsewhere ([`Head`]).
//!
//! [`Verifier`] takes lines and does no I/O; [`verify`] feeds it from files, in bounded memory.
//!
//! ```no_run
//! use credbroker_client::audit::{self, Keys};
//!
//! # fn example() -> Result<(), audit::ReadError> {
//! let keys = Keys::load("/safe/copy/of/audit.pub".as_ref())?;
//! let report = audit::verify(&["/var/lib/credbroker/audit.jsonl"], keys, [])?;
//! match &report.broken {
//!     None => println!("{} records, signed to {:?}", report.records, report.signed_to),
//!     Some(broken) => println!("{broken}"),
//! }
//! # Ok(())
//! # }
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use thiserror::Error;

pub use self::files::{ReadError, verify};
pub use self::keys::Keys;
use self::keys::PublicKey;
use self::line::{Line, Said};

mod files;
mod keys;
mod line;

/// No record is longer, in bytes; no broker writes more than 4096.
pub const MAX_LINE: usize = 64 * 1024;

/// A SHA-256 hash.
pub(crate) type Hash = [u8; 32];

/// Where a chain stood: the number of a record and its hash. Written `SEQ:HASH`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Number of the record.
    pub seq: u64,
    /// Its hash.
    pub hash: Hash,
}

/// What a verification found. It covers the records before the break, if there is one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// Records that stand.
    pub records: u64,
    /// Number of the first of them. Above 1, older files were rotated away, or are missing.
    pub first: Option<u64>,
    /// The last of them.
    pub head: Option<Head>,
    /// Number of the last checkpoint with a good signature: everything up to it is as it was.
    pub signed_to: Option<u64>,
    /// Records after that one, which no signature covers.
    pub unsigned: u64,
    /// Checkpoints with a good signature.
    pub checkpoints: u64,
    /// Whether the signatures were compared with keys from elsewhere. If not, they are by keys
    /// that the log itself names.
    pub trusted: bool,
    /// The first break.
    pub broken: Option<Broken>,
}

/// Where a log is broken, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// In which file; none when it shows only at the end of all.
    pub file: Option<PathBuf>,
    /// In which line of it, from 1; 0 when it shows only at the end.
    pub line: u64,
    /// What is wrong.
    pub fault: Fault,
}

/// What can be wrong with a log.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Fault {
    /// There is no record at all.
    #[error("there is no record")]
    Empty,
    /// The line is longer than any record.
    #[error("the line is longer than {MAX_LINE} bytes")]
    TooLong,
    /// The last line does not end: it was cut, or is being written.
    #[error("the line does not end: it was cut, or is being written at this moment")]
    Torn,
    /// The line is not a record in the one form that records have.
    #[error("the line is not a record")]
    NotARecord,
    /// The record is not what its own hash says.
    #[error("the record does not have its hash: it was edited")]
    Edited,
    /// The number does not follow.
    #[error("record {found} stands where record {expected} belongs")]
    Order {
        /// The number that belongs here.
        expected: u64,
        /// The number that stands here.
        found: u64,
    },
    /// The number follows, and the hash of the record before does not.
    #[error("the record does not follow the one before it: one of them is not what was written")]
    Unlinked,
    /// A checkpoint whose signature is not by the key that it names.
    #[error("the signature of the checkpoint is forged")]
    ForgedSignature,
    /// A key that no trusted key vouches for, or not the one that the start announced.
    #[error("the key is foreign: no trusted key vouches for it, or another one was announced")]
    ForeignKey,
    /// A record with a noted number has another hash.
    #[error("record {seq} is not the one that was noted")]
    NotTheNoted {
        /// Its number.
        seq: u64,
    },
    /// The log ends before a head that was noted.
    #[error("record {noted} was noted, and the log ends at {end}: its end was cut off")]
    CutOff {
        /// The noted number.
        noted: u64,
        /// The last number.
        end: u64,
    },
    /// The log begins after a head that was noted.
    #[error("record {noted} was noted, and the files begin at {first}: give the older files too")]
    Before {
        /// The noted number.
        noted: u64,
        /// The first number.
        first: u64,
    },
}

/// Checks lines in the order in which they were written.
#[derive(Debug)]
pub struct Verifier {
    keys: Keys,
    noted: BTreeMap<u64, Hash>,
    report: Report,
    /// The key of the start that the records are of.
    announced: Option<PublicKey>,
}

impl Verifier {
    /// Trusts `keys`, or the log's own when there are none, and looks for the `noted` heads.
    #[must_use]
    pub fn new(keys: Keys, noted: impl IntoIterator<Item = Head>) -> Self {
        let report = Report { trusted: !keys.is_empty(), ..Report::default() };
        let noted = noted.into_iter().map(|head| (head.seq, head.hash)).collect();
        Self { keys, noted, report, announced: None }
    }

    /// Checks the next line, without its newline.
    ///
    /// # Errors
    /// What is wrong with it. Nothing that follows it means anything then.
    pub fn line(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        let line = Line::parse(bytes)?;
        self.follows(&line)?;
        if let Some(noted) = self.noted.remove(&line.seq)
            && noted != line.hash
        {
            return Err(Fault::NotTheNoted { seq: line.seq });
        }
        match &line.said {
            Said::Started { key, certificate } => {
                if let Some(key) = key {
                    self.believe(key, certificate.as_ref(), &line)?;
                }
                self.announced = *key;
            }
            Said::Checkpoint { key, certificate, signature } => {
                match &self.announced {
                    Some(announced) if announced != key => return Err(Fault::ForeignKey),
                    Some(_) => {}
                    None => self.believe(key, certificate.as_ref(), &line)?,
                }
                self.announced = Some(*key);
                if !keys::is_checkpoint(key, signature, &line) {
                    return Err(Fault::ForgedSignature);
                }
                self.report.checkpoints += 1;
                self.report.signed_to = Some(line.seq);
            }
            Said::Other => {}
        }
        self.report.records += 1;
        self.report.first.get_or_insert(line.seq);
        self.report.head = Some(Head { seq: line.seq, hash: line.hash });
        Ok(())
    }

    fn follows(&self, line: &Line) -> Result<(), Fault> {
        let (expected, prev) = match &self.report.head {
            Some(head) => (head.seq.saturating_add(1), head.hash),
            // The first of all follows nothing; what a later one follows is not known.
            None if line.seq == 1 => (1, Hash::default()),
            None => (line.seq, line.prev),
        };
        if line.seq != expected || line.seq == 0 {
            return Err(Fault::Order { expected: expected.max(1), found: line.seq });
        }
        if line.prev == prev { Ok(()) } else { Err(Fault::Unlinked) }
    }

    fn believe(
        &self,
        key: &PublicKey,
        certificate: Option<&keys::Signature>,
        line: &Line,
    ) -> Result<(), Fault> {
        if self.keys.is_empty() || self.keys.vouch_for(key, certificate, &line.broker) {
            Ok(())
        } else {
            Err(Fault::ForeignKey)
        }
    }

    /// What was found, when no line is left; a cut end shows only now.
    #[must_use]
    pub fn finish(self) -> Report {
        let Self { noted, mut report, .. } = self;
        let fault = match (report.first.zip(report.head), noted.keys().next(), noted.keys().last())
        {
            (None, _, _) => Some(Fault::Empty),
            (Some((_, head)), _, Some(noted)) if *noted > head.seq => {
                Some(Fault::CutOff { noted: *noted, end: head.seq })
            }
            (Some((first, _)), Some(noted), _) => Some(Fault::Before { noted: *noted, first }),
            (Some(_), None, _) => None,
        };
        report.broken = fault.map(|fault| Broken { file: None, line: 0, fault });
        report.count_unsigned();
        report
    }

    /// What was found up to a break.
    #[must_use]
    pub fn break_off(self, broken: Broken) -> Report {
        let Self { mut report, .. } = self;
        report.broken = Some(broken);
        report.count_unsigned();
        report
    }
}

impl Report {
    fn count_unsigned(&mut self) {
        self.unsigned = match (self.head, self.signed_to) {
            (Some(head), Some(signed)) => head.seq.saturating_sub(signed),
            (_, _) => self.records,
        };
    }
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}:{}: ", file.display(), self.line)?;
        }
        self.fault.fmt(f)
    }
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.seq, HEXLOWER.encode(&self.hash))
    }
}

/// The text is not a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("is not a number, a colon and 64 hexadecimal digits, as `SEQ:HASH`")]
pub struct NotAHead;

impl FromStr for Head {
    type Err = NotAHead;

    fn from_str(text: &str) -> Result<Self, NotAHead> {
        let (seq, hash) = text.split_once(':').ok_or(NotAHead)?;
        let seq = seq.parse().map_err(|_not_a_number| NotAHead)?;
        let hash = HEXLOWER_PERMISSIVE.decode(hash.as_bytes()).map_err(|_not_hex| NotAHead)?;
        Ok(Self { seq, hash: hash.try_into().map_err(|_length| NotAHead)? })
    }
}

#[cfg(test)]
mod tests;
