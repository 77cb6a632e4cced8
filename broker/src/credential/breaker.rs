//! Keeps a refused credential from being tried again and again: servers lock accounts for that.
//!
//! It belongs to one version of a credential, so another version begins with a closed one. After a
//! refusal nothing is dialled for a while, which doubles with each refusal in a row; then one login
//! tries, and the others wait for what comes of it, as they do for the first login of all. That a
//! server cannot be reached opens nothing and ends the waiting.

#![forbid(unsafe_code)]

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::Notify;
use tokio::time::timeout_at;

const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// How long a login waits for another one's outcome before it goes ahead by itself.
const PATIENCE: Duration = Duration::from_secs(5);
/// After so long without a success one login goes first again.
const FRESH: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
pub(crate) struct Breaker {
    state: Mutex<State>,
    /// Woken when a trial has ended.
    ended: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// When it last logged in.
    succeeded: Option<Instant>,
    /// In a row.
    refusals: u32,
    /// Open until then, and half open after.
    until: Option<Instant>,
    /// Somebody tries for all.
    trial: bool,
    /// Counts the times that it opened: those who began before are of the same storm.
    opened: u64,
    /// Whether it has been told that the server no longer takes what it took.
    diverged: bool,
}

/// Nothing is to be dialled now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Open {
    /// When it makes sense to try again.
    pub(crate) retry: Duration,
}

/// An open breaker, as an operator sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BreakerView {
    /// When one login may try again; past, when none has.
    pub(crate) open_until: SystemTime,
    /// In a row.
    pub(crate) refusals: u32,
}

/// Leave to log in once. Dropped, it says nothing of the credential.
#[must_use]
#[derive(Debug)]
pub(crate) struct Attempt<'a> {
    breaker: &'a Breaker,
    is_trial: bool,
    opened: u64,
}

/// What was said of a secret by whoever refused it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The configured server says that it is wrong.
    Wrong,
    /// The same, by somebody who has not shown who he is.
    Hearsay,
    /// That something else is not let in: the role, or the address that it is asked from.
    Elsewhere,
}

/// What a refusal means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// It never logged in, or this is known.
    Again,
    /// It logged in before, and this is the first refusal since.
    Diverged,
    /// The same, if it is true: whoever said so may be an impostor.
    Doubtful,
}

