//! How much of the worker one principal may have at once.
//!
//! A call is read as values, which take up to thirty times the bytes that they came in, and may
//! then wait for its turn. The rate of calls bounds the small ones; large ones are bounded by their
//! sum. And whoever shares the worker with others never has all of the turns.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{Code, Failure};

/// Bytes of a call that is not counted.
const SMALL: usize = 16 << 10;
/// Bytes of all others of one principal at once.
const MOST: usize = 4 << 20;

/// What one principal has.
#[derive(Debug, Clone)]
pub struct Room {
    large: Arc<Semaphore>,
    turns: Arc<Semaphore>,
}

/// What one call takes of it, until the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Share(
    #[expect(dead_code, reason = "given back on drop")] Option<Arc<OwnedSemaphorePermit>>,
);

impl Room {
    /// With so many statements at once.
    pub(crate) fn new(turns: usize) -> Self {
        Self { large: Arc::new(Semaphore::new(MOST)), turns: Arc::new(Semaphore::new(turns)) }
    }

    /// Of the principal's own turns.
    pub(super) fn turns(&self) -> Arc<Semaphore> {
        Arc::clone(&self.turns)
    }

    /// Room for a call that came in `bytes`.
    ///
    /// # Errors
    /// `LIMIT_REACHED`.
    pub fn take(&self, bytes: usize) -> Result<Share, Failure> {
        if bytes <= SMALL {
            return Ok(Share(None));
        }
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        match Arc::clone(&self.large).try_acquire_many_owned(bytes) {
            Ok(permit) => Ok(Share(Some(Arc::new(permit)))),
            Err(_too_many) => Err(Failure::new(
                Code::LimitReached,
                "too many large calls at once; nothing was run",
            )
            .with_hint("try again when another call has ended, or pass less in params")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_calls_have_a_sum_and_small_ones_have_none() {
        let room = Room::new(1);
        let shares: Vec<Share> = (0..4).map(|_| room.take(1 << 20).unwrap()).collect();
        assert_eq!(room.take(SMALL + 1).unwrap_err().code(), Code::LimitReached);
        assert!(room.take(SMALL).is_ok());
        let clones = shares.clone();
        drop(shares);
        assert!(room.take(1 << 20).is_err());
        drop(clones);
        assert!(room.take(MOST).is_ok() && room.take(MOST + 1).is_err());
    }
}
