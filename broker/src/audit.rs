//! The audit log: an append-only chain of JSON lines, written before anything is granted.
//!
//! [`Audit::before`] is the only maker of [`Audited`], and every granting effect takes one. If
//! the line cannot be written, there is no `Audited` and so no effect. What takes rights away
//! (revoking, expiring, cutting, denying) uses [`Audit::always`]: it happens whatever the disk
//! says, and its lines wait in memory until they can be written.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use serde::Deserialize;
use thiserror::Error;
use tracing::{debug, error, info};

pub(crate) use self::chain::Chain;
pub(crate) use self::record::{Event, Outcome, Record};
pub(crate) use self::sink::SinkError;
use self::sink::Sinks;
use crate::config::AuditConfig;

mod chain;
mod record;
mod sink;

/// Lines of what took rights away that wait for a log that cannot be written. Past this the
/// oldest is given up, counted, and the gap shows in the sequence numbers.
const MAX_WAITING: usize = 16 * 1024;

/// The key `audit.durability`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Durability {
    /// Written before the reply; synced in the background, so that a power loss may cost a second.
    #[default]
    Write,
    /// Synced before the reply.
    Fsync,
}

impl fmt::Display for Durability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Write => "write",
            Self::Fsync => "fsync",
        })
    }
}

/// The sequence number of a record; a refusal's `ref`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Seq(pub(crate) u64);

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Proof that what `T` proves has been written down.
#[must_use]
#[derive(Debug)]
pub(crate) struct Audited<T>(T);

impl<T> Audited<T> {
    /// The evidence, to act on it.
    pub(crate) fn into_inner(self) -> T {
        self.0
    }

    pub(crate) fn get(&self) -> &T {
        &self.0
    }

    /// Evidence of nothing.
    #[cfg(test)]
    pub(crate) fn dangerous_for_test(evidence: T) -> Self {
        Self(evidence)
    }
}

/// The log could not be written, so nothing may be granted.
#[derive(Debug, Error)]
#[error("the audit log cannot be written")]
pub(crate) struct AuditUnavailable;

/// The log. Cheap to clone; clones write to the same chain.
#[derive(Clone, Debug)]
pub(crate) struct Audit {
    writer: Arc<Mutex<Writer>>,
}

#[derive(Debug)]
struct Writer {
    chain: Chain,
    sinks: Sinks,
    waiting: VecDeque<String>,
    /// Whether the last write worked: a change is logged once, not at each record.
    writable: bool,
}

impl Audit {
    /// Opens the log, checks its tail and goes on with its chain.
    ///
    /// # Errors
    /// When the file cannot be opened, belongs to another broker, or does not end as a chain does.
    pub(crate) fn open(config: &AuditConfig) -> Result<Self, SinkError> {
        let (sinks, tail) = Sinks::open(config)?;
        let chain = Chain::continuing(
            tail.head,
            rustix::system::uname().nodename().to_string_lossy().into_owned(),
        );
        let audit = Self {
            writer: Arc::new(Mutex::new(Writer {
                chain,
                sinks,
                waiting: VecDeque::new(),
                writable: true,
            })),
        };
        if let Some(torn) = tail.torn {
            audit.always(&Record::new(Event::AuditRepaired, Outcome::Done).detail("torn", torn));
        }
        Ok(audit)
    }

    /// Writes `record`, and only then turns `evidence` into something that can be acted on.
    #[expect(clippy::unused_async, reason = "the writer answers when the line is written")]
    pub(crate) async fn before<T>(
        &self,
        record: &Record,
        evidence: T,
    ) -> Result<Audited<T>, AuditUnavailable> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        writer.grant(record)?;
        Ok(Audited(evidence))
    }

    /// Writes the first record, before there is a runtime to wait in.
    pub(crate) fn before_serving(&self, record: &Record) -> Result<(), AuditUnavailable> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        writer.grant(record)
    }

    /// Takes `record` down for certain: now, or as soon as the log can be written.
    pub(crate) fn always(&self, record: &Record) -> Seq {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let link = writer.chain.link(record, SystemTime::now());
        let line = link.line().to_owned();
        let seq = writer.chain.advance(link);
        if writer.waiting.len() == MAX_WAITING {
            writer.waiting.pop_front();
        }
        writer.waiting.push_back(line);
        // Whether it could be written now does not matter to who takes a right away.
        let _ = writer.flush_waiting();
        seq
    }

    /// A denial.
    pub(crate) fn denied(&self, _: crate::peer::Uid, record: &Record) -> Seq {
        self.always(record)
    }

    /// Records in the chain, those before this start included.
    pub(crate) fn records(&self) -> u64 {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner).chain.records()
    }

    /// Whether grants can be written at this moment.
    pub(crate) fn is_writable(&self) -> bool {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner).writable
    }

    /// Tries again to write what waits, and brings the file to the disk.
    pub(crate) fn settle(&self) {
        let file = {
            let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
            if !writer.writable {
                writer.try_again();
            }
            writer.sinks.dirty_file()
        };
        // Outside the lock: a slow disk must not hold up the next record.
        if let Some(file) = file
            && let Err(error) = rustix::fs::fdatasync(&file)
        {
            error!(%error, "the audit log could not be synced");
        }
    }
}

impl Writer {
    fn grant(&mut self, record: &Record) -> Result<(), AuditUnavailable> {
        self.flush_waiting()?;
        let link = self.chain.link(record, SystemTime::now());
        self.write(link.line())?;
        // Only a written line becomes part of the chain.
        self.chain.advance(link);
        Ok(())
    }

