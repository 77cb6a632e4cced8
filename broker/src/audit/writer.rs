//! The writer: one thread that does all writing, so that a disk or a reader that hangs holds up
//! nobody else. It takes what is queued, writes it at once, and then tells those who wait.
//!
//! When that fails, the grants of the batch become refusals under the same numbers, and what
//! takes rights away is tried again: at once in the room kept for it, and then each second.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tracing::{debug, error, info};

use super::chain::{Chain, Link, timestamp};
use super::file::Mended;
use super::queue::{Body, Entry, Receipt};
use super::signer::Signer;
use super::sink::{Sinks, Written};
use super::{Durability, Event, Outcome, Record, Shared};
use crate::config::AuditConfig;

/// How often a log that cannot be written is tried again, denials that are counted are looked at,
/// and a file that was written is synced.
const TICK: Duration = Duration::from_secs(1);
/// A checkpoint comes after so many records, or so much time with at least one.
const CHECKPOINT_RECORDS: u64 = 1000;
const CHECKPOINT_SPAN: Duration = Duration::from_secs(60);
/// When a rotation that failed is tried again.
const ROTATE_AGAIN: Duration = Duration::from_secs(60);
/// Bytes of torn lines that fit into one record.
const MAX_TORN: usize = 2048;

#[derive(Debug)]
pub(super) struct Writer {
    shared: Arc<Shared>,
    chain: Chain,
    sinks: Sinks,
    signer: Signer,
    max_size: u64,
    keep: u32,
    durability: Durability,
    /// Absent where each batch is synced.
    syncer: Option<Syncer>,
    /// Records since the last checkpoint, and when that was.
    unsigned: u64,
    signed: Instant,
    /// Whether a checkpoint is in the queue.
    signing: bool,
    rotate_from: Instant,
    /// Until when nothing is tried, because nothing could be written.
    hold: Option<Instant>,
    /// Whether the end of the present outage has been recorded already.
    announced: bool,
    next_tick: Instant,
    /// Reused from batch to batch.
    text: String,
    ends: Vec<(usize, Link)>,
}

/// A thread that syncs, and what hands files to it.
#[derive(Debug)]
struct Syncer {
    files: SyncSender<File>,
    thread: JoinHandle<()>,
}

impl Writer {
    pub(super) fn new(
        config: &AuditConfig,
        shared: Arc<Shared>,
        chain: Chain,
        sinks: Sinks,
        signer: Signer,
    ) -> Self {
        let now = Instant::now();
        Self {
            shared,
            chain,
            sinks,
            signer,
            max_size: config.max_size,
            keep: config.keep,
            durability: config.durability,
            syncer: None,
            unsigned: 0,
            signed: now,
            signing: false,
            rotate_from: now,
            hold: None,
            announced: false,
            next_tick: now + TICK,
            text: String::new(),
            ends: Vec::new(),
        }
    }

    /// Records what had to be mended, in as many records as it takes.
    pub(super) fn record_mended(&self, mended: &Mended) {
        let record = || {
            Record::new(Event::AuditRepaired, Outcome::Done)
                .reason(mended.what)
                .detail("bytes", mended.len)
        };
        if mended.bytes.is_empty() {
            self.shared.queue.push(record().text());
        }
        for (part, torn) in mended.bytes.chunks(MAX_TORN).enumerate() {
            let record = record()
                .detail("offset", part * MAX_TORN)
                .detail("kept", mended.bytes.len())
                .detail("torn", data_encoding::BASE64.encode(torn));
            self.shared.queue.push(record.text());
        }
    }

    /// Starts the thread, and one that syncs where nobody waits for that.
    pub(super) fn start(mut self: Box<Self>) -> io::Result<()> {
        if self.durability == Durability::Write {
            let ((files, written), shared) = (sync_channel(1), Arc::clone(&self.shared));
            let thread = std::thread::Builder::new()
                .name("audit-sync".into())
                .spawn(move || sync_all(&written, &shared))?;
            self.syncer = Some(Syncer { files, thread });
        }
        std::thread::Builder::new().name("audit".into()).spawn(move || self.run()).map(drop)
    }

    fn run(mut self) {
        let mut last_written = false;
        loop {
            let held = self.hold.is_some();
            let turn = self.shared.queue.take(self.hold.unwrap_or(self.next_tick), held);
            if self.hold.take().is_some() {
                self.recover();
            }
            // After a failure what was to be granted is refused by now, and the rest may fit into
            // the room kept for it.
            let written =
                self.write(turn.entries) || self.write(self.shared.queue.take_now().entries);
            let now = Instant::now();
            if !written {
                if turn.stopping {
                    break;
                }
                self.hold = Some(now + TICK);
            }
            if now >= self.next_tick {
                self.next_tick = now + TICK;
                self.tick(now);
            }
            if turn.stopping && self.shared.queue.is_empty() {
                if last_written {
                    break;
                }
                self.record_denials(now, true);
                if self.unsigned > 0 || !self.shared.queue.is_empty() {
                    self.shared.queue.push_checkpoint(false);
                }
                last_written = true;
            }
        }
        let left = self.shared.queue.len();
        if left > 0 {
            error!(records = left, "the audit log could not be written to the end");
        }
        if let Some(Syncer { files, thread }) = self.syncer.take() {
            drop(files);
            // The file that it syncs is locked as long as it has it.
            let _ = thread.join();
        }
        let Self { mut sinks, shared, .. } = self;
        sinks.close();
        // Whoever waits for the end may open the file again, and lock it.
        drop(sinks);
        shared.queue.close();
    }

