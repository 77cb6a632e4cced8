//! `next_cursor`: where a result was cut, and for whom and what.
//!
//! A cursor is a random name for an offset, kept here. It is bound to its principal, the right
//! that the statement ran under, the statement and its parameters; it holds neither of them,
//! only a keyed hash, and nothing in the database. A cursor that is foreign, unknown or expired
//! gets one and the same answer.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hash as _, Hasher as _};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Principal, Source};
use crate::error::Failure;
use crate::random;
use crate::sql::Params;

/// Cursors of one principal; a new one takes the place of the oldest.
const MAX_CURSORS: usize = 64;
/// How long a cursor can be used.
const LIFETIME: Duration = Duration::from_secs(600);

/// The cursors of all principals.
#[derive(Debug, Default)]
pub(super) struct Cursors {
    kept: Mutex<HashMap<String, Entry>>,
    key: RandomState,
}

/// What was asked, under which right; comparable with nothing outside this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Print(u64);

#[derive(Debug)]
struct Entry {
    principal: Principal,
    print: Print,
    offset: u64,
    made: Instant,
}

impl Cursors {
    pub(super) fn print(&self, source: &Source<'_>, sql: &str, params: &Params) -> Print {
        let mut hasher = self.key.build_hasher();
        match source {
            Source::Own(connection) => (0, connection).hash(&mut hasher),
            Source::Token(connection, token) => {
                (1, connection, token.expose()).hash(&mut hasher);
            }
            Source::Reference(id) => (2, id).hash(&mut hasher),
        }
        sql.hash(&mut hasher);
        match params {
            Params::None => 0.hash(&mut hasher),
            Params::List(values) => (1, values).hash(&mut hasher),
            Params::Named(values) => (2, values).hash(&mut hasher),
        }
        Print(hasher.finish())
    }

    /// Names the place after the first `offset` rows.
    pub(super) fn insert(
        &self,
        principal: &Principal,
        print: Print,
        offset: u64,
        now: Instant,
    ) -> Result<String, Failure> {
        let cursor = random::name("cur_")?;
        let mut kept = self.kept();
        kept.retain(|_, entry| entry.lives(now));
        let own = kept.iter().filter(|(_, entry)| entry.principal == *principal);
        if own.clone().count() >= MAX_CURSORS {
            let oldest = own.min_by_key(|(_, entry)| entry.made).map(|(name, _)| name.clone());
            oldest.and_then(|name| kept.remove(&name));
        }
        let entry = Entry { principal: principal.clone(), print, offset, made: now };
        kept.insert(cursor.clone(), entry);
        Ok(cursor)
    }

    /// The offset that a cursor of the caller stands for.
    pub(super) fn find(
        &self,
        principal: &Principal,
        cursor: &str,
        print: Print,
        now: Instant,
    ) -> Result<u64, Failure> {
        let kept = self.kept();
        let entry = kept.get(cursor).filter(|entry| entry.principal == *principal);
        let entry = entry.filter(|entry| entry.lives(now)).ok_or_else(|| {
            Failure::invalid("cursor is unknown or has expired")
                .with_hint("run the statement again without cursor; a cursor lives for 10 minutes")
        })?;
        if entry.print != print {
            return Err(Failure::invalid("cursor was made for another statement")
                .with_hint("repeat the connection, the statement and params exactly"));
        }
        Ok(entry.offset)
    }

    pub(super) fn sweep(&self, now: Instant) {
        self.kept().retain(|_, entry| entry.lives(now));
    }

    fn kept(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn lives(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.made) < LIFETIME
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn principal(name: &str) -> Principal {
        Principal::http(&crate::app::Name::parse(name).unwrap())
    }

    #[test]
    fn foreign_unknown_and_expired_are_one_answer() {
        let (cursors, now) = (Cursors::default(), Instant::now());
        let print = cursors.print(&Source::Own("db"), "select 1", &Params::None);
        let cursor = cursors.insert(&principal("a"), print, 7, now).unwrap();
        assert_eq!(cursors.find(&principal("a"), &cursor, print, now), Ok(7));
        let unknown = cursors.find(&principal("a"), "cur_x", print, now).unwrap_err();
        assert_eq!(cursors.find(&principal("b"), &cursor, print, now), Err(unknown.clone()));
        let later = now + LIFETIME;
        assert_eq!(cursors.find(&principal("a"), &cursor, print, later), Err(unknown));
        cursors.sweep(later);
        assert!(cursors.kept().is_empty());
    }

    #[test]
    fn a_cursor_is_for_what_it_was_made_for() {
        let (cursors, now) = (Cursors::default(), Instant::now());
        let list = |value| Params::List(vec![value]);
        let asked = |source: Source<'_>, sql, params| cursors.print(&source, sql, &params);
        let print = asked(Source::Own("db"), "select $1", list(json!(1)));
        let cursor = cursors.insert(&principal("a"), print, 1, now).unwrap();
        assert_eq!(print, asked(Source::Own("db"), "select $1", list(json!(1))));
        for other in [
            asked(Source::Own("other"), "select $1", list(json!(1))),
            asked(Source::Reference("db"), "select $1", list(json!(1))),
            asked(Source::Own("db"), "select $2", list(json!(1))),
            asked(Source::Own("db"), "select $1", list(json!("1"))),
            asked(Source::Own("db"), "select $1", Params::None),
        ] {
            let failure = cursors.find(&principal("a"), &cursor, other, now).unwrap_err();
            assert!(failure.to_string().contains("another statement"), "{failure}");
        }
    }

    #[test]
    fn the_oldest_makes_room() {
        let (cursors, now) = (Cursors::default(), Instant::now());
        let print = cursors.print(&Source::Own("db"), "select 1", &Params::None);
        let names: Vec<_> = (0..=MAX_CURSORS as u64)
            .map(|at| {
                let made = now + Duration::from_millis(at);
                cursors.insert(&principal("a"), print, at, made).unwrap()
            })
            .collect();
        assert_eq!(cursors.kept().len(), MAX_CURSORS);
        assert!(cursors.find(&principal("a"), &names[0], print, now).is_err());
        assert_eq!(cursors.find(&principal("a"), &names[1], print, now), Ok(1));
    }
}
