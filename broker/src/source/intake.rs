//! Reading a descriptor into the arena, bounded, without knowing how much will come.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::AsFd;

use super::MAX_SECRET;
use crate::arena::{Arena, ArenaFull, Slot};

/// One byte more than a secret may have shows that there is more.
const MOST: usize = MAX_SECRET + 1;
const LEAST: usize = 256;

/// A place in the arena that grows with what is read. Most secrets are short, and an arena may
/// be small: none is given the room of the longest from the start.
pub(crate) struct Intake {
    arena: Arena,
    slot: Slot,
    len: usize,
}

/// What one read gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    Some,
    End,
    /// The descriptor does not block, and has nothing now.
    NothingYet,
}

/// Reading cannot go on.
#[derive(Debug)]
pub(crate) enum IntakeFault {
    TooLong,
    ArenaFull(ArenaFull),
    Io(io::Error),
}

impl Intake {
    pub(crate) fn new(arena: &Arena, expected: usize) -> Result<Self, ArenaFull> {
        let slot = arena.allocate(expected.clamp(LEAST, MOST))?;
        Ok(Self { arena: arena.clone(), slot, len: 0 })
    }

    /// Whether nothing was read yet.
    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// One read(2), straight into the arena.
    pub(crate) fn take_from(&mut self, from: impl AsFd) -> Result<Taken, IntakeFault> {
        if self.len == self.slot.len() {
            self.grow()?;
        }
        let len = self.len;
        let read = self.slot.fill(|bytes| match bytes.get_mut(len..) {
            Some(rest) => rustix::io::retry_on_intr(|| rustix::io::read(&from, &mut *rest)),
            None => Ok(0),
        });
        match read {
            Ok(0) => Ok(Taken::End),
            Ok(count) if len + count > MAX_SECRET => Err(IntakeFault::TooLong),
            Ok(count) => {
                self.len += count;
                Ok(Taken::Some)
            }
            Err(rustix::io::Errno::AGAIN) => Ok(Taken::NothingYet),
            Err(errno) => Err(IntakeFault::Io(errno.into())),
        }
    }

    /// What was read.
    pub(crate) fn finish(mut self) -> Slot {
        self.slot.truncate(self.len);
        self.slot
    }

    fn grow(&mut self) -> Result<(), IntakeFault> {
        let more = (self.slot.len() * 4).min(MOST);
        let mut larger = self.arena.allocate(more).map_err(IntakeFault::ArenaFull)?;
        self.slot.expose(|from| {
            larger.fill(|to| to.iter_mut().zip(from).for_each(|(to, from)| *to = *from));
        });
        self.slot = larger;
        Ok(())
    }
}
