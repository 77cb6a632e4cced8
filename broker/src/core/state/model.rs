//! The handle table and the session registry against a model that is too simple to be wrong:
//! lists that are searched from end to end.

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::fixture::{admitted, credential, issue, name, peer, settings, state};
use super::{By, Claim, NoPlace, State};
use crate::core::suspension::{Scope, Suspended};
use crate::credential::Credential;
use crate::handle::{HandleFault, HandleId, TokenHash};
use crate::peer::Peer;
use crate::session::{ClientKey, Cut, CutReason, Lifeline, SessionId};

const UIDS: [u32; 3] = [10, 11, 12];
const MOST_SESSIONS: usize = 4;

#[derive(Clone, Debug)]
enum Op {
    Issue {
        who: usize,
        ttl: u64,
        uses: Option<u32>,
        max_sessions: Option<usize>,
    },
    /// The handle by its place among all that there ever were.
    Open {
        who: usize,
        handle: usize,
    },
    OpenAmbient {
        who: usize,
    },
    Commit {
        session: usize,
    },
    Leave {
        session: usize,
    },
    Revoke {
        handle: usize,
    },
    Pass {
        seconds: u64,
    },
    Suspend,
    Resume,
    /// Which uids the new policy knows.
    Reload {
        allowed: u8,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let any = 0_usize..64;
    let limit = || proptest::option::of(1_usize..4);
    prop_oneof![
        3 => (0_usize..3, 1_u64..50, proptest::option::of(1_u32..4), limit())
            .prop_map(|(who, ttl, uses, max_sessions)| Op::Issue { who, ttl, uses, max_sessions }),
        6 => (0_usize..3, any.clone()).prop_map(|(who, handle)| Op::Open { who, handle }),
        1 => (0_usize..3).prop_map(|who| Op::OpenAmbient { who }),
        4 => any.clone().prop_map(|session| Op::Commit { session }),
        2 => any.clone().prop_map(|session| Op::Leave { session }),
        1 => any.prop_map(|handle| Op::Revoke { handle }),
        2 => (1_u64..30).prop_map(|seconds| Op::Pass { seconds }),
        1 => Just(Op::Suspend),
        2 => Just(Op::Resume),
        1 => (0_u8..8).prop_map(|allowed| Op::Reload { allowed }),
    ]
}

#[derive(Debug)]
struct ModelHandle {
    id: HandleId,
    token: TokenHash,
    holder: usize,
    expires: Instant,
    uses: Option<u32>,
    max_sessions: Option<usize>,
    live: bool,
    /// Remembered as expired, so that its own holder is told so.
    expired: bool,
}

#[derive(Debug)]
struct ModelSession {
    id: SessionId,
    cut: Arc<Cut>,
    who: usize,
    handle: Option<usize>,
    marked: bool,
    live: bool,
    here: bool,
}

#[derive(Debug)]
struct World {
    state: State,
    credential: Arc<Credential>,
    peers: Vec<Peer>,
    handles: Vec<ModelHandle>,
    sessions: Vec<ModelSession>,
    allowed: BTreeSet<usize>,
    suspended: bool,
    now: Instant,
}

impl World {
    fn new(credential: &Arc<Credential>) -> Self {
        Self {
            state: state(&UIDS, MOST_SESSIONS),
            credential: Arc::clone(credential),
            peers: UIDS.iter().copied().map(peer).collect(),
            handles: Vec::new(),
            sessions: Vec::new(),
            allowed: (0..UIDS.len()).collect(),
            suspended: false,
            now: Instant::now(),
        }
    }

    /// Sessions of a uid that have not left, marked or not.
    fn open_of(&self, who: usize) -> usize {
        self.sessions.iter().filter(|session| session.here && session.who == who).count()
    }

    fn open_under(&self, handle: usize) -> usize {
        self.sessions
            .iter()
            .filter(|session| session.here && session.handle == Some(handle))
            .count()
    }

    /// What the model says to somebody who wants to open a session.
    fn expect(&self, who: usize, handle: Option<usize>) -> Result<(), &'static str> {
        if let Some(index) = handle {
            let handle = self.handles.get(index).filter(|handle| handle.holder == who);
            let handle = handle.filter(|handle| handle.live || handle.expired).ok_or("invalid")?;
            if handle.expired || handle.expires <= self.now {
                return Err("expired");
            }
        }
        if !self.allowed.contains(&who) {
            return Err("denied");
        }
        if self.suspended {
            return Err("suspended");
        }
        if self.open_of(who) >= MOST_SESSIONS {
            return Err("full");
        }
        if let Some(index) = handle {
            let handle = &self.handles[index];
            if handle.max_sessions.is_some_and(|most| self.open_under(index) >= most) {
                return Err("full");
            }
            if handle.uses == Some(0) {
                return Err("invalid");
            }
        }
        Ok(())
    }

    fn open(&mut self, who: usize, handle: Option<usize>) {
        let expected = self.expect(who, handle);
        let by = match handle {
            None => By::Ambient,
            Some(index) => By::Token(self.handles.get(index).map(|handle| handle.token)),
        };
        let connection = admitted(&self.state);
        let peer = self.peers[who].clone();
        let claim = Claim { peer: &peer, connection: &connection, database: None, by };
        let credential = Arc::clone(&self.credential);
        let got = self.state.place(&claim, self.now, |_| Some(credential));
        let said = match &got {
            Ok(_) => Ok(()),
            Err(NoPlace::Full(_)) => Err("full"),
            Err(NoPlace::Handle(HandleFault::Invalid)) => Err("invalid"),
            Err(NoPlace::Handle(HandleFault::Expired)) => Err("expired"),
            Err(NoPlace::Policy(_)) => Err("denied"),
            Err(NoPlace::Suspended) => Err("suspended"),
            Err(NoPlace::Database | NoPlace::NoCredential | NoPlace::Moved) => Err("other"),
        };
        assert_eq!(said, expected);
        if let Ok(placed) = got {
            if let Some(uses) = handle.and_then(|index| self.handles[index].uses.as_mut()) {
                *uses -= 1;
            }
            let (id, cut) = (placed.id, placed.cut);
            self.sessions.push(ModelSession {
                id,
                cut,
                who,
                handle,
                marked: false,
                live: false,
                here: true,
            });
        }
    }

