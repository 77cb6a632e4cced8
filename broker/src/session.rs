//! The registry of sessions: what is open or being opened, and how it is cut.
//!
//! A session is entered as `opening` under the same lock that spends the handle's use, and
//! becomes live only through [`Registry::commit`], under that lock too. So whatever takes a
//! right away finds every session that was opened under it, and one that is being opened just
//! then fails to commit.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use subtle::ConstantTimeEq as _;

pub(crate) use self::cut::{Client, Cut, CutReason, Lifeline, fire};
use crate::connection::{AllowedDatabase, Connection, ConnectionName};
use crate::handle::HandleId;
use crate::peer::{Peer, Uid};

mod cut;

/// Names a session in logs and audit records: `ses_` and a number, unique for one start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SessionId(u64);

impl SessionId {
    const PREFIX: &str = "ses_";

    /// `None` when `text` is not a session's name.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix(Self::PREFIX)?;
        let canonical = digits.bytes().all(|byte| byte.is_ascii_digit());
        digits.parse().ok().filter(|_| canonical).map(Self)
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", Self::PREFIX, self.0)
    }
}

/// What a client may cancel a query with: made by the broker, never the server's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ClientKey {
    pub(crate) pid: u32,
    pub(crate) secret: Box<[u8]>,
}

/// How long the secret part of a key is: protocol 3.2 made room for longer ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeyLength {
    /// Four bytes, which is all that a client of protocol 3.0 takes.
    Short,
    /// 32 bytes.
    Long,
}

impl KeyLength {
    pub(crate) const fn bytes(self) -> usize {
        match self {
            Self::Short => 4,
            Self::Long => 32,
        }
    }
}

/// Under what right a session is opened.
#[derive(Clone, Debug)]
pub(crate) enum Right {
    /// An ambient grant of the peer's own.
    Ambient,
    /// A handle, and the grant of its holder.
    Handle {
        id: HandleId,
        /// Who got the handle. The right is theirs: it ends when they may no longer have it.
        holder: Peer,
        /// Whether it was issued for the peer by name.
        redeemed: bool,
        subject: String,
    },
}

impl Right {
    pub(crate) fn handle(&self) -> Option<HandleId> {
        match self {
            Self::Ambient => None,
            Self::Handle { id, .. } => Some(*id),
        }
    }
}

/// How a session's bytes travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Through the broker.
    Door,
    /// The client has the socket itself.
    Handoff,
}

impl Mode {
    /// The word for operators and records.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Door => "door",
            Self::Handoff => "handoff",
        }
    }
}

/// Whose a session is, and what it is for: all that decides whether it may go on.
#[derive(Clone, Debug)]
pub(crate) struct Owner {
    /// Who came in. Without its process: that the client has gone shows on its socket.
    pub(crate) peer: Peer,
    pub(crate) connection: Arc<Connection>,
    pub(crate) database: AllowedDatabase,
    pub(crate) mode: Mode,
    pub(crate) right: Right,
    /// Of the connection's credential; 0 for one that was registered with the handle, and
    /// [`RENEWING`] while it is looked for.
    pub(crate) credential_version: u64,
}

/// The version of an opening whose credential was refused, until another is found: of no rotation's
/// concern, for it never becomes live.
pub(crate) const RENEWING: u64 = u64::MAX;

/// A session, described.
#[derive(Clone, Debug)]
pub(crate) struct SessionView {
    pub(crate) id: SessionId,
    pub(crate) owner: Owner,
    pub(crate) since: SystemTime,
    pub(crate) live: bool,
}

#[derive(Debug)]
struct Entry {
    owner: Owner,
    since: SystemTime,
    cut: Arc<Cut>,
    /// Present when live.
    key: Option<ClientKey>,
}

/// All sessions: plain data, no lock of its own.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    next: u64,
    sessions: HashMap<SessionId, Entry>,
    /// By the process id in their keys, which no two have in common.
    by_pid: HashMap<u32, SessionId>,
    by_owner: HashMap<(Uid, ConnectionName), usize>,
    by_handle: HashMap<HandleId, usize>,
}

/// The session was marked to be cut before it was live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CutMeanwhile(pub(crate) CutReason);

impl Registry {
    /// Enters a session that is being opened.
    pub(crate) fn enter(&mut self, owner: Owner) -> (SessionId, Arc<Cut>) {
        self.next += 1;
        let id = SessionId(self.next);
        let cut = Arc::new(Cut::default());
        *self.by_owner.entry(place_of(&owner)).or_default() += 1;
        if let Some(handle) = owner.right.handle() {
            *self.by_handle.entry(handle).or_default() += 1;
        }
        let since = SystemTime::now();
        self.sessions.insert(id, Entry { owner, since, cut: Arc::clone(&cut), key: None });
        (id, cut)
    }

