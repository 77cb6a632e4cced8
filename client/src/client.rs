//! The requests.
//!
//! Invariants: every request ends, at the latest after the client's timeout; what runs in
//! the background is counted by one tracker, so that [`Client::close`] can wait for it.

use std::fmt;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use credbroker_proto::v1;
use credbroker_proto::v1::handle_service_client::HandleServiceClient;
use credbroker_proto::v1::revoke_handle_request::Handle as WhichHandle;
use tokio::sync::oneshot;
use tonic::transport::Channel;
use tonic::{Response, Status};

use crate::background::Background;
use crate::connector::Connector;
use crate::handle::Origin;
use crate::request::span;
use crate::{
    ClientBuilder, ConnectionInfo, Destination, Error, Events, Handle, HandleEvent, HandleInfo,
    HandleList, IssueRequest, Token, WhoAmI, channel,
};

/// A connection to the broker; cheap to clone, and all clones share it.
///
/// It connects again by itself, and checks the server again, when the broker was restarted.
/// Handles do not survive a restart of the broker.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    rpc: HandleServiceClient<Channel>,
    runtime_dir: PathBuf,
    timeout: Duration,
    background: Background,
}

impl Client {
    /// How to connect, if not with the defaults.
    pub fn builder() -> ClientBuilder {
        ClientBuilder::default()
    }

    /// Connects with the defaults.
    ///
    /// # Errors
    /// Those of [`ClientBuilder::connect`].
    pub async fn connect() -> Result<Self, Error> {
        Self::builder().connect().await
    }

    pub(crate) async fn open(
        connector: Connector,
        runtime_dir: PathBuf,
        limit: Duration,
    ) -> Result<Self, Error> {
        let channel = channel::open(connector, limit).await?;
        Ok(Self {
            inner: Arc::new(Inner {
                rpc: HandleServiceClient::new(channel),
                runtime_dir,
                timeout: limit,
                background: Background::here(),
            }),
        })
    }

    /// Asks for a handle.
    ///
    /// Dropping the future leaves no handle behind: one that is issued nevertheless is
    /// revoked in the background.
    ///
    /// # Errors
    /// [`Error::Refused`] with the broker's reason, and what any request may meet:
    /// [`Error::Timeout`], [`Error::Disconnected`], [`Error::Connect`],
    /// [`Error::ServerUntrusted`], [`Error::Protocol`].
    pub async fn issue(&self, request: IssueRequest) -> Result<Handle, Error> {
        let request = request.into_wire()?;
        let client = self.clone();
        let (give, issued) = oneshot::channel();
        self.background().run(async move {
            // If nobody waits any more, this drops the handle, which revokes it.
            let _unwanted = give.send(client.issue_now(request).await);
        });
        // The task only goes without an answer when its runtime is shut down.
        issued.await.unwrap_or(Err(Error::Disconnected))
    }

    async fn issue_now(&self, request: v1::IssueHandleRequest) -> Result<Handle, Error> {
        let mut rpc = self.inner.rpc.clone();
        let issued = self.bounded(rpc.issue_handle(request)).await?;
        Handle::from_wire(Origin::Rpc(self.clone()), issued, self.runtime_dir())
    }

    /// Gives a handle `ttl` to live from now; `None` is as long as at its issue. The holder
    /// only.
    ///
    /// # Errors
    /// Those of [`Client::issue`].
    pub async fn renew(&self, token: &Token, ttl: Option<Duration>) -> Result<HandleInfo, Error> {
        let request = v1::RenewHandleRequest {
            token: token.expose().to_owned(),
            ttl: ttl.map(span).transpose()?,
        };
        let mut rpc = self.inner.rpc.clone();
        HandleInfo::from_wire(self.bounded(rpc.renew_handle(request)).await?.handle)
    }

    /// Ends the handle with this token and says how many live sessions were cut. When this
    /// returns, they are dead.
    ///
    /// # Errors
    /// Those of [`Client::issue`].
    pub async fn revoke_token(&self, token: &Token) -> Result<u32, Error> {
        self.revoke(WhichHandle::Token(token.expose().to_owned())).await
    }

