//! What the worker needs of a broker.
//!
//! [`Broker`] is the seam: [`client`] is the only user of the client library, and tests put
//! doors of their own behind it.

pub mod client;

use std::fmt::{self, Debug};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;

use crate::error::Failure;

/// What a broker answers, or why not.
pub type Answer<'a, T> = BoxFuture<'a, Result<T, Failure>>;

/// A broker, as far as the worker uses one.
pub trait Broker: Debug + Send + Sync + 'static {
    /// The connections that this process may use, masked.
    fn connections(&self) -> Answer<'_, Vec<Connection>>;
    /// Issues a handle for `connection`, on behalf of `subject`.
    fn issue<'a>(&'a self, connection: &'a str, subject: &'a str) -> Answer<'a, Issued>;
    /// Issues a handle that outlives this process: whoever has the token uses it.
    fn issue_token<'a>(
        &'a self,
        connection: &'a str,
        subject: &'a str,
        ttl: Duration,
    ) -> Answer<'a, (Token, HandleInfo)>;
    /// Issues a handle for `connection`, which has no credential, on a login that the caller
    /// brings; the broker keeps it in its locked memory for as long as the handle lives.
    fn register<'a>(
        &'a self,
        connection: &'a str,
        login: Login,
        subject: &'a str,
    ) -> Answer<'a, Issued>;
    /// As [`register`](Self::register), a handle that outlives this process.
    fn register_token<'a>(
        &'a self,
        connection: &'a str,
        login: Login,
        subject: &'a str,
        ttl: Duration,
    ) -> Answer<'a, (Token, HandleInfo)>;
    /// What a handle is; `HANDLE_INVALID` when it is unknown, expired or revoked.
    fn describe<'a>(&'a self, token: &'a Token) -> Answer<'a, HandleInfo>;
    /// The name of the connection that leads to `destination`, by the broker's configuration;
    /// `ACCESS_DENIED` when there is none that this process may use.
    fn resolve<'a>(&'a self, destination: &'a Destination) -> Answer<'a, String>;

    /// Ends a handle; when this is done its sessions are dead.
    fn revoke<'a>(&'a self, token: &'a Token) -> Answer<'a, ()>;
}

/// A handle that the worker holds itself: kept alive until it is revoked or dropped.
pub trait Held: Debug + Send + Sync + 'static {
    /// Ends the handle; when this is done its sessions are dead.
    fn revoke(self: Box<Self>) -> BoxFuture<'static, ()>;
}

/// The bearer form of a handle; the library's type, which no text shows.
pub use credbroker_client::Token;

/// A password on its way to the broker, in a memfd; the library's type, which no text shows.
pub use credbroker_client::Secret;

/// A user name and a password that a caller brings.
#[derive(Debug)]
pub struct Login {
    /// The database role.
    pub username: String,
    /// Its password.
    pub secret: Secret,
}

/// A new handle, where it is used, and the value that keeps it alive.
#[derive(Debug)]
pub struct Issued {
    /// Renews until it is dropped.
    pub held: Box<dyn Held>,
    /// The bearer form.
    pub token: Token,
    /// Where to use it.
    pub door: Door,
}

/// Where a handle is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Door {
    /// The directory of the door's socket.
    pub directory: PathBuf,
    /// The database name to ask for.
    pub database: String,
    /// The user name to give.
    pub user: String,
}

/// Where a caller wants to go; only ever compared with what the broker has configured.
#[derive(Clone, PartialEq, Eq)]
pub struct Destination {
    /// A name, an address, or the directory of a Unix socket.
    pub host: String,
    /// `None`: PostgreSQL's usual one.
    pub port: Option<u16>,
    /// Name of the database; empty: the connection's own.
    pub database: String,
}

impl Debug for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Destination([REDACTED])")
    }
}

/// What the worker looks at in a handle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandleInfo {
    /// Public identifier.
    pub id: String,
    /// Name of the connection.
    pub connection: String,
    /// For whom it was issued.
    pub subject: String,
    /// When it dies unless renewed.
    pub expires: SystemTime,
}

/// A connection, masked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connection {
    /// Its name.
    pub name: String,
    /// Its type: `postgresql`.
    pub kind: String,
    /// Where it leads, with the secret parts masked at a fixed width.
    pub target: String,
    /// What the worker may do with it.
    pub may: Vec<String>,
    /// Whether the broker holds a credential for it.
    pub has_credential: bool,
    /// Where its door is.
    pub door: Option<Door>,
}
