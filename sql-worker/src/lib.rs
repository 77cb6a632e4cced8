//! The SQL worker: an unprivileged MCP and gRPC server that runs SQL through the broker's doors.
//!
//! It holds handles, never credentials: what it sends as a password to a door is a handle's
//! token, and the broker logs in to the database. It knows no database host, and listens only
//! when it is told to: on a Unix socket, or on loopback.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`cli`] | arguments → configuration → [`app::App`] → exit code |
//! | [`config`] | the configuration file, parsed into types that cannot be wrong |
//! | [`app`] | the verbs, and whose handle, pool and reference is whose |
//! | [`broker`] | what the worker needs of a broker; the only user of the client library |
//! | [`mcp`] | the MCP edge: one tool, one file; [`mcp::transport`] is how calls come in |
//! | [`rpc`] | the gRPC edge: the same verbs, rows as they come |
//! | [`socket`] | Unix sockets whose clients the kernel names |
//! | [`sql`] | statements, parameters, results; the only user of sqlx |
//! | [`error`] | [`error::Failure`], the one shape in which anything is refused |
//! | [`shutdown`] | signals |
//!
//! ```
//! use credbroker_sql_worker::sql::Script;
//!
//! // `:name` is a parameter, except where PostgreSQL would read something else.
//! let script = Script::parse("select ':a', b::text from t where id = :id");
//! assert_eq!(script.names(), ["id"]);
//! ```
#![forbid(unsafe_code)]

pub mod app;
pub mod broker;
pub mod cli;
pub mod config;
pub mod error;
pub mod mcp;
mod random;
pub mod rpc;
pub mod shutdown;
pub mod socket;
pub mod sql;
