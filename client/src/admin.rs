//! The requests of operators.

mod info;

use std::fmt;
use std::future::Future;
use std::time::Duration;

use credbroker_proto::v1;
use credbroker_proto::v1::admin_service_client::AdminServiceClient;
use tonic::transport::Channel;
use tonic::{Response, Status as Refusal};

pub use self::info::{
    AdminConnection, AdminHandleList, ArenaUse, AuditHead, AuditLine, Considered, CredentialInfo,
    Cut, Explanation, HandleFilter, KeyRotation, OpenBreaker, PeerDescription, Reloaded, Scope,
    SessionInfo, SessionList, Status, Suspension, Validation,
};
use crate::connector::Connector;
use crate::{ClientBuilder, Error, Events, WhoAmI, channel};

/// A connection to `admin.sock`, for operators; cheap to clone, and all clones share it.
///
/// It connects again by itself, and checks the server again, when the broker was restarted.
/// Every request may meet the errors of [`Client::issue`](crate::Client::issue), and
/// [`Reason::AccessDenied`](crate::Reason::AccessDenied) for who is no operator.
#[derive(Clone)]
pub struct AdminClient {
    rpc: AdminServiceClient<Channel>,
    limit: Duration,
}

impl AdminClient {
    /// Connects with the defaults.
    ///
    /// # Errors
    /// Those of [`ClientBuilder::connect`].
    pub async fn connect() -> Result<Self, Error> {
        ClientBuilder::default().connect_admin().await
    }

    pub(crate) async fn open(connector: Connector, limit: Duration) -> Result<Self, Error> {
        let channel = channel::open(connector, limit).await?;
        Ok(Self { rpc: AdminServiceClient::new(channel), limit })
    }

    /// Whom the broker takes the caller for. Told to who is no operator, too.
    ///
    /// # Errors
    /// Those of all requests.
    pub async fn who_am_i(&self) -> Result<WhoAmI, Error> {
        Ok(self.bounded(self.rpc.clone().who_am_i(v1::WhoAmIRequest {})).await?.into())
    }

    /// All connections, masked, by name.
    ///
    /// # Errors
    /// Those of all requests.
    pub async fn list_connections(&self) -> Result<Vec<AdminConnection>, Error> {
        let request = v1::AdminListConnectionsRequest {};
        let list = self.bounded(self.rpc.clone().list_connections(request)).await?;
        list.connections.into_iter().map(AdminConnection::from_wire).collect()
    }

    /// One connection, masked.
    ///
    /// # Errors
    /// Those of all requests.
    pub async fn connection(&self, name: &str) -> Result<AdminConnection, Error> {
        let request = v1::GetConnectionRequest { connection: name.to_owned() };
        let response = self.bounded(self.rpc.clone().get_connection(request)).await?;
        let connection = response.connection;
        AdminConnection::from_wire(connection.ok_or_else(|| Error::protocol("it has nothing"))?)
    }

    /// Makes the broker forget a credential that was put, and says how many sessions were cut.
    ///
    /// # Errors
    /// Those of all requests.
    pub async fn delete_credential(&self, connection: &str) -> Result<u32, Error> {
        let request = v1::DeleteCredentialRequest { connection: connection.to_owned() };
        Ok(self.bounded(self.rpc.clone().delete_credential(request)).await?.sessions_cut)
    }

    /// Logs in with a connection's credential, looks at the role, and logs out.
    ///
    /// # Errors
    /// Those of all requests.
    pub async fn validate(&self, connection: &str) -> Result<Validation, Error> {
        let request = v1::ValidateConnectionRequest { connection: connection.to_owned() };
        let response = self.bounded(self.rpc.clone().validate_connection(request)).await?;
        Ok(Validation::from_wire(response))
    }

    /// Cuts everything, and lets nothing new be opened until [`AdminClient::resume`]. When this
    /// returns, it is dead.
    ///
    /// # Errors
    /// Those of all requests.
    pub async fn suspend(&self, scope: Scope) -> Result<Suspension, Error> {
        let request = v1::SuspendRequest { scope: Some(scope.into_suspend()) };
        Ok(Suspension::from_wire(self.bounded(self.rpc.clone().suspend(request)).await?))
    }

    /// Ends a suspension, and gives the names of what is still suspended. [`Scope::All`] ends
    /// those of single connections too.
    ///
    /// # Errors
    /// Those of all requests.
    pub async fn resume(&self, scope: Scope) -> Result<Vec<String>, Error> {
        let request = v1::ResumeRequest { scope: Some(scope.into_resume()) };
        Ok(self.bounded(self.rpc.clone().resume(request)).await?.still_suspended)
    }

