//! Secrets in the broker's own environment: copied into the arena, and wiped where they stood
//! once every connection has read its own, so that /proc/PID/environ shows none.

#![forbid(unsafe_code)]

use super::{MAX_SECRET, SourceFault};
use crate::arena::{Arena, Slot};
use crate::sys;

pub(super) fn read(variable: &str, arena: &Arena) -> Result<Slot, SourceFault> {
    let missing = || SourceFault::NoVariable { variable: variable.to_owned() };
    sys::read_env(variable, |value| {
        if value.is_empty() {
            return Err(missing());
        }
        if value.len() > MAX_SECRET {
            return Err(SourceFault::TooLong);
        }
        let mut slot = arena.allocate(value.len())?;
        slot.fill(|place| place.copy_from_slice(value));
        Ok(slot)
    })
    .unwrap_or_else(|| Err(missing()))
}
