//! When handles die: a timer wheel beside the table, so that time costs nothing per live handle.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::future::poll_fn;
use std::time::Instant;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_util::time::DelayQueue;
use tokio_util::time::delay_queue::Key;

use super::HandleId;

/// Tells the timer what to wait for. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Expiry {
    orders: UnboundedSender<Order>,
}

/// The timer's other end; run by the core.
#[derive(Debug)]
pub(crate) struct ExpiryQueue {
    orders: UnboundedReceiver<Order>,
}

#[derive(Debug)]
enum Order {
    Wake(HandleId, Instant),
    Forget(HandleId),
}

impl Expiry {
    pub(crate) fn new() -> (Self, ExpiryQueue) {
        // Orders come from requests that were limited, and from the queue's own answers.
        let (sender, receiver) = unbounded_channel();
        (Self { orders: sender }, ExpiryQueue { orders: receiver })
    }

    /// Asks to be woken for a handle at `at`, in place of any earlier request for it.
    pub(crate) fn wake(&self, id: HandleId, at: Instant) {
        let _ = self.orders.send(Order::Wake(id, at));
    }

    pub(crate) fn forget(&self, id: HandleId) {
        let _ = self.orders.send(Order::Forget(id));
    }
}

impl ExpiryQueue {
    /// Calls `due` for each handle whose time has come, until every [`Expiry`] is gone. `due`
    /// answers when to ask again, if at all: a handle may have been renewed meanwhile.
    pub(crate) async fn run(mut self, due: impl Fn(HandleId) -> Option<Instant>) {
        let mut queue = DelayQueue::new();
        let mut keys: HashMap<HandleId, Key> = HashMap::new();
        loop {
            tokio::select! {
                order = self.orders.recv() => match order {
                    None => return,
                    Some(Order::Wake(id, at)) => wake(&mut queue, &mut keys, id, at),
                    Some(Order::Forget(id)) => {
                        if let Some(key) = keys.remove(&id) {
                            queue.remove(&key);
                        }
                    }
                },
                // An empty queue answers None at once, for ever.
                Some(expired) = poll_fn(|context| queue.poll_expired(context)), if !queue.is_empty() => {
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
