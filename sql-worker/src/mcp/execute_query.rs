//! `execute_query`: one statement on an open connection.

use schemars::JsonSchema;
use serde::Deserialize;

use super::params::ParamsArgument;
use super::result_set::StatementResult;
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
    /// From connect_named_storage.
    connection_id: String,
    /// One SQL statement.
    query: String,
    /// A list for $1, $2, … or an object for :name. Decimals are exact as strings.
    params: Option<ParamsArgument>,
    /// true: change nothing, on a connection that may write too.
    readonly: Option<bool>,
}

impl Tool for ExecuteQuery {
    const NAME: &'static str = "execute_query";
    const TITLE: &'static str = "Run a query on an open connection";
    const DESCRIPTION: &'static str =
        "Runs one SQL statement on a connection_id. Results and limits are those of execute_sql.";
    const HINTS: Hints = Hints::Changes;
    type Arguments = Arguments;
    type Output = StatementResult;

    async fn run(
        app: &App,
        caller: &Principal,
        arguments: Arguments,
    ) -> Result<StatementResult, Failure> {
        let request = Request {
            sql: &arguments.query,
            params: arguments.params.into(),
            max_rows: None,
            format: Format::Json,
            readonly: arguments.readonly,
        };
        let source = Source::Reference(&arguments.connection_id);
        app.run(caller, source, request).await.map(StatementResult::from)
    }
}
