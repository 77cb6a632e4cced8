//! The gRPC service as any uid, without the client library: what it does is the broker's.

use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use credbroker_proto::v1::handle_service_client::HandleServiceClient;
use credbroker_proto::v1::{
    DescribeHandleRequest, Handle, HandleEvent, IssueHandleRequest, IssueHandleResponse,
    ListConnectionsRequest, ListHandlesRequest, RenewHandleRequest, ResolveConnectionRequest,
    RevokeHandleRequest, WatchHandleRequest, WhoAmIRequest, WhoAmIResponse, revoke_handle_request,
};
use hyper_util::rt::TokioIo;
use tokio::runtime::{self, Runtime};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_types::StatusExt as _;

use crate::frontend::without_reference;
use crate::identity::Identity;

/// One call may take this long; a revoke waits for its sessions to die.
const CALL_LIMIT: Duration = Duration::from_secs(20);

/// One connection to `broker.sock`, made by one identity.
#[derive(Debug)]
pub struct Handles {
    runtime: Runtime,
    channel: Channel,
}

impl Handles {
    /// Connects to the socket at `path` as `identity`.
    ///
    /// # Errors
    /// When the socket does not take the connection, or no runtime can be built.
    pub fn connect(identity: &Identity, path: &Path) -> io::Result<Self> {
        Self::over(identity.connect(path)?)
    }

    /// Speaks over a connection that somebody has made.
    ///
    /// # Errors
    /// When there is no runtime to be had.
    pub fn over(stream: UnixStream) -> io::Result<Self> {
        let (runtime, channel) = channel(stream)?;
        Ok(Self { runtime, channel })
    }

    /// Issues a handle with the defaults of the broker.
    pub fn issue(&self, connection: &str) -> Result<Issued, Refusal> {
        self.issue_with(IssueHandleRequest { connection: connection.into(), ..Default::default() })
    }

    /// Issues a handle that lives for `ttl`.
    ///
    /// # Panics
    /// When the time cannot be a protobuf duration.
    pub fn issue_for(&self, connection: &str, ttl: Duration) -> Result<Issued, Refusal> {
        let ttl = prost_types::Duration::try_from(ttl).expect("a short time");
        let connection = connection.into();
        self.issue_with(IssueHandleRequest { connection, ttl: Some(ttl), ..Default::default() })
    }

    /// Issues a handle.
    ///
    /// # Panics
    /// When the answer has no handle in it.
    pub fn issue_with(&self, request: IssueHandleRequest) -> Result<Issued, Refusal> {
        let response = self.call(async |mut client| client.issue_handle(request).await)?;
        let IssueHandleResponse { handle, token, .. } = response;
        Ok(Issued { handle: handle.expect("an issued handle is described"), token })
    }

    /// Moves the expiry of a handle.
    ///
    /// # Panics
    /// When the answer has no handle in it.
    pub fn renew(&self, token: &str) -> Result<Handle, Refusal> {
        let request = RenewHandleRequest { token: token.into(), ttl: None };
        let response = self.call(async |mut client| client.renew_handle(request).await)?;
        Ok(response.handle.expect("a renewed handle is described"))
    }

    /// Moves the expiry of a handle to `ttl` from now.
    ///
    /// # Panics
    /// When the time cannot be a protobuf duration.
    pub fn renew_for(&self, token: &str, ttl: Duration) -> Result<(), Refusal> {
        let ttl = prost_types::Duration::try_from(ttl).expect("a short time");
        let request = RenewHandleRequest { token: token.into(), ttl: Some(ttl) };
        self.call(async |mut client| client.renew_handle(request).await).map(drop)
    }

    /// Ends a handle by its token; gives the number of sessions that were cut.
    pub fn revoke(&self, token: &str) -> Result<u32, Refusal> {
        self.revoke_by(revoke_handle_request::Handle::Token(token.into()))
    }

    /// Ends a handle by its public identifier.
    pub fn revoke_id(&self, id: &str) -> Result<u32, Refusal> {
        self.revoke_by(revoke_handle_request::Handle::Id(id.into()))
    }

    /// Asks for a handle `count` times, up to 16 at once (the broker takes no more
    /// on one connection), and gives the refusals.
    #[must_use]
    pub fn flood(&self, connection: &str, count: usize) -> Vec<Refusal> {
        use futures_util::StreamExt as _;
        let request = IssueHandleRequest { connection: connection.into(), ..Default::default() };
        let calls = (0..count).map(|_| {
            let mut client = HandleServiceClient::new(self.channel.clone());
            let request = request.clone();
            async move { client.issue_handle(request).await.err().map(Refusal::from) }
        });
        let calls = futures_util::stream::iter(calls).buffer_unordered(16);
        self.runtime.block_on(calls.filter_map(async |refusal| refusal).collect())
    }

    fn revoke_by(&self, handle: revoke_handle_request::Handle) -> Result<u32, Refusal> {
        let request = RevokeHandleRequest { handle: Some(handle) };
        let response = self.call(async |mut client| client.revoke_handle(request).await)?;
        Ok(response.sessions_cut)
    }

    /// Looks at a handle.
    ///
    /// # Panics
    /// When the answer has no handle in it.
    pub fn describe(&self, token: &str) -> Result<Handle, Refusal> {
        let request = DescribeHandleRequest { token: token.into() };
        let response = self.call(async |mut client| client.describe_handle(request).await)?;
        Ok(response.handle.expect("a described handle is described"))
    }

    /// The caller's handles.
    pub fn list(&self) -> Result<Vec<Handle>, Refusal> {
        let request = ListHandlesRequest {};
        let response = self.call(async |mut client| client.list_handles(request).await)?;
        Ok(response.handles)
    }

