//! Which parts of the arena are free. The bookkeeping lies outside the arena: nothing that
//! overran a slot could steer it, and the arena holds secrets only.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

/// Slots start at multiples of this many bytes, so that neighbours share no cache line.
const GRANULE: usize = 64;

/// A range that was taken. Not `Clone`: who has it owns the bytes.
#[derive(Debug)]
pub(super) struct Extent {
    offset: usize,
    len: usize,
}

impl Extent {
    pub(super) fn offset(&self) -> usize {
        self.offset
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}

/// The free ranges, by offset; neighbours are always merged.
#[derive(Debug)]
pub(super) struct Extents {
    free: BTreeMap<usize, usize>,
}

impl Extents {
    pub(super) fn new(capacity: usize) -> Self {
        let usable = capacity - capacity % GRANULE;
        Self { free: BTreeMap::from([(0, usable)]) }
    }

    /// First fit: few secrets of few sizes do not fragment.
    pub(super) fn take(&mut self, len: usize) -> Option<Extent> {
        let len = len.max(1).checked_next_multiple_of(GRANULE)?;
        let (&offset, &room) = self.free.iter().find(|(_, room)| **room >= len)?;
        self.free.remove(&offset);
        if room > len {
            self.free.insert(offset + len, room - len);
        }
        Some(Extent { offset, len })
    }

    pub(super) fn give_back(&mut self, extent: &Extent) {
        let Extent { mut offset, mut len } = *extent;
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
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a map of bytes: nothing is handed out twice, and all of it comes back.
        #[test]
        fn extents_never_overlap_and_all_comes_back(
            steps in proptest::collection::vec((any::<bool>(), 1_usize..3000, any::<usize>()), 1..200)
        ) {
            const CAPACITY: usize = 16 * 1024;
            let mut extents = Extents::new(CAPACITY);
            let mut used = vec![false; CAPACITY];
            let mut held: Vec<Extent> = Vec::new();
            for (take, len, pick) in steps {
                if take {
                    if let Some(extent) = extents.take(len) {
                        prop_assert!(extent.len() >= len);
                        for byte in &mut used[extent.offset()..extent.offset() + extent.len()] {
                            prop_assert!(!*byte);
                            *byte = true;
                        }
                        held.push(extent);
                    }
                } else if !held.is_empty() {
                    let extent = held.swap_remove(pick % held.len());
                    used[extent.offset()..extent.offset() + extent.len()].fill(false);
                    extents.give_back(&extent);
                }
            }
            for extent in &held {
                extents.give_back(extent);
            }
            prop_assert_eq!(extents.free, BTreeMap::from([(0, CAPACITY)]));
        }
    }

    #[test]
    fn a_length_that_overflows_is_refused() {
        assert!(Extents::new(4096).take(usize::MAX).is_none());
    }
}