impl Breaker {
    /// Waits for leave to log in.
    pub(crate) async fn enter(&self) -> Result<Attempt<'_>, Open> {
        let deadline = Instant::now() + PATIENCE;
        let mut has_waited = false;
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            // From here on no end of a trial is missed.
            ended.as_mut().enable();
            if let Some(answer) = self.try_enter(Instant::now(), has_waited) {
                return answer;
            }
            has_waited = true;
            let _outcome = timeout_at(deadline.into(), ended).await;
        }
    }

    /// Leave for an operator, who tries whatever came of it before.
    pub(crate) fn enter_regardless(&self) -> Attempt<'_> {
        Attempt { breaker: self, is_trial: false, opened: self.state().opened }
    }

    /// `None` when somebody else is trying, and it is worth waiting for.
    fn try_enter(&self, now: Instant, has_waited: bool) -> Option<Result<Attempt<'_>, Open>> {
        let mut state = self.state();
        let attempt = |is_trial, opened| Attempt { breaker: self, is_trial, opened };
        if let Some(until) = state.until {
            if now < until {
                return Some(Err(Open { retry: until - now }));
            }
            if state.trial {
                return Some(Err(Open { retry: FIRST_WAIT }));
            }
        } else if has_waited || state.succeeded.is_some_and(|at| now < at + FRESH) {
            return Some(Ok(attempt(false, state.opened)));
        } else if state.trial {
            return None;
        }
        state.trial = true;
        Some(Ok(attempt(true, state.opened)))
    }

    /// Lets the next login try: what was refused may be taken now.
    pub(crate) fn close(&self) {
        let mut state = self.state();
        (state.until, state.refusals) = (None, 0);
    }

    /// When it lets somebody try again, if it is open.
    pub(crate) fn is_open(&self) -> Option<Open> {
        let until = self.state().until?;
        Some(Open { retry: until.saturating_duration_since(Instant::now()) })
    }

    /// What may be told of it. `None` when it is closed.
    pub(crate) fn view(&self) -> Option<BreakerView> {
        let state = self.state();
        let (until, refusals) = (state.until?, state.refusals);
        let (now, wall) = (Instant::now(), SystemTime::now());
        let open_until = match until.checked_duration_since(now) {
            Some(ahead) => wall + ahead,
            None => wall - now.duration_since(until),
        };
        Some(BreakerView { open_until, refusals })
    }

    /// Whether it has opened since an attempt began: what is still on the way to the server need
    /// not arrive.
    fn has_opened_since(&self, opened: u64) -> bool {
        self.state().opened != opened
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Attempt<'_> {
    /// The server let us in.
    pub(crate) fn succeeded(self) {
        let mut state = self.breaker.state();
        state.succeeded = Some(Instant::now());
        (state.until, state.refusals, state.diverged) = (None, 0, false);
    }

    /// The server refused the credential.
    ///
    /// Only a wrong secret can mean that it has diverged, and only if the server itself says so: by
    /// a word that anybody can say, anybody could cut every session.
    pub(crate) fn refused(self, verdict: Verdict) -> Refused {
        self.refused_at(Instant::now(), verdict)
    }

    fn refused_at(self, now: Instant, verdict: Verdict) -> Refused {
        let mut state = self.breaker.state();
        let first_of_its_storm = state.opened == self.opened;
        if first_of_its_storm {
            state.opened += 1;
            let wait = FIRST_WAIT.saturating_mul(1 << state.refusals.min(6)).min(LONGEST_WAIT);
            state.refusals = state.refusals.saturating_add(1);
            state.until = Some(now + wait);
        }
        let is_news = state.succeeded.is_some() && !state.diverged;
        match verdict {
            Verdict::Wrong if is_news => {
                state.diverged = true;
                Refused::Diverged
            }
            Verdict::Hearsay if is_news && first_of_its_storm => Refused::Doubtful,
            Verdict::Wrong | Verdict::Hearsay | Verdict::Elsewhere => Refused::Again,
        }
    }

    /// Whether another login was refused meanwhile, so that this one must not show its proof.
    pub(crate) fn is_overtaken(&self) -> bool {
        self.breaker.has_opened_since(self.opened)
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if self.is_trial {
            self.breaker.state().trial = false;
            self.breaker.ended.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn enter(breaker: &Breaker, now: Instant) -> Result<Attempt<'_>, Open> {
        breaker.try_enter(now, false).expect("nobody tries")
    }

    #[test]
    fn the_wait_doubles_to_a_minute_and_a_success_ends_it() {
        let breaker = Breaker::default();
        let mut now = Instant::now();
        let mut waits = Vec::new();
        for _ in 0..9 {
            let Refused::Again = enter(&breaker, now).unwrap().refused_at(now, Verdict::Wrong)
            else {
                panic!()
            };
            let open = enter(&breaker, now).unwrap_err();
            waits.push(open.retry.as_secs());
            assert!(enter(&breaker, now + open.retry - SECOND / 2).is_err());
            now += open.retry;
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        enter(&breaker, now).unwrap().succeeded();
        assert_eq!(breaker.is_open(), None);
        let Refused::Diverged = enter(&breaker, now).unwrap().refused_at(now, Verdict::Wrong)
        else {
            panic!()
        };
        assert_eq!(enter(&breaker, now).unwrap_err().retry, SECOND);
    }

    #[test]
    fn half_open_lets_one_try() {
        let breaker = Breaker::default();
        let now = Instant::now();
        assert_eq!(enter(&breaker, now).unwrap().refused_at(now, Verdict::Wrong), Refused::Again);
        let then = now + 2 * SECOND;
        let trial = enter(&breaker, then).unwrap();
        assert!(enter(&breaker, then).is_err(), "one tries already");
        drop(trial);
        assert!(enter(&breaker, then).is_ok(), "it came to nothing");
    }

    #[test]
    fn one_storm_counts_once_and_what_is_late_shows_nothing() {
        let breaker = Breaker::default();
        let now = Instant::now();
        enter(&breaker, now).unwrap().succeeded();
        let storm: Vec<_> = (0..50).map(|_| enter(&breaker, Instant::now()).unwrap()).collect();
        assert!(!storm[0].is_overtaken());
        let mut meanings = Vec::new();
        for attempt in storm {
            meanings.push(attempt.refused_at(now, Verdict::Wrong));
        }
        assert_eq!(meanings[0], Refused::Diverged);
        assert!(meanings[1..].iter().all(|one| *one == Refused::Again));
        assert_eq!(breaker.state().refusals, 1);
        let late = breaker.enter_regardless();
        assert!(!late.is_overtaken());
        assert_eq!(breaker.enter_regardless().refused_at(now, Verdict::Wrong), Refused::Again);
        assert!(late.is_overtaken());
    }

    #[test]
    fn what_anybody_could_say_opens_it_and_cuts_nothing() {
        let breaker = Breaker::default();
        let now = Instant::now();
        enter(&breaker, now).unwrap().succeeded();
        let (first, second) = (enter(&breaker, now).unwrap(), enter(&breaker, now).unwrap());
        assert_eq!(first.refused_at(now, Verdict::Hearsay), Refused::Doubtful);
        assert_eq!(second.refused_at(now, Verdict::Hearsay), Refused::Again, "told once");
        assert_eq!(enter(&breaker, now).unwrap_err().retry, SECOND, "it is open all the same");
        // The word of the server itself counts afterwards as it did before.
        let then = now + SECOND;
        let said = enter(&breaker, then).unwrap().refused_at(then, Verdict::Wrong);
        assert_eq!(said, Refused::Diverged);
        let then = then + 2 * SECOND;
        let said = enter(&breaker, then).unwrap().refused_at(then, Verdict::Hearsay);
        assert_eq!(said, Refused::Again, "it is known");
    }

    #[tokio::test]
    async fn the_others_wait_for_the_first() {
        let breaker = Arc::new(Breaker::default());
        let (let_in, refused) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let trial = breaker.enter().await.unwrap();
        let mut others = tokio::task::JoinSet::new();
        for _ in 0..100 {
            let (breaker, let_in, refused) =
                (Arc::clone(&breaker), Arc::clone(&let_in), Arc::clone(&refused));
            others.spawn(async move {
                let counter = if breaker.enter().await.is_ok() { let_in } else { refused };
                counter.fetch_add(1, Ordering::SeqCst);
            });
        }
        tokio::task::yield_now().await;
        assert_eq!(let_in.load(Ordering::SeqCst) + refused.load(Ordering::SeqCst), 0);
        assert_eq!(trial.refused(Verdict::Wrong), Refused::Again);
        others.join_all().await;
        assert_eq!(refused.load(Ordering::SeqCst), 100, "nobody else has tried");
    }

    #[tokio::test]
    async fn a_server_that_cannot_be_reached_makes_nobody_wait_in_a_row() {
        let breaker = Arc::new(Breaker::default());
        let trial = breaker.enter().await.unwrap();
        let mut others = tokio::task::JoinSet::new();
        for _ in 0..10 {
            let breaker = Arc::clone(&breaker);
            others.spawn(async move { breaker.enter().await.map(|attempt| attempt.is_trial) });
        }
        tokio::task::yield_now().await;
        drop(trial);
        let all = others.join_all().await;
        assert!(all.iter().all(|one| *one == Ok(false)), "{all:?}");
    }
}
