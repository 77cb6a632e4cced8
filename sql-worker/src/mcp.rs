//! The MCP edge, in both protocol eras as rmcp speaks them.
//!
//! Invariants: the list of tools is fixed, in a fixed order, and the same for everybody; bad
//! arguments and refusals are tool results with `isError`, only an unknown tool is a protocol
//! error; a call ends, and its statement with it, when nobody is left to get its answer.

mod call;
mod connect_named_storage;
mod create_credential_token;
mod disconnect;
mod execute_query;
mod execute_sql;
mod list_connections;
mod params;
mod progress;
mod result_set;
mod revoke_credential_token;
mod schema;
mod secrets;
mod tool;
mod trace;
pub mod transport;

use std::sync::Arc;
use std::time::Duration;

use rmcp::model::{
    CacheScope, CallToolRequestParams, CallToolResponse, GetPromptRequestParams, GetPromptResponse,
    Implementation, ListToolsResult, PaginatedRequestParams, ServerCapabilities, ServerConfig,
};
use rmcp::service::{RequestContext, serve_server_with_ct};
use rmcp::{ErrorData, RoleServer, ServerHandler};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use self::tool::{Entry, entry};
use self::transport::lines::Lines;
use crate::app::{App, Principal};

const NAME: &str = "credbroker-sql-worker";
const TITLE: &str = "SQL through the credential broker";
const INSTRUCTIONS: &str = "Runs SQL on named database connections. list_connections shows \
    them; execute_sql needs nothing but a name. No tool takes or shows a password: a person \
    stores it with `credbroker put NAME`. Pass values as params ($1 or :name), one statement \
    a call; every call is a transaction of its own.";

/// How long a client may keep the list of tools: it is a constant of this process.
const LIST_TTL_MS: u64 = 3_600_000;
/// Half of the second in which the worker promises to be gone: answers may still leave.
const DRAIN: Duration = Duration::from_millis(500);

/// Serves one client that writes and reads lines, until its input ends, it is lost, or `stop`
/// fires. With `patience`, it is lost when it does not take an answer in that time.
pub async fn serve<R, W>(
    app: Arc<App>,
    caller: Principal,
    (input, output): (R, W),
    patience: Option<Duration>,
    stop: CancellationToken,
) where
    R: AsyncRead + Send + Unpin + 'static,
    W: AsyncWrite + Send + Unpin + 'static,
{
    let ended = stop.child_token();
    let (lines, writing) = Lines::new(input, output, ended.clone(), patience);
    let server = Server::new(app, caller, ended.clone());
    // rmcp watches `stop` itself. It is not told of the end of input, so that it answers what
    // it has already read.
    let speaking = async {
        match serve_server_with_ct(server, lines, stop.child_token()).await {
            Ok(running) => {
                let _reason = running.waiting().await;
            }
            // The error may quote what the client sent.
            Err(_handshake) => tracing::info!("the client left before the handshake was done"),
        }
    };
    // It holds all that there is to say: the last of it is written when rmcp is done.
    let serving = async { tokio::join!(speaking, writing) };
    tokio::pin!(serving);
    tokio::select! {
        ((), ()) = &mut serving => return,
        () = ended.cancelled() => {}
    }
    if timeout(DRAIN, serving).await.is_err() {
        tracing::warn!("answers were left unsent");
    }
}

/// The tools, in the order in which they are listed.
fn tools() -> Vec<Entry> {
    vec![
        entry::<list_connections::ListConnections>(),
        entry::<execute_sql::ExecuteSql>(),
        entry::<create_credential_token::CreateCredentialToken>(),
        entry::<revoke_credential_token::RevokeCredentialToken>(),
        entry::<connect_named_storage::ConnectNamedStorage>(),
        entry::<execute_query::ExecuteQuery>(),
        entry::<disconnect::Disconnect>(),
    ]
}

struct Server {
    app: Arc<App>,
    caller: Principal,
    tools: Vec<Entry>,
    ended: CancellationToken,
}

impl Server {
    /// `ended` fires when no answer can leave any more.
    fn new(app: Arc<App>, caller: Principal, ended: CancellationToken) -> Self {
        Self { app, caller, tools: tools(), ended }
    }
}

