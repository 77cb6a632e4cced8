//! Requests per second, for each uid, connection and verb: token buckets that hold twice the
//! rate, so that a burst after a pause passes.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::connection::ConnectionName;
use crate::peer::Uid;

/// Buckets that are full again mean nothing; past this many they are swept.
const SWEEP_AT: usize = 4096;

/// What is counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Verb {
    Issue,
    Renew,
    Open,
    Register,
    Reveal,
}

#[derive(Debug, Default)]
pub(super) struct Rates {
    buckets: HashMap<(Uid, ConnectionName, Verb), Bucket>,
}

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    filled: Instant,
    rate: u32,
}

impl Bucket {
    fn burst(&self) -> f64 {
        f64::from(self.rate) * 2.0
    }

    fn fill(&mut self, now: Instant) {
        let since = now.saturating_duration_since(self.filled).as_secs_f64();
        self.tokens = (self.tokens + since * f64::from(self.rate)).min(self.burst());
        self.filled = now;
    }
}

impl Rates {
    /// Takes one more request, or says after what time it would fit. Only peers with a grant get
    /// here, so configuration bounds the number of buckets.
    pub(super) fn take(
        &mut self,
        uid: Uid,
        connection: &ConnectionName,
        verb: Verb,
        rate: u32,
        now: Instant,
    ) -> Result<(), Duration> {
        if self.buckets.len() >= SWEEP_AT {
            self.buckets.retain(|_, bucket| {
                bucket.fill(now);
                bucket.tokens < bucket.burst()
            });
        }
        let full = || Bucket { tokens: f64::from(rate) * 2.0, filled: now, rate };
        let bucket = self.buckets.entry((uid, connection.clone(), verb)).or_insert_with(full);
        bucket.rate = rate;
        bucket.fill(now);
        if bucket.tokens < 1.0 {
            let missing = (1.0 - bucket.tokens) / f64::from(rate.max(1));
            return Err(Duration::from_secs_f64(missing));
        }
        bucket.tokens -= 1.0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_then_the_rate() {
        let (mut rates, start) = (Rates::default(), Instant::now());
        let name = ConnectionName::parse("main_db").unwrap();
        let mut refill = |uid, at| rates.take(Uid::from_raw(uid), &name, Verb::Issue, 10, at);
        let mut take = |uid, at| refill(uid, at).is_ok();
        assert_eq!((0..100).filter(|_| take(1, start)).count(), 20);
        assert!(take(2, start), "another uid has its own");
        let later = start + Duration::from_millis(500);
        assert_eq!((0..100).filter(|_| take(1, later)).count(), 5);
        let retry = refill(1, later).unwrap_err();
        assert!(retry <= Duration::from_millis(100), "{retry:?}");
        assert!(refill(1, later + retry + Duration::from_millis(1)).is_ok());
    }
}