    /// Makes an opening session live, unless something cut it meanwhile.
    pub(crate) fn commit(
        &mut self,
        id: SessionId,
        key: ClientKey,
        lifeline: Lifeline,
    ) -> Result<(), CutMeanwhile> {
        let Some(entry) = self.sessions.get_mut(&id) else {
            return Err(CutMeanwhile(CutReason::Revoked));
        };
        if let Some(reason) = entry.cut.reason() {
            return Err(CutMeanwhile(reason));
        }
        entry.cut.hold(lifeline);
        self.by_pid.insert(key.pid, id);
        entry.key = Some(key);
        Ok(())
    }

    /// Gives an opening another version of the credential. `false` when it is marked to be cut, or
    /// live, or gone.
    #[must_use]
    pub(crate) fn renew(&mut self, id: SessionId, version: u64) -> bool {
        let Some(entry) = self.sessions.get_mut(&id) else { return false };
        let may = entry.key.is_none() && entry.cut.reason().is_none();
        if may {
            entry.owner.credential_version = version;
        }
        may
    }

    /// Forgets a session, when it has ended.
    pub(crate) fn leave(&mut self, id: SessionId) {
        let Some(entry) = self.sessions.remove(&id) else { return };
        if let Some(key) = entry.key {
            self.by_pid.remove(&key.pid);
        }
        uncount(&mut self.by_owner, &place_of(&entry.owner));
        if let Some(handle) = entry.owner.right.handle() {
            uncount(&mut self.by_handle, &handle);
        }
        entry.cut.end();
    }

    /// Marks every session that `which` picks and gives back what to fire, outside the lock.
    #[must_use]
    pub(crate) fn mark(
        &mut self,
        reason: CutReason,
        which: impl Fn(&Owner) -> bool,
    ) -> Vec<Arc<Cut>> {
        let picked = || self.sessions.values().filter(|entry| which(&entry.owner));
        // All are looked at before the first is changed: looks at memory that is far away overlap,
        // and changes wait for each other.
        let fresh = picked().filter(|entry| entry.cut.reason().is_none()).count();
        let mut cuts = Vec::with_capacity(fresh);
        cuts.extend(picked().map(|entry| {
            entry.cut.mark(reason);
            Arc::clone(&entry.cut)
        }));
        cuts
    }

    /// Marks one session; `None` when there is none of that name.
    pub(crate) fn mark_one(
        &mut self,
        id: SessionId,
        reason: CutReason,
    ) -> Option<(Owner, Arc<Cut>)> {
        let entry = self.sessions.get(&id)?;
        entry.cut.mark(reason);
        Some((entry.owner.clone(), Arc::clone(&entry.cut)))
    }

    /// All sessions that `which` picks, in no order.
    pub(crate) fn views(&self, which: impl Fn(&Owner) -> bool) -> Vec<SessionView> {
        let picked = self.sessions.iter().filter(|(_, entry)| which(&entry.owner));
        picked
            .map(|(id, entry)| SessionView {
                id: *id,
                owner: entry.owner.clone(),
                since: entry.since,
                live: entry.key.is_some(),
            })
            .collect()
    }

    /// The live session of a key, if it is `uid`'s.
    pub(crate) fn by_key(&self, key: &ClientKey, uid: Uid) -> Option<SessionId> {
        let id = self.by_pid.get(&key.pid)?;
        let entry = self.sessions.get(id)?;
        let same = entry.key.as_ref()?.secret.ct_eq(&key.secret);
        (bool::from(same) && entry.owner.peer.uid() == uid).then_some(*id)
    }

    /// Whether a live session's key has this process id.
    pub(crate) fn has_pid(&self, pid: u32) -> bool {
        self.by_pid.contains_key(&pid)
    }

    /// Sessions of a uid on a connection, those being opened included.
    pub(crate) fn count(&self, uid: Uid, connection: &ConnectionName) -> usize {
        self.by_owner.get(&(uid, connection.clone())).copied().unwrap_or(0)
    }

    /// Sessions on a connection, those being opened included.
    pub(crate) fn count_of_connection(&self, connection: &ConnectionName) -> usize {
        let of_it = self.by_owner.iter().filter(|((_, name), _)| name == connection);
        of_it.map(|(_, count)| count).sum()
    }

