//! `execute_sql`: one statement on a connection, under the worker's handle or a token.

use schemars::JsonSchema;
use serde::Deserialize;

use super::params::ParamsArgument;
use super::result_set::StatementResult;
use super::tool::{Hints, Tool};
use crate::app::{App, Principal, Request, Source};
use crate::broker::Token;
use crate::error::Failure;
use crate::sql::Format;

/// The tool.
pub(super) struct ExecuteSql;

/// What to run, and where.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Arguments {
    /// A name from list_connections.
    database: String,
    /// One SQL statement.
    sql: String,
    /// A list for $1, $2, … or an object for :name. Decimals are exact as strings.
    params: Option<ParamsArgument>,
    /// From create_credential_token; not needed otherwise.
    credential_token: Option<String>,
    /// Rows to return.
    #[schemars(range(min = 1, max = 50000))]
    max_rows: Option<usize>,
    /// How rows are returned; json unless csv is asked for.
    format: Option<FormatArgument>,
    /// true: change nothing, on a connection that may write too.
    readonly: Option<bool>,
}

/// The form of rows.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum FormatArgument {
    Json,
    Csv,
}

impl Tool for ExecuteSql {
    const NAME: &'static str = "execute_sql";
    const TITLE: &'static str = "Run a SQL statement";
    const DESCRIPTION: &'static str = "Runs one SQL statement, as a transaction of its own; \
        connections are read-only unless they are configured otherwise. \
        int8 and numeric values are strings, bytea is base64. When truncated is true there was \
        more: the query was stopped there, and what its functions changed is rolled back; \
        INSERT, UPDATE and DELETE still complete.";
    const HINTS: Hints = Hints::Changes;
    type Arguments = Arguments;
    type Output = StatementResult;

    async fn run(
        app: &App,
        caller: &Principal,
        arguments: Arguments,
    ) -> Result<StatementResult, Failure> {
        // A text that is no token is told from an unknown one by nobody.
        let token = arguments.credential_token.as_deref().map(Token::parse).transpose();
        let token = token.map_err(|_not_a_token| Failure::handle_invalid())?;
        let source = match &token {
            Some(token) => Source::Token(&arguments.database, token),
            None => Source::Own(&arguments.database),
        };
        let request = Request {
            sql: &arguments.sql,
            params: arguments.params.into(),
            max_rows: arguments.max_rows,
            format: match arguments.format {
                Some(FormatArgument::Csv) => Format::Csv,
                Some(FormatArgument::Json) | None => Format::Json,
            },
            readonly: arguments.readonly,
        };
        app.run(caller, source, request).await.map(StatementResult::from)
    }
}