impl ServerHandler for Server {
    fn get_info(&self) -> ServerConfig {
        let own = Implementation::new(NAME, env!("CARGO_PKG_VERSION")).with_title(TITLE);
        // There are no prompts, and that is said where the list is asked for: clients of either
        // era ask without looking at what was declared.
        ServerConfig::new(ServerCapabilities::builder().enable_tools().enable_prompts().build())
            .with_server_info(own)
            .with_instructions(INSTRUCTIONS)
    }

    async fn list_tools(
        &self,
        _page: Option<PaginatedRequestParams>,
        context: RequestContext<RoleServer>,
    ) -> Result<ListToolsResult, ErrorData> {
        let tools = self.tools.iter().map(|entry| entry.definition.clone()).collect();
        let mut result = ListToolsResult { tools, ..ListToolsResult::default() };
        if context.protocol_version().is_some_and(|version| !version.has_initialize()) {
            result.ttl_ms = Some(LIST_TTL_MS);
            result.cache_scope = Some(CacheScope::Public);
        }
        Ok(result)
    }

    async fn get_prompt(
        &self,
        _request: GetPromptRequestParams,
        _context: RequestContext<RoleServer>,
    ) -> Result<GetPromptResponse, ErrorData> {
        Err(ErrorData::invalid_params("unknown prompt", None))
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, ErrorData> {
        let entry = self.tools.iter().find(|entry| entry.definition.name == request.name);
        let entry = entry.ok_or_else(|| ErrorData::invalid_params("unknown tool", None))?;
        let arguments = request.arguments.unwrap_or_default();
        let Self { app, caller, ended, .. } = self;
        Ok(call::answer(app, caller, entry, arguments, &context, ended).await.into())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Calls `visit` with every subschema.
    fn walk(schema: &Value, visit: &mut dyn FnMut(&Value)) {
        visit(schema);
        for key in ["properties", "$defs"] {
            for (_, inner) in schema[key].as_object().into_iter().flatten() {
                walk(inner, visit);
            }
        }
        for key in ["items", "additionalProperties"] {
            let inner = &schema[key];
            if !inner.is_null() && *inner != Value::Bool(false) {
                walk(inner, visit);
            }
        }
        for inner in schema["anyOf"].as_array().into_iter().flatten() {
            walk(inner, visit);
        }
    }

    #[test]
    fn the_order_is_the_contracts() {
        let names: Vec<_> = tools().into_iter().map(|entry| entry.definition.name).collect();
        assert_eq!(
            names,
            [
                "list_connections",
                "execute_sql",
                "create_credential_token",
                "revoke_credential_token",
                "connect_named_storage",
                "execute_query",
                "disconnect",
            ]
        );
    }

    #[test]
    fn schemas_are_strict_and_portable() {
        for entry in tools() {
            let tool = entry.definition;
            let input = Value::Object(tool.input_schema.as_ref().clone());
            let output = Value::Object(tool.output_schema.unwrap().as_ref().clone());
            for schema in [&input, &output] {
                assert_eq!(schema["type"], "object", "{}", tool.name);
                assert_eq!(schema["additionalProperties"], false, "{}", tool.name);
                walk(schema, &mut |inner| {
                    assert!(inner.is_object(), "{}: bare {inner}", tool.name);
                    assert!(inner.get("format").is_none(), "{}: {inner}", tool.name);
                    assert!(inner.get("$ref").is_none(), "{}: {inner}", tool.name);
                    let typed = inner.get("type").is_some() || inner.get("anyOf").is_some();
                    assert!(typed, "{}: {inner}", tool.name);
                });
            }
            assert_eq!(output["required"], json!(["success"]), "{}", tool.name);
            assert_eq!(output["properties"]["error"]["type"], "object", "{}", tool.name);
            for (name, property) in input["properties"].as_object().into_iter().flatten() {
                assert!(property["description"].is_string(), "{}.{name}", tool.name);
            }
        }
    }

    #[test]
    fn every_tool_is_annotated_and_short() {
        for entry in tools() {
            let tool = entry.definition;
            let hints = tool.annotations.unwrap();
            assert!(hints.read_only_hint.is_some() && hints.open_world_hint == Some(false));
            assert!(hints.destructive_hint.is_some() && hints.idempotent_hint.is_some());
            assert!(tool.title.is_some());
            assert!(tool.description.unwrap().len() < 500, "{}", tool.name);
        }
    }
}
