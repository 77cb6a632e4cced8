//! What PBKDF2 made of a password, kept so that the next login needs microseconds instead of
//! milliseconds. It is as good as the password: it lies in the arena, beside it, and goes with it.

#![forbid(unsafe_code)]

use std::num::NonZeroU32;
use std::sync::{Mutex, PoisonError};

use crate::arena::Slot;

/// A role has one salt, and another when its password is set again.
const MOST: usize = 2;

/// The SaltedPasswords of one version of a credential.
#[derive(Debug, Default)]
pub(crate) struct SaltedPasswords {
    /// The newest last.
    known: Mutex<Vec<SaltedPassword>>,
}

/// `Hi(password, salt, iterations)` (RFC 5802 §2.2).
#[derive(Debug)]
pub(crate) struct SaltedPassword {
    pub(crate) salt: Vec<u8>,
    pub(crate) iterations: NonZeroU32,
    pub(crate) key: Slot,
}

impl SaltedPasswords {
    /// Lends the one that was derived with this salt, if it is known. Whatever `read` copies out
    /// of it must be wiped.
    pub(crate) fn expose<R>(
        &self,
        salt: &[u8],
        iterations: NonZeroU32,
        read: impl FnOnce(&[u8]) -> R,
    ) -> Option<R> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let found = known.iter().find(|one| one.is_of(salt, iterations))?;
        Some(found.key.expose(read))
    }

    /// Whether there is one of this salt.
    pub(crate) fn has(&self, salt: &[u8], iterations: NonZeroU32) -> bool {
        self.expose(salt, iterations, |_key| ()).is_some()
    }

    /// Keeps one that a server has shown to be right; the oldest makes room for it.
    pub(crate) fn keep(&self, proven: SaltedPassword) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.iter().any(|one| one.is_of(&proven.salt, proven.iterations)) {
            return;
        }
        if known.len() == MOST {
            known.remove(0);
        }
        known.push(proven);
    }
}

impl SaltedPassword {
    fn is_of(&self, salt: &[u8], iterations: NonZeroU32) -> bool {
        self.salt == salt && self.iterations == iterations
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::{Arena, BackendChoice};

    #[test]
    fn two_are_kept_and_the_oldest_goes_first() {
        let arena = Arena::map(BackendChoice::Auto, 64 * 1024).unwrap();
        let iterations = NonZeroU32::new(4096).unwrap();
        let known = SaltedPasswords::default();
        let keep = |salt: &[u8], byte: u8| {
            let mut key = arena.allocate(32).unwrap();
            key.fill(|place| place.fill(byte));
            known.keep(SaltedPassword { salt: salt.to_vec(), iterations, key });
        };
        let first = |salt: &[u8]| known.expose(salt, iterations, |key| key[0]);
        keep(b"a", 1);
        keep(b"a", 9);
        keep(b"b", 2);
        assert_eq!((first(b"a"), first(b"b"), first(b"c")), (Some(1), Some(2), None));
        assert!(known.expose(b"a", NonZeroU32::new(5000).unwrap(), |_| ()).is_none());
        let used = arena.usage().own;
        keep(b"c", 3);
        assert_eq!((first(b"a"), first(b"b"), first(b"c")), (None, Some(2), Some(3)));
        assert_eq!(arena.usage().own, used, "its place is free again");
    }
}
