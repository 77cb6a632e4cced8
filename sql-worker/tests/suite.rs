//! The worker against a real, private PostgreSQL, with a broker that only hands out doors.
//!
//! The server trusts its socket, so no password is involved; it is started by whoever runs
//! the tests, or as `postgres` when that is root, which PostgreSQL refuses to run as.
#![forbid(unsafe_code)]

#[cfg(test)]
#[path = "suite/broker.rs"]
mod broker;
#[cfg(test)]
#[path = "suite/cluster.rs"]
mod cluster;
#[cfg(test)]
#[path = "suite/guard.rs"]
mod guard;
#[cfg(test)]
#[path = "suite/hostile.rs"]
mod hostile;
#[cfg(test)]
#[path = "suite/leaks.rs"]
mod leaks;
#[cfg(test)]
#[path = "suite/mcp.rs"]
mod mcp;
#[cfg(test)]
#[path = "suite/params.rs"]
mod params;
#[cfg(test)]
#[path = "suite/process.rs"]
mod process;
#[cfg(test)]
#[path = "suite/readonly.rs"]
mod readonly;
#[cfg(test)]
#[path = "suite/statements.rs"]
mod statements;
#[cfg(test)]
#[path = "suite/strangers.rs"]
mod strangers;
#[cfg(test)]
#[path = "suite/tools.rs"]
mod tools;
#[cfg(test)]
#[path = "suite/values.rs"]
mod values;
