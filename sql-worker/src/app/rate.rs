//! How often a principal may call: a token bucket each, kept as one point in time.
//!
//! The point is when the bucket will be full again (the "theoretical arrival time" of ITU-T
//! I.371's GCRA), so a full bucket is one that need not be remembered.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Principal;
use crate::error::{Code, Failure};

/// The buckets of all principals.
#[derive(Debug)]
pub(super) struct Rates {
    per_second: u32,
    full_at: Mutex<HashMap<Principal, Instant>>,
}

impl Rates {
    /// `per_second` calls in the long run, twice as many at once.
    pub(super) fn new(per_second: u32) -> Self {
        Self { per_second: per_second.max(1), full_at: Mutex::default() }
    }

    /// Takes one call out of the caller's bucket.
    pub(super) fn take(&self, caller: &Principal, now: Instant) -> Result<(), Failure> {
        let each = Duration::from_secs(1) / self.per_second;
        let burst = each * self.per_second.saturating_mul(2);
        let mut buckets = self.buckets();
        let full_at = buckets.get(caller).map_or(now, |full_at| (*full_at).max(now)) + each;
        if full_at.duration_since(now) > burst {
            return Err(Failure::new(Code::LimitReached, "too many calls; nothing was run")
                .with_hint(format!(
                    "at most {} calls a second, and twice as many at once: wait a second",
                    self.per_second
                )));
        }
        buckets.insert(caller.clone(), full_at);
        Ok(())
    }

    /// Forgets full buckets.
    pub(super) fn sweep(&self, now: Instant) {
        self.buckets().retain(|_, full_at| *full_at > now);
    }

    fn buckets(&self) -> MutexGuard<'_, HashMap<Principal, Instant>> {
        self.full_at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_the_rate_and_each_principal_alone() {
        let (rates, now) = (Rates::new(50), Instant::now());
        let (one, two) = (Principal::unix(1).unwrap(), Principal::unix(2).unwrap());
        let taken = |caller, now| (0..500).filter(|_| rates.take(caller, now).is_ok()).count();
        assert_eq!(taken(&one, now), 100);
        assert_eq!(taken(&two, now), 100);
        assert_eq!(taken(&one, now + Duration::from_secs(1)), 50);
        let refused = rates.take(&one, now + Duration::from_secs(1)).unwrap_err();
        assert_eq!(refused.code(), Code::LimitReached);

        rates.sweep(now + Duration::from_secs(1));
        assert_eq!(rates.buckets().len(), 2);
        rates.sweep(now + Duration::from_secs(60));
        assert!(rates.buckets().is_empty());
    }
}
