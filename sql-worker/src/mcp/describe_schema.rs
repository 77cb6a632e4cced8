//! `describe_schema`: what a database holds, in steps that stay small.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::place::place;
use super::schema::{object, objects};
use super::tool::{Hints, Tool};
use crate::app::{App, Described, Description, Principal, Subject};
use crate::error::Failure;
use crate::sql::catalogue::{Pattern, TableName};

/// The tool.
pub(super) struct DescribeSchema;

/// Of what.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Arguments {
    /// From list_connections; or give connection_id.
    database: Option<String>,
    connection_id: Option<String>,
    /// Glob: ord*, sales.*
    pattern: Option<String>,
    /// orders, sales.orders
    table: Option<String>,
}

/// Schemas, tables or one table.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Output {
    success: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "objects")]
    schemas: Option<Vec<Value>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "objects")]
    tables: Option<Vec<Value>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "object")]
    table: Option<Value>,
    truncated: bool,
}

impl From<Described> for Output {
    fn from(described: Described) -> Self {
        let (mut schemas, mut tables, mut table) = (None, None, None);
        match described.description {
            Description::Schemas(found) => schemas = Some(found),
            Description::Tables(found) => tables = Some(found),
            Description::Table(found) => table = Some(found),
        }
        Self { success: true, schemas, tables, table, truncated: described.truncated }
    }
}

/// What the arguments ask about.
fn subject(pattern: Option<&str>, table: Option<&str>) -> Result<Subject, Failure> {
    match (pattern, table) {
        (None, None) => Ok(Subject::Database),
        (Some(pattern), None) => Pattern::parse(pattern).map(Subject::Tables),
        (None, Some(table)) => TableName::parse(table).map(Subject::Table),
        (Some(_), Some(_)) => Err(Failure::invalid("give pattern or table, not both")),
    }
}

impl Tool for DescribeSchema {
    const NAME: &'static str = "describe_schema";
    const TITLE: &'static str = "Describe a database";
    const DESCRIPTION: &'static str = "Schemas and their tables; with pattern, matching tables with row \
        estimates and comments; with table, its columns, keys, checks, indexes and partitions. \
        Only what the connection's role may see and the connection offers.";
    const HINTS: Hints = Hints::ReadOnly;
    type Arguments = Arguments;
    type Output = Output;

    async fn run(app: &App, caller: &Principal, arguments: Arguments) -> Result<Output, Failure> {
        let Arguments { database, connection_id, pattern, table } = arguments;
        let source = place(database.as_deref(), connection_id.as_deref())?;
        let subject = subject(pattern.as_deref(), table.as_deref())?;
        app.describe(caller, source, &subject).await.map(Output::from)
    }

    fn holds_data(_output: &Output) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_chosen_by_what_is_given() {
        assert!(matches!(subject(None, None), Ok(Subject::Database)));
        assert!(matches!(subject(Some("a*"), None), Ok(Subject::Tables(_))));
        assert!(matches!(subject(None, Some("a.b")), Ok(Subject::Table(_))));
        assert!(subject(Some("a"), Some("b")).is_err() && subject(Some(""), None).is_err());
    }
}
