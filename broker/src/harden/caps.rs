//! Capabilities: all of them go, from every set.

#![forbid(unsafe_code)]

use std::{fmt, io};

use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, set_capabilities,
};

/// Whether there was anything to drop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dropped {
    /// The process had some.
    Dropped,
    /// It had none.
    None,
}

impl fmt::Display for Dropped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dropped => "dropped",
            Self::None => "none",
        })
    }
}

pub(super) fn drop_all() -> io::Result<Dropped> {
    let had = capabilities(None)?;
    // Absent on kernels without ambient capabilities, where there is nothing to clear.
    let _ = clear_ambient_capability_set();
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    Ok(if had.permitted.is_empty() { Dropped::None } else { Dropped::Dropped })
}
