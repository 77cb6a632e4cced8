//! When handles die: a timer wheel beside the table, so that time costs nothing per live handle.
//!
//! A handle lives for a second at least, so its order can wait: orders pile up until the timer
//! looks at them, and whoever issues a handle need not wake a thread for it.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time::timeout_at;
use tokio_util::time::DelayQueue;
use tokio_util::time::delay_queue::Key;

use super::HandleId;

/// How long an order waits at most before the timer takes it.
const SPAN: Duration = Duration::from_millis(250);
/// Orders that wait at most; with one more, the timer takes them at once.
const MAX_WAITING: usize = 1024;

/// Tells the timer what to wait for. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Expiry {
    orders: Arc<Orders>,
}

/// The timer's other end; run by the core.
#[derive(Debug)]
pub(crate) struct ExpiryQueue {
    orders: Arc<Orders>,
}

#[derive(Debug, Default)]
struct Orders {
    pile: Mutex<Pile>,
    /// Wakes the timer.
    hurry: Notify,
}

#[derive(Debug, Default)]
struct Pile {
    waiting: Vec<Order>,
    /// When the timer looks by itself; `None` while nothing was ordered lately.
    look: Option<Instant>,
}

#[derive(Debug)]
enum Order {
    Wake(HandleId, Instant),
    Forget(HandleId),
}

impl Expiry {
    pub(crate) fn new() -> (Self, ExpiryQueue) {
        let orders = Arc::default();
        (Self { orders: Arc::clone(&orders) }, ExpiryQueue { orders })
    }

    /// Asks to be woken for a handle at `at`, in place of any earlier request for it.
    pub(crate) fn wake(&self, id: HandleId, at: Instant) {
        self.orders.add(Order::Wake(id, at), |look| at < look);
    }

    pub(crate) fn forget(&self, id: HandleId) {
        self.orders.add(Order::Forget(id), |_| false);
    }
}

impl Orders {
    fn pile(&self) -> MutexGuard<'_, Pile> {
        self.pile.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `hurries`: whether the order must be known before the timer looks by itself.
    fn add(&self, order: Order, hurries: impl FnOnce(Instant) -> bool) {
        let mut pile = self.pile();
        pile.waiting.push(order);
        let hurry = pile.waiting.len() >= MAX_WAITING || pile.look.is_none_or(hurries);
        drop(pile);
        if hurry {
            self.hurry.notify_one();
        }
    }

    /// What was ordered, and when to look again.
    fn take(&self) -> (Vec<Order>, Option<Instant>) {
        let mut pile = self.pile();
        let taken = std::mem::take(&mut pile.waiting);
        pile.look = (!taken.is_empty()).then(|| Instant::now() + SPAN);
        (taken, pile.look)
    }

    /// Returns when it is time to look, at `look` if not before.
    async fn more(&self, look: Option<Instant>) {
        match look {
            // Either way there is something to look at.
            Some(look) => drop(timeout_at(look.into(), self.hurry.notified()).await),
            None => self.hurry.notified().await,
        }
    }
}

impl ExpiryQueue {
    /// Calls `due` for each handle whose time has come, for ever. `due` answers when to ask
    /// again, if at all: a handle may have been renewed meanwhile.
    pub(crate) async fn run(self, due: impl Fn(HandleId) -> Option<Instant>) {
        let mut queue = DelayQueue::new();
        let mut keys: HashMap<HandleId, Key> = HashMap::new();
        loop {
            let (orders, look) = self.orders.take();
            for order in orders {
                match order {
                    Order::Wake(id, at) => wake(&mut queue, &mut keys, id, at),
                    Order::Forget(id) => {
                        if let Some(key) = keys.remove(&id) {
                            queue.remove(&key);
                        }
                    }
                }
            }
            let more = self.orders.more(look);
            tokio::pin!(more);
            loop {
                tokio::select! {
                    () = &mut more => break,
                    // An empty queue answers None at once, for ever.
                    Some(expired) = poll_fn(|context| queue.poll_expired(context)),
                        if !queue.is_empty() =>
                    {
                        let id = expired.into_inner();
                        keys.remove(&id);
                        if let Some(at) = due(id) {
                            wake(&mut queue, &mut keys, id, at);
                        }
                    }
                }
            }
        }
    }
}

fn wake(
    queue: &mut DelayQueue<HandleId>,
    keys: &mut HashMap<HandleId, Key>,
    id: HandleId,
    at: Instant,
) {
    let at = tokio::time::Instant::from_std(at);
    match keys.entry(id) {
        Entry::Occupied(key) => queue.reset_at(key.get(), at),
        Entry::Vacant(place) => {
            place.insert(queue.insert_at(id, at));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn id() -> HandleId {
        HandleId::random().unwrap()
    }

    /// Runs the timer, whose clock stands still but where everybody sleeps, for `span`.
    async fn run(queue: ExpiryQueue, span: Duration) -> Vec<(HandleId, Duration)> {
        let started = tokio::time::Instant::now();
        let died = RefCell::new(Vec::new());
        let due = |id| {
            died.borrow_mut().push((id, started.elapsed()));
            None
        };
        let _elapsed = tokio::time::timeout(span, queue.run(due)).await;
        died.into_inner()
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_in_the_pile_is_not_late() {
        let (expiry, queue) = Expiry::new();
        let (early, late, forgotten) = (id(), id(), id());
        let now = tokio::time::Instant::now().into_std();
        expiry.wake(late, now + Duration::from_secs(9));
        let ordering = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            // The timer would look at the pile only after this is due.
            expiry.wake(early, now + Duration::from_millis(120));
            expiry.wake(forgotten, now + Duration::from_secs(5));
            expiry.wake(late, now + Duration::from_secs(8));
            expiry.forget(forgotten);
        };
        let (died, ()) = tokio::join!(run(queue, Duration::from_secs(20)), ordering);
        let died: Vec<_> = died.iter().map(|(id, after)| (*id, after.as_millis())).collect();
        assert!(matches!(died.as_slice(), [(_, 120..=122), (_, 8000..=8002)]), "{died:?}");
        assert_eq!((died[0].0, died[1].0), (early, late));
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_does_not_wait_for_the_next_look() {
        let (expiry, queue) = Expiry::new();
        let now = tokio::time::Instant::now().into_std();
        let ordering = async {
            for _ in 0..3 * MAX_WAITING {
                expiry.wake(id(), now + Duration::from_secs(3600));
            }
            // Whoever is woken runs first.
            tokio::task::yield_now().await;
            tokio::time::sleep(Duration::from_millis(1)).await;
            expiry.orders.pile().waiting.len()
        };
        let (died, waiting) = tokio::join!(run(queue, Duration::from_millis(2)), ordering);
        assert_eq!((died.len(), waiting), (0, 0));
    }
}
