//! Waiting for a phase with a deadline. Nothing in the tests sleeps to synchronise.

use std::thread;
use std::time::{Duration, Instant};

/// How long a test waits for something that ought to happen soon, on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

const STEP: Duration = Duration::from_millis(10);

/// Asks `probe` until it answers, at most for `limit`. `None` when the time is over.
pub fn until<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = probe() {
            return Some(found);
        }
        if Instant::now() >= deadline {
            return None;
        }
        thread::sleep(STEP);
    }
}

/// Whether `condition` stays true for the whole of `span`: for what must *not* happen.
pub fn holds_for(span: Duration, mut condition: impl FnMut() -> bool) -> bool {
    until(span, || (!condition()).then_some(())).is_none()
}

/// Asserts that a condition becomes true within [`PATIENCE`], or within the given
/// [`Duration`] when one stands first.
///
/// ```
/// use credbroker_e2e::assert_eventually;
///
/// let mut calls = 0;
/// assert_eventually!({ calls += 1; calls > 2 }, "the third call never came");
/// ```
#[macro_export]
macro_rules! assert_eventually {
    (within $limit:expr, $condition:expr, $($message:tt)+) => {
        assert!(
            $crate::wait::until($limit, || ($condition).then_some(())).is_some(),
            $($message)+
        )
    };
    ($condition:expr, $($message:tt)+) => {
        $crate::assert_eventually!(within $crate::wait::PATIENCE, $condition, $($message)+)
    };
}
