//! The broker behind the client library.
//!
//! The connection is made at the first use and again after a failure, so the worker starts,
//! and lists its tools, before the broker does.

use std::path::PathBuf;
use std::time::Duration;

use credbroker_client::{
    Client, Error, Handle, IssueRequest, KeepAlive, PacketClient, Reason, RegisterRequest, Token,
};
use futures_util::future::BoxFuture;
use tokio::sync::OnceCell;

use super::{Answer, Broker, Connection, Destination, Door, HandleInfo, Held, Issued, Login};
use crate::error::{Code, Failure};

/// The type of the connections that the worker speaks to.
const KIND: &str = "postgresql";
/// For operators, in the audit log and in lists of handles.
const PURPOSE: &str = "sql-worker";
/// More bytes than any name has. The broker would not read a message with a much longer one.
const MAX_NAME: usize = 256;

/// A broker that is reached over its socket.
#[derive(Debug)]
pub struct Remote {
    runtime_dir: Option<PathBuf>,
    client: OnceCell<Client>,
    /// Secrets go by packet only.
    packets: OnceCell<PacketClient>,
}

impl Remote {
    /// Will connect in `runtime_dir`, or where the client library finds the broker.
    #[must_use]
    pub fn new(runtime_dir: Option<PathBuf>) -> Self {
        Self { runtime_dir, client: OnceCell::new(), packets: OnceCell::new() }
    }

    async fn client(&self) -> Result<&Client, Failure> {
        let connect = || async {
            let builder = Client::builder();
            match &self.runtime_dir {
                Some(directory) => builder.runtime_dir(directory).connect().await,
                None => builder.connect().await,
            }
        };
        self.client.get_or_try_init(connect).await.map_err(|error| failure(&error))
    }

    async fn packets(&self) -> Result<&PacketClient, Failure> {
        let connect = || async {
            let builder = Client::builder();
            match &self.runtime_dir {
                Some(directory) => builder.runtime_dir(directory).connect_packet().await,
                None => builder.connect_packet().await,
            }
        };
        self.packets.get_or_try_init(connect).await.map_err(|error| failure(&error))
    }

    async fn bring(
        &self,
        connection: &str,
        login: Login,
        change: impl FnOnce(RegisterRequest) -> RegisterRequest,
    ) -> Result<Handle, Failure> {
        let request = RegisterRequest::new(named(connection)?, login.username).purpose(PURPOSE);
        let handle = self.packets().await?.register(change(request), login.secret).await;
        handle.map_err(|error| failure(&error))
    }
}

impl Broker for Remote {
    fn connections(&self) -> Answer<'_, Vec<Connection>> {
        Box::pin(async {
            let list = self.client().await?.list_connections().await;
            let list = list.map_err(|error| failure(&error))?;
            Ok(list
                .into_iter()
                .map(|connection| Connection {
                    name: connection.name,
                    kind: connection.kind,
                    target: connection.target,
                    may: connection.may,
                    has_credential: connection.has_credential,
                    door: connection.endpoint.map(|endpoint| Door {
                        directory: endpoint.door,
                        database: endpoint.database,
                        user: endpoint.user,
                    }),
                })
                .collect())
        })
    }

    fn issue<'a>(&'a self, connection: &'a str, subject: &'a str) -> Answer<'a, Issued> {
        Box::pin(async move {
            let request = IssueRequest::new(named(connection)?).subject(subject).purpose(PURPOSE);
            let handle = self.client().await?.issue(request).await;
            keep(handle.map_err(|error| failure(&error))?)
        })
    }

    fn register<'a>(
        &'a self,
        connection: &'a str,
        login: Login,
        subject: &'a str,
    ) -> Answer<'a, Issued> {
        Box::pin(async move {
            keep(self.bring(connection, login, |request| request.subject(subject)).await?)
        })
    }

    fn register_token<'a>(
        &'a self,
        connection: &'a str,
        login: Login,
        subject: &'a str,
        ttl: Duration,
    ) -> Answer<'a, (Token, HandleInfo)> {
        Box::pin(async move {
            let change = |request: RegisterRequest| request.subject(subject).ttl(ttl);
            let handle = self.bring(connection, login, change).await?;
            let info = public(handle.info());
            Ok((handle.into_token(), info))
        })
    }

    fn issue_token<'a>(
        &'a self,
        connection: &'a str,
        subject: &'a str,
        ttl: Duration,
    ) -> Answer<'a, (Token, HandleInfo)> {
        Box::pin(async move {
            let request = IssueRequest::new(named(connection)?).subject(subject).purpose(PURPOSE);
            let handle = self.client().await?.issue(request.ttl(ttl)).await;
            let handle = handle.map_err(|error| failure(&error))?;
            let info = public(handle.info());
            Ok((handle.into_token(), info))
        })
    }

    fn describe<'a>(&'a self, token: &'a Token) -> Answer<'a, HandleInfo> {
        Box::pin(async move {
            let info = self.client().await?.describe(token).await;
            info.map(public).map_err(|error| failure(&error))
        })
    }

    fn resolve<'a>(&'a self, destination: &'a Destination) -> Answer<'a, String> {
        Box::pin(async move {
            let mut asked = credbroker_client::Destination::new(&destination.host)
                .kind(KIND)
                .database(&destination.database);
            if let Some(port) = destination.port {
                asked = asked.port(port);
            }
            let name = self.client().await?.resolve(asked).await;
            name.map_err(|error| failure(&error))
        })
    }

    fn revoke<'a>(&'a self, token: &'a Token) -> Answer<'a, ()> {
        Box::pin(async move {
            let cut = self.client().await?.revoke_token(token).await;
            cut.map(|_sessions| ()).map_err(|error| failure(&error))
        })
    }
}

