//! Records on their way to the writer. A record gets its number when it enters, and what has a
//! number is written, in order: the numbers of those who wait for nothing are known at once, and
//! the chain has no gap.
//!
//! Whoever wants to grant waits for the writer's [`Receipt`]. A receipt that nobody takes, or a
//! wait that is given up, is followed in the log: what is still queued becomes a refusal, and what
//! was written is taken back by a record of its own.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::oneshot;

use super::chain::timestamp;
use super::record::Text;
use super::{Event, Outcome, Record, Seq};

/// Records that wait for a log that cannot be written. Past this they are given up, and one
/// record at the end of the queue counts them.
const MAX_WAITING: usize = 16 * 1024;
/// Grants that wait. The rest of the queue is kept for what takes rights away.
const MAX_GRANTS: usize = 4 * 1024;
/// Records that the writer takes at once.
const MAX_BATCH: usize = 256;

/// Why nothing came of a record that allowed something.
pub(super) const UNWRITTEN: &str = "AUDIT_UNAVAILABLE";
pub(super) const CALLER_GONE: &str = "client_gone";

#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<State>,
    /// Wakes the writer.
    more: Condvar,
    /// Wakes who waits for the log to be closed.
    closed: Condvar,
}

#[derive(Debug)]
struct State {
    next: u64,
    /// Without a gap: the number of each is that of the one before and one.
    waiting: VecDeque<Entry>,
    /// How many of them are grants.
    grants: usize,
    /// How many records the last of `waiting` stands for, when it counts what was given up.
    given_up: u64,
    stopping: bool,
    closed: bool,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) seq: Seq,
    pub(super) time: SystemTime,
    pub(super) body: Body,
    pub(super) waiter: Option<Waiter>,
}

#[derive(Debug)]
pub(super) enum Body {
    Record(Text),
    /// Made when it is written, for it signs what stands before it.
    Checkpoint {
        /// A new file begins with this one.
        rotate: bool,
    },
}

/// Who is told that a record stands.
#[derive(Debug)]
pub(super) enum Waiter {
    Task(oneshot::Sender<Receipt>),
    Thread(SyncSender<Receipt>),
}

/// A record stands in the log. Whoever drops it untaken says that nothing came of it.
#[derive(Debug)]
pub(super) struct Receipt {
    queue: Arc<Queue>,
    seq: Seq,
    event: Event,
    late: bool,
    taken: bool,
}

/// What the writer is to do.
#[derive(Debug)]
pub(super) struct Turn {
    pub(super) entries: VecDeque<Entry>,
    pub(super) stopping: bool,
}

