//! Client library of credbroker: handles to connections whose credentials one never sees.
//!
//! A [`Client`] speaks gRPC with the broker over its Unix socket, after it has checked who
//! serves that socket. [`Client::issue`] gives a [`Handle`], a short-lived right to use one
//! connection through the broker's door; the handle can renew itself and is revoked when it
//! is dropped. A [`PacketClient`] does the same by single packets, and takes and brings secrets,
//! which it only ever holds in a memfd. [`AdminClient`] and [`AdminPacketClient`] are for
//! operators.
//!
//! What it is not: a database driver. A handle says where the door is and what to log in
//! with; any client of that protocol does the rest.
//!
//! | module | what it has |
//! | --- | --- |
//! | `builder` | where the broker is, whom to accept as its server, timeouts |
//! | `connector` | connects, and checks the uid that the kernel gives for the server |
//! | `channel` | gRPC over what it connected; events as a stream |
//! | `client`, `admin` | the requests of holders and of operators, by gRPC |
//! | `packet` | the requests by packet, in `packet/link` sent and matched with their replies |
//! | `request`, `info`, `admin/info` | what is asked, what is answered |
//! | `secret` | secrets in memfds |
//! | `handoff` | an authenticated socket that drivers can log in on |
//! | `background` | what goes on when nobody waits for it |
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

mod admin;
#[cfg(feature = "audit")]
pub mod audit;
mod background;
mod builder;
mod channel;
mod client;
mod connector;
mod error;
mod handle;
mod handoff;
mod info;
mod keep_alive;
mod packet;
mod request;
mod secret;
mod token;

pub use admin::{
    AdminClient, AdminConnection, AdminHandleList, ArenaUse, AuditHead, AuditLine, Considered,
    CredentialInfo, Cut, Explanation, HandleFilter, KeyRotation, OpenBreaker, PeerDescription,
    Reloaded, Scope, SessionInfo, SessionList, Status, Suspension, Validation,
};
pub use builder::ClientBuilder;
pub use channel::Events;
pub use client::Client;
pub use credbroker_proto::v1::Reason;
pub use error::Error;
pub use handle::Handle;
pub use handoff::{Handoff, OpenRequest, Stream};
pub use info::{ConnectionInfo, EndpointInfo, HandleEvent, HandleInfo, HandleList, WhoAmI};
pub use keep_alive::{KeepAlive, RenewalEnd};
pub use packet::{AdminPacketClient, PacketClient, Stored};
pub use request::{Bind, Destination, IssueRequest, PutRequest, RegisterRequest};
pub use secret::{Revealed, Secret, SecretError};
pub use token::Token;
