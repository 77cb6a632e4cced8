//! Which parts of the arena are free, and who has the others. The bookkeeping lies outside the
//! arena: nothing that overran a slot could steer it, and the arena holds secrets only.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashMap};

use crate::peer::Uid;
use crate::source::MAX_SECRET;

/// Slots start at multiples of this many bytes, so that neighbours share no cache line.
pub(super) const GRANULE: usize = 64;
/// Bytes before and after each slot that nobody may write.
pub(super) const CANARY: usize = 16;
/// What peers register takes at most this part of the arena, over all of them…
const FOR_PEERS: usize = 2;
/// …and one uid at most this part of that.
const FOR_ONE_PEER: usize = 4;

/// A range that was taken: a canary, room for a secret, a canary. Not `Clone`: who has it owns
/// the bytes.
#[derive(Debug)]
pub(super) struct Extent {
    offset: usize,
    len: usize,
    owner: Owner,
}

/// Whose a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// The operator's credentials and the broker's keys.
    Broker,
    /// What a peer of this uid registered.
    Peer(Uid),
}

/// How full the arena is, in bytes. Slots count with their canaries and what rounds them up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// All that slots can take: `own`, `registered` and `free` together.
    pub capacity: usize,
    /// Taken by the operator's credentials and the broker's keys.
    pub own: usize,
    /// Taken by what peers registered.
    pub registered: usize,
    /// Taken by nothing.
    pub free: usize,
    /// The longest secret that still has a place in one piece.
    pub largest_free: usize,
}

impl Extent {
    pub(super) fn offset(&self) -> usize {
        self.offset
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn owner(&self) -> Owner {
        self.owner
    }

    /// Where the secret begins.
    pub(super) fn start(&self) -> usize {
        self.offset + CANARY
    }

    /// How long the secret can be.
    pub(super) fn room(&self) -> usize {
        self.len - 2 * CANARY
    }
}

/// The ranges: free ones by offset, neighbours always merged; taken ones by offset; and what
/// each owner has.
#[derive(Debug)]
pub(super) struct Extents {
    capacity: usize,
    free: BTreeMap<usize, usize>,
    taken: BTreeMap<usize, usize>,
    own: usize,
    registered: usize,
    by_uid: HashMap<Uid, usize>,
}

impl Extents {
    /// The granules of `start..end`.
    pub(super) fn new(start: usize, end: usize) -> Self {
        let start = start.next_multiple_of(GRANULE);
        let capacity = end.saturating_sub(start);
        let capacity = capacity - capacity % GRANULE;
        Self {
            capacity,
            free: BTreeMap::from([(start, capacity)]),
            taken: BTreeMap::new(),
            own: 0,
            registered: 0,
            by_uid: HashMap::new(),
        }
    }

    /// A range with room for `len` bytes. The broker's own are laid from the bottom up, those of
    /// peers from the top down: what comes and goes with peers leaves no holes among what stays.
    pub(super) fn take(&mut self, len: usize, owner: Owner) -> Option<Extent> {
        let len = footprint(len)?;
        let offset = match owner {
            Owner::Broker => self.take_low(len)?,
            Owner::Peer(uid) => {
                let of_uid = self.by_uid.get(&uid).copied().unwrap_or(0);
                if self.registered + len > self.for_peers() || of_uid + len > self.for_one_peer() {
                    return None;
                }
                self.take_high(len)?
            }
        };
        Some(self.note(offset, len, owner))
    }

    /// A range for `len` bytes of what `of` holds, which this copy is to replace: of the same
    /// owner, whose part of the arena lends room for both for as long as they are two.
    pub(super) fn take_for_copy(&mut self, of: &Extent, len: usize) -> Option<Extent> {
        let len = footprint(len).filter(|len| *len <= of.len)?;
        let offset = match of.owner {
            Owner::Broker => self.take_low(len)?,
            Owner::Peer(_) => self.take_high(len)?,
        };
        Some(self.note(offset, len, of.owner))
    }

    fn note(&mut self, offset: usize, len: usize, owner: Owner) -> Extent {
        self.taken.insert(offset, len);
        match owner {
            Owner::Broker => self.own += len,
            Owner::Peer(uid) => {
                self.registered += len;
                *self.by_uid.entry(uid).or_default() += len;
            }
        }
        Extent { offset, len, owner }
    }