    /// Live handles that `filter` picks, at most `limit` of them and at most 1000.
    ///
    /// # Errors
    /// Those of all requests.
    pub async fn list_handles(
        &self,
        filter: HandleFilter,
        limit: u32,
    ) -> Result<AdminHandleList, Error> {
        let request = v1::AdminListHandlesRequest { filter: Some(filter.into_wire()), limit };
        AdminHandleList::from_wire(self.bounded(self.rpc.clone().list_handles(request)).await?)
    }

    /// Ends the handles that `filter` picks. When this returns, their sessions are dead.
    ///
    /// # Errors
    /// Those of all requests.
    pub async fn revoke_handles(&self, filter: HandleFilter) -> Result<Cut, Error> {
        let request = v1::RevokeHandlesRequest { filter: Some(filter.into_wire()) };
        let response = self.bounded(self.rpc.clone().revoke_handles(request)).await?;
        Ok(Cut { handles: response.handles_revoked, sessions: response.sessions_cut })
    }

    /// Live sessions and those that are being opened, of one connection or of all; at most
    /// `limit` of them and at most 1000.
    ///
    /// # Errors
    /// Those of all requests.
    pub async fn list_sessions(
        &self,
        connection: Option<&str>,
        limit: u32,
    ) -> Result<SessionList, Error> {
        let connection = connection.map(str::to_owned);
        let request = v1::ListSessionsRequest { connection, limit };
        SessionList::from_wire(self.bounded(self.rpc.clone().list_sessions(request)).await?)
    }

    /// Ends a session (`ses_…`). When this returns, it is dead.
    ///
    /// # Errors
    /// Those of all requests.
    pub async fn close_session(&self, session: &str) -> Result<(), Error> {
        let request = v1::CloseSessionRequest { session: session.to_owned() };
        let v1::CloseSessionResponse {} =
            self.bounded(self.rpc.clone().close_session(request)).await?;
        Ok(())
    }

    /// Wraps all data keys anew, and tells how far it is.
    ///
    /// # Errors
    /// Those of all requests.
    pub async fn rotate_master_key(&self) -> Result<Events<KeyRotation>, Error> {
        let request = v1::RotateMasterKeyRequest {};
        let stream = self.bounded(self.rpc.clone().rotate_master_key(request)).await?;
        Ok(Events::new(stream, |step| Some(Ok(KeyRotation { done: step.done, total: step.total }))))
    }

    /// Makes the broker read its configuration again: whole or not at all.
    ///
    /// # Errors
    /// Those of all requests.
    pub async fn reload(&self) -> Result<Reloaded, Error> {
        let response = self.bounded(self.rpc.clone().reload(v1::ReloadRequest {})).await?;
        let cut = Cut { handles: response.handles_revoked, sessions: response.sessions_cut };
        Ok(Reloaded { cut, changes: response.changes })
    }

    /// Posture, versions, counts, and the head of the audit log.
    ///
    /// # Errors
    /// Those of all requests.
    pub async fn status(&self) -> Result<Status, Error> {
        let request = v1::GetStatusRequest {};
        Status::from_wire(self.bounded(self.rpc.clone().get_status(request)).await?)
    }

    /// Audit records as they are written, after at most 1000 of those that were.
    ///
    /// # Errors
    /// Those of all requests.
    pub async fn tail_audit(&self, last: u32) -> Result<Events<AuditLine>, Error> {
        let request = v1::TailAuditRequest { last };
        let stream = self.bounded(self.rpc.clone().tail_audit(request)).await?;
        Ok(Events::new(stream, |record| {
            Some(Ok(AuditLine { line: record.line, skipped: record.skipped }))
        }))
    }

    /// Why a request was refused, by the number that the refusal carries as `ref`.
    ///
    /// # Errors
    /// Those of all requests.
    pub async fn explain_refusal(&self, reference: u64) -> Result<Explanation, Error> {
        self.explain(v1::ExplainAccessRequest {
            who: Some(v1::explain_access_request::Who::Ref(reference)),
            ..Default::default()
        })
        .await
    }

    /// Whether a peer may do `action` on `connection`, and why.
    ///
    /// # Errors
    /// Those of all requests.
    pub async fn explain_peer(
        &self,
        peer: PeerDescription,
        action: &str,
        connection: &str,
    ) -> Result<Explanation, Error> {
        self.explain(v1::ExplainAccessRequest {
            who: Some(v1::explain_access_request::Who::Peer(peer.into_wire())),
            action: action.to_owned(),
            connection: connection.to_owned(),
        })
        .await
    }

    async fn explain(&self, request: v1::ExplainAccessRequest) -> Result<Explanation, Error> {
        Explanation::from_wire(self.bounded(self.rpc.clone().explain_access(request)).await?)
    }

    async fn bounded<T>(
        &self,
        answer: impl Future<Output = Result<Response<T>, Refusal>>,
    ) -> Result<T, Error> {
        channel::bounded(self.limit, answer).await
    }
}

impl fmt::Debug for AdminClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdminClient").field("timeout", &self.limit).finish_non_exhaustive()
    }
}
