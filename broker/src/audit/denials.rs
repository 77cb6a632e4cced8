//! Denials, limited: a peer that is refused a thousand times a second must not fill the disk.
//!
//! Each uid has a few records to spend, and gets a new one each second; so has the whole of them.
//! What comes past that is counted: it shares the number of the last record of its kind, and once
//! in a while one record says how many there were. Keyed by what the kernel and the configuration
//! say, never by what a caller typed. No clock and no lock in here.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime};

use super::chain::timestamp;
use super::{Event, Outcome, Record, Seq};
use crate::connection::ConnectionName;
use crate::peer::Uid;

/// Records that a uid may spend at once, and regains one a second.
const BURST: f64 = 20.0;
/// The same for all uids together, regained fifty a second.
const BURST_OF_ALL: f64 = 500.0;
const RATE_OF_ALL: f64 = 50.0;
/// How long denials are counted before the count is recorded.
const WINDOW: Duration = Duration::from_secs(10);
/// Kinds that are told apart, and uids that are remembered.
const MAX_KINDS: usize = 1024;

/// Denials that are alike.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Kind {
    /// Absent where there are too many to tell apart.
    uid: Option<Uid>,
    reason: Option<String>,
    connection: Option<ConnectionName>,
}

/// The last record of a kind, and what was counted since.
#[derive(Debug)]
struct Count {
    stands: Seq,
    since: SystemTime,
    until: SystemTime,
    began: Instant,
    count: u64,
}

#[derive(Debug)]
struct Bucket {
    left: f64,
    filled: Instant,
}

/// The table.
#[derive(Debug)]
pub(super) struct Denials {
    kinds: HashMap<Kind, Count>,
    buckets: HashMap<Uid, Bucket>,
    all: Bucket,
    /// How many kinds have counted something.
    counting: usize,
    /// When what is of no use was last removed.
    swept: Instant,
}

impl Bucket {
    fn take(&mut self, now: Instant, rate: f64, burst: f64) -> bool {
        let since = now.saturating_duration_since(self.filled).as_secs_f64();
        self.left = (self.left + since * rate).min(burst);
        self.filled = now;
        let has = self.left >= 1.0;
        if has {
            self.left -= 1.0;
        }
        has
    }
}

