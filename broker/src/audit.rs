//! The audit log: an append-only chain of JSON lines, written before anything is granted.
//!
//! [`Audit::before`] is the only maker of [`Audited`], and every granting effect takes one. If
//! the line cannot be written, there is no `Audited` and so no effect. What takes rights away
//! (revoking, expiring, cutting, denying) uses [`Audit::always`]: it happens whatever the disk
//! says, and its lines go into room kept for them, or wait in memory until they can be written.
//!
//! | module | what it has |
//! | --- | --- |
//! | `record` | what a record says |
//! | `chain` | its place: number, hash, the line |
//! | `queue` | records on their way, and those who wait for them |
//! | `writer` | the thread that writes, tells, recovers, signs and rotates |
//! | `sink`, `file` | where lines go |
//! | `signer` | the keys of checkpoints |
//! | `denials` | refusals, limited and counted |
//! | `recent` | the last records, and readers that follow |

#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde::Deserialize;
use thiserror::Error;
use tokio::sync::oneshot;
use tracing::{error, info};

use self::chain::{Chain, Link};
use self::denials::Denials;
use self::queue::{CALLER_GONE, Queue, Receipt, UNWRITTEN, Waiter};
use self::recent::Recent;
pub(crate) use self::recent::{Followed, Subscription};
pub(crate) use self::record::{Event, Outcome, Record};
use self::signer::Signer;
pub(crate) use self::sink::SinkError;
use self::sink::Sinks;
use self::writer::Writer;
use crate::arena::Arena;
use crate::config::AuditConfig;
use crate::peer::Uid;

mod chain;
mod denials;
mod file;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod queue;
mod recent;
mod record;
mod signer;
mod sink;
mod writer;

/// How long a grant waits for its record.
const PATIENCE: Duration = Duration::from_secs(2);

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
pub(crate) struct AuditUnavailable {
    /// The record that says so, if there is one already.
    pub(crate) reference: Option<Seq>,
}

/// Where the log stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// Number of the last record that was written.
    pub(crate) seq: u64,
    /// Its hash, in hexadecimal.
    pub(crate) hash: String,
    /// Number of the last checkpoint of this start; 0 before the first.
    pub(crate) signed_to: u64,
}

/// The log. Cheap to clone; clones write to the same chain.
#[derive(Clone, Debug)]
pub(crate) struct Audit {
    shared: Arc<Shared>,
    life: Arc<Life>,
}

/// Dropped with the last clone, which stops the writer.
#[derive(Debug)]
struct Life {
    queue: Arc<Queue>,
    /// Until [`Audit::start`].
    writer: Mutex<Option<Box<Writer>>>,
}

/// What the callers and the writer share.
#[derive(Debug)]
struct Shared {
    queue: Arc<Queue>,
    recent: Recent,
    denials: Mutex<Denials>,
    place: Mutex<Place>,
    writable: AtomicBool,
    /// The key of this start, for its first record.
    introduction: Vec<(&'static str, String)>,
}

#[derive(Debug)]
struct Place {
    head: Link,
    signed_to: u64,
    refused_since: Option<SystemTime>,
}

impl Audit {
    /// Opens the log, checks its tail and goes on with its chain. Nothing is written before
    /// [`Audit::start`].
    ///
    /// # Errors
    /// When the file cannot be opened, belongs to another broker, or does not end as a chain does,
    /// or when there is no key to sign with.
    pub(crate) fn open(config: &AuditConfig, arena: &Arena) -> Result<Self, SinkError> {
        let (sinks, head, mended) = Sinks::open(config)?;
        let broker = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let signer = Signer::make(config, &broker, arena)?;
        if let Some(file) = &config.file {
            signer.publish(file)?;
        }
        let chain = Chain::continuing(head, &broker);
        let head = chain.head();
        let queue = Arc::new(Queue::new(head.seq + 1));
        let shared = Arc::new(Shared {
            queue: Arc::clone(&queue),
            recent: Recent::new(),
            denials: Mutex::new(Denials::new(Instant::now())),
            place: Mutex::new(Place { head, signed_to: 0, refused_since: None }),
            writable: AtomicBool::new(true),
            introduction: signer.introduction(),
        });
        let writer = Writer::new(config, Arc::clone(&shared), chain, sinks, signer);
        if let Some(mended) = mended {
            writer.record_mended(&mended);
        }
        let writer = Mutex::new(Some(Box::new(writer)));
        Ok(Self { shared, life: Arc::new(Life { queue, writer }) })
    }