    /// Sessions of a handle, those being opened included.
    pub(crate) fn count_of_handle(&self, handle: HandleId) -> usize {
        self.by_handle.get(&handle).copied().unwrap_or(0)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.sessions.len()
    }
}

fn place_of(owner: &Owner) -> (Uid, ConnectionName) {
    (owner.peer.uid(), owner.connection.name.clone())
}

fn uncount<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(secret: &[u8]) -> ClientKey {
        ClientKey { pid: 7, secret: secret.into() }
    }

    fn owner(uid: u32, handle: Option<HandleId>) -> Owner {
        let peer = Peer::dangerous_for_test(uid, uid, &[]);
        let connection = Arc::new(crate::connection::tests::connection("main_db"));
        let database = connection.database(None).unwrap();
        let right = match handle {
            None => Right::Ambient,
            Some(id) => {
                Right::Handle { id, holder: peer.clone(), redeemed: false, subject: String::new() }
            }
        };
        Owner { peer, connection, database, mode: Mode::Door, right, credential_version: 1 }
    }

    fn lifeline() -> Lifeline {
        Lifeline::Relayed(std::os::unix::net::UnixStream::pair().unwrap().0.into(), None)
    }

    #[test]
    fn a_session_that_was_marked_while_opening_cannot_commit() {
        let mut registry = Registry::default();
        let handle = HandleId::random().unwrap();
        let (id, _) = registry.enter(owner(10, Some(handle)));
        let cuts = registry.mark(CutReason::Revoked, |owner| owner.right.handle() == Some(handle));
        assert_eq!(cuts.len(), 1);
        assert_eq!(
            registry.commit(id, key(b"1234"), lifeline()),
            Err(CutMeanwhile(CutReason::Revoked))
        );
        assert_eq!(registry.by_key(&key(b"1234"), Uid::from_raw(10)), None);
    }

    #[test]
    fn an_opening_can_be_renewed_until_it_is_cut_or_live() {
        let mut registry = Registry::default();
        let (id, _) = registry.enter(owner(10, None));
        assert!(registry.renew(id, RENEWING));
        let of_old = |owner: &Owner| (1..2).contains(&owner.credential_version);
        assert!(
            registry.mark(CutReason::Rotated, of_old).is_empty(),
            "it logs in with the new one"
        );
        assert!(registry.renew(id, 2));
        registry.commit(id, key(b"1234"), lifeline()).unwrap();
        assert!(!registry.renew(id, 3), "it is live");
        let (cut, _) = registry.enter(owner(10, None));
        assert!(registry.mark_one(cut, CutReason::Closed).is_some());
        assert!(!registry.renew(cut, 2), "it is marked");
    }

    #[test]
    fn keys_are_of_one_uid_only() {
        let mut registry = Registry::default();
        let (id, _) = registry.enter(owner(10, None));
        registry.commit(id, key(b"1234"), lifeline()).unwrap();
        assert_eq!(registry.by_key(&key(b"1234"), Uid::from_raw(10)), Some(id));
        assert_eq!(registry.by_key(&key(b"1234"), Uid::from_raw(11)), None);
        for wrong in [&b"1235"[..], b"123", b"12345", b""] {
            assert_eq!(registry.by_key(&key(wrong), Uid::from_raw(10)), None);
        }
        registry.leave(id);
        assert_eq!(registry.by_key(&key(b"1234"), Uid::from_raw(10)), None);
        assert!(registry.is_empty());
    }

    #[test]
    fn names_come_back_and_others_do_not() {
        let mut registry = Registry::default();
        let (id, _) = registry.enter(owner(10, None));
        assert_eq!(SessionId::parse(&id.to_string()), Some(id));
        for bad in ["", "ses_", "ses_x", "ses_+1", "1", "ses_99999999999999999999"] {
            assert_eq!(SessionId::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn counts_go_up_and_down() {
        let mut registry = Registry::default();
        let handle = HandleId::random().unwrap();
        let (first, _) = registry.enter(owner(10, Some(handle)));
        let (_second, _) = registry.enter(owner(10, None));
        let name = ConnectionName::parse("main_db").unwrap();
        assert_eq!(registry.count(Uid::from_raw(10), &name), 2);
        assert_eq!(registry.count_of_handle(handle), 1);
        registry.leave(first);
        assert_eq!(registry.count(Uid::from_raw(10), &name), 1);
        assert_eq!(registry.count_of_handle(handle), 0);
    }
}