impl Denials {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            kinds: HashMap::new(),
            buckets: HashMap::new(),
            all: Bucket { left: BURST_OF_ALL, filled: now },
            counting: 0,
            swept: now,
        }
    }

    /// The number of the record for this denial: one of its own, made by `write`, or that of the
    /// last one like it.
    pub(super) fn note(
        &mut self,
        uid: Uid,
        record: &Record,
        now: Instant,
        write: impl Fn(&Record) -> Seq,
    ) -> Seq {
        let spends = self.spend(uid, now);
        let kind = self.kind(uid, record, spends);
        let wall = SystemTime::now();
        match self.kinds.get_mut(&kind) {
            Some(count) if !spends => {
                if count.count == 0 {
                    (count.since, count.began) = (wall, now);
                    self.counting += 1;
                }
                count.count += 1;
                count.until = wall;
                count.stands
            }
            Some(count) if count.count > 0 => {
                // Its number must stand for what was counted until that is recorded.
                write(record)
            }
            Some(count) => {
                count.stands = write(record);
                count.stands
            }
            None => {
                // The first of its kind has a record whatever was spent: there must be one that
                // stands for the next.
                let stands = write(record);
                let count = Count { stands, since: wall, until: wall, began: now, count: 0 };
                self.kinds.insert(kind, count);
                stands
            }
        }
    }

    /// As narrow a kind as there is room for. Whoever has nothing left to spend begins no new kind
    /// for each connection, and where all is spent not even one for each uid.
    fn kind(&mut self, uid: Uid, record: &Record, spends: bool) -> Kind {
        let (reason, connection) = record.likeness();
        let narrow = Kind { uid: Some(uid), reason, connection };
        if self.kinds.contains_key(&narrow) {
            return narrow;
        }
        let room = self.kinds.len() < MAX_KINDS;
        if room && spends {
            return narrow;
        }
        let of_uid = Kind { connection: None, ..narrow };
        if self.kinds.contains_key(&of_uid) || (room && self.all.left >= 1.0) {
            return of_uid;
        }
        Kind { uid: None, ..of_uid }
    }

    fn spend(&mut self, uid: Uid, now: Instant) -> bool {
        self.sweep(now);
        if self.buckets.len() >= MAX_KINDS && !self.buckets.contains_key(&uid) {
            return false;
        }
        let bucket = self.buckets.entry(uid).or_insert(Bucket { left: BURST, filled: now });
        bucket.take(now, 1.0, BURST) && self.all.take(now, RATE_OF_ALL, BURST_OF_ALL)
    }

    /// Makes room when there is none, at most once a second: whoever fills the table must not make
    /// each refusal as dear as a walk through it.
    fn sweep(&mut self, now: Instant) {
        let full = self.kinds.len() >= MAX_KINDS || self.buckets.len() >= MAX_KINDS;
        if !full || now.saturating_duration_since(self.swept) < Duration::from_secs(1) {
            return;
        }
        self.swept = now;
        // What has nothing to record stands for nothing that would be lost.
        self.kinds.retain(|_, count| count.count > 0);
        self.buckets.retain(|_, bucket| {
            bucket.left + now.saturating_duration_since(bucket.filled).as_secs_f64() < BURST
        });
    }

    /// Records of what was counted for long enough, or of all that was counted.
    pub(super) fn due(&mut self, now: Instant, all: bool) -> Vec<Record> {
        if self.counting == 0 {
            return Vec::new();
        }
        let mut records = Vec::new();
        for (kind, count) in &mut self.kinds {
            let over = now.saturating_duration_since(count.began) >= WINDOW;
            if count.count == 0 || !(all || over) {
                continue;
            }
            let mut record = Record::new(Event::AccessDenied, Outcome::Denied)
                .reason(kind.reason.as_deref().unwrap_or("denied"))
                .detail("count", count.count)
                .detail("first_ref", count.stands.0)
                .detail("since", timestamp(count.since).to_string())
                .detail("until", timestamp(count.until).to_string());
            if let Some(uid) = kind.uid {
                record = record.detail("uid", uid.as_raw());
            }
            if let Some(connection) = &kind.connection {
                record = record.connection(connection);
            }
            records.push(record);
            count.count = 0;
        }
        self.counting -= records.len();
        records
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Counts what is written.
    #[derive(Default)]
    struct Log(Cell<u64>);

    impl Log {
        fn write(&self, _record: &Record) -> Seq {
            self.0.set(self.0.get() + 1);
            Seq(self.0.get())
        }
    }

    fn denial(reason: &str) -> Record {
        Record::new(Event::AccessDenied, Outcome::Denied).reason(reason)
    }

    fn counted(records: &[Record]) -> u64 {
        let count = |record: &Record| {
            let mut line = String::from("{");
            record.text().write_to(&mut line);
            line.push('}');
            let value: serde_json::Value = serde_json::from_str(&line).unwrap();
            value["detail"]["count"].as_u64().unwrap()
        };
        records.iter().map(count).sum()
    }

    #[test]
    fn a_flood_is_counted_and_nothing_is_lost() {
        let start = Instant::now();
        let (mut denials, log) = (Denials::new(start), Log::default());
        let (mut written, mut counts) = (0, 0);
        for n in 0..100_000_u64 {
            let now = start + Duration::from_micros(n * 300);
            let before = log.0.get();
            let reference =
                denials.note(Uid::from_raw(7), &denial("no_grant"), now, |r| log.write(r));
            assert!((1..=log.0.get()).contains(&reference.0), "it refers to what is there");
            written += log.0.get() - before;
            counts += counted(&denials.due(now, false));
        }
        let rest = denials.due(start, true);
        assert_eq!(written + counts + counted(&rest), 100_000);
        assert!(written <= 20 + 31, "{written}");
        assert!(denials.due(start, true).is_empty(), "each is counted once");
    }

    #[test]
    fn one_uid_does_not_silence_another() {
        let now = Instant::now();
        let (mut denials, log) = (Denials::new(now), Log::default());
        for _ in 0..1000 {
            denials.note(Uid::from_raw(7), &denial("no_grant"), now, |r| log.write(r));
        }
        let before = log.0.get();
        denials.note(Uid::from_raw(8), &denial("no_grant"), now, |r| log.write(r));
        assert_eq!(log.0.get(), before + 1);
        // A kind of its own has a record of its own, even when all is spent.
        denials.note(Uid::from_raw(7), &denial("LIMIT_REACHED"), now, |r| log.write(r));
        assert_eq!(log.0.get(), before + 2);
    }

    #[test]
    fn a_count_keeps_the_number_that_it_shares() {
        let now = Instant::now();
        let (mut denials, log) = (Denials::new(now), Log::default());
        let mut last = Seq(0);
        for _ in 0..30 {
            last = denials.note(Uid::from_raw(7), &denial("no_grant"), now, |r| log.write(r));
        }
        assert_eq!(last, Seq(20), "the last that has a record stands for the ten after it");
        // A second later there is one to spend again; the ten are still counted under 20.
        let later = now + Duration::from_secs(1);
        let own = denials.note(Uid::from_raw(7), &denial("no_grant"), later, |r| log.write(r));
        assert_eq!(own, Seq(21));
        let records = denials.due(later, true);
        let mut line = String::new();
        records[0].text().write_to(&mut line);
        assert!(line.contains("\"count\":10,\"first_ref\":20"), "{line}");
    }

    #[test]
    fn many_uids_do_not_grow_the_table() {
        let now = Instant::now();
        let (mut denials, log) = (Denials::new(now), Log::default());
        for uid in 0..100_000 {
            for _ in 0..2 {
                denials.note(Uid::from_raw(uid), &denial("no_grant"), now, |r| log.write(r));
            }
        }
        assert!(denials.kinds.len() <= MAX_KINDS + 1, "{}", denials.kinds.len());
        assert!(denials.buckets.len() <= MAX_KINDS);
        assert!(log.0.get() <= 500 + 2, "{}", log.0.get());
        assert_eq!(log.0.get() + counted(&denials.due(now, true)), 200_000);
    }
}
