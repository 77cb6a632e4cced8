//! Telling holders what becomes of their handles.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::time::{Instant, SystemTime};

use futures_util::Stream;
use futures_util::stream::unfold;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use super::{Core, Refusal, Why};
use crate::connection::ConnectionName;
use crate::handle::{Handle, HandleId, TokenHash};
use crate::metrics;
use crate::peer::Peer;
use crate::session::CutReason;

/// Streams on one handle; more would be a mistake, or an attempt to use the broker up.
const MAX_STREAMS: usize = 16;
/// News that a slow reader may leave unread. Reading on it is told the newest.
const UNREAD: usize = 8;

/// What becomes of a handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HandleNews {
    /// A quarter of its life is left.
    Expiring(SystemTime),
    /// New sessions use this version of the credential.
    Rotated(u64),
    /// It is gone.
    Ended(CutReason),
}

/// The end of a handle, to be told.
#[derive(Clone, Copy, Debug)]
pub(super) struct HandleEnd(pub(super) CutReason);

#[derive(Clone, Copy, Debug)]
enum Signal {
    Renewed,
    Rotated(u64),
    Ended(CutReason),
}

/// Who waits for news of which handle.
#[derive(Debug, Default)]
pub(super) struct Watchers {
    streams: HashMap<HandleId, broadcast::Sender<Signal>>,
}

impl Watchers {
    fn watch(&mut self, id: HandleId) -> Option<broadcast::Receiver<Signal>> {
        self.streams.retain(|_, sender| sender.receiver_count() > 0);
        let sender = self.streams.entry(id).or_insert_with(|| broadcast::channel(UNREAD).0);
        (sender.receiver_count() < MAX_STREAMS).then(|| sender.subscribe())
    }

    pub(super) fn end(&mut self, id: HandleId, HandleEnd(reason): HandleEnd) {
        if let Some(sender) = self.streams.remove(&id) {
            // Nobody may be left to hear it.
            let _ = sender.send(Signal::Ended(reason));
        }
    }

    pub(super) fn end_all(&mut self, HandleEnd(reason): HandleEnd) {
        for (_, sender) in self.streams.drain() {
            let _ = sender.send(Signal::Ended(reason));
        }
    }

    pub(super) fn renewed(&self, id: HandleId) {
        self.tell(id, Signal::Renewed);
    }

    pub(super) fn rotated(&self, ids: impl Iterator<Item = HandleId>, version: u64) {
        ids.for_each(|id| self.tell(id, Signal::Rotated(version)));
    }

    fn tell(&self, id: HandleId, signal: Signal) {
        if let Some(sender) = self.streams.get(&id) {
            let _ = sender.send(signal);
        }
    }

    /// Handles that somebody watches.
    pub(super) fn watched(&self) -> Vec<HandleId> {
        self.streams.keys().copied().collect()
    }
}

/// One stream of news.
struct Watching {
    core: Core,
    id: HandleId,
    signals: broadcast::Receiver<Signal>,
    /// The expiry that was told already.
    told: Option<Instant>,
    ended: bool,
}

impl Core {
    /// What becomes of a handle, until it is gone: its holder and its redeemer only.
    pub(crate) fn watch(
        &self,
        peer: &Peer,
        token: Option<TokenHash>,
    ) -> Result<impl Stream<Item = HandleNews> + Send + use<>, Refusal> {
        let timed = self.shared.metrics.begin(metrics::Verb::Watch);
        let id = self.look_up(peer, token, |handle| handle.concerns(peer.uid()), |h| h.id)?;
        let signals = {
            let mut state = self.state();
            // It may have ended since; then there is nothing to watch.
            state.handles.get(id).is_some().then(|| state.watchers.watch(id))
        };
        let signals = signals.ok_or_else(|| self.refuse(peer, None, Why::HandleInvalid))?;
        let signals =
            signals.ok_or_else(|| self.refuse(peer, None, Why::limit("streams of news")))?;
        timed.done();
        let watching = Watching { core: self.clone(), id, signals, told: None, ended: false };
        Ok(unfold(watching, async |mut watching| {
            watching.next().await.map(|news| (news, watching))
        }))
    }

    /// Tells watchers of a connection's handles that it has a new credential.
    pub(super) fn tell_rotated(&self, name: &ConnectionName, version: u64) {
        let state = self.state();
        let of_connection = |id: &HandleId| {
            let handle = state.handles.get(*id);
            handle.is_some_and(|handle| handle.connection == *name && handle.registered.is_none())
        };
        let ids = state.watchers.watched().into_iter().filter(of_connection);
        state.watchers.rotated(ids.collect::<Vec<_>>().into_iter(), version);
    }

    /// When a handle's holder should be warned, and of what.
    fn warning_of(&self, id: HandleId) -> Option<(Instant, Instant, SystemTime)> {
        let state = self.state();
        let warning = |handle: &Handle| {
            let lead = handle.ttl / 4;
            let at = handle.expires.checked_sub(lead).unwrap_or(handle.expires);
            (at, handle.expires, handle.wall(handle.expires))
        };
        state.handles.get(id).map(warning)
    }
}

impl Watching {
    async fn next(&mut self) -> Option<HandleNews> {
        while !self.ended {
            let warning = self.core.warning_of(self.id);
            let due = warning.filter(|(_, expires, _)| self.told != Some(*expires));
            let time = async {
                match due {
                    Some((at, ..)) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            let signal = tokio::select! {
                biased;
                signal = self.signals.recv() => signal,
                () = time => {
                    if let Some((_, expires, wall)) = due {
                        self.told = Some(expires);
                        return Some(HandleNews::Expiring(wall));
                    }
                    continue;
                }
            };
            match signal {
                Ok(Signal::Renewed) | Err(RecvError::Lagged(_)) => {}
                Ok(Signal::Rotated(version)) => return Some(HandleNews::Rotated(version)),
                Ok(Signal::Ended(reason)) => {
                    self.ended = true;
                    return Some(HandleNews::Ended(reason));
                }
                Err(RecvError::Closed) => return None,
            }
        }
        None
    }
}
