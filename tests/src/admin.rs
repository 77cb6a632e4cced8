//! The operators' service, without the client library: what it does is the broker's.

use std::io;
use std::path::Path;

use credbroker_proto::v1::admin_service_client::AdminServiceClient;
use credbroker_proto::v1::{
    CloseSessionRequest, HandleFilter, ListSessionsRequest, ReloadRequest, ReloadResponse,
    ResumeRequest, RevokeHandlesRequest, RevokeHandlesResponse, SessionInfo, SuspendRequest,
    SuspendResponse, resume_request, suspend_request,
};
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use tonic::{Response, Status};

use crate::handles::{Refusal, channel};
use crate::identity::Identity;

/// One connection to `admin.sock`, made by one identity.
#[derive(Debug)]
pub struct Admin {
    runtime: Runtime,
    channel: Channel,
}

impl Admin {
    /// Connects to the socket at `path` as `identity`.
    ///
    /// # Errors
    /// When the socket does not take the connection, or no runtime can be built.
    pub fn connect(identity: &Identity, path: &Path) -> io::Result<Self> {
        let (runtime, channel) = channel(identity.connect(path)?)?;
        Ok(Self { runtime, channel })
    }

    /// Ends every handle of a connection.
    pub fn revoke_all(&self, connection: &str) -> Result<RevokeHandlesResponse, Refusal> {
        let filter = HandleFilter { connection: Some(connection.into()), ..Default::default() };
        let request = RevokeHandlesRequest { filter: Some(filter) };
        self.call(async |mut client| client.revoke_handles(request).await)
    }

    /// The live sessions of a connection, and those that are being opened.
    pub fn sessions(&self, connection: &str) -> Result<Vec<SessionInfo>, Refusal> {
        let request = ListSessionsRequest { connection: Some(connection.into()), limit: 1000 };
        let answer = self.call(async |mut client| client.list_sessions(request).await)?;
        Ok(answer.sessions)
    }

    /// Ends one session.
    pub fn close_session(&self, session: &str) -> Result<(), Refusal> {
        let request = CloseSessionRequest { session: session.into() };
        self.call(async |mut client| client.close_session(request).await).map(drop)
    }

    /// Suspends a connection.
    pub fn suspend(&self, connection: &str) -> Result<SuspendResponse, Refusal> {
        let scope = Some(suspend_request::Scope::Connection(connection.into()));
        self.call(async |mut client| client.suspend(SuspendRequest { scope }).await)
    }

    /// Ends the suspension of a connection.
    pub fn resume(&self, connection: &str) -> Result<(), Refusal> {
        let scope = Some(resume_request::Scope::Connection(connection.into()));
        self.call(async |mut client| client.resume(ResumeRequest { scope }).await).map(drop)
    }

    /// Has the configuration read again.
    pub fn reload(&self) -> Result<ReloadResponse, Refusal> {
        self.call(async |mut client| client.reload(ReloadRequest {}).await)
    }

    fn call<T, F>(&self, request: F) -> Result<T, Refusal>
    where
        F: AsyncFnOnce(AdminServiceClient<Channel>) -> Result<Response<T>, Status>,
    {
        let client = AdminServiceClient::new(self.channel.clone());
        let answer = self.runtime.block_on(request(client));
        answer.map(Response::into_inner).map_err(Refusal::from)
    }
}