    /// Starts the thread that writes. Called once, when threads may exist; what was recorded
    /// before waits for it.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub(crate) fn start(&self) -> io::Result<()> {
        let writer = self.life.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        writer.map_or(Ok(()), |writer| writer.start())
    }

    /// Writes `record`, and only then turns `evidence` into something that can be acted on.
    ///
    /// # Errors
    /// When it could not be written, or not in time. Nothing comes of its record then, and the log
    /// says so under the same number.
    pub(crate) async fn before<T>(
        &self,
        record: &Record,
        evidence: T,
    ) -> Result<Audited<T>, AuditUnavailable> {
        if !self.is_writable() {
            return Err(AuditUnavailable { reference: None });
        }
        let (task, told) = oneshot::channel();
        let entered = self.shared.queue.push_grant(record.text(), Waiter::Task(task));
        let seq = entered.ok_or(AuditUnavailable { reference: None })?;
        let mut waiting = Waiting { queue: &self.shared.queue, seq, told, over: false };
        match tokio::time::timeout(PATIENCE, &mut waiting.told).await {
            Ok(told) => waiting.end(told.ok()),
            Err(_elapsed) => {
                self.shared.refuse_grants(&"it takes too long");
                waiting.told.close();
                // It may have been written at the last moment.
                let told = waiting.told.try_recv().ok();
                waiting.end(told)
            }
        }?;
        Ok(Audited(evidence))
    }

    /// Writes the first record, before there is a runtime to wait in. It names the key that
    /// checkpoints are signed with.
    ///
    /// # Errors
    /// When it could not be written in time.
    pub(crate) fn before_serving(&self, mut record: Record) -> Result<(), AuditUnavailable> {
        let (thread, told) = sync_channel(1);
        for (name, key) in &self.shared.introduction {
            record = record.detail(name, key.as_str());
        }
        let entered = self.shared.queue.push_grant(record.text(), Waiter::Thread(thread));
        let seq = entered.ok_or(AuditUnavailable { reference: None })?;
        match told.recv_timeout(PATIENCE) {
            Ok(receipt) => {
                receipt.take();
                Ok(())
            }
            Err(_late) => Err(AuditUnavailable { reference: Some(seq) }),
        }
    }

    /// Takes `record` down for certain: now, or as soon as the log can be written. Never waits.
    pub(crate) fn always(&self, record: &Record) -> Seq {
        self.shared.queue.push(record.text())
    }

    /// Takes the refusal of a peer down. Of a flood of them one record gives the count, and each
    /// has the number of a record like it.
    pub(crate) fn denied(&self, uid: Uid, record: &Record) -> Seq {
        self.shared.denials().note(uid, record, Instant::now(), |record| self.always(record))
    }

    /// Whether grants can be written at this moment.
    pub(crate) fn is_writable(&self) -> bool {
        self.shared.is_writable()
    }

    /// Where the log stands: a copy kept elsewhere shows whether its end was cut off.
    pub(crate) fn head(&self) -> Head {
        let place = self.shared.place();
        Head { seq: place.head.seq, hash: place.head.hex(), signed_to: place.signed_to }
    }

    /// The `last` records that were written, at most 1000, oldest first, and those that follow.
    pub(crate) fn tail(&self, last: usize) -> (Vec<String>, Subscription) {
        self.shared.recent.tail(last)
    }

    /// Writes what is queued and the last checkpoint, and closes the log. False when that takes
    /// longer than `within`.
    pub(crate) fn stop(&self, within: Duration) -> bool {
        self.shared.queue.stop();
        self.shared.queue.wait_until_closed(within)
    }
}

/// A grant that waits for its record; given up when dropped.
struct Waiting<'a> {
    queue: &'a Queue,
    seq: Seq,
    told: oneshot::Receiver<Receipt>,
    over: bool,
}