    pub(super) fn give_back(&mut self, extent: &Extent) {
        let Extent { mut offset, mut len, owner } = *extent;
        match owner {
            Owner::Broker => self.own -= len,
            Owner::Peer(uid) => {
                self.registered -= len;
                if let Some(of_uid) = self.by_uid.get_mut(&uid) {
                    *of_uid -= len;
                    if *of_uid == 0 {
                        self.by_uid.remove(&uid);
                    }
                }
            }
        }
        self.taken.remove(&offset);
        if let Some(after) = self.free.remove(&(offset + len)) {
            len += after;
        }
        if let Some((&before, &room)) = self.free.range(..offset).next_back()
            && before + room == offset
        {
            self.free.remove(&before);
            offset = before;
            len += room;
        }
        self.free.insert(offset, len);
    }

    /// Offset and length of every range that is taken.
    pub(super) fn taken(&self) -> impl Iterator<Item = (usize, usize)> {
        self.taken.iter().map(|(offset, len)| (*offset, *len))
    }

    pub(super) fn usage(&self) -> Usage {
        let largest = self.free.values().max().copied().unwrap_or(0);
        Usage {
            capacity: self.capacity,
            own: self.own,
            registered: self.registered,
            free: self.capacity - self.own - self.registered,
            largest_free: largest.saturating_sub(2 * CANARY),
        }
    }

    /// What all peers together may have.
    fn for_peers(&self) -> usize {
        self.capacity / FOR_PEERS
    }

    /// What one uid may have: its part, but where that is small, one secret of any length.
    fn for_one_peer(&self) -> usize {
        let longest = footprint(MAX_SECRET).unwrap_or(usize::MAX);
        (self.for_peers() / FOR_ONE_PEER).max(longest)
    }

    /// First fit: few secrets of few sizes do not fragment.
    fn take_low(&mut self, len: usize) -> Option<usize> {
        let (&offset, &room) = self.free.iter().find(|(_, room)| **room >= len)?;
        self.free.remove(&offset);
        if room > len {
            self.free.insert(offset + len, room - len);
        }
        Some(offset)
    }

