//! The locked memory that holds plaintext: one mapping, made at start, cut into slots.
//!
//! Invariants:
//! - what is in the arena never lies anywhere else between operations;
//! - a [`Slot`] is wiped before its place can be used again, and the whole region before it is
//!   unmapped;
//! - the region is mapped, locked and readable before the first secret exists, so that running
//!   out of locked memory is a refusal to start and never a fault at a request;
//! - before and after each slot stands a canary, and behind a secret its place is zero. Whoever
//!   finds that broken wipes everything and ends the process: a program that writes where it
//!   must not cannot be trusted with another secret;
//! - what peers register cannot take more than half, nor one uid more than a quarter of that.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use subtle::ConstantTimeEq as _;
use thiserror::Error;
use tracing::error;
use zeroize::Zeroize as _;

use self::region::Region;
pub use self::region::{Backend, BackendChoice, NoSecretMemory, RegionError};
pub use self::slab::Usage;
use self::slab::{Extent, Extents, Owner};
pub use self::vm_flags::VmFlags;
use crate::peer::Uid;

mod region;
mod slab;
mod vm_flags;

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
    /// Why it is not memfd_secret's, where it is not.
    pub why_not_secret: Option<NoSecretMemory>,
    /// What the kernel says that it does with it.
    pub flags: VmFlags,
    /// Bytes of the arena.
    pub capacity: usize,
    /// Bytes that were asked for, before RLIMIT_MEMLOCK was looked at.
    pub wanted: usize,
}

/// No room is left in the arena, or none for this peer.
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
        let extents = Mutex::new(Extents::new(region.first(), region.len()));
        Ok(Self { shared: Arc::new(Shared { region, extents }) })
    }

    /// What kind of memory was got.
    #[must_use]
    pub fn posture(&self) -> Posture {
        let region = &self.shared.region;
        Posture {
            backend: region.backend(),
            why_not_secret: region.why_not_secret(),
            flags: region.flags(),
            capacity: region.len(),
            wanted: region.wanted(),
        }
    }

    /// A zeroed place of `len` bytes for a credential or key of the broker's own.
    ///
    /// # Errors
    /// [`ArenaFull`] when no free extent is long enough.
    pub fn allocate(&self, len: usize) -> Result<Slot, ArenaFull> {
        self.place(len, Owner::Broker)
    }

    /// A zeroed place of `len` bytes for what a peer of `uid` registers. All peers together get
    /// half of the arena, and one uid a quarter of that, or one longest secret where that is more.
    ///
    /// # Errors
    /// [`ArenaFull`] when the uid or all peers have their part, or no free extent is long enough.
    pub fn allocate_for(&self, uid: Uid, len: usize) -> Result<Slot, ArenaFull> {
        self.place(len, Owner::Peer(uid))
    }

    /// How full it is.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.shared.extents().usage()
    }

    /// Looks at the canaries of all slots. Does not return when one is broken.
    pub fn check(&self) {
        let extents = self.shared.extents();
        let intact = |(offset, len)| self.shared.region.is_intact(offset, len, None);
        if !extents.taken().all(intact) {
            self.shared.wipe_and_abort();
        }
    }

    fn place(&self, len: usize, owner: Owner) -> Result<Slot, ArenaFull> {
        place(&self.shared, len, |extents| extents.take(len, owner))
    }
}