/// Dropped in this order: renewal ends before the handle does.
#[derive(Debug)]
struct Kept {
    keep_alive: KeepAlive,
    handle: Handle,
}

impl Held for Kept {
    fn revoke(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            let Self { keep_alive, handle } = *self;
            drop(keep_alive);
            // A handle that cannot be revoked dies at its expiry.
            let _ = handle.revoke().await;
        })
    }
}

/// Renews a handle for as long as the worker has it.
fn keep(handle: Handle) -> Result<Issued, Failure> {
    let endpoint = handle.endpoint();
    let door = Door {
        directory: endpoint.door.clone(),
        database: endpoint.database.clone(),
        user: endpoint.user.clone(),
    };
    let token = Token::parse(handle.token().expose()).map_err(|error| failure(&error))?;
    let keep_alive = handle.keep_alive();
    Ok(Issued { held: Box::new(Kept { keep_alive, handle }), token, door })
}

/// A name that may be one. Another gets the answer of one that nobody has.
fn named(connection: &str) -> Result<&str, Failure> {
    if connection.len() > MAX_NAME {
        return Err(refused(Reason::AccessDenied, None));
    }
    Ok(connection)
}

fn public(info: credbroker_client::HandleInfo) -> HandleInfo {
    HandleInfo {
        id: info.id,
        connection: info.connection,
        subject: info.subject,
        expires: info.expires,
    }
}

/// The broker's words are not passed on: fixed texts are what the model gets.
fn failure(error: &Error) -> Failure {
    if let Error::Refused { reason, reference, .. } = error {
        return refused(*reason, *reference);
    }
    if matches!(error, Error::InvalidToken) {
        return Failure::handle_invalid();
    }
    tracing::warn!(%error, "the broker could not be asked");
    Failure::new(Code::BrokerUnreachable, "the broker cannot be reached")
        .with_hint("a person must see that credbrokerd runs and that its sockets are mounted here")
}

fn refused(reason: Reason, reference: Option<u64>) -> Failure {
    let (code, message) = match reason {
        Reason::HandleInvalid | Reason::HandleExpired => return Failure::handle_invalid(),
        Reason::AccessDenied => {
            let failure = Failure::new(Code::AccessDenied, "access denied, or no such connection");
            return failure.with_reference(reference).with_hint(
                "list_connections shows what may be used; an operator can explain the ref",
            );
        }
        Reason::InvalidRequest => (Code::InvalidRequest, "the broker refused the request"),
        Reason::LimitReached => (Code::LimitReached, "too many requests; try again later"),
        Reason::Suspended => (Code::Suspended, "an operator has suspended the connection"),
        Reason::Draining => (Code::Draining, "the broker is shutting down"),
        Reason::UpstreamUnreachable => (Code::UpstreamUnreachable, "the database does not answer"),
        Reason::UpstreamRefused => {
            (Code::UpstreamRefused, "the database refused the broker's credential")
        }
        Reason::UpstreamUntrusted => {
            (Code::UpstreamUntrusted, "the database failed to prove who it is")
        }
        Reason::AuditUnavailable => {
            (Code::AuditUnavailable, "the broker cannot write its audit log and grants nothing")
        }
        Reason::HandoffUnsupported | Reason::Unsupported => {
            (Code::Unsupported, "the broker does not offer this")
        }
        Reason::Unspecified | Reason::Internal => (Code::Internal, "a fault of the broker"),
    };
    Failure::new(code, message).with_reference(reference)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(reason: Reason, reference: u64) -> Error {
        let message = "denied cbh_secret db.internal".to_owned();
        Error::Refused { reason, message, reference: Some(reference), retry_after: None }
    }

    #[test]
    fn every_dead_handle_has_the_same_answer() {
        let answer = Failure::handle_invalid();
        assert_eq!(failure(&refusal(Reason::HandleInvalid, 1)), answer);
        assert_eq!(failure(&refusal(Reason::HandleExpired, 2)), answer);
        assert_eq!(failure(&Error::InvalidToken), answer);
    }

    #[tokio::test]
    async fn a_name_that_is_too_long_is_nobodys() {
        let nowhere = Remote::new(Some(PathBuf::from("/nonexistent")));
        for (length, code) in [(63, Code::BrokerUnreachable), (70_000, Code::AccessDenied)] {
            let failed = nowhere.issue(&"n".repeat(length), "stdio:uid=0").await.unwrap_err();
            assert_eq!(failed.code(), code);
        }
    }

    #[test]
    fn the_brokers_words_stay_outside() {
        let failure = failure(&refusal(Reason::AccessDenied, 81));
        let text = failure.to_json().to_string();
        assert!(text.contains("ref=81") && !text.contains("internal"), "{text}");
    }
}
