//! `execute_query`: one statement on an open connection.

use schemars::JsonSchema;
use serde::Deserialize;

use super::params::ParamsArgument;
use super::result_set::{QueryResult, StatementResult};
use super::tool::{Hints, Tool};
use crate::app::{App, Principal, Request, Source};
use crate::error::Failure;
use crate::sql::Format;

/// The tool.
pub(super) struct ExecuteQuery;

/// What to run, and where.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Arguments {
    connection_id: String,
    query: String,
    /// As in execute_sql.
    params: Option<ParamsArgument>,
    cursor: Option<String>,
    readonly: Option<bool>,
}

impl Tool for ExecuteQuery {
    const NAME: &'static str = "execute_query";
    const TITLE: &'static str = "Run a query";
    const DESCRIPTION: &'static str = "As execute_sql, on a connection_id.";
    const HINTS: Hints = Hints::Statement;
    type Arguments = Arguments;
    type Output = QueryResult;

    async fn run(
        app: &App,
        caller: &Principal,
        arguments: Arguments,
    ) -> Result<QueryResult, Failure> {
        let request = Request {
            sql: &arguments.query,
            params: arguments.params.into(),
            max_rows: None,
            format: Format::Json,
            readonly: arguments.readonly,
        };
        let source = Source::Reference(&arguments.connection_id);
        let cursor = arguments.cursor.as_deref();
        let page = app.page(caller, source, request, cursor).await?;
        Ok(QueryResult(StatementResult::page(page)))
    }

    fn holds_data(QueryResult(output): &QueryResult) -> bool {
        output.has_rows()
    }
}
