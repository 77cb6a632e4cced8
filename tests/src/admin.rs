//! `AdminService` as any uid, without the client library.

use std::io;
use std::path::Path;
use std::time::Duration;

use credbroker_proto::v1::admin_service_client::AdminServiceClient;
use credbroker_proto::v1::{
    AdminConnection, CloseSessionRequest, ExplainAccessRequest, ExplainAccessResponse,
    GetConnectionRequest, GetStatusRequest, GetStatusResponse, HandleFilter, ListSessionsRequest,
    ListSessionsResponse, PeerDescription, ReloadRequest, ReloadResponse, ResumeRequest,
    RevokeHandlesRequest, RevokeHandlesResponse, SessionInfo, SuspendRequest, SuspendResponse,
    explain_access_request, resume_request, suspend_request,
};
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

use crate::handles::{Handles, Refusal};
use crate::identity::Identity;

/// One connection to `admin.sock`, made by one identity.
#[derive(Debug)]
pub struct Admin {
    connection: Handles,
}

impl Admin {
    /// Connects to the socket at `path` as `identity`.
    ///
    /// # Errors
    /// When the socket does not take the connection, or no runtime can be built.
    pub fn connect(identity: &Identity, path: &Path) -> io::Result<Self> {
        Ok(Self { connection: Handles::connect(identity, path)? })
    }

    /// Makes any call.
    pub fn call<T, F>(&self, request: F) -> Result<T, Refusal>
    where
        F: AsyncFnOnce(AdminServiceClient<Channel>) -> Result<Response<T>, Status>,
    {
        self.connection.ask(async |channel| {
            request(AdminServiceClient::new(channel)).await.map(Response::into_inner)
        })
    }

    /// The next message of a stream; see [`Handles::next`].
    pub fn next<T>(
        &self,
        stream: &mut Streaming<T>,
        limit: Duration,
    ) -> Option<Result<Option<T>, Refusal>> {
        self.connection.next(stream, limit)
    }

    /// Suspends a connection, or all.
    pub fn suspend(&self, connection: Option<&str>) -> Result<SuspendResponse, Refusal> {
        use suspend_request::Scope;
        let scope = connection.map_or(Scope::All(true), |name| Scope::Connection(name.into()));
        self.call(async |mut client| client.suspend(SuspendRequest { scope: Some(scope) }).await)
    }

    /// Resumes a connection, or all; gives what is still suspended.
    pub fn resume(&self, connection: Option<&str>) -> Result<Vec<String>, Refusal> {
        use resume_request::Scope;
        let scope = connection.map_or(Scope::All(true), |name| Scope::Connection(name.into()));
        let request = ResumeRequest { scope: Some(scope) };
        let response = self.call(async |mut client| client.resume(request).await)?;
        Ok(response.still_suspended)
    }

    /// Makes the broker read its configuration again.
    pub fn reload(&self) -> Result<ReloadResponse, Refusal> {
        self.call(async |mut client| client.reload(ReloadRequest {}).await)
    }

    /// The state of the broker.
    pub fn status(&self) -> Result<GetStatusResponse, Refusal> {
        self.call(async |mut client| client.get_status(GetStatusRequest {}).await)
    }

    /// A connection.
    ///
    /// # Panics
    /// When the answer has none in it.
    pub fn connection(&self, name: &str) -> Result<AdminConnection, Refusal> {
        let request = GetConnectionRequest { connection: name.into() };
        let response = self.call(async |mut client| client.get_connection(request).await)?;
        Ok(response.connection.expect("a connection"))
    }

    /// Sessions of all connections.
    pub fn sessions(&self) -> Result<ListSessionsResponse, Refusal> {
        let request = ListSessionsRequest { connection: None, limit: 0 };
        self.call(async |mut client| client.list_sessions(request).await)
    }

    /// Why something was refused.
    pub fn explain(&self, reference: u64) -> Result<ExplainAccessResponse, Refusal> {
        let who = Some(explain_access_request::Who::Ref(reference));
        let request = ExplainAccessRequest { who, ..Default::default() };
        self.call(async |mut client| client.explain_access(request).await)
    }

    /// What a peer may do.
    pub fn explain_peer(
        &self,
        peer: PeerDescription,
        action: &str,
        connection: &str,
    ) -> Result<ExplainAccessResponse, Refusal> {
        let request = ExplainAccessRequest {
            who: Some(explain_access_request::Who::Peer(peer)),
            action: action.into(),
            connection: connection.into(),
        };
        self.call(async |mut client| client.explain_access(request).await)
    }

    /// Ends every handle of a connection.
    pub fn revoke_all(&self, connection: &str) -> Result<RevokeHandlesResponse, Refusal> {
        let filter = HandleFilter { connection: Some(connection.into()), ..Default::default() };
        let request = RevokeHandlesRequest { filter: Some(filter) };
        self.call(async |mut client| client.revoke_handles(request).await)
    }

    /// The live sessions of a connection, and those that are being opened.
    pub fn sessions_of(&self, connection: &str) -> Result<Vec<SessionInfo>, Refusal> {
        let request = ListSessionsRequest { connection: Some(connection.into()), limit: 1000 };
        let answer = self.call(async |mut client| client.list_sessions(request).await)?;
        Ok(answer.sessions)
    }

    /// Ends one session.
    pub fn close_session(&self, session: &str) -> Result<(), Refusal> {
        let request = CloseSessionRequest { session: session.into() };
        self.call(async |mut client| client.close_session(request).await).map(drop)
    }
}
