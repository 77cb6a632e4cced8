//! credbrokerd: a sidecar that holds database credentials in locked memory, knows its callers
//! from the kernel, and logs in on their behalf. They use a credential through a short-lived
//! handle and never see it.
//!
//! What it is not: a secret store that hands secrets out, a connection pool that shares server
//! sessions, or a parser of what passes through.
//!
//! # Map
//!
//! | module | what it is |
//! | --- | --- |
//! | [`cli`], [`exit`] | the command line, and how the process ends |
//! | `app` | the composition root: configuration, hardening, sockets, serving, draining |
//! | [`config`] | what is written, parsed into what cannot be wrong |
//! | `harden` | what the process gives up before it serves |
//! | [`peer`] | who is calling: made by accept, and by nothing else |
//! | [`policy`] | who may do what: pure, deny by default |
//! | [`arena`] | the locked memory |
//! | `keeper` | the small process that runs programs that print secrets |
//! | `source`, `credential` | where secrets come from, and where they stay |
//! | `handle`, `session` | rights, and what is open under them |
//! | `audit` | written before anything is granted |
//! | `core` | the verbs, where identity, policy and audit meet |
//! | `rpc`, `packet`, `door` | the edges: gRPC, packets with descriptors, the Postgres protocol |
//! | `upstream` | the way to the database |
//! | `metrics` | counters, and the socket they are read from |
//!
//! # How a grant comes about
//!
//! Each step takes what only the step before can make, so that none can be left out: `Peer`
//! (accept) → `Grant` (policy) → `Audited` (audit log) → the effect. For a session: `Opening`,
//! which alone lends the credential → `Permit`, which only a commit that no revocation has
//! overtaken makes, and without which no client is told that it is in.
//!
//! ```
//! use credbroker_broker::policy::Policy;
//!
//! // A policy without grants: everybody is denied everything, and nothing is an operator.
//! let policy = Policy::default();
//! assert!(format!("{policy:?}").contains("rules: []"));
//! ```

/// As in the program: tests that search memory find what it would leave.
#[cfg(test)]
#[global_allocator]
static ALLOCATOR: credbroker_zeroing::ZeroOnFree = credbroker_zeroing::ZeroOnFree;

mod app;
pub mod arena;
mod audit;
pub mod cli;
pub mod config;
pub mod connection;
mod core;
mod credential;
mod door;
pub mod exit;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod handle;
mod harden;
mod health;
#[cfg(test)]
mod isolated;
mod keeper;
mod lobby;
mod metrics;
mod notify;
mod packet;
pub mod peer;
pub mod policy;
mod posture;
mod rpc;
mod session;
mod shutdown;
mod socket;
mod source;
mod sys;
mod trusted;
mod upstream;

pub use app::main;