impl Waiting<'_> {
    fn end(&mut self, told: Option<Receipt>) -> Result<(), AuditUnavailable> {
        self.over = true;
        match told {
            Some(receipt) => {
                receipt.take();
                Ok(())
            }
            None => {
                self.queue.withdraw(self.seq, UNWRITTEN);
                Err(AuditUnavailable { reference: Some(self.seq) })
            }
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.queue.withdraw(self.seq, CALLER_GONE);
        }
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        self.queue.stop();
    }
}

impl Shared {
    fn is_writable(&self) -> bool {
        self.writable.load(Ordering::Acquire)
    }

    /// From now on nothing is granted. A change is logged once, not at each record.
    fn refuse_grants(&self, why: &dyn fmt::Display) {
        if self.writable.swap(false, Ordering::AcqRel) {
            self.place().refused_since = Some(SystemTime::now());
            error!(%why, "the audit log cannot be written: nothing is granted");
        }
    }

    fn grant_again(&self) {
        if !self.writable.swap(true, Ordering::AcqRel) {
            info!("the audit log can be written again");
        }
    }

    fn refused_since(&self) -> Option<SystemTime> {
        self.place().refused_since
    }

    fn moved(&self, head: Link) {
        self.place().head = head;
    }

    fn signed(&self, seq: u64) {
        self.place().signed_to = seq;
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn denials(&self) -> MutexGuard<'_, Denials> {
        self.denials.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::arena::BackendChoice;

    pub(crate) fn config(path: &Path) -> AuditConfig {
        AuditConfig {
            file: Some(path.to_owned()),
            stdout: false,
            durability: Durability::Write,
            max_size: 1 << 30,
            keep: 8,
            signing_key: None,
        }
    }

    fn open(config: &AuditConfig) -> Result<Audit, SinkError> {
        Audit::open(config, &Arena::map(BackendChoice::Auto, 64 * 1024).unwrap())
    }

    fn start(config: &AuditConfig) -> Audit {
        let audit = open(config).unwrap();
        audit.start().unwrap();
        audit
    }

    fn stop(audit: &Audit) {
        assert!(audit.stop(Duration::from_secs(10)), "the log closes");
    }

    /// Opens the log at `path`, records `event`, and closes it.
    fn record_one(path: &Path, event: Event) -> Seq {
        let audit = start(&config(path));
        let seq = audit.always(&Record::new(event, Outcome::Done));
        stop(&audit);
        seq
    }

    fn lines(path: &Path) -> Vec<String> {
        std::fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
    }

    /// The number of the last record of files that follow each other.
    fn verified(paths: &[PathBuf]) -> u64 {
        let lines: Vec<String> = paths.iter().flat_map(|path| lines(path)).collect();
        Chain::verify(lines.iter().map(String::as_str)).unwrap_or_else(|broken| {
            let around = &lines[broken.line.saturating_sub(1)..=broken.line];
            panic!("{broken:?} {around:#?}")
        })
    }

    fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !holds() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn issued() -> Record {
        Record::new(Event::HandleIssued, Outcome::Allowed)
    }

    fn log() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        (dir, path)
    }

    #[test]
    fn the_chain_goes_on_after_a_restart() {
        let (_dir, path) = log();
        assert_eq!(record_one(&path, Event::BrokerStarted), Seq(1));
        assert_eq!(record_one(&path, Event::BrokerStopped), Seq(3), "behind a checkpoint");
        assert_eq!(verified(&[path.clone()]), 4);
        assert!(lines(&path)[3].contains("\"checkpoint\""), "{}", lines(&path)[3]);
    }

    #[test]
    fn torn_bytes_are_kept_in_records_of_their_own() {
        for torn in [10, 2049, 20_000] {
            let (_dir, path) = log();
            record_one(&path, Event::BrokerStarted);
            let mut text = std::fs::read(&path).unwrap();
            text.extend((0..torn).map(|n| b'a' + (n % 26) as u8));
            std::fs::write(&path, text).unwrap();
            record_one(&path, Event::BrokerStopped);
            let kept: String = lines(&path)
                .iter()
                .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
                .filter(|record| record["event"] == "audit.repaired")
                .flat_map(|record| {
                    assert_eq!(record["detail"]["bytes"], torn);
                    let torn = record["detail"]["torn"].as_str().unwrap().as_bytes().to_vec();
                    data_encoding::BASE64.decode(&torn).unwrap()
                })
                .map(char::from)
                .collect();
            assert_eq!(kept.len(), torn.min(16 * 1024));
            assert!(kept.starts_with("abcdefghij"));
            verified(&[path]);
        }
    }

