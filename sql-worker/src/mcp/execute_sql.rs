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
    /// From list_connections.
    database: String,
    sql: String,
    /// List for $1, object for :name; decimals as strings.
    params: Option<ParamsArgument>,
    credential_token: Option<String>,
    #[schemars(range(min = 1, max = 50000))]
    max_rows: Option<usize>,
    /// next_cursor of a truncated result.
    cursor: Option<String>,
    /// Default json.
    format: Option<FormatArgument>,
    /// true: change nothing.
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
    const DESCRIPTION: &'static str = "Runs one SQL statement in its own transaction, read-only unless configured \
        otherwise. int8 and numeric come as strings, bytea as base64. If truncated, repeat the call \
        with cursor = next_cursor within 10 minutes: the query runs again from that row on, so use \
        ORDER BY.";
    const HINTS: Hints = Hints::Statement;
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
        let cursor = arguments.cursor.as_deref();
        app.page(caller, source, request, cursor).await.map(StatementResult::page)
    }

    fn holds_data(output: &StatementResult) -> bool {
        output.has_rows()
    }
}