    /// The log failed before: looks for a way to write it again, without waiting for a request.
    fn try_again(&mut self) {
        if let Err(error) = self.sinks.recover() {
            debug!(%error, "the audit log is still not to be had");
            return;
        }
        if self.flush_waiting().is_ok() && !self.writable {
            // Nothing waited. Whether it can be written shows at the next record.
            self.writable = true;
        }
    }

    fn flush_waiting(&mut self) -> Result<(), AuditUnavailable> {
        while let Some(line) = self.waiting.pop_front() {
            if let Err(unavailable) = self.write(&line) {
                self.waiting.push_front(line);
                return Err(unavailable);
            }
        }
        Ok(())
    }

    fn write(&mut self, line: &str) -> Result<(), AuditUnavailable> {
        let written = self.sinks.write(line);
        match &written {
            Ok(()) if !self.writable => info!("the audit log can be written again"),
            Err(error) if self.writable => {
                error!(%error, "the audit log cannot be written: nothing is granted")
            }
            Ok(()) | Err(_) => {}
        }
        self.writable = written.is_ok();
        written.map_err(|_logged| AuditUnavailable)
    }
}

// PROVISIONAL
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) seq: u64,
    pub(crate) hash: String,
    pub(crate) signed_to: u64,
}
#[derive(Debug)]
pub(crate) struct Subscription;
impl Subscription {
    pub(crate) async fn next(&mut self) -> Option<Followed> {
        None
    }
}
#[derive(Debug)]
pub(crate) struct Followed {
    pub(crate) line: Arc<str>,
    pub(crate) skipped: u64,
}
impl Audit {
    pub(crate) fn head(&self) -> Head {
        panic!()
    }
    pub(crate) fn tail(&self, _: usize) -> (Vec<String>, Subscription) {
        (vec![], Subscription)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use super::*;

    pub(crate) fn audit_at(path: &Path) -> Audit {
        Audit::open(&config(path)).unwrap()
    }

    fn config(path: &Path) -> AuditConfig {
        AuditConfig { file: Some(path.to_owned()), stdout: false, durability: Durability::Write }
    }

    fn lines(path: &Path) -> Vec<String> {
        std::fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn the_chain_goes_on_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        audit_at(&path).always(&Record::new(Event::BrokerStarted, Outcome::Done));
        let seq = audit_at(&path).always(&Record::new(Event::BrokerStopped, Outcome::Done));
        assert_eq!(seq, Seq(2));
        let lines = lines(&path);
        assert_eq!(Chain::verify(lines.iter().map(String::as_str)), Ok(2));
    }

    #[test]
    fn torn_bytes_are_kept_in_a_record_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        audit_at(&path).always(&Record::new(Event::BrokerStarted, Outcome::Done));
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.push_str("{\"v\":1,\"se");
        std::fs::write(&path, text).unwrap();
        audit_at(&path).always(&Record::new(Event::BrokerStopped, Outcome::Done));
        let lines = lines(&path);
        assert_eq!(Chain::verify(lines.iter().map(String::as_str)), Ok(3));
        assert!(
            lines[1].contains("audit.repaired") && lines[1].contains("eyJ2IjoxLCJzZQ=="),
            "{}",
            lines[1]
        );
    }

    #[test]
    fn an_edited_tail_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        audit_at(&path).always(&Record::new(Event::BrokerStarted, Outcome::Done));
        let text =
            std::fs::read_to_string(&path).unwrap().replace("broker.started", "broker.stopped");
        std::fs::write(&path, text).unwrap();
        assert!(matches!(Audit::open(&config(&path)), Err(SinkError::BrokenTail { .. })));
    }

    #[tokio::test]
    async fn a_deleted_log_grants_nothing_until_there_is_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        let audit = audit_at(&path);
        let record = Record::new(Event::HandleIssued, Outcome::Allowed);
        let issue = || audit.before(&record, ());
        assert!(issue().await.is_ok());
        std::fs::remove_file(&path).unwrap();
        assert!(issue().await.is_err());
        audit.always(&Record::new(Event::HandleRevoked, Outcome::Done));
        audit.settle();
        assert!(issue().await.is_ok());
        let lines = lines(&path);
        assert_eq!(lines.len(), 2, "the revocation waited, the refused grant left nothing");
        assert!(lines[0].contains("handle.revoked") && lines[0].contains("\"seq\":2"));
    }

    #[test]
    fn two_brokers_cannot_share_a_log() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        let _first = audit_at(&path);
        assert!(matches!(Audit::open(&config(&path)), Err(SinkError::InUse { .. })));
    }

    #[tokio::test]
    async fn without_a_log_nothing_is_granted_and_denials_wait() {
        let audit = Audit {
            writer: Arc::new(Mutex::new(Writer {
                chain: Chain::continuing(None, "host".into()),
                sinks: Sinks::failing(),
                waiting: VecDeque::new(),
                writable: true,
            })),
        };
        let record = Record::new(Event::HandleIssued, Outcome::Allowed);
        assert!(audit.before(&record, ()).await.is_err());
        assert_eq!(audit.always(&Record::new(Event::AccessDenied, Outcome::Denied)), Seq(1));
        assert!(!audit.is_writable());
        let writer = audit.writer.lock().unwrap();
        assert_eq!(writer.waiting.len(), 1, "the denial waits, the grant left no trace");
    }
}
