//! What the fuzzer calls, one function for each kind of bytes that come from outside. Each takes
//! any bytes and ends the process if one of its promises does not hold; most promise more than
//! that nothing panics. Compiled for tests and with `--cfg fuzzing` only.

#![forbid(unsafe_code)]

pub use crate::audit::fuzzing::audit_line;
pub use crate::config::fuzzing::config;
pub use crate::door::postgres::fuzzing::{backend, startup};
pub use crate::keeper::message::fuzzing::keeper;
pub use crate::packet::fuzzing::packet;
pub use crate::policy::fuzzing::policy;

/// Takes any bytes, and says whether they were what they should be.
pub type Target = fn(&[u8]) -> bool;

/// All of them, by the names of their corpora.
pub const TARGETS: [(&str, Target); 7] = [
    ("packet", packet),
    ("config", config),
    ("policy", policy),
    ("audit_line", audit_line),
    ("keeper", keeper),
    ("startup", startup),
    ("backend", backend),
];

#[cfg(test)]
mod tests;