impl Queue {
    /// `next` is the first number.
    pub(super) fn new(next: u64) -> Self {
        Self {
            state: Mutex::new(State {
                next,
                waiting: VecDeque::new(),
                grants: 0,
                given_up: 0,
                stopping: false,
                closed: false,
            }),
            more: Condvar::new(),
            closed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a record that nobody waits for. A full queue gives the number of the record that
    /// counts it.
    pub(super) fn push(&self, text: Text) -> Seq {
        let mut state = self.state();
        let seq = if state.waiting.len() < MAX_WAITING {
            state.given_up = 0;
            state.push(Body::Record(text), None)
        } else {
            state.give_up()
        };
        drop(state);
        self.more.notify_one();
        seq
    }

    /// Enters a checkpoint, unless the queue is full.
    pub(super) fn push_checkpoint(&self, rotate: bool) -> bool {
        let mut state = self.state();
        let room = state.waiting.len() < MAX_WAITING;
        if room {
            state.given_up = 0;
            state.push(Body::Checkpoint { rotate }, None);
        }
        room
    }

    /// Enters a record that a grant waits for. `None` when too many wait already.
    pub(super) fn push_grant(&self, text: Text, waiter: Waiter) -> Option<Seq> {
        let mut state = self.state();
        if state.grants >= MAX_GRANTS || state.waiting.len() >= MAX_WAITING || state.stopping {
            return None;
        }
        state.grants += 1;
        let seq = state.push(Body::Record(text), Some(waiter));
        drop(state);
        self.more.notify_one();
        Some(seq)
    }

    /// Turns a grant that the writer has not taken yet into its refusal.
    pub(super) fn withdraw(&self, seq: Seq, reason: &str) {
        let mut state = self.state();
        let first = state.waiting.front().map_or(seq.0, |entry| entry.seq.0);
        let place = seq.0.checked_sub(first).and_then(|place| usize::try_from(place).ok());
        if let Some(entry) = place.and_then(|place| state.waiting.get_mut(place))
            && entry.waiter.take().is_some()
        {
            entry.refuse(reason);
            state.grants -= 1;
        }
    }

    /// Waits until there is something to write (unless `hold`), somebody stops the log, or
    /// `deadline` has come.
    pub(super) fn take(&self, deadline: Instant, hold: bool) -> Turn {
        let mut state = self.state();
        loop {
            let now = Instant::now();
            let ready = state.stopping || (!hold && !state.waiting.is_empty());
            if ready || now >= deadline {
                return Turn { entries: state.batch(), stopping: state.stopping };
            }
            let slept = self.more.wait_timeout(state, deadline - now);
            state = slept.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What is there now.
    pub(super) fn take_now(&self) -> Turn {
        self.take(Instant::now(), false)
    }

    /// Puts entries back that could not be written, refusing the grants among them.
    pub(super) fn put_back(&self, mut entries: VecDeque<Entry>) {
        let mut refused = Vec::new();
        for entry in &mut entries {
            if let Some(waiter) = entry.waiter.take() {
                entry.refuse(UNWRITTEN);
                refused.push(waiter);
            }
        }
        let mut state = self.state();
        for entry in entries.into_iter().rev() {
            state.waiting.push_front(entry);
        }
        drop(state);
        // Their records stand in the queue: a waiter that hears nothing more is refused.
        drop(refused);
    }

    /// Lets the writer write what is there, and end.
    pub(super) fn stop(&self) {
        self.state().stopping = true;
        self.more.notify_one();
    }

    /// The writer has ended.
    pub(super) fn close(&self) {
        self.state().closed = true;
        self.closed.notify_all();
    }

    /// Returns when the writer has ended, or after `within`; whether it has.
    pub(super) fn wait_until_closed(&self, within: Duration) -> bool {
        let waited = self.closed.wait_timeout_while(self.state(), within, |state| !state.closed);
        waited.unwrap_or_else(PoisonError::into_inner).0.closed
    }

    pub(super) fn is_empty(&self) -> bool {
        self.state().waiting.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.state().waiting.len()
    }
}

impl State {
    fn push(&mut self, body: Body, waiter: Option<Waiter>) -> Seq {
        let seq = Seq(self.next);
        self.next += 1;
        // The time is taken here, so that times are in the order of the numbers.
        self.waiting.push_back(Entry { seq, time: SystemTime::now(), body, waiter });
        seq
    }

    /// Counts a record for which there is no room in the last record of the queue.
    fn give_up(&mut self) -> Seq {
        self.given_up += 1;
        let counted = Record::new(Event::AuditRepaired, Outcome::Failed)
            .reason("queue_full")
            .detail("given_up", self.given_up)
            .detail("until", timestamp(SystemTime::now()).to_string());
        let body = Body::Record(counted.text());
        match self.waiting.back_mut() {
            Some(last) if self.given_up > 1 => {
                last.body = body;
                last.seq
            }
            Some(_) | None => self.push(body, None),
        }
    }

    fn batch(&mut self) -> VecDeque<Entry> {
        let mut count = self.waiting.len().min(MAX_BATCH);
        // A new file begins with its checkpoint, so what stands before it goes first.
        let rotates = |entry: &Entry| matches!(entry.body, Body::Checkpoint { rotate: true });
        if let Some(place) = self.waiting.iter().take(count).skip(1).position(rotates) {
            count = place + 1;
        }
        if count == self.waiting.len() {
            self.given_up = 0;
        }
        let batch: VecDeque<Entry> = self.waiting.drain(..count).collect();
        self.grants -= batch.iter().filter(|entry| entry.waiter.is_some()).count();
        batch
    }
}

impl Entry {
    fn refuse(&mut self, reason: &str) {
        match &mut self.body {
            Body::Record(text) => text.refused(reason),
            Body::Checkpoint { .. } => {}
        }
    }
}

impl Waiter {
    /// Says that the record stands. One that is not there any more drops the receipt.
    pub(super) fn tell(self, receipt: Receipt) {
        match self {
            Self::Task(task) => drop(task.send(receipt)),
            Self::Thread(thread) => drop(thread.try_send(receipt)),
        }
    }
}

impl Receipt {
    /// `late`: whoever waited has given up by now.
    pub(super) fn new(queue: &Arc<Queue>, seq: Seq, event: Event, late: bool) -> Self {
        Self { queue: Arc::clone(queue), seq, event, late, taken: false }
    }

    /// The grant goes ahead.
    pub(super) fn take(mut self) {
        self.taken = true;
    }
}

impl Drop for Receipt {
    fn drop(&mut self) {
        if !self.taken {
            let record = Record::new(Event::AccessDenied, Outcome::Failed)
                .reason(if self.late { UNWRITTEN } else { CALLER_GONE })
                .detail("nothing_came_of", self.seq.0)
                .detail("instead_of", self.event.name());
            self.queue.push(record.text());
        }
    }
}