    /// Marks in the model what `which` picks.
    fn mark(&mut self, which: impl Fn(&ModelSession) -> bool) {
        for session in self.sessions.iter_mut().filter(|session| session.here && which(session)) {
            session.marked = true;
        }
    }

    fn end_handles(&mut self, which: impl Fn(&ModelHandle) -> bool) -> BTreeSet<usize> {
        let mut ended = BTreeSet::new();
        for (index, handle) in self.handles.iter_mut().enumerate() {
            if handle.live && which(handle) {
                handle.live = false;
                ended.insert(index);
            }
        }
        self.mark(|session| session.handle.is_some_and(|handle| ended.contains(&handle)));
        ended
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Issue { who, ttl, uses, max_sessions } => {
                let (ttl, peer) = (Duration::from_secs(ttl), self.peers[who].clone());
                let (id, token) = issue(&mut self.state, &peer, self.now, ttl, uses, max_sessions);
                let expires = self.now + ttl;
                self.handles.push(ModelHandle {
                    id,
                    token,
                    holder: who,
                    expires,
                    uses,
                    max_sessions,
                    live: true,
                    expired: false,
                });
            }
            Op::Open { who, handle } => self.open(who, Some(handle % self.handles.len().max(1))),
            Op::OpenAmbient { who } => self.open(who, None),
            Op::Commit { session } => {
                let Some(session) = pick(&mut self.sessions, session) else { return };
                if !session.here || session.live {
                    return;
                }
                let key = ClientKey {
                    pid: u32::MAX,
                    secret: u32::try_from(session.who).unwrap().to_be_bytes().into(),
                };
                let lifeline = Lifeline::Relayed(UnixStream::pair().unwrap().0.into(), None);
                let committed = self.state.sessions.commit(session.id, key, lifeline).is_ok();
                assert_eq!(committed, !session.marked);
                session.live = committed;
            }
            Op::Leave { session } => {
                let Some(session) = pick(&mut self.sessions, session) else { return };
                self.state.sessions.leave(session.id);
                session.here = false;
            }
            Op::Revoke { handle } => {
                let Some(id) = pick(&mut self.handles, handle).map(|handle| handle.id) else {
                    return;
                };
                // As the core does: only what is live is revoked.
                if self.handles.iter().any(|handle| handle.id == id && handle.live) {
                    let taken = self.state.revoke_each(CutReason::Revoked, &[id]);
                    assert_eq!(taken.handles.len(), 1);
                }
                self.end_handles(|handle| handle.id == id);
            }
            Op::Pass { seconds } => {
                self.now += Duration::from_secs(seconds);
                let due: Vec<HandleId> = self
                    .handles
                    .iter()
                    .filter(|handle| handle.live && handle.expires <= self.now)
                    .map(|handle| handle.id)
                    .collect();
                for id in due {
                    assert!(self.state.expire(id).is_some());
                    let ended = self.end_handles(|handle| handle.id == id);
                    ended.into_iter().for_each(|index| self.handles[index].expired = true);
                }
            }
            Op::Suspend => {
                let _taken = self.state.suspend(&Suspended::of(&Scope::All));
                self.suspended = true;
                self.end_handles(|_| true);
                self.mark(|_| true);
            }
            Op::Resume => {
                self.state.suspended.remove(&Scope::All);
                self.suspended = false;
            }
            Op::Reload { allowed } => {
                self.allowed = (0..UIDS.len()).filter(|who| allowed & (1 << who) != 0).collect();
                let uids: Vec<u32> = self.allowed.iter().map(|who| UIDS[*who]).collect();
                let _taken = self.state.reload(settings(&uids, MOST_SESSIONS));
                let allowed = self.allowed.clone();
                self.end_handles(|handle| !allowed.contains(&handle.holder));
                self.mark(|session| !allowed.contains(&session.who));
            }
        }
    }

    fn check(&self) {
        let live = self.handles.iter().filter(|handle| handle.live).count();
        assert_eq!(self.state.handles.live_count(), live);
        assert_eq!(self.state.handles.live().count(), live);
        let here = self.sessions.iter().filter(|session| session.here).count();
        assert_eq!(self.state.sessions.len(), here);
        assert_eq!(self.state.sessions.count_of_connection(&name()), here);
        for (who, peer) in self.peers.iter().enumerate() {
            assert_eq!(self.state.sessions.count(peer.uid(), &name()), self.open_of(who));
        }
        for (index, handle) in self.handles.iter().enumerate() {
            assert_eq!(self.state.sessions.count_of_handle(handle.id), self.open_under(index));
        }
        for session in self.sessions.iter().filter(|session| session.here) {
            assert_eq!(session.cut.reason().is_some(), session.marked);
        }
    }
}

fn pick<T>(all: &mut [T], index: usize) -> Option<&mut T> {
    let index = index.checked_rem(all.len())?;
    all.get_mut(index)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn the_state_does_what_the_model_says(ops in proptest::collection::vec(op(), 1..120)) {
        thread_local!(static CREDENTIAL: Arc<Credential> = credential());
        let mut world = CREDENTIAL.with(World::new);
        for op in &ops {
            world.apply(op);
            world.check();
        }
    }
}
