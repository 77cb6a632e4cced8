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
use hyper_util::rt::TokioIo;
use tokio::runtime;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use crate::connector::Connector;
use crate::request::span;
use crate::{
    ClientBuilder, ConnectionInfo, EndpointInfo, Error, Handle, HandleInfo, HandleList,
    IssueRequest, Token, WhoAmI,
};

/// A Unix socket has no host name, and h2 refuses a path as `:authority`.
const AUTHORITY: &str = "http://localhost";

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
    runtime: runtime::Handle,
    background: TaskTracker,
    closing: CancellationToken,
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
        let connector = Arc::new(connector);
        let dial = tower::service_fn(move |_: tonic::transport::Uri| {
            let connector = Arc::clone(&connector);
            async move { connector.connect().await.map(|stream| TokioIo::new(stream.into_stream())) }
        });
        let endpoint = Endpoint::from_static(AUTHORITY);
        let channel = timeout(limit, endpoint.connect_with_connector(dial))
            .await
            .map_err(|_elapsed| Error::Timeout { after: limit })?
            .map_err(|error| Error::from_transport(&error))?;
        Ok(Self {
            inner: Arc::new(Inner {
                rpc: HandleServiceClient::new(channel),
                runtime_dir,
                timeout: limit,
                runtime: runtime::Handle::current(),
                background: TaskTracker::new(),
                closing: CancellationToken::new(),
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
        self.in_background(async move {
            // If nobody waits any more, this drops the handle, which revokes it.
            let _unwanted = give.send(client.issue_now(request).await);
        });
        // The task only goes without an answer when its runtime is shut down.
        issued.await.unwrap_or(Err(Error::Disconnected))
    }

    async fn issue_now(&self, request: v1::IssueHandleRequest) -> Result<Handle, Error> {
        let mut rpc = self.inner.rpc.clone();
        let issued = self.bounded(rpc.issue_handle(request)).await?;
        let token = Token::parse(&issued.token)
            .map_err(|_invalid| Error::protocol("its token is not one"))?;
        let info = HandleInfo::from_wire(issued.handle)?;
        let endpoint = EndpointInfo::from_wire(issued.endpoint, self.runtime_dir())?;
        Ok(Handle::new(self.clone(), token, info, endpoint))
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
        self.inner.closing.cancel();
        self.inner.background.close();
        self.inner.background.wait().await;
    }

    /// Runs `work`, which must end by itself, on the runtime that the client was made in.
    pub(crate) fn in_background(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.inner.background.spawn_on(work, &self.inner.runtime);
    }

    /// Cancelled when [`Client::close`] is called.
    pub(crate) fn closing(&self) -> CancellationToken {
        self.inner.closing.child_token()
    }

    async fn bounded<T>(
        &self,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Error> {
        let limit = self.inner.timeout;
        match timeout(limit, answer).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(Error::from_status(&status)),
            Err(_elapsed) => Err(Error::Timeout { after: limit }),
        }
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
