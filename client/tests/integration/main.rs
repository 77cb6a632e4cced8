//! The library and the command line against a scripted broker on a Unix socket.
//!
//! The broker here keeps a log of what was asked of it; tests wait for an entry of that log,
//! or for a line of output, never for a time.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::wildcard_enum_match_arm,
    reason = "clippy.toml allows them in #[test] functions, and the helpers here are as much tests"
)]

mod admin;
mod broker;
mod client;
mod commands;
mod entry;
mod exec;
mod operator;
mod packet;
mod packets;
mod put;
mod terminal;
