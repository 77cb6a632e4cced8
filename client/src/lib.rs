//! Client library of credbroker: handles to connections whose credentials one never sees.
//!
//! A [`Client`] speaks gRPC with the broker over its Unix socket, after it has checked who
//! serves that socket. [`Client::issue`] gives a [`Handle`], a short-lived right to use one
//! connection through the broker's door; the handle can renew itself and is revoked when it
//! is dropped. No part of this library ever holds a credential.
//!
//! What it is not: a database driver. A handle says where the door is and what to log in
//! with; any client of that protocol does the rest.
//!
//! | module | what it has |
//! | --- | --- |
//! | `builder` | where the broker is, whom to accept as its server, timeouts |
//! | `connector` | connects, and checks the uid that the kernel gives for the server |
//! | `client` | the requests |
//! | `request`, `info` | what is asked, what is answered |
//! | `handle`, `keep_alive` | the owned handle: renewal, revocation at the end |
//! | `token` | the bearer form, kept out of every text |
//! | [`audit`] | verifying an audit log offline (feature `audit`) |
//! | `error` | one enum; what the broker refused and why |
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use credbroker_client::{Client, IssueRequest};
//!
//! # async fn example() -> Result<(), credbroker_client::Error> {
//! let client = Client::connect().await?;
//! let request = IssueRequest::new("main_db").ttl(Duration::from_secs(600)).purpose("report");
//! let handle = client.issue(request).await?;
//! let keep_alive = handle.keep_alive();
//!
//! // Any Postgres client takes it: psql, sqlx, tokio-postgres, …
//! let url = handle.url();
//! # drop(url);
//!
//! drop(keep_alive);
//! let sessions_cut = handle.revoke().await?; // or drop it: revoked in the background
//! client.close().await;
//! # let _ = sessions_cut;
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

#[cfg(feature = "audit")]
pub mod audit;
mod builder;
mod client;
mod connector;
mod error;
mod handle;
mod info;
mod keep_alive;
mod request;
mod token;

pub use builder::ClientBuilder;
pub use client::Client;
pub use credbroker_proto::v1::Reason;
pub use error::Error;
pub use handle::Handle;
pub use info::{ConnectionInfo, EndpointInfo, HandleInfo, HandleList, WhoAmI};
pub use keep_alive::{KeepAlive, RenewalEnd};
pub use request::{Bind, IssueRequest};
pub use token::Token;
