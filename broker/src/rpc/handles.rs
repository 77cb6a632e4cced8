//! `HandleService`, for one peer.

#![forbid(unsafe_code)]

use std::pin::Pin;

use credbroker_proto::v1::handle_service_server::HandleService;
use credbroker_proto::v1::{
    self, DescribeHandleRequest, DescribeHandleResponse, IssueHandleRequest, IssueHandleResponse,
    ListConnectionsRequest, ListConnectionsResponse, ListHandlesRequest, ListHandlesResponse,
    RenewHandleRequest, RenewHandleResponse, RevokeHandleRequest, RevokeHandleResponse,
    WhoAmIRequest, WhoAmIResponse, revoke_handle_request,
};
use futures_util::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};

use super::{convert, status};
use crate::connection::Destination;
use crate::core::{Core, Named, Why};
use crate::handle::{HandleId, TokenHash};
use crate::peer::Peer;

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

    type WatchHandleStream = Pin<Box<dyn Stream<Item = Result<v1::HandleEvent, Status>> + Send>>;

    async fn watch_handle(
        &self,
        request: Request<v1::WatchHandleRequest>,
    ) -> Result<Response<Self::WatchHandleStream>, Status> {
        let news = self.core.watch(&self.peer, TokenHash::of(&request.into_inner().token));
        let news = news.map_err(|refusal| status::refused(&refusal))?;
        Ok(Response::new(Box::pin(news.map(|news| Ok(convert::event(news))))))
    }

    async fn resolve_connection(
        &self,
        request: Request<v1::ResolveConnectionRequest>,
    ) -> Result<Response<v1::ResolveConnectionResponse>, Status> {
        let v1::ResolveConnectionRequest { r#type, host, port, database } = request.into_inner();
        let port = match port.map(u16::try_from) {
            None => None,
            Some(Ok(port)) => Some(port),
            Some(Err(_)) => return Err(self.wrong("port", "be at most 65535")),
        };
        let asked = Destination { kind: &r#type, host: &host, port, database: &database };
        let name = self.core.resolve(&self.peer, &asked);
        let name = name.map_err(|refusal| status::refused(&refusal))?.to_string();
        Ok(Response::new(v1::ResolveConnectionResponse { name }))
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
        Ok(Response::new(convert::whoami(&self.core, &self.peer)))
    }
}
