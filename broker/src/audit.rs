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
pub(crate) mod tests;
