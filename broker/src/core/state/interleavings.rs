//! Every order in which threads can take the lock: redeem × revoke × expire × suspend × reload ×
//! commit. Whatever the order, no session lives under a right that was taken away.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

use super::fixture::{admitted, credential, issue, peer, settings, state};
use super::{By, Claim, State};
use crate::core::suspension::{Scope, Suspended};
use crate::handle::{HandleId, TokenHash};
use crate::session::{ClientKey, Cut, CutReason, Lifeline};

const UID: u32 = 10;

type Shared = loom::sync::Arc<loom::sync::Mutex<State>>;

/// Every order with up to two preemptions; a thread may yield wherever it blocks or says so.
fn exhaust(run: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(2);
    model.check(run);
}

fn lifeline() -> Lifeline {
    Lifeline::Relayed(UnixStream::pair().unwrap().0.into(), None)
}

/// Opens a session as a door does: a place under one lock, the rest of the login without it, and
/// commit under another.
fn redeem(
    state: &Shared,
    by: By,
    key: u32,
    credential: &Arc<crate::credential::Credential>,
) -> Outcome {
    let peer = peer(UID);
    let placed = {
        let mut state = state.lock().unwrap();
        let connection = admitted(&state);
        let claim = Claim { peer: &peer, connection: &connection, database: None, by };
        state.place(&claim, Instant::now(), |_| Some(Arc::clone(credential)))
    };
    let Ok(placed) = placed else { return Outcome::Refused };
    thread::yield_now();
    let key = ClientKey { pid: key, secret: [0; 4].into() };
    let committed = state.lock().unwrap().sessions.commit(placed.id, key, lifeline());
    match committed {
        Ok(()) => Outcome::Live(placed.cut),
        Err(_cut) => {
            state.lock().unwrap().sessions.leave(placed.id);
            Outcome::Refused
        }
    }
}

enum Outcome {
    Refused,
    Live(Arc<Cut>),
}

impl Outcome {
    /// Live, and nobody has cut it.
    fn goes_on(&self) -> bool {
        matches!(self, Self::Live(cut) if cut.reason().is_none())
    }
}

/// One thread opens a session while each of `enders` takes the right away in its own thread.
fn race(by_handle: bool, enders: &'static [fn(&mut State, HandleId)]) {
    let orders = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = Arc::clone(&orders);
    let credential = credential();
    exhaust(move || {
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut fresh = state(&[UID], 100);
        let ttl = Duration::from_secs(3600);
        let (id, token) = issue(&mut fresh, &peer(UID), Instant::now(), ttl, None, None);
        let shared: Shared = loom::sync::Arc::new(loom::sync::Mutex::new(fresh));
        let by = if by_handle { By::Token(Some(token)) } else { By::Ambient };
        let opener = {
            let (shared, credential) = (shared.clone(), Arc::clone(&credential));
            thread::spawn(move || redeem(&shared, by, 1, &credential))
        };
        let enders: Vec<_> = enders
            .iter()
            .map(|end| {
                let shared = shared.clone();
                thread::spawn(move || end(&mut shared.lock().unwrap(), id))
            })
            .collect();
        let outcome = opener.join().unwrap();
        enders.into_iter().for_each(|ender| ender.join().unwrap());
        assert!(!outcome.goes_on(), "a session lives on although its right is gone");
        let marked = shared.lock().unwrap().sessions.views(|_| true).iter().all(|view| view.live);
        assert!(marked, "what did not commit has left");
    });
    println!(
        "{} orders of {} threads",
        orders.load(std::sync::atomic::Ordering::Relaxed),
        enders.len() + 1
    );
}

fn revoke(state: &mut State, id: HandleId) {
    let _taken = state.revoke_each(CutReason::Revoked, &[id]);
}

fn expire(state: &mut State, id: HandleId) {
    let _taken = state.expire(id);
}

fn suspend(state: &mut State, _: HandleId) {
    let _taken = state.suspend(&Suspended::of(&Scope::All));
}

