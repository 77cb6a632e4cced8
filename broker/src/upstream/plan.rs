//! In what order a server is dialled: hosts, addresses, and where the TLS mode leaves a choice,
//! ways to speak.
//!
//! The next one is tried when nobody answered, as libpq does (34.1.1.3), and when a server says
//! that it takes nobody now. One that answers and fails to prove itself ends the dialling:
//! otherwise whoever answers first would choose.

#![forbid(unsafe_code)]

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};
use tracing::debug;

use super::tls::server_name;
use super::{Address, DialError, Distrust, Link, Remote, Secured};
use crate::connection::{Check, Connection, First, Hosts, Negotiation, TcpHost, Tls};

/// For all hosts together, and for the logins to those that refuse; one address has
/// `connect_timeout`, which is no longer.
const DIAL_WITHIN: Duration = Duration::from_secs(60);

/// A connection's hosts, in order, from the one that is to be dialled next.
#[derive(Debug)]
pub(crate) struct Route<'a> {
    connection: &'a Connection,
    /// How many hosts were begun with.
    begun: usize,
    /// Those of the last of them that were not dialled.
    addresses: std::vec::IntoIter<SocketAddr>,
    until: Instant,
}

impl Link {
    /// Dials exactly where an earlier link led.
    pub(crate) async fn dial_again(remote: &Remote) -> Result<Self, DialError> {
        within(remote.timeout, remote.connect()).await
    }
}

pub(super) async fn within<T>(
    limit: Duration,
    dial: impl Future<Output = Result<T, DialError>>,
) -> Result<T, DialError> {
    timeout(limit, dial).await.unwrap_or_else(|_elapsed| Err(too_late()))
}

fn too_late() -> DialError {
    DialError::Unreachable(io::ErrorKind::TimedOut.into())
}

impl<'a> Route<'a> {
    pub(crate) fn to(connection: &'a Connection) -> Self {
        let until = Instant::now() + DIAL_WITHIN;
        Self { connection, begun: 0, addresses: Vec::new().into_iter(), until }
    }

    /// Dials on, until somebody answers.
    pub(crate) async fn dial(&mut self) -> Result<Link, DialError> {
        timeout_at(self.until, self.in_order()).await.unwrap_or_else(|_elapsed| Err(too_late()))
    }

    /// Leaves the host that answered last, with what other addresses it has.
    pub(crate) fn pass_host(&mut self) {
        self.addresses = Vec::new().into_iter();
    }

    async fn in_order(&mut self) -> Result<Link, DialError> {
        let Connection { name, hosts, tls, connect_timeout: timeout, .. } = self.connection;
        let mut last = DialError::Unreachable(io::Error::new(
            io::ErrorKind::NotFound,
            "the name has no address",
        ));
        let mut pass_over = |error: io::Error, what: &dyn std::fmt::Display| {
            debug!(connection = %name, %error, "no server at {what}");
            last = DialError::Unreachable(error);
        };
        match hosts {
            Hosts::Unix { sockets, server } => {
                while let Some(socket) = sockets.get(self.begun) {
                    self.begun += 1;
                    let address = Address::Unix { path: socket.path(), server: *server };
                    let remote = Remote { address, tls: None, timeout: *timeout };
                    match Link::dial_again(&remote).await {
                        Err(DialError::Unreachable(error)) => pass_over(error, &remote),
                        answer => return answer,
                    }
                }
            }
            Hosts::Tcp(hosts) => loop {
                if let Some(host) = self.begun.checked_sub(1).and_then(|last| hosts.get(last)) {
                    let ways = Ways::of(tls, host)?;
                    for address in self.addresses.by_ref() {
                        match ways.dial(&Address::Tcp(address), *timeout).await {
                            Err(DialError::Unreachable(error)) => pass_over(error, host),
                            answer => return answer,
                        }
                    }
                }
                let Some(host) = hosts.get(self.begun) else { break };
                self.begun += 1;
                match within(*timeout, lookup(host)).await {
                    Ok(found) => self.addresses = found.into_iter(),
                    Err(DialError::Unreachable(error)) => pass_over(error, host),
                    Err(untrusted) => return Err(untrusted),
                }
            },
        }
        Err(last)
    }
}

async fn lookup(host: &TcpHost) -> Result<Vec<SocketAddr>, DialError> {
    let found = tokio::net::lookup_host((host.host.as_str(), host.port)).await;
    found.map(Iterator::collect).map_err(DialError::Unreachable)
}

/// How a host may be spoken with: in one way, or in two, the first of which is tried first.
#[derive(Debug)]
enum Ways {
    One(Option<Secured>),
    /// Mode `prefer`.
    TlsElsePlain(Secured),
    /// Mode `allow`.
    PlainElseTls(Secured),
}

impl Ways {
    fn of(tls: &Tls, host: &TcpHost) -> Result<Self, DialError> {
        let secured = |check, config: &Arc<_>, negotiation| {
            // Checked with the configuration.
            let name = server_name(&host.host)
                .map_err(|error| Distrust::other(io::Error::other(error)))?;
            Ok(Secured { check, config: Arc::clone(config), name, negotiation })
        };
        Ok(match tls {
            Tls::Disable => Self::One(None),
            Tls::Required { check, config, negotiation, .. } => Self::One(Some(
                secured(*check, config, *negotiation).map_err(DialError::Untrusted)?,
            )),
            Tls::Optional { first, config } => {
                let secured = secured(Check::Nothing, config, Negotiation::Postgres)
                    .map_err(DialError::Untrusted)?;
                match first {
                    First::Tls => Self::TlsElsePlain(secured),
                    First::Plaintext => Self::PlainElseTls(secured),
                }
            }
        })
    }

    async fn dial(&self, address: &Address, timeout: Duration) -> Result<Link, DialError> {
        let by = |tls: Option<&Secured>| {
            let (address, tls) = (address.clone(), tls.cloned());
            Remote { address, tls, timeout }
        };
        match self {
            Self::One(tls) => Link::dial_again(&by(tls.as_ref())).await,
            Self::PlainElseTls(tls) => {
                let link = Link::dial_again(&by(None)).await?;
                Ok(Link { otherwise: Some(by(Some(tls))), ..link })
            }
            Self::TlsElsePlain(tls) => match Link::dial_again(&by(Some(tls))).await {
                Ok(link) => Ok(Link { otherwise: Some(by(None)), ..link }),
                Err(error) if is_of_tls(&error) => Link::dial_again(&by(None)).await,
                Err(error) => Err(error),
            },
        }
    }
}

/// Whether somebody answered, and TLS is what failed.
fn is_of_tls(error: &DialError) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    match error {
        DialError::Untrusted(_) => true,
        DialError::Unreachable(error) => {
            [BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof].contains(&error.kind())
        }
    }
}