    /// Writes a batch, and tells those who wait for it. False when not all of it was written; the
    /// rest is back in the queue, its grants refused.
    fn write(&mut self, mut entries: VecDeque<Entry>) -> bool {
        if let Some(Entry { body: Body::Checkpoint { rotate }, .. }) = entries.front_mut()
            && std::mem::take(rotate)
        {
            self.rotate();
        }
        let before = self.chain.head();
        self.text.clear();
        self.ends.clear();
        let mut ends = Vec::with_capacity(entries.len());
        for entry in &entries {
            self.append(entry);
            ends.push(self.text.len());
            self.ends.push((self.text.len(), self.chain.head()));
        }
        let grants = entries.iter().any(|entry| entry.waiter.is_some());
        let Written { lines, error } = self.sinks.write(&self.text, &ends, grants);
        let rest = entries.split_off(lines.min(entries.len()));
        let (end, head) = lines
            .checked_sub(1)
            .and_then(|last| self.ends.get(last))
            .copied()
            .unwrap_or((0, before));
        self.chain.go_back(head);
        if let Some(error) = error {
            self.shared.refuse_grants(&error);
        }
        if !entries.is_empty() {
            self.stands(entries, end, head);
        }
        let all = rest.is_empty();
        if !all {
            self.shared.queue.put_back(rest);
        }
        all
    }

    fn append(&mut self, entry: &Entry) {
        match &entry.body {
            Body::Record(text) => self.chain.append(entry.seq, entry.time, text, &mut self.text),
            Body::Checkpoint { .. } => {
                let record = Record::new(Event::Checkpoint, Outcome::Done);
                let place = (entry.seq.0, entry.time);
                let broker = self.chain.broker();
                let record = self.signer.checkpoint(record, broker, place, &self.chain.head());
                self.chain.append(entry.seq, entry.time, &record.text(), &mut self.text);
            }
        }
    }

    /// What follows from a batch that was written: its text ends at `end`, the chain at `head`.
    fn stands(&mut self, entries: VecDeque<Entry>, end: usize, head: Link) {
        self.shared.recent.add(self.text.get(..end).unwrap_or_default());
        for Entry { seq, time, body, waiter } in entries {
            match body {
                Body::Record(text) => {
                    self.unsigned += 1;
                    if let Some(waiter) = waiter {
                        let late = time.elapsed().is_ok_and(|since| since >= super::PATIENCE);
                        waiter.tell(Receipt::new(&self.shared.queue, seq, text.event(), late));
                    }
                }
                Body::Checkpoint { .. } => {
                    self.unsigned = 0;
                    self.signed = Instant::now();
                    self.signing = false;
                    self.shared.signed(seq.0);
                }
            }
        }
        self.shared.moved(head);
        if self.sinks.is_whole() && !self.shared.is_writable() {
            self.announce();
            self.announced = false;
            self.shared.grant_again();
        }
        let rotate = self.sinks.len() > self.max_size && Instant::now() >= self.rotate_from;
        if !self.signing && (rotate || self.unsigned >= CHECKPOINT_RECORDS) {
            self.signing = self.shared.queue.push_checkpoint(rotate);
        }
    }

    fn rotate(&mut self) {
        match self.sinks.rotate(self.keep) {
            Ok(()) => info!("the audit log goes on in a new file"),
            Err(error) => {
                error!(%error, "the audit log could not be rotated, and goes on in the old file");
                self.rotate_from = Instant::now() + ROTATE_AGAIN;
            }
        }
    }

    /// What is done once a second.
    fn tick(&mut self, now: Instant) {
        if self.shared.is_writable() {
            // A file that nobody writes to is missed too.
            if let Err(error) = self.sinks.check() {
                self.shared.refuse_grants(&error);
            }
        } else if self.hold.is_none() {
            self.recover();
        }
        self.record_denials(now, false);
        if self.unsigned > 0 && !self.signing && now.duration_since(self.signed) >= CHECKPOINT_SPAN
        {
            self.signing = self.shared.queue.push_checkpoint(false);
        }
        if let Some(syncer) = &self.syncer
            && let Some(file) = self.sinks.unsynced()
            && syncer.files.try_send(file).is_ok()
        {
            self.sinks.synced();
        }
    }

    fn record_denials(&self, now: Instant, all: bool) {
        for record in self.shared.denials().due(now, all) {
            self.shared.queue.push(record.text());
        }
    }

    /// Looks for a way to write again, without waiting for a request.
    fn recover(&mut self) {
        match self.sinks.recover(&self.chain.head()) {
            Ok(None) => {}
            Ok(Some(mended)) => {
                self.record_mended(&mended);
            }
            Err(error) => {
                debug!(%error, "the audit log is still not to be had");
                return;
            }
        }
        // Whether it can be written shows when something is.
        self.announce();
    }

    /// Records that grants were refused for a while, once.
    fn announce(&mut self) {
        if !std::mem::replace(&mut self.announced, true) {
            let mut record =
                Record::new(Event::AuditRepaired, Outcome::Done).reason("writable_again");
            if let Some(since) = self.shared.refused_since() {
                record = record.detail("refused_since", timestamp(since).to_string());
            }
            self.shared.queue.push(record.text());
        }
    }
}

/// Brings files to the disk as they come, until nobody sends any more.
fn sync_all(files: &Receiver<File>, shared: &Shared) {
    for file in files {
        if let Err(error) = rustix::fs::fdatasync(&file) {
            shared.refuse_grants(&error);
        }
    }
}