fn reload(state: &mut State, _: HandleId) {
    let _taken = state.reload(settings(&[], 100));
}

/// A reload that changes nothing takes nothing away.
fn reload_the_same(state: &mut State, _: HandleId) {
    let taken = state.reload(settings(&[UID], 100));
    assert!(taken.handles.is_empty() && taken.cuts.is_empty());
}

#[test]
fn a_revoke_leaves_no_session() {
    race(true, &[revoke]);
    race(true, &[revoke, reload_the_same]);
}

#[test]
fn an_expiry_leaves_no_session() {
    race(true, &[expire, revoke]);
}

#[test]
fn a_suspension_leaves_no_session() {
    race(true, &[suspend, expire]);
    race(false, &[suspend]);
}

#[test]
fn a_reload_leaves_no_session() {
    race(true, &[reload, revoke]);
    race(false, &[reload]);
}

#[test]
fn the_control_without_an_end_a_session_goes_on() {
    let credential = credential();
    exhaust(move || {
        let shared: Shared = loom::sync::Arc::new(loom::sync::Mutex::new(state(&[UID], 100)));
        let opener = {
            let (shared, credential) = (shared.clone(), Arc::clone(&credential));
            thread::spawn(move || redeem(&shared, By::Ambient, 1, &credential))
        };
        let same = {
            let shared = shared;
            thread::spawn(move || {
                reload_the_same(&mut shared.lock().unwrap(), HandleId::random().unwrap())
            })
        };
        same.join().unwrap();
        assert!(opener.join().unwrap().goes_on());
    });
}

#[test]
fn a_rotation_without_grace_leaves_no_session_of_the_old_version() {
    // The session took the old version under the lock; one that takes its place afterwards gets
    // the new one, which this fixture has not: so only those before count.
    let credential = credential();
    exhaust(move || {
        let shared: Shared = loom::sync::Arc::new(loom::sync::Mutex::new(state(&[UID], 100)));
        let rotated = loom::sync::Arc::new(loom::sync::atomic::AtomicBool::new(false));
        let opener = {
            let (shared, credential, rotated) =
                (shared.clone(), Arc::clone(&credential), rotated.clone());
            thread::spawn(move || {
                let before = !rotated.load(Ordering::SeqCst);
                (before, redeem(&shared, By::Ambient, 1, &credential))
            })
        };
        let version = credential.version() + 1;
        {
            let mut state = shared.lock().unwrap();
            let cuts = state.rotate(&super::fixture::name(), version);
            assert!(cuts.len() <= 1);
            rotated.store(true, Ordering::SeqCst);
        }
        let _ = opener.join().unwrap();
        // A second look finds whatever came in with the old one.
        let mut state = shared.lock().unwrap();
        let live = state.sessions.views(|_| true).len();
        assert_eq!(state.rotate(&super::fixture::name(), version).len(), live);
    });
}

#[test]
fn one_use_is_spent_once() {
    let credential = credential();
    exhaust(move || {
        let mut fresh = state(&[UID], 100);
        let ttl = Duration::from_secs(3600);
        let (_, token) = issue(&mut fresh, &peer(UID), Instant::now(), ttl, Some(1), None);
        let shared: Shared = loom::sync::Arc::new(loom::sync::Mutex::new(fresh));
        let won = loom::sync::Arc::new(AtomicUsize::new(0));
        let threads: Vec<_> = [1, 2]
            .into_iter()
            .map(|key| {
                let (shared, credential, won) =
                    (shared.clone(), Arc::clone(&credential), won.clone());
                thread::spawn(move || spend(&shared, token, key, &credential, &won))
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(won.load(Ordering::SeqCst), 1);
    });
}

fn spend(
    shared: &Shared,
    token: TokenHash,
    key: u32,
    credential: &Arc<crate::credential::Credential>,
    won: &AtomicUsize,
) {
    if redeem(shared, By::Token(Some(token)), key, credential).goes_on() {
        won.fetch_add(1, Ordering::SeqCst);
    }
}
