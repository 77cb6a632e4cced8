//! The service of one connection: each request to its verb.

use std::sync::Arc;

use credbroker_proto::v1::sql_service_server::SqlService;
use credbroker_proto::v1::{
    ConnectNamedRequest, ConnectNamedResponse, ConnectRequest, ConnectResponse,
    CreateCredentialTokenRequest, CreateCredentialTokenResponse, DescribeSchemaRequest,
    DescribeSchemaResponse, DisconnectRequest, DisconnectResponse, ExecuteQueryRequest,
    ExplainQueryRequest, ExplainQueryResponse, ListSqlConnectionsRequest,
    ListSqlConnectionsResponse, RevokeCredentialTokenRequest, RevokeCredentialTokenResponse,
};
use prost::Message;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status};

use super::call::Call;
use super::outlet::Parts;
use super::{
    connect, connect_named, create_credential_token, describe_schema, disconnect, execute_query,
    explain_query, list_connections, revoke_credential_token,
};
use crate::app::{App, Principal};

/// What one caller may ask.
#[derive(Debug)]
pub(super) struct Service {
    app: Arc<App>,
    caller: Principal,
    stop: CancellationToken,
    lost: CancellationToken,
    tasks: TaskTracker,
}

impl Service {
    /// `stop` ends its calls; `lost` is for it to fire, and ends the connection; statements run
    /// in `tasks`.
    pub(super) fn new(
        app: Arc<App>,
        caller: Principal,
        stop: CancellationToken,
        lost: CancellationToken,
        tasks: TaskTracker,
    ) -> Self {
        Self { app, caller, stop, lost, tasks }
    }

    fn begin<T: Message>(&self, verb: &'static str, request: Request<T>) -> (Call, T) {
        let Self { app, caller, stop, .. } = self;
        let (app, caller, stop) = (Arc::clone(app), caller.clone(), stop.clone());
        let share = app.room(&caller).take(request.get_ref().encoded_len());
        let call = Call::new(verb, app, caller, stop, request.metadata());
        (call.with_share(share), request.into_inner())
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl SqlService for Service {
    type ExecuteQueryStream = Parts;

    async fn execute_query(&self, request: Request<ExecuteQueryRequest>) -> Answer<Parts> {
        let (call, request) = self.begin("execute_query", request);
        Ok(Response::new(execute_query::start(call, &self.tasks, self.lost.clone(), request)))
    }

    async fn list_sql_connections(
        &self,
        request: Request<ListSqlConnectionsRequest>,
    ) -> Answer<ListSqlConnectionsResponse> {
        let (call, request) = self.begin("list_sql_connections", request);
        call.answer(async |app, caller| list_connections::run(app, caller, request).await).await
    }

    async fn explain_query(
        &self,
        request: Request<ExplainQueryRequest>,
    ) -> Answer<ExplainQueryResponse> {
        let (call, request) = self.begin("explain_query", request);
        call.answer(async |app, caller| explain_query::run(app, caller, request).await).await
    }

    async fn describe_schema(
        &self,
        request: Request<DescribeSchemaRequest>,
    ) -> Answer<DescribeSchemaResponse> {
        let (call, request) = self.begin("describe_schema", request);
        call.answer(async |app, caller| describe_schema::run(app, caller, request).await).await
    }

    async fn connect(&self, request: Request<ConnectRequest>) -> Answer<ConnectResponse> {
        let (call, request) = self.begin("connect", request);
        call.answer(async |app, caller| connect::run(app, caller, request).await).await
    }

    async fn connect_named(
        &self,
        request: Request<ConnectNamedRequest>,
    ) -> Answer<ConnectNamedResponse> {
        let (call, request) = self.begin("connect_named", request);
        call.answer(async |app, caller| connect_named::run(app, caller, request).await).await
    }

    async fn disconnect(&self, request: Request<DisconnectRequest>) -> Answer<DisconnectResponse> {
        let (call, request) = self.begin("disconnect", request);
        call.answer(async |app, caller| disconnect::run(app, caller, request).await).await
    }

    async fn create_credential_token(
        &self,
        request: Request<CreateCredentialTokenRequest>,
    ) -> Answer<CreateCredentialTokenResponse> {
        let (call, request) = self.begin("create_credential_token", request);
        call.answer(async |app, caller| create_credential_token::run(app, caller, request).await)
            .await
    }

    async fn revoke_credential_token(
        &self,
        request: Request<RevokeCredentialTokenRequest>,
    ) -> Answer<RevokeCredentialTokenResponse> {
        let (call, request) = self.begin("revoke_credential_token", request);
        call.answer(async |app, caller| revoke_credential_token::run(app, caller, request).await)
            .await
    }
}
