//! `explain_query`: the plan of a statement, without running it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::place::place;
use super::tool::{Hints, Tool};
use crate::app::{App, Principal};
use crate::error::Failure;

/// The tool.
pub(super) struct ExplainQuery;

/// Of what.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Arguments {
    /// From list_connections; or give connection_id.
    database: Option<String>,
    connection_id: Option<String>,
    /// Without EXPLAIN.
    query: String,
}

/// The plan.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Output {
    success: bool,
    /// One line a node or detail.
    plan: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    total_cost: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    row_estimate: Option<f64>,
    truncated: bool,
}

impl Tool for ExplainQuery {
    const NAME: &'static str = "explain_query";
    const TITLE: &'static str = "Explain a query";
    const DESCRIPTION: &'static str = "The plan of a statement, with costs. It is not run; parameters need no \
        values.";
    const HINTS: Hints = Hints::ReadOnly;
    type Arguments = Arguments;
    type Output = Output;

    async fn run(app: &App, caller: &Principal, arguments: Arguments) -> Result<Output, Failure> {
        let Arguments { database, connection_id, query } = arguments;
        let source = place(database.as_deref(), connection_id.as_deref())?;
        let explanation = app.explain(caller, source, &query).await?;
        Ok(Output {
            success: true,
            plan: explanation.lines,
            total_cost: explanation.total_cost,
            row_estimate: explanation.row_estimate,
            truncated: explanation.truncated,
        })
    }

    fn holds_data(_output: &Output) -> bool {
        true
    }
}
