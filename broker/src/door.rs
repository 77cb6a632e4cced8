//! Doors: sockets that speak a destination's own protocol, for clients that know nothing of us.
//!
//! [`login`] is the one flow by which a client comes in; a protocol only words it. [`relay`]
//! carries bytes once it is in. [`wire`] is what every codec is made of.

pub(crate) mod ends;
pub(crate) mod login;
pub(crate) mod postgres;
pub(crate) mod relay;
pub(crate) mod wire;
