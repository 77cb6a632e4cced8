//! All handles, by token hash and by name: plain data, no clock, no lock. The core keeps it and
//! the session registry under one mutex.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::{Handle, HandleId, TokenHash};
use crate::audit::Audited;
use crate::connection::ConnectionName;
use crate::peer::{PeerId, Uid};

/// How long an expired handle is remembered, so that its own holder learns why it fails.
pub(crate) const REMEMBERED: Duration = Duration::from_secs(60);

/// Whether a handle still gives a right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    Live,
    /// Remembered only.
    Expired,
}

/// Why a token gives no right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HandleFault {
    /// Unknown, of another peer, or revoked: nobody can tell which.
    Invalid,
    /// Expired; told to its own holder and redeemer only.
    Expired,
}

/// A holder has as many handles on a connection as it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TableFull;

#[derive(Debug, Default)]
pub(crate) struct Table {
    handles: HashMap<HandleId, Handle>,
    by_token: HashMap<TokenHash, HandleId>,
    tokens: HashMap<HandleId, TokenHash>,
    /// Live handles of a holder's uid on a connection.
    counts: HashMap<(Uid, ConnectionName), usize>,
    /// Live handles of a holder's uid that are bound to its process: each may keep descriptors.
    bound: HashMap<Uid, usize>,
}

/// Bound handles of one uid, over all connections.
const MAX_BOUND: usize = 512;

impl Table {
    /// Adds a live handle unless its holder has `limit` on that connection already.
    pub(crate) fn insert(
        &mut self,
        token: TokenHash,
        handle: Audited<Handle>,
        limit: usize,
    ) -> Result<(), TableFull> {
        let handle = handle.into_inner();
        let count = self.counts.entry(owner(&handle)).or_default();
        let bound = self.bound.entry(handle.holder.uid()).or_default();
        let adds = usize::from(handle.is_bound());
        if *count >= limit || *bound + adds > MAX_BOUND {
            return Err(TableFull);
        }
        *count += 1;
        *bound += adds;
        self.by_token.insert(token, handle.id);
        self.tokens.insert(handle.id, token);
        self.handles.insert(handle.id, handle);
        Ok(())
    }

    /// The live handle of a token, if `may` says that the caller may know of it.
    pub(crate) fn find(
        &mut self,
        token: TokenHash,
        now: Instant,
        may: impl FnOnce(&Handle) -> bool,
    ) -> Result<&mut Handle, HandleFault> {
        let handle = self.by_token.get(&token).and_then(|id| self.handles.get_mut(id));
        let handle = handle.filter(|handle| may(handle)).ok_or(HandleFault::Invalid)?;
        // The clock decides, not the queue: a timer that is late gives nobody more time.
        if handle.standing == Standing::Expired || handle.expires <= now {
            return Err(HandleFault::Expired);
        }
        Ok(handle)
    }

    /// Takes the spending of a use back.
    pub(crate) fn give_back_use(&mut self, id: HandleId) {
        if let Some(left) = self.handles.get_mut(&id).and_then(|handle| handle.uses_left.as_mut()) {
            *left += 1;
        }
    }

    pub(crate) fn get(&self, id: HandleId) -> Option<&Handle> {
        self.handles.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: HandleId) -> Option<&mut Handle> {
        self.handles.get_mut(&id)
    }

    /// Forgets a handle altogether.
    pub(crate) fn remove(&mut self, id: HandleId) -> Option<Handle> {
        let handle = self.handles.remove(&id)?;
        if let Some(token) = self.tokens.remove(&id) {
            self.by_token.remove(&token);
        }
        if handle.standing == Standing::Live {
            self.uncount(&owner(&handle), usize::from(handle.is_bound()));
        }
        Some(handle)
    }

    /// Ends a handle whose time has come, and remembers that it was. `None` when it is not live.
    pub(crate) fn expire(&mut self, id: HandleId) -> Option<&Handle> {
        let handle =
            self.handles.get_mut(&id).filter(|handle| handle.standing == Standing::Live)?;
        handle.standing = Standing::Expired;
        // What is only remembered keeps neither a descriptor nor a secret.
        handle.registered = None;
        handle.holder = handle.holder.without_process();
        let (owner, adds) = (owner(handle), usize::from(handle.is_bound()));
        self.uncount(&owner, adds);
        self.handles.get(&id)
    }