    /// [`Client::revoke_token`] by the handle's public identifier.
    ///
    /// # Errors
    /// Those of [`Client::issue`].
    pub async fn revoke_id(&self, id: &str) -> Result<u32, Error> {
        self.revoke(WhichHandle::Id(id.to_owned())).await
    }

    async fn revoke(&self, which: WhichHandle) -> Result<u32, Error> {
        let mut rpc = self.inner.rpc.clone();
        let request = v1::RevokeHandleRequest { handle: Some(which) };
        Ok(self.bounded(rpc.revoke_handle(request)).await?.sessions_cut)
    }

    /// What a handle is now. Its holder or redeemer only.
    ///
    /// # Errors
    /// Those of [`Client::issue`].
    pub async fn describe(&self, token: &Token) -> Result<HandleInfo, Error> {
        let mut rpc = self.inner.rpc.clone();
        let request = v1::DescribeHandleRequest { token: token.expose().to_owned() };
        HandleInfo::from_wire(self.bounded(rpc.describe_handle(request)).await?.handle)
    }

    /// Tells what becomes of a handle, until it is gone. Its holder or redeemer only.
    ///
    /// # Errors
    /// Those of [`Client::issue`].
    pub async fn watch(&self, token: &Token) -> Result<Events<HandleEvent>, Error> {
        let mut rpc = self.inner.rpc.clone();
        let request = v1::WatchHandleRequest { token: token.expose().to_owned() };
        Ok(Events::new(self.bounded(rpc.watch_handle(request)).await?, HandleEvent::from_wire))
    }

    /// The name of the caller's connection to `destination`.
    ///
    /// # Errors
    /// Those of [`Client::issue`]; [`Reason::AccessDenied`](crate::Reason::AccessDenied) for
    /// what is not there as well as for what the caller may not use.
    pub async fn resolve(&self, destination: Destination) -> Result<String, Error> {
        let mut rpc = self.inner.rpc.clone();
        Ok(self.bounded(rpc.resolve_connection(destination.into_wire())).await?.name)
    }

    /// The live handles that the caller holds or may redeem.
    ///
    /// # Errors
    /// Those of [`Client::issue`].
    pub async fn list_handles(&self) -> Result<HandleList, Error> {
        let mut rpc = self.inner.rpc.clone();
        let list = self.bounded(rpc.list_handles(v1::ListHandlesRequest {})).await?;
        let handles = list.handles.into_iter().map(|handle| HandleInfo::from_wire(Some(handle)));
        Ok(HandleList { handles: handles.collect::<Result<_, _>>()?, truncated: list.truncated })
    }

    /// The connections that the caller may use, masked, by name.
    ///
    /// # Errors
    /// Those of [`Client::issue`].
    pub async fn list_connections(&self) -> Result<Vec<ConnectionInfo>, Error> {
        let mut rpc = self.inner.rpc.clone();
        let list = self.bounded(rpc.list_connections(v1::ListConnectionsRequest {})).await?;
        list.connections
            .into_iter()
            .map(|connection| ConnectionInfo::from_wire(connection, self.runtime_dir()))
            .collect()
    }

    /// Whom the broker takes the caller for.
    ///
    /// # Errors
    /// Those of [`Client::issue`].
    pub async fn who_am_i(&self) -> Result<WhoAmI, Error> {
        let mut rpc = self.inner.rpc.clone();
        Ok(self.bounded(rpc.who_am_i(v1::WhoAmIRequest {})).await?.into())
    }

    /// The absolute path of the broker's runtime directory, as this process sees it.
    #[must_use]
    pub fn runtime_dir(&self) -> &Path {
        &self.inner.runtime_dir
    }

    /// Ends all renewal in the background and waits until every dropped handle is revoked, or
    /// the attempt has timed out. For all clones; requests still work afterwards.
    pub async fn close(&self) {
        self.background().close().await;
    }

    pub(crate) fn background(&self) -> &Background {
        &self.inner.background
    }

    async fn bounded<T>(
        &self,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Error> {
        channel::bounded(self.inner.timeout, answer).await
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("runtime_dir", &self.inner.runtime_dir)
            .field("timeout", &self.inner.timeout)
            .finish_non_exhaustive()
    }
}