    #[test]
    fn an_edited_tail_is_refused() {
        let (_dir, path) = log();
        record_one(&path, Event::BrokerStarted);
        let text = std::fs::read_to_string(&path).unwrap().replace("checkpoint", "checkpaint");
        std::fs::write(&path, text).unwrap();
        assert!(matches!(open(&config(&path)), Err(SinkError::BrokenTail { .. })));
    }

    #[test]
    fn two_brokers_cannot_share_a_log() {
        let (_dir, path) = log();
        let _first = open(&config(&path)).unwrap();
        assert!(matches!(open(&config(&path)), Err(SinkError::InUse { .. })));
    }

    #[tokio::test]
    async fn a_deleted_log_grants_nothing_until_there_is_a_new_one() {
        let (dir, path) = log();
        let audit = start(&config(&path));
        assert!(audit.before(&issued(), ()).await.is_ok());
        let old = dir.path().join("old");
        std::fs::rename(&path, &old).unwrap();
        assert!(audit.before(&issued(), ()).await.is_err());
        audit.always(&Record::new(Event::HandleRevoked, Outcome::Done));
        wait_for("it resumes", || audit.is_writable());
        assert!(audit.before(&issued(), ()).await.is_ok());
        stop(&audit);
        verified(&[old, path.clone()]);
        let text = lines(&path).join("\n");
        for part in ["handle.revoked", "\"deleted\"", "writable_again", "handle.issued"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[tokio::test]
    async fn a_log_that_somebody_else_changes_grants_nothing_until_it_is_mended() {
        type Change = fn(&Path);
        let changes: [(&str, Change); 3] = [
            ("trailing", |path| {
                use std::io::Write as _;
                let mut file = std::fs::File::options().append(true).open(path).unwrap();
                file.write_all(b"{\"v\":1,\"seq\":7}\n").unwrap();
            }),
            ("cut", |path| {
                std::fs::File::options().write(true).open(path).unwrap().set_len(3).unwrap();
            }),
            ("replaced", |path| {
                let copy = path.with_extension("copy");
                std::fs::copy(path, &copy).unwrap();
                std::fs::rename(copy, path).unwrap();
            }),
        ];
        for (what, change) in changes {
            let (_dir, path) = log();
            let audit = start(&config(&path));
            assert!(audit.before(&issued(), ()).await.is_ok());
            change(&path);
            assert!(audit.before(&issued(), ()).await.is_err(), "{what}");
            wait_for(what, || audit.is_writable());
            stop(&audit);
            let lines = lines(&path);
            assert!(lines.iter().any(|line| line.contains(what)), "{what} in {lines:#?}");
            if what != "cut" {
                verified(&[path]);
            }
        }
    }

    #[tokio::test]
    async fn another_log_in_the_place_of_ours_is_not_touched() {
        let (dir, path) = log();
        let audit = start(&config(&path));
        assert!(audit.before(&issued(), ()).await.is_ok());
        let other = dir.path().join("other.jsonl");
        record_one(&other, Event::BrokerStarted);
        let text = std::fs::read(&other).unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert!(audit.before(&issued(), ()).await.is_err());
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert!(!audit.is_writable());
        assert_eq!(std::fs::read(&path).unwrap(), text);
        std::fs::remove_file(&path).unwrap();
        wait_for("it resumes", || audit.is_writable());
    }

    #[tokio::test]
    async fn a_refused_grant_keeps_its_number() {
        let (dir, path) = log();
        let audit = start(&config(&path));
        assert!(audit.before(&issued(), ()).await.is_ok());
        std::fs::rename(&path, dir.path().join("old")).unwrap();
        let refused = audit.before(&issued().purpose("report"), ()).await.unwrap_err();
        assert_eq!(refused.reference, Some(Seq(2)));
        wait_for("it resumes", || audit.is_writable());
        stop(&audit);
        let line = &lines(&path)[0];
        assert!(
            line.contains("\"seq\":2,")
                && line.contains(
                    "\"access.denied\",\"outcome\":\"denied\",\"reason\":\"AUDIT_UNAVAILABLE\""
                )
                && line.contains(
                    "\"purpose\":\"report\",\"detail\":{\"instead_of\":\"handle.issued\"}"
                ),
            "{line}"
        );
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_leaves_no_grant_behind() {
        let (_dir, path) = log();
        // Not started yet: the record waits in the queue.
        let audit = open(&config(&path)).unwrap();
        {
            let record = issued();
            let waiting = audit.before(&record, ());
            let gone = tokio::time::timeout(Duration::from_millis(10), waiting).await;
            assert!(gone.is_err());
        }
        audit.start().unwrap();
        // Written, but nobody takes the answer.
        {
            let record = issued();
            let mut waiting = Box::pin(audit.before(&record, ()));
            let seq = audit.head().seq;
            let polled = std::future::poll_fn(|context| {
                std::task::Poll::Ready(waiting.as_mut().poll(context))
            });
            assert!(polled.await.is_pending());
            wait_for("it is written", || audit.head().seq > seq);
        }
        stop(&audit);
        verified(&[path.clone()]);
        let lines = lines(&path);
        assert!(lines[0].contains("access.denied") && lines[0].contains("client_gone"));
        assert!(lines[1].contains("handle.issued"));
        assert!(lines[2].contains("\"nothing_came_of\":2"), "{}", lines[2]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_log_that_stalls_refuses_in_bounded_time_and_keeps_what_takes_rights_away() {
        let (_dir, path) = log();
        // A writer that has not started stands for one that hangs in write(2).
        let audit = open(&config(&path)).unwrap();
        let refused = audit.before(&issued(), ()).await.unwrap_err();
        assert_eq!(refused.reference, Some(Seq(1)));
        let refused = audit.before(&issued(), ()).await.unwrap_err();
        assert_eq!(refused.reference, None, "the second need not wait to know");
        for _ in 0..20_000 {
            audit.always(&Record::new(Event::HandleRevoked, Outcome::Done));
        }
        audit.start().unwrap();
        wait_for("it resumes", || audit.is_writable());
        stop(&audit);
        let last = verified(&[path.clone()]);
        let lines = lines(&path);
        assert_eq!(lines.len() as u64, last);
        let given_up = lines.iter().find(|line| line.contains("queue_full")).unwrap();
        let revoked = lines.iter().filter(|line| line.contains("handle.revoked")).count();
        let count = format!("\"given_up\":{},", 20_000 - revoked);
        assert!(given_up.contains(&count), "{count} in {given_up}");
    }

    #[tokio::test]
    async fn the_chain_runs_through_rotated_files() {
        let (dir, path) = log();
        let config = AuditConfig { max_size: 16 * 1024, keep: 3, ..config(&path) };
        let audit = start(&config);
        for _ in 0..300 {
            assert!(audit.before(&issued(), ()).await.is_ok());
        }
        stop(&audit);
        let rotated = |n: u32| PathBuf::from(format!("{}.{n}", path.display()));
        assert!(rotated(3).exists() && !rotated(4).exists(), "three are kept");
        let files = [rotated(3), rotated(2), rotated(1), path.clone()];
        let all: Vec<String> = files.iter().flat_map(|file| lines(file)).collect();
        for file in &files {
            let first = &lines(file)[0];
            assert!(first.contains("\"checkpoint\""), "{first}");
            let len = std::fs::metadata(file).unwrap().len();
            assert!(len < 20 * 1024, "{len}");
        }
        for (before, after) in all.iter().zip(all.iter().skip(1)) {
            let hash = before.rsplit_once("\"hash\":").unwrap().1.trim_end_matches('}');
            assert!(after.contains(&format!("\"prev\":{hash}")), "{before} {after}");
        }
        // The broker died before there was a new file.
        std::fs::rename(&path, rotated(1)).unwrap();
        let seq = audit.head().seq;
        drop(audit);
        let seq_after = {
            let audit = start(&config);
            assert!(audit.before(&issued(), ()).await.is_ok());
            stop(&audit);
            audit.head().seq
        };
        assert_eq!(seq_after, seq + 3, "said, issued, signed");
        assert!(lines(&path)[0].contains("\"missing\""), "{}", lines(&path)[0]);
        drop(dir);
    }

    #[tokio::test]
    async fn a_flood_of_denials_stays_small() {
        let (_dir, path) = log();
        let audit = start(&config(&path));
        let denied = Record::new(Event::AccessDenied, Outcome::Denied).reason("no_grant");
        let mut references = std::collections::BTreeSet::new();
        for _ in 0..100_000 {
            references.insert(audit.denied(Uid::from_raw(1000), &denied).0);
        }
        stop(&audit);
        let lines = lines(&path);
        let len = std::fs::metadata(&path).unwrap().len();
        println!("100000 denials: {} records, {len} bytes", lines.len());
        assert!(lines.len() < 60 && len < 32 * 1024);
        let records = lines.iter().map(|line| serde_json::from_str(line).unwrap());
        let records: Vec<serde_json::Value> = records.collect();
        let written: Vec<_> =
            records.iter().filter(|record| record["event"] == "access.denied").collect();
        let counted = written.iter().map(|r| r["detail"]["count"].as_u64().unwrap_or(1));
        assert_eq!(counted.sum::<u64>(), 100_000, "nothing is lost in the count");
        for reference in references {
            assert!(written.iter().any(|record| record["seq"] == reference), "ref={reference}");
        }
    }

    #[tokio::test]
    async fn a_reader_follows() {
        let (_dir, path) = log();
        let audit = start(&config(&path));
        assert!(audit.before(&issued(), ()).await.is_ok());
        let (last, mut following) = audit.tail(10);
        assert_eq!(last, lines(&path));
        let seq = audit.always(&Record::new(Event::HandleRevoked, Outcome::Done));
        let followed = following.next().await.unwrap();
        assert!(followed.line.contains(&format!("\"seq\":{seq},")), "{}", followed.line);
        assert_eq!(followed.skipped, 0);
    }

    /// 64 tasks grant and deny while the file fails and comes back.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn the_chain_holds_while_the_file_fails_and_comes_back() {
        let (dir, path) = log();
        let audit = start(&config(&path));
        let over = Arc::new(AtomicBool::new(false));
        let counts = Arc::new([const { AtomicU64::new(0) }; 2]);
        let mut tasks = tokio::task::JoinSet::new();
        for task in 0..64_u32 {
            let (audit, over, counts) = (audit.clone(), Arc::clone(&over), Arc::clone(&counts));
            tasks.spawn(async move {
                let denied = Record::new(Event::AccessDenied, Outcome::Denied).reason("no_grant");
                let issued = issued().detail("task", task);
                while !over.load(Ordering::Relaxed) {
                    let granted = audit.before(&issued, ()).await.is_ok();
                    counts[usize::from(granted)].fetch_add(1, Ordering::Relaxed);
                    audit.denied(Uid::from_raw(task), &denied);
                    tokio::task::yield_now().await;
                }
            });
        }
        let mut pieces = Vec::new();
        for piece in 0..3 {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let old = dir.path().join(format!("old{piece}"));
            std::fs::rename(&path, &old).unwrap();
            // A directory in its place keeps the broker from making a new file.
            std::fs::create_dir(&path).unwrap();
            pieces.push(old);
            wait_for("the failure is seen", || !audit.is_writable());
            tokio::time::sleep(Duration::from_millis(1200)).await;
            assert!(!audit.is_writable());
            std::fs::remove_dir(&path).unwrap();
            wait_for("it resumes", || audit.is_writable());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        over.store(true, Ordering::Relaxed);
        while tasks.join_next().await.is_some() {}
        stop(&audit);
        pieces.push(path.clone());
        let last = verified(&pieces);
        assert_eq!(last, audit.head().seq);
        let all: Vec<String> = pieces.iter().flat_map(|piece| lines(piece)).collect();
        let granted =
            all.iter().filter(|line| line.contains("\"event\":\"handle.issued\"")).count();
        let [refused, counted] = counts.each_ref().map(|count| count.load(Ordering::Relaxed));
        println!("{last} records: {counted} granted, {refused} refused");
        assert_eq!(granted as u64, counted, "a record for each grant, and none without");
        assert!(refused > 64);
    }
}
