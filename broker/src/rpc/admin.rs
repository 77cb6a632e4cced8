//! `AdminService`, for one peer. Everything but WhoAmI begins with the proof that it is an
//! operator.

#![forbid(unsafe_code)]

use std::pin::Pin;

use credbroker_proto::v1;
use credbroker_proto::v1::admin_service_server::AdminService;
use futures_util::Stream;
use tonic::{Request, Response, Status};

use super::{admin_convert as convert, convert as common, status};
use crate::core::{Core, HandleFilter, ReloadProblem, Scope, Why};
use crate::peer::Peer;
use crate::policy::Operator;
use crate::session::SessionId;

/// Entries of a list when nobody says how many, and at most.
const LISTED: usize = 100;
const LISTED_AT_MOST: usize = 1000;
/// Records from before now that a tail begins with, at most.
const TAILED_AT_MOST: usize = 1000;

type Answer<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The service of one connection.
#[derive(Debug)]
pub(super) struct Admin {
    core: Core,
    peer: Peer,
}

impl Admin {
    pub(super) fn new(core: Core, peer: Peer) -> Self {
        Self { core, peer }
    }

    fn operator(&self) -> Result<Operator, Status> {
        self.core.operator(&self.peer).map_err(|refusal| status::refused(&refusal))
    }

    fn wrong(&self, field: &'static str, must: &'static str) -> Status {
        let why = Why::InvalidRequest { field, must };
        status::refused(&self.core.refuse(&self.peer, None, why))
    }

    fn scope(
        &self,
        operator: &Operator,
        connection: Option<String>,
        all: bool,
    ) -> Result<Scope, Status> {
        match connection {
            Some(name) => {
                self.core.scope(operator, &name).map_err(|refusal| status::refused(&refusal))
            }
            None if all => Ok(Scope::All),
            None => Err(self.wrong("scope", "be a connection or all")),
        }
    }

    fn filter(&self, filter: Option<v1::HandleFilter>) -> Result<HandleFilter, Status> {
        convert::filter(filter.unwrap_or_default()).map_err(|bad| self.wrong(bad.field, bad.must))
    }
}

fn limit(asked: u32) -> usize {
    match usize::try_from(asked) {
        Ok(0) => LISTED,
        Ok(asked) => asked.min(LISTED_AT_MOST),
        Err(_) => LISTED_AT_MOST,
    }
}

#[tonic::async_trait]
impl AdminService for Admin {
    type RotateMasterKeyStream = Streamed<v1::RotateMasterKeyResponse>;
    type TailAuditStream = Streamed<v1::TailAuditResponse>;

    async fn who_am_i(&self, _: Request<v1::WhoAmIRequest>) -> Answer<v1::WhoAmIResponse> {
        Ok(Response::new(common::whoami(&self.core, &self.peer)))
    }

    async fn list_connections(
        &self,
        _: Request<v1::AdminListConnectionsRequest>,
    ) -> Answer<v1::AdminListConnectionsResponse> {
        let connections = self.core.all_connections(&self.operator()?);
        let connections = connections.into_iter().map(convert::connection).collect();
        Ok(Response::new(v1::AdminListConnectionsResponse { connections }))
    }

    async fn get_connection(
        &self,
        request: Request<v1::GetConnectionRequest>,
    ) -> Answer<v1::GetConnectionResponse> {
        let operator = self.operator()?;
        let found = self.core.one_connection(&operator, &request.into_inner().connection);
        let found = found.map_err(|refusal| status::refused(&refusal))?;
        let connection = Some(convert::connection(found));
        Ok(Response::new(v1::GetConnectionResponse { connection }))
    }

    async fn delete_credential(
        &self,
        request: Request<v1::DeleteCredentialRequest>,
    ) -> Answer<v1::DeleteCredentialResponse> {
        let operator = self.operator()?;
        let name = request.into_inner().connection;
        let cut = self.core.delete_credential(&operator, &name).await;
        let cut = cut.map_err(|refusal| status::refused(&refusal))?;
        let sessions_cut = common::count(cut);
        Ok(Response::new(v1::DeleteCredentialResponse { sessions_cut }))
    }

    async fn validate_connection(
        &self,
        request: Request<v1::ValidateConnectionRequest>,
    ) -> Answer<v1::ValidateConnectionResponse> {
        let operator = self.operator()?;
        let name = request.into_inner().connection;
        let probe = self.core.probe(&operator, &name).await;
        let probe = probe.map_err(|refusal| status::refused(&refusal))?;
        let found = crate::door::postgres::validate(&self.core, probe).await;
        let found = found.map_err(|refusal| status::refused(&refusal))?;
        Ok(Response::new(convert::validated(found)))
    }

    async fn suspend(&self, request: Request<v1::SuspendRequest>) -> Answer<v1::SuspendResponse> {
        use v1::suspend_request::Scope as Asked;
        let operator = self.operator()?;
        let scope = match request.into_inner().scope {
            Some(Asked::Connection(name)) => self.scope(&operator, Some(name), false),
            Some(Asked::All(all)) => self.scope(&operator, None, all),
            None => self.scope(&operator, None, false),
        }?;
        Ok(Response::new(convert::suspended(self.core.suspend(&operator, scope).await)))
    }

