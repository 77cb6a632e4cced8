//! The locked memory that holds plaintext: one mapping, made at start, cut into slots.
//!
//! Invariants:
//! - what is in the arena never lies anywhere else between operations;
//! - a [`Slot`] is wiped before its place can be used again, and the whole region before it is
//!   unmapped;
//! - the region is mapped, locked and readable before the first secret exists, so that running
//!   out of locked memory is a refusal to start and never a fault at a request.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;
use zeroize::Zeroize as _;

use self::region::Region;
pub use self::region::{Backend, BackendChoice, RegionError};
use self::slab::{Extent, Extents};

mod region;
mod slab;
pub mod zeroing;

/// Smallest arena that is worth starting with: what old containers get as RLIMIT_MEMLOCK.
pub const MIN_CAPACITY: usize = 16 * 1024;

/// The arena. Cheap to clone; all clones are the same memory.
#[derive(Clone)]
pub struct Arena {
    shared: Arc<Shared>,
}

struct Shared {
    region: Region,
    extents: Mutex<Extents>,
}

/// What kind of memory was got, for the posture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Posture {
    /// How the memory is backed.
    pub backend: Backend,
    /// Bytes of the arena.
    pub capacity: usize,
    /// Bytes that were asked for, before RLIMIT_MEMLOCK was looked at.
    pub wanted: usize,
}

/// No room is left in the arena.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("the arena is full: raise arena.capacity, or RLIMIT_MEMLOCK if that caps it")]
pub struct ArenaFull;

impl Arena {
    /// Maps and locks `capacity` bytes, or less when RLIMIT_MEMLOCK allows less.
    ///
    /// # Errors
    /// When no backend that `choice` allows can be had, or less than [`MIN_CAPACITY`] bytes.
    pub fn map(choice: BackendChoice, capacity: usize) -> Result<Self, RegionError> {
        let region = Region::map(choice, capacity)?;
        let extents = Mutex::new(Extents::new(region.len()));
        Ok(Self { shared: Arc::new(Shared { region, extents }) })
    }

    /// What kind of memory was got.
    #[must_use]
    pub fn posture(&self) -> Posture {
        let region = &self.shared.region;
        Posture { backend: region.backend(), capacity: region.len(), wanted: region.wanted() }
    }

    /// A zeroed place of `len` bytes.
    ///
    /// # Errors
    /// [`ArenaFull`] when no free extent is long enough.
    pub fn allocate(&self, len: usize) -> Result<Slot, ArenaFull> {
        let mut extents = self.shared.extents.lock().unwrap_or_else(PoisonError::into_inner);
        let extent = extents.take(len).ok_or(ArenaFull)?;
        Ok(Slot { shared: Arc::clone(&self.shared), extent, len })
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena").field("posture", &self.posture()).finish()
    }
}

/// A place in the arena. Wiped when dropped; neither `Clone` nor readable through `Debug`.
///
/// ```compile_fail
/// fn twice(slot: &credbroker_broker::arena::Slot) -> credbroker_broker::arena::Slot {
///     slot.clone()
/// }
/// ```
pub struct Slot {
    shared: Arc<Shared>,
    extent: Extent,
    len: usize,
}

impl Slot {
    /// Lends the bytes to `read`. Whatever `read` copies out of them it must wipe itself.
    pub fn expose<R>(&self, read: impl FnOnce(&[u8]) -> R) -> R {
        read(self.shared.region.bytes(self.extent.offset(), self.len))
    }

    /// Lends the bytes for writing.
    pub fn fill<R>(&mut self, write: impl FnOnce(&mut [u8]) -> R) -> R {
        // The extent belongs to this slot alone until it is given back in `drop`, and `&mut self`
        // excludes a second borrow, so no other reference to these bytes exists.
        write(self.shared.region.bytes_mut(&mut self.extent, self.len))
    }

    /// Number of bytes in use.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no byte is in use.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Gives up all but the first `len` bytes, and wipes the rest.
    pub fn truncate(&mut self, len: usize) {
        self.fill(|bytes| bytes.iter_mut().skip(len).for_each(|byte| byte.zeroize()));
        self.len = self.len.min(len);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.len = self.extent.len();
        self.fill(|bytes| bytes.zeroize());
        let mut extents = self.shared.extents.lock().unwrap_or_else(PoisonError::into_inner);
        extents.give_back(&self.extent);
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[REDACTED]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arena() -> Arena {
        Arena::map(BackendChoice::Auto, 64 * 1024).unwrap()
    }

    #[test]
    fn a_slot_is_wiped_before_it_is_used_again() {
        let arena = arena();
        let mut slot = arena.allocate(64).unwrap();
        slot.fill(|bytes| bytes.copy_from_slice(&[0xAA; 64]));
        let offset = slot.extent.offset();
        drop(slot);
        let again = arena.allocate(64).unwrap();
        assert_eq!(again.extent.offset(), offset, "the first free place is taken again");
        again.expose(|bytes| assert_eq!(bytes, [0; 64]));
    }

    #[test]
    fn truncate_wipes_the_rest() {
        let arena = arena();
        let mut slot = arena.allocate(8).unwrap();
        slot.fill(|bytes| bytes.copy_from_slice(b"abcdefgh"));
        slot.truncate(3);
        slot.expose(|bytes| assert_eq!(bytes, b"abc"));
        slot.len = 8;
        slot.expose(|bytes| assert_eq!(bytes, b"abc\0\0\0\0\0"));
    }

    #[test]
    fn a_full_arena_is_an_error_and_recovers() {
        let arena = arena();
        let mut slots = Vec::new();
        while let Ok(slot) = arena.allocate(1024) {
            slots.push(slot);
        }
        assert_eq!(slots.len(), 64);
        assert_eq!(arena.allocate(1).unwrap_err(), ArenaFull);
        slots.pop();
        assert!(arena.allocate(1024).is_ok());
    }

    #[test]
    fn slots_do_not_overlap() {
        let arena = arena();
        let mut slots: Vec<_> = (0..40_u8).map(|_| arena.allocate(100).unwrap()).collect();
        for (mark, slot) in (0_u8..).zip(&mut slots) {
            slot.fill(|bytes| bytes.fill(mark));
        }
        for (mark, slot) in (0_u8..).zip(&slots) {
            slot.expose(|bytes| assert!(bytes.iter().all(|byte| *byte == mark)));
        }
    }

    #[test]
    fn debug_shows_nothing() {
        let slot = arena().allocate(4).unwrap();
        assert_eq!(format!("{slot:?}"), "[REDACTED]");
    }
}

// PROVISIONAL
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    pub capacity: usize,
    pub own: usize,
    pub registered: usize,
    pub free: usize,
    pub largest_free: usize,
}