    /// Last fit.
    fn take_high(&mut self, len: usize) -> Option<usize> {
        let (&offset, &room) = self.free.iter().rev().find(|(_, room)| **room >= len)?;
        self.free.remove(&offset);
        if room > len {
            self.free.insert(offset, room - len);
        }
        Some(offset + room - len)
    }
}

/// What a secret of `len` bytes takes.
fn footprint(len: usize) -> Option<usize> {
    len.max(1).checked_add(2 * CANARY)?.checked_next_multiple_of(GRANULE)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FIRST: usize = 16;

    fn peer(uid: u32) -> Owner {
        Owner::Peer(Uid::from_raw(uid))
    }

    #[derive(Clone, Debug)]
    enum Step {
        Take(usize, Owner),
        GiveBack(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let len = prop_oneof![1_usize..200, 1_usize..20_000];
        let owner = prop_oneof![Just(Owner::Broker), Just(peer(1)), Just(peer(2))];
        let step = prop_oneof![
            3 => (len, owner).prop_map(|(len, owner)| Step::Take(len, owner)),
            2 => any::<usize>().prop_map(Step::GiveBack),
        ];
        proptest::collection::vec(step, 1..200)
    }

    /// What the bookkeeping means: who has each granule.
    struct Model {
        granules: Vec<Option<Owner>>,
    }

    impl Model {
        fn bytes(&self, which: impl Fn(Option<Owner>) -> bool) -> usize {
            self.granules.iter().filter(|owner| which(**owner)).count() * GRANULE
        }

        fn mark(&mut self, extent: &Extent, before: Option<Owner>, after: Option<Owner>) {
            let first = (extent.offset() - GRANULE) / GRANULE;
            for granule in &mut self.granules[first..first + extent.len() / GRANULE] {
                assert_eq!(*granule, before, "{extent:?} lies on what somebody else has");
                *granule = after;
            }
        }

        fn longest_free(&self) -> usize {
            let runs = self.granules.split(Option::is_some).map(<[_]>::len);
            runs.max().unwrap_or(0) * GRANULE
        }
    }

    proptest! {
        /// Against a map of granules: nothing is handed out twice, what is refused was over a
        /// limit or had no place, the sums are right at every step, and all comes back.
        #[test]
        fn the_books_are_those_of_a_map_of_granules(steps in steps(), pages in 4_usize..32) {
            let capacity = pages * 4096 - GRANULE;
            let mut extents = Extents::new(FIRST, pages * 4096);
            let mut model = Model { granules: vec![None; capacity / GRANULE] };
            let mut held: Vec<Extent> = Vec::new();
            for step in steps {
                match step {
                    Step::Take(len, owner) => match extents.take(len, owner) {
                        Some(extent) => {
                            prop_assert!(extent.room() >= len);
                            prop_assert!(extent.room() < len + GRANULE);
                            model.mark(&extent, None, Some(owner));
                            held.push(extent);
                        }
                        None => {
                            let needs = footprint(len).unwrap();
                            let of_uid = model.bytes(|found| found == Some(owner));
                            let peers = model
                                .bytes(|found| matches!(found, Some(Owner::Peer(_))));
                            let over = owner != Owner::Broker
                                && (peers + needs > capacity / 2
                                    || of_uid + needs
                                        > (capacity / 8).max(footprint(MAX_SECRET).unwrap()));
                            prop_assert!(over || model.longest_free() < needs);
                        }
                    },
                    Step::GiveBack(pick) if !held.is_empty() => {
                        let extent = held.swap_remove(pick % held.len());
                        model.mark(&extent, Some(extent.owner), None);
                        extents.give_back(&extent);
                    }
                    Step::GiveBack(_) => {}
                }
                let usage = extents.usage();
                prop_assert_eq!(usage.capacity, capacity);
                prop_assert_eq!(usage.own, model.bytes(|found| found == Some(Owner::Broker)));
                prop_assert_eq!(
                    usage.registered,
                    model.bytes(|found| matches!(found, Some(Owner::Peer(_))))
                );
                prop_assert_eq!(usage.free, model.bytes(|found| found.is_none()));
                prop_assert_eq!(
                    usage.largest_free,
                    model.longest_free().saturating_sub(2 * CANARY)
                );
                prop_assert!(usage.registered <= capacity / 2);
                prop_assert_eq!(extents.taken().count(), held.len());
            }
            for extent in &held {
                extents.give_back(extent);
            }
            prop_assert_eq!(extents.free, BTreeMap::from([(GRANULE, capacity)]));
            prop_assert!(extents.by_uid.is_empty() && extents.taken.is_empty());
        }
    }

    #[test]
    fn a_length_that_overflows_is_refused() {
        assert!(Extents::new(FIRST, 4096).take(usize::MAX, Owner::Broker).is_none());
        assert!(Extents::new(FIRST, 4096).take(usize::MAX - 2 * CANARY, peer(1)).is_none());
    }

    #[test]
    fn peers_cannot_crowd_out_the_broker_or_each_other() {
        let mut extents = Extents::new(FIRST, 1 << 20);
        let fill = |extents: &mut Extents, owner| {
            std::iter::from_fn(|| extents.take(1000, owner)).map(|extent| extent.len()).sum()
        };
        let alice: usize = fill(&mut extents, peer(1));
        assert!(alice > (1 << 17) - 2048 && alice <= 1 << 17, "a quarter of a half: {alice}");
        let bob: usize = fill(&mut extents, peer(2));
        assert_eq!(bob, alice, "the first left the second what is its own");
        let others: usize = (3..20).map(|uid| fill(&mut extents, peer(uid))).sum();
        assert!(alice + bob + others <= 1 << 19, "all peers have half");
        let own: usize = fill(&mut extents, Owner::Broker);
        assert!(own > (1 << 19) - 2048, "the other half is the broker's: {own}");
    }

    #[test]
    fn a_small_arena_still_takes_one_long_secret_of_a_peer() {
        // What RLIMIT_MEMLOCK = 64 KiB leaves.
        let mut extents = Extents::new(FIRST, 48 * 1024);
        assert!(extents.take(MAX_SECRET, peer(1)).is_some());
        assert!(extents.take(MAX_SECRET, peer(1)).is_none());
        assert!(extents.take(MAX_SECRET, Owner::Broker).is_some(), "the broker has its own half");
    }
}