    /// Live handles, in no order.
    pub(crate) fn live(&self) -> impl Iterator<Item = &Handle> {
        self.handles.values().filter(|handle| handle.standing == Standing::Live)
    }

    /// Live handles that were issued to one connection of a peer.
    pub(crate) fn held_by(&self, peer: PeerId) -> impl Iterator<Item = &Handle> {
        self.live().filter(move |handle| handle.holder.id() == peer)
    }

    fn uncount(&mut self, owner: &(Uid, ConnectionName), bound: usize) {
        subtract(&mut self.counts, owner, 1);
        subtract(&mut self.bound, &owner.0, bound);
    }
}

fn subtract<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, usize>, key: &K, by: usize) {
    if let Some(count) = counts.get_mut(key) {
        *count = count.saturating_sub(by);
        if *count == 0 {
            counts.remove(key);
        }
    }
}

fn owner(handle: &Handle) -> (Uid, ConnectionName) {
    (handle.holder.uid(), handle.connection.name.clone())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::SystemTime;

    use super::*;
    use crate::connection::tests::connection;
    use crate::handle::{Bind, Token};
    use crate::peer::Peer;

    fn handle(uid: u32, now: Instant) -> (TokenHash, Handle) {
        let handle = Handle {
            id: HandleId::random().unwrap(),
            connection: Arc::new(connection("main_db")),
            holder: Peer::dangerous_for_test(uid, uid, &[]),
            redeemer: None,
            subject: String::new(),
            purpose: String::new(),
            bind: Bind::None,
            issued: now,
            issued_at: SystemTime::UNIX_EPOCH,
            ttl: Duration::from_secs(60),
            expires: now + Duration::from_secs(60),
            never_after: None,
            uses_left: None,
            max_sessions: None,
            registered: None,
            revealed: false,
            standing: Standing::Live,
        };
        (Token::random().unwrap().hash(), handle)
    }

    #[test]
    fn a_foreign_token_is_as_unknown_as_none() {
        let (mut table, now) = (Table::default(), Instant::now());
        let (token, mine) = handle(10, now);
        table.insert(token, Audited::dangerous_for_test(mine), 10).unwrap();
        let other = Uid::from_raw(11);
        let (unknown, _) = handle(10, now);
        assert_eq!(table.find(token, now, |h| h.concerns(other)).err(), Some(HandleFault::Invalid));
        assert_eq!(table.find(unknown, now, |_| true).err(), Some(HandleFault::Invalid));
        assert!(table.find(token, now, |h| h.concerns(Uid::from_raw(10))).is_ok());
    }

    #[test]
    fn the_clock_decides_before_the_timer_does() {
        let (mut table, now) = (Table::default(), Instant::now());
        let (token, mine) = handle(10, now);
        let id = mine.id;
        table.insert(token, Audited::dangerous_for_test(mine), 10).unwrap();
        let later = now + Duration::from_secs(60);
        assert_eq!(table.find(token, later, |_| true).err(), Some(HandleFault::Expired));
        assert!(table.expire(id).is_some());
        assert!(table.expire(id).is_none(), "once");
        assert_eq!(table.find(token, now, |_| true).err(), Some(HandleFault::Expired));
        table.remove(id);
        assert_eq!(table.find(token, now, |_| true).err(), Some(HandleFault::Invalid));
    }

    #[test]
    fn the_limit_counts_live_handles_only() {
        let (mut table, now) = (Table::default(), Instant::now());
        let ids: Vec<_> = (0..3)
            .map(|_| {
                let (token, mine) = handle(10, now);
                let id = mine.id;
                table.insert(token, Audited::dangerous_for_test(mine), 3).unwrap();
                id
            })
            .collect();
        let insert = |table: &mut Table, uid| {
            let (token, more) = handle(uid, now);
            table.insert(token, Audited::dangerous_for_test(more), 3)
        };
        assert_eq!(insert(&mut table, 10), Err(TableFull));
        assert_eq!(insert(&mut table, 11), Ok(()));
        table.expire(ids[0]);
        assert_eq!(insert(&mut table, 10), Ok(()));
        table.remove(ids[0]);
        assert_eq!(
            insert(&mut table, 10),
            Err(TableFull),
            "an expired handle is not counted twice"
        );
        table.remove(ids[1]);
        assert_eq!(insert(&mut table, 10), Ok(()));
    }
}