    async fn resume(&self, request: Request<v1::ResumeRequest>) -> Answer<v1::ResumeResponse> {
        use v1::resume_request::Scope as Asked;
        let operator = self.operator()?;
        let scope = match request.into_inner().scope {
            Some(Asked::Connection(name)) => self.scope(&operator, Some(name), false),
            Some(Asked::All(all)) => self.scope(&operator, None, all),
            None => self.scope(&operator, None, false),
        }?;
        let still_suspended = self.core.resume(&operator, scope).await;
        let still_suspended = still_suspended.map_err(|refusal| status::refused(&refusal))?;
        Ok(Response::new(v1::ResumeResponse { still_suspended }))
    }

    async fn list_handles(
        &self,
        request: Request<v1::AdminListHandlesRequest>,
    ) -> Answer<v1::AdminListHandlesResponse> {
        let operator = self.operator()?;
        let v1::AdminListHandlesRequest { filter, limit: asked } = request.into_inner();
        let filter = match filter {
            Some(filter) => self.filter(Some(filter))?,
            None => HandleFilter::default(),
        };
        let selected = self.core.select_handles(&operator, &filter, limit(asked));
        Ok(Response::new(v1::AdminListHandlesResponse {
            handles: selected.first.into_iter().map(common::handle).collect(),
            total: common::count(selected.total),
        }))
    }

    async fn revoke_handles(
        &self,
        request: Request<v1::RevokeHandlesRequest>,
    ) -> Answer<v1::RevokeHandlesResponse> {
        let operator = self.operator()?;
        let filter = self.filter(request.into_inner().filter)?;
        let taken = self.core.revoke_selected(&operator, &filter).await;
        Ok(Response::new(v1::RevokeHandlesResponse {
            handles_revoked: common::count(taken.handles),
            sessions_cut: common::count(taken.sessions),
        }))
    }

    async fn list_sessions(
        &self,
        request: Request<v1::ListSessionsRequest>,
    ) -> Answer<v1::ListSessionsResponse> {
        let operator = self.operator()?;
        let v1::ListSessionsRequest { connection, limit: asked } = request.into_inner();
        let selected = self.core.select_sessions(&operator, connection.as_deref(), limit(asked));
        Ok(Response::new(v1::ListSessionsResponse {
            sessions: selected.first.into_iter().map(convert::session).collect(),
            total: common::count(selected.total),
        }))
    }

    async fn close_session(
        &self,
        request: Request<v1::CloseSessionRequest>,
    ) -> Answer<v1::CloseSessionResponse> {
        let operator = self.operator()?;
        let id = SessionId::parse(&request.into_inner().session);
        let closed = self.core.close_session(&operator, id).await;
        closed.map_err(|refusal| status::refused(&refusal))?;
        Ok(Response::new(v1::CloseSessionResponse {}))
    }

    async fn rotate_master_key(
        &self,
        _: Request<v1::RotateMasterKeyRequest>,
    ) -> Answer<Self::RotateMasterKeyStream> {
        let operator = self.operator()?;
        let why = Why::Unsupported("a master key (this broker has no sealed store)");
        Err(status::refused(&self.core.refuse(operator.peer(), None, why)))
    }

    async fn reload(&self, _: Request<v1::ReloadRequest>) -> Answer<v1::ReloadResponse> {
        let operator = self.operator()?;
        match self.core.reload(Some(operator.peer())).await {
            Ok(reloaded) => Ok(Response::new(v1::ReloadResponse {
                sessions_cut: common::count(reloaded.sessions_cut),
                handles_revoked: common::count(reloaded.handles_revoked),
                changes: reloaded.changes,
            })),
            // To an operator it is told what is wrong with the configuration.
            Err(problem) => Err(not_reloaded(&problem)),
        }
    }

    async fn get_status(&self, _: Request<v1::GetStatusRequest>) -> Answer<v1::GetStatusResponse> {
        Ok(Response::new(convert::status(self.core.status(&self.operator()?))))
    }

    async fn tail_audit(
        &self,
        request: Request<v1::TailAuditRequest>,
    ) -> Answer<Self::TailAuditStream> {
        let operator = self.operator()?;
        let last = usize::try_from(request.into_inner().last).unwrap_or(TAILED_AT_MOST);
        let lines = self.core.tail_audit(&operator, last.min(TAILED_AT_MOST));
        Ok(Response::new(Box::pin(convert::tail(lines))))
    }

    async fn explain_access(
        &self,
        request: Request<v1::ExplainAccessRequest>,
    ) -> Answer<v1::ExplainAccessResponse> {
        let operator = self.operator()?;
        let question = convert::question(request.into_inner())
            .map_err(|bad| self.wrong(bad.field, bad.must))?;
        let explained = self.core.explain(&operator, question);
        let explained = explained.map_err(|refusal| status::refused(&refusal))?;
        Ok(Response::new(convert::explained(explained)))
    }
}

fn not_reloaded(problem: &ReloadProblem) -> Status {
    let message = format!("the configuration stays as it was: {problem}");
    status::told(tonic::Code::FailedPrecondition, "INVALID_REQUEST", message)
}