impl Shared {
    fn extents(&self) -> MutexGuard<'_, Extents> {
        self.extents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The end: first the secrets, then a line that says why, then the process. Nothing is
    /// unwound, for nothing that this program would still do can be relied on.
    #[cold]
    fn wipe_and_abort(&self) -> ! {
        self.region.dangerous_wipe_for_abort();
        error!(
            "the arena is damaged: something wrote past its place; all secrets are wiped, and the broker ends"
        );
        std::process::abort()
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

/// A place that `take` chooses.
fn place(
    shared: &Arc<Shared>,
    len: usize,
    take: impl FnOnce(&mut Extents) -> Option<Extent>,
) -> Result<Slot, ArenaFull> {
    // Under the lock, so that no check sees a place without its canaries.
    let mut extents = shared.extents();
    let mut extent = take(&mut extents).ok_or(ArenaFull)?;
    shared.region.arm(&mut extent);
    Ok(Slot { shared: Arc::clone(shared), extent, len })
}

impl Slot {
    /// A zeroed place for the first or last `len` bytes of this one, which is to be dropped soon:
    /// it counts as this one does, as the broker's own or as a peer's.
    ///
    /// # Errors
    /// [`ArenaFull`] when no free extent is long enough.
    pub fn place_for_copy(&self, len: usize) -> Result<Self, ArenaFull> {
        place(&self.shared, len, |extents| extents.take_for_copy(&self.extent, len))
    }

    /// A zeroed place of `len` bytes for what is derived from this one: it counts as this one
    /// does, as the broker's own or within the peer's part.
    ///
    /// # Errors
    /// [`ArenaFull`] when there is no room, or none for this peer.
    pub fn place_for_derived(&self, len: usize) -> Result<Self, ArenaFull> {
        let owner = self.extent.owner();
        place(&self.shared, len, |extents| extents.take(len, owner))
    }

    /// Lends the bytes to `read`. Whatever `read` copies out of them it must wipe itself.
    pub fn expose<R>(&self, read: impl FnOnce(&[u8]) -> R) -> R {
        read(self.shared.region.bytes(&self.extent, self.len))
    }

    /// Lends the bytes for writing.
    pub fn fill<R>(&mut self, write: impl FnOnce(&mut [u8]) -> R) -> R {
        // The extent belongs to this slot alone until it is given back in `drop`, and `&mut self`
        // excludes a second borrow, so no other reference to these bytes exists.
        write(self.shared.region.bytes_mut(&mut self.extent, self.len))
    }

    /// Whether two secrets are the same, in a time that depends on their lengths only.
    #[must_use]
    pub fn equals(&self, other: &Self) -> bool {
        self.expose(|own| other.expose(|other| bool::from(own.ct_eq(other))))
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
        let Self { shared, extent, len } = self;
        let mut extents = shared.extents();
        if !shared.region.is_intact(extent.offset(), extent.len(), Some(*len)) {
            shared.wipe_and_abort();
        }
        shared.region.clear(extent);
        extents.give_back(extent);
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
    use crate::isolated;

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
        assert_eq!(slots.len(), 60, "each takes its canaries, too");
        assert_eq!(arena.usage().free, arena.usage().capacity - 60 * 1088);
        assert_eq!(arena.allocate(arena.usage().largest_free + 1).unwrap_err(), ArenaFull);
        assert!(arena.allocate(arena.usage().largest_free).is_ok());
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

    #[test]
    fn what_a_peer_registers_is_counted_until_it_is_dropped() {
        let arena = arena();
        let own = arena.allocate(32).unwrap();
        let mut slots = Vec::new();
        while let Ok(slot) = arena.allocate_for(Uid::from_raw(7), 1000) {
            slots.push(slot);
        }
        let Usage { capacity, own: broker, registered, free, .. } = arena.usage();
        assert_eq!((broker, registered), (64, slots.len() * 1088));
        assert_eq!(broker + registered + free, capacity);
        assert!(registered <= capacity / 2);
        assert!(arena.allocate(1000).is_ok(), "the broker's own half is left");
        drop((own, slots));
        assert_eq!((arena.usage().registered, arena.usage().own), (0, 0));
        assert!(arena.allocate_for(Uid::from_raw(7), 1000).is_ok());
    }

    #[test]
    fn equal_is_what_has_the_same_bytes() {
        let arena = arena();
        let slot = |text: &[u8]| {
            let mut slot = arena.allocate(text.len()).unwrap();
            slot.fill(|bytes| bytes.copy_from_slice(text));
            slot
        };
        assert!(slot(b"secret").equals(&slot(b"secret")));
        assert!(!slot(b"secret").equals(&slot(b"sacred")));
        assert!(!slot(b"secret").equals(&slot(b"secret2")));
    }

    #[test]
    fn slots_of_any_length_are_found_intact() {
        let arena = arena();
        let mut slots: Vec<Slot> = (0..100).filter_map(|len| arena.allocate(len).ok()).collect();
        for slot in &mut slots {
            slot.fill(|bytes| bytes.fill(0xff));
            slot.truncate(slot.len() / 2);
        }
        arena.check();
    }

    /// Each way to leave one's place, in a process of its own, and how it is found.
    #[test]
    fn a_broken_canary_wipes_the_arena_and_ends_the_process() {
        let name = "arena::tests::a_broken_canary_wipes_the_arena_and_ends_the_process";
        let Some(way) = isolated::role() else {
            for way in ["before", "after", "rest", "check"] {
                let done = isolated::again(name, way);
                assert_eq!(done.signal, Some(libc::SIGABRT), "{way}: {}", done.said);
                let lines = done.said.lines().filter(|line| line.contains("the arena is damaged"));
                assert_eq!(lines.count(), 1, "{way}: {}", done.said);
                assert!(!done.said.contains("canaryofthetest"), "{way}: {}", done.said);
                assert!(done.said.contains("wiped=true"), "{way}: {}", done.said);
            }
            // The control: the same without a broken canary ends well.
            assert_eq!(isolated::again(name, "none").signal, None);
            return;
        };
        let arena = arena();
        let mut bystander = arena.allocate(15).unwrap();
        bystander.fill(|bytes| bytes.copy_from_slice(b"canaryofthetest"));
        let _subscriber =
            tracing::subscriber::set_default(isolated::SaysAnd(Box::new(move || {
                format!("wiped={}", bystander.expose(|bytes| bytes == [0; 15]))
            })));
        let slot = arena.allocate(20).unwrap();
        let place = slot.expose(<[u8]>::as_ptr).cast_mut();
        match way.as_str() {
            "before" => poke(place.wrapping_sub(1)),
            "after" | "check" => poke(place.wrapping_add(slot.extent.room())),
            "rest" => poke(place.wrapping_add(20)),
            _ => {}
        }
        if way == "check" {
            arena.check();
        }
        drop(slot);
    }

    /// What a bug does.
    #[allow(unsafe_code, reason = "a write past a slot cannot be made otherwise")]
    fn poke(place: *mut u8) {
        // SAFETY: the places above lie within the mapping, and no reference to them exists.
        unsafe { place.write_volatile(0xEE) };
    }
}
