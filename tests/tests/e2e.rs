//! The promises of credbroker, each proved with real processes, real uids and a real
//! PostgreSQL. One module a subject, one test a promise.
#![allow(
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking, in their helper functions too"
)]

#[path = "e2e/admin.rs"]
mod admin;
#[path = "e2e/audit.rs"]
mod audit;
#[path = "e2e/binding.rs"]
mod binding;
#[path = "e2e/cancel.rs"]
mod cancel;
#[path = "e2e/client_certificate.rs"]
mod client_certificate;
#[path = "e2e/config.rs"]
mod config;
#[path = "e2e/deploy.rs"]
mod deploy;
#[path = "e2e/direct.rs"]
mod direct;
#[path = "e2e/entry.rs"]
mod entry;
#[path = "e2e/handles.rs"]
mod handles;
#[path = "e2e/handoff.rs"]
mod handoff;
#[path = "e2e/harness.rs"]
mod harness;
#[path = "e2e/hostile.rs"]
mod hostile;
#[path = "e2e/hosts.rs"]
mod hosts;
#[path = "e2e/inline_secrets.rs"]
mod inline_secrets;
#[path = "e2e/lifecycle.rs"]
mod lifecycle;
#[path = "e2e/login.rs"]
mod login;
#[path = "e2e/mcp_cancel.rs"]
mod mcp_cancel;
#[path = "e2e/mcp_hygiene.rs"]
mod mcp_hygiene;
#[path = "e2e/mcp_principals.rs"]
mod mcp_principals;
#[path = "e2e/mcp_readonly.rs"]
mod mcp_readonly;
#[path = "e2e/mcp_sharing.rs"]
mod mcp_sharing;
#[path = "e2e/mcp_tools.rs"]
mod mcp_tools;
#[path = "e2e/mcp_transports.rs"]
mod mcp_transports;
#[path = "e2e/memory.rs"]
mod memory;
#[path = "e2e/metrics.rs"]
mod metrics;
#[path = "e2e/packet.rs"]
mod packet;
#[path = "e2e/peers.rs"]
mod peers;
#[path = "e2e/reload.rs"]
mod reload;
#[path = "e2e/revocation.rs"]
mod revocation;
#[path = "e2e/rogue.rs"]
mod rogue;
#[path = "e2e/rpc.rs"]
mod rpc;
#[path = "e2e/secrecy.rs"]
mod secrecy;
#[path = "e2e/secrets.rs"]
mod secrets;
#[path = "e2e/sources.rs"]
mod sources;
#[path = "e2e/spares.rs"]
mod spares;
#[path = "e2e/sql_rpc.rs"]
mod sql_rpc;
#[path = "e2e/tampering.rs"]
mod tampering;
#[path = "e2e/upstream.rs"]
mod upstream;
#[path = "e2e/whole_path.rs"]
mod whole_path;
#[path = "e2e/worker_secrecy.rs"]
mod worker_secrecy;
