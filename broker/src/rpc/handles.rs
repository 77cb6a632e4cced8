//! `HandleService`, for one peer.

#![forbid(unsafe_code)]

use credbroker_proto::v1::handle_service_server::HandleService;
use credbroker_proto::v1::{
    self, DescribeHandleRequest, DescribeHandleResponse, IssueHandleRequest, IssueHandleResponse,
    ListConnectionsRequest, ListConnectionsResponse, ListHandlesRequest, ListHandlesResponse,
    RenewHandleRequest, RenewHandleResponse, RevokeHandleRequest, RevokeHandleResponse,
    WhoAmIRequest, WhoAmIResponse, revoke_handle_request,
};
use tonic::{Request, Response, Status};

use super::{convert, status};
use crate::core::{Core, Named, Why};
use crate::handle::{HandleId, TokenHash};
use crate::peer::{Gid, Peer};

/// The service of one connection.
#[derive(Debug)]
pub(super) struct Handles {
    core: Core,
    peer: Peer,
}

impl Handles {
    pub(super) fn new(core: Core, peer: Peer) -> Self {
        Self { core, peer }
    }

    fn wrong(&self, field: &'static str, must: &'static str) -> Status {
        status::refused(&self.core.refuse(&self.peer, None, Why::InvalidRequest { field, must }))
    }
}

#[tonic::async_trait]
impl HandleService for Handles {
    async fn issue_handle(
        &self,
        request: Request<IssueHandleRequest>,
    ) -> Result<Response<IssueHandleResponse>, Status> {
        let request =
            convert::issue(request.into_inner()).map_err(|bad| self.wrong(bad.field, bad.must))?;
        let issued = self.core.issue(&self.peer, request).await;
        let issued = issued.map_err(|refusal| status::refused(&refusal))?;
        Ok(Response::new(IssueHandleResponse {
            handle: Some(convert::handle(issued.handle)),
            token: issued.token.into_public(),
            endpoint: Some(convert::endpoint(&issued.connection)),
        }))
    }

    async fn renew_handle(
        &self,
        request: Request<RenewHandleRequest>,
    ) -> Result<Response<RenewHandleResponse>, Status> {
        let RenewHandleRequest { token, ttl } = request.into_inner();
        let ttl = convert::span(ttl, "ttl").map_err(|bad| self.wrong(bad.field, bad.must))?;
        let renewed = self.core.renew(&self.peer, TokenHash::of(&token), ttl).await;
        let handle = renewed.map_err(|refusal| status::refused(&refusal))?;
        Ok(Response::new(RenewHandleResponse { handle: Some(convert::handle(handle)) }))
    }

    async fn revoke_handle(
        &self,
        request: Request<RevokeHandleRequest>,
    ) -> Result<Response<RevokeHandleResponse>, Status> {
        let named = match request.into_inner().handle {
            Some(revoke_handle_request::Handle::Token(token)) => {
                Named::Token(TokenHash::of(&token))
            }
            Some(revoke_handle_request::Handle::Id(id)) => Named::Id(HandleId::parse(&id)),
            None => return Err(self.wrong("handle", "be given, by token or id")),
        };
        let cut = self
            .core
            .revoke(&self.peer, named)
            .await
            .map_err(|refusal| status::refused(&refusal))?;
        Ok(Response::new(RevokeHandleResponse { sessions_cut: convert::count(cut) }))
    }

    async fn describe_handle(
        &self,
        request: Request<DescribeHandleRequest>,
    ) -> Result<Response<DescribeHandleResponse>, Status> {
        let described = self.core.describe(&self.peer, TokenHash::of(&request.into_inner().token));
        let handle = described.map_err(|refusal| status::refused(&refusal))?;
        Ok(Response::new(DescribeHandleResponse { handle: Some(convert::handle(handle)) }))
    }

    async fn list_handles(
        &self,
        _: Request<ListHandlesRequest>,
    ) -> Result<Response<ListHandlesResponse>, Status> {
        let (handles, truncated) = self.core.list(&self.peer);
        let handles = handles.into_iter().map(convert::handle).collect();
        Ok(Response::new(ListHandlesResponse { handles, truncated }))
    }

    type WatchHandleStream = futures_util::stream::Empty<Result<v1::HandleEvent, Status>>;

    async fn watch_handle(
        &self,
        _: Request<v1::WatchHandleRequest>,
    ) -> Result<Response<Self::WatchHandleStream>, Status> {
        let why = Why::Unsupported("WatchHandle");
        Err(status::refused(&self.core.refuse(&self.peer, None, why)))
    }

    async fn resolve_connection(
        &self,
        _: Request<v1::ResolveConnectionRequest>,
    ) -> Result<Response<v1::ResolveConnectionResponse>, Status> {
        let why = Why::Unsupported("ResolveConnection");
        Err(status::refused(&self.core.refuse(&self.peer, None, why)))
    }

    async fn list_connections(
        &self,
        _: Request<ListConnectionsRequest>,
    ) -> Result<Response<ListConnectionsResponse>, Status> {
        let connections =
            self.core.connections_of(&self.peer).into_iter().map(convert::connection).collect();
        Ok(Response::new(ListConnectionsResponse { connections }))
    }

    async fn who_am_i(
        &self,
        _: Request<WhoAmIRequest>,
    ) -> Result<Response<WhoAmIResponse>, Status> {
        let policy = self.core.policy();
        Ok(Response::new(v1::WhoAmIResponse {
            uid: self.peer.uid().as_raw(),
            gid: self.peer.gid().as_raw(),
            groups: self.peer.groups().iter().copied().map(Gid::as_raw).collect(),
            pid: self.peer.pid().and_then(|pid| u32::try_from(pid).ok()),
            grants: policy.grants_of(&self.peer),
            operator: policy.is_operator(&self.peer),
            warnings: self.core.warnings_for(&self.peer),
            broker_version: env!("CARGO_PKG_VERSION").to_owned(),
        }))
    }
}