    /// The caller's connections.
    pub fn connections(&self) -> Result<Vec<credbroker_proto::v1::Connection>, Refusal> {
        let request = ListConnectionsRequest {};
        let response = self.call(async |mut client| client.list_connections(request).await)?;
        Ok(response.connections)
    }

    /// Who the broker takes the caller for.
    pub fn whoami(&self) -> Result<WhoAmIResponse, Refusal> {
        self.call(async |mut client| client.who_am_i(WhoAmIRequest {}).await)
    }

    /// Whether the standard health service says `SERVING` for `service` (`""`: the broker).
    pub fn serving(&self, service: &str) -> Result<bool, Refusal> {
        let request = HealthCheckRequest { service: service.into() };
        let mut client = HealthClient::new(self.channel.clone());
        let answer = self.runtime.block_on(client.check(request));
        let answer = answer.map_err(Refusal::from)?.into_inner();
        Ok(answer.status() == tonic_health::pb::health_check_response::ServingStatus::Serving)
    }

    /// The names of the services that reflection lists, as grpcurl would.
    pub fn reflected_services(&self) -> Result<Vec<String>, Refusal> {
        let request = ServerReflectionRequest {
            message_request: Some(MessageRequest::ListServices("*".into())),
            ..Default::default()
        };
        let mut client = ServerReflectionClient::new(self.channel.clone());
        let answer = self.runtime.block_on(async {
            let requests = futures_util::stream::iter([request]);
            let mut answers = client.server_reflection_info(requests).await?.into_inner();
            answers.message().await
        });
        let answer = answer.map_err(Refusal::from)?;
        let services = match answer.and_then(|answer| answer.message_response) {
            Some(MessageResponse::ListServicesResponse(list)) => list.service,
            Some(_) | None => Vec::new(),
        };
        Ok(services.into_iter().map(|service| service.name).collect())
    }

    /// Makes any call of any service of this connection, streams included.
    pub fn ask<T>(
        &self,
        request: impl AsyncFnOnce(Channel) -> Result<T, Status>,
    ) -> Result<T, Refusal> {
        self.runtime.block_on(request(self.channel.clone())).map_err(Refusal::from)
    }

    /// The next message of a stream, waited for at most `limit`; the outer `None` when that is
    /// over.
    pub fn next<T>(
        &self,
        stream: &mut Streaming<T>,
        limit: Duration,
    ) -> Option<Result<Option<T>, Refusal>> {
        let next = async { tokio::time::timeout(limit, stream.message()).await };
        self.runtime.block_on(next).ok().map(|next| next.map_err(Refusal::from))
    }

    /// Watches a handle.
    pub fn watch(&self, token: &str) -> Result<Streaming<HandleEvent>, Refusal> {
        let request = WatchHandleRequest { token: token.into() };
        self.call(async |mut client| client.watch_handle(request).await)
    }

    /// The name of a destination.
    pub fn resolve(&self, request: ResolveConnectionRequest) -> Result<String, Refusal> {
        let response = self.call(async |mut client| client.resolve_connection(request).await)?;
        Ok(response.name)
    }

    /// Makes any call, for requests that a well-behaved client would not make.
    pub fn call<T, F>(&self, request: F) -> Result<T, Refusal>
    where
        F: AsyncFnOnce(HandleServiceClient<Channel>) -> Result<Response<T>, Status>,
    {
        let client = HandleServiceClient::new(self.channel.clone());
        let answer = self.runtime.block_on(request(client));
        answer.map(Response::into_inner).map_err(Refusal::from)
    }
}

/// A channel over one connection that somebody has made, and the runtime that it lives on.
pub(crate) fn channel(stream: UnixStream) -> io::Result<(Runtime, Channel)> {
    stream.set_nonblocking(true)?;
    let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let channel = runtime.block_on(async {
        let mut once = Some(tokio::net::UnixStream::from_std(stream)?);
        let connector = tower::service_fn(move |_uri| {
            let stream = once.take().map(TokioIo::new);
            async move { stream.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)) }
        });
        Endpoint::from_static("http://localhost")
            .timeout(CALL_LIMIT)
            .connect_with_connector(connector)
            .await
            .map_err(io::Error::other)
    })?;
    Ok((runtime, channel))
}

/// A handle and its token.
pub struct Issued {
    /// What it is.
    pub handle: Handle,
    /// Its bearer form.
    pub token: String,
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued").field("handle", &self.handle).finish_non_exhaustive()
    }
}

/// How the broker said no.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The gRPC code.
    pub code: Code,
    /// `google.rpc.ErrorInfo.reason`, empty when there was none.
    pub reason: String,
    /// The audit sequence number of the refusal.
    pub reference: Option<u64>,
    /// When to try again, `google.rpc.RetryInfo`.
    pub retry: Option<Duration>,
    /// The text for people.
    pub message: String,
}

impl Refusal {
    /// Everything that the caller can see, with the reference made equal, so that two
    /// refusals can be compared byte for byte.
    #[must_use]
    pub fn without_reference(&self) -> String {
        format!("{:?} {} {}", self.code, self.reason, without_reference(&self.message))
    }
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        let info = status.get_details_error_info();
        let (reason, reference) = info.map_or_else(Default::default, |info| {
            let reference = info.metadata.get("ref").and_then(|number| number.parse().ok());
            (info.reason, reference)
        });
        let retry = status.get_details_retry_info().and_then(|info| info.retry_delay);
        Self { code: status.code(), reason, reference, retry, message: status.message().into() }
    }
}
