//! The proof harness of credbroker: real processes under real uids, a real PostgreSQL, and
//! instruments that look for what must not be there.
//!
//! It is not a mock of anything. A test starts the true `credbrokerd`, talks to it as the
//! kernel lets an unprivileged process talk to it, and looks at the outcome from outside: in
//! `pg_stat_activity`, in the audit file, in `/proc`.
//!
//! | module | what it gives |
//! | --- | --- |
//! | [`postgres`] | a private PostgreSQL with SCRAM and TLS, shared by all tests of a run; a role, a database and a canary password for each test |
//! | [`broker`] | a configuration builder and a running `credbrokerd` |
//! | [`worker`] | an MCP client on the standard streams of the real SQL worker |
//! | [`identity`] | who acts: commands and sockets under another uid |
//! | [`process`] | child processes that end with the test and whose output is kept |
//! | [`handles`], [`admin`] | the gRPC services, as any uid |
//! | [`crowd`] | many sessions at once, at work and idle, and when each of them dies |
//! | [`packet`] | the packet sockets, as any uid, with any descriptors |
//! | [`frontend`] | a PostgreSQL frontend that can also lie |
//! | [`proxy`] | a hand on the wire between broker and PostgreSQL: hold a login at any step |
//! | [`rogue`] | scripted servers that lie, stall and flood, and a record of what the broker sent them |
//! | [`canary`], [`memory`] | secrets in every form they could hide in, and the search for them |
//! | [`audit`] | the audit file, read as a consumer would |
//! | [`mod@bench`] | what is measured, against what, and the report |
//! | [`binaries`], [`shared`], [`wait`] | where the programs are, what tests share, waiting without sleeping |
//!
//! As root, broker, worker, client and attacker are four uids. Without root they are all one,
//! the broker runs with `allow_own_uid`, and a test that needs the boundary says that it
//! cannot prove it ([`identity::several`]).
//!
//! ```
//! use credbroker_e2e::canary::Canary;
//!
//! let canary = Canary::random();
//! let haystack = format!("user:{}", canary.reveal());
//! assert!(canary.patterns().iter().any(|p| p.is_in(haystack.as_bytes())));
//! assert!(!format!("{canary:?}").contains(canary.reveal()));
//! ```
#![allow(
    clippy::panic,
    clippy::indexing_slicing,
    clippy::missing_errors_doc,
    reason = "a test library: what goes wrong must fail the test, loudly and at once"
)]

pub mod admin;
pub mod audit;
pub mod bench;
pub mod binaries;
pub mod broker;
pub mod canary;
pub mod crowd;
pub mod front;
pub mod frontend;
pub mod handles;
pub mod holder;
pub mod identity;
pub mod memory;
pub mod middleman;
pub mod packet;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod rogue;
pub mod shared;
pub mod wait;
pub mod worker;
