//! The last records in memory, and readers that follow the log. A slow reader loses records and
//! learns how many; it holds up nobody.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

/// Records that are kept, and records that a reader may be behind.
const KEPT: usize = 1000;
/// Bytes of them that are kept.
const MAX_BYTES: usize = 1024 * 1024;

#[derive(Debug)]
pub(super) struct Recent {
    kept: Mutex<Kept>,
}

#[derive(Debug)]
struct Kept {
    lines: VecDeque<Arc<str>>,
    bytes: usize,
    readers: broadcast::Sender<Arc<str>>,
}

/// Records as they are written, from the moment on at which it was made.
#[derive(Debug)]
pub(crate) struct Subscription {
    lines: broadcast::Receiver<Arc<str>>,
}

/// A record that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Followed {
    /// As it stands in the log, without its newline.
    pub(crate) line: Arc<str>,
    /// Records just before it that the reader was too slow for.
    pub(crate) skipped: u64,
}

impl Recent {
    pub(super) fn new() -> Self {
        let readers = broadcast::Sender::new(KEPT);
        Self { kept: Mutex::new(Kept { lines: VecDeque::new(), bytes: 0, readers }) }
    }

    /// `lines` end with a newline each.
    pub(super) fn add(&self, lines: &str) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        for line in lines.lines() {
            let line: Arc<str> = line.into();
            kept.bytes += line.len();
            kept.lines.push_back(Arc::clone(&line));
            // Nobody may be following.
            let _ = kept.readers.send(line);
        }
        while kept.lines.len() > KEPT || kept.bytes > MAX_BYTES {
            let gone = kept.lines.pop_front().map_or(0, |line| line.len());
            kept.bytes = kept.bytes.saturating_sub(gone);
        }
    }

    /// The `last` records, oldest first, and those that follow them.
    pub(super) fn tail(&self, last: usize) -> (Vec<String>, Subscription) {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let skip = kept.lines.len().saturating_sub(last);
        let lines = kept.lines.iter().skip(skip).map(ToString::to_string).collect();
        (lines, Subscription { lines: kept.readers.subscribe() })
    }
}

impl Subscription {
    /// The next record. `None` when the log is closed.
    pub(crate) async fn next(&mut self) -> Option<Followed> {
        let mut skipped = 0;
        loop {
            match self.lines.recv().await {
                Ok(line) => return Some(Followed { line, skipped }),
                Err(RecvError::Lagged(count)) => skipped += count,
                Err(RecvError::Closed) => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_reader_gets_the_last_records_and_then_each_new_one() {
        let recent = Recent::new();
        recent.add("1\n2\n3\n");
        let (last, mut following) = recent.tail(2);
        assert_eq!(last, ["2", "3"]);
        recent.add("4\n");
        assert_eq!(following.next().await, Some(Followed { line: "4".into(), skipped: 0 }));
        drop(recent);
        assert_eq!(following.next().await, None);
    }

    #[tokio::test]
    async fn a_slow_reader_learns_how_much_it_missed() {
        let recent = Recent::new();
        let (_, mut following) = recent.tail(0);
        for n in 0..5000 {
            recent.add(&format!("{n}\n"));
        }
        let first = following.next().await.unwrap();
        // The channel's capacity is the next power of two.
        assert_eq!((&*first.line, first.skipped), ("3976", 3976));
        assert_eq!(recent.tail(usize::MAX).0.len(), KEPT);
    }
}
