//! The result of a statement, as `execute_sql` and `execute_query` give it.

use std::borrow::Cow;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Serialize;
use serde_json::Value;

use super::schema::objects;
use crate::sql::{Answer, Body};

/// Columns and rows, or the number of affected rows.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub(super) struct StatementResult {
    success: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "objects")]
    columns: Option<Vec<ColumnResult>>,
    /// One array of cells a row.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "rows_schema")]
    rows: Option<Vec<Value>>,
    /// The rows as CSV with a header line, when that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    csv: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    row_count: Option<usize>,
    /// Whether the statement gave more than is shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    truncated: Option<bool>,
    /// The limit that was met: max_rows, max_bytes or max_cell_bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(skip)]
    truncated_reason: Option<&'static str>,
    /// For statements that change rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    affected_rows: Option<u64>,
    #[schemars(skip)]
    elapsed_ms: u64,
    /// Where a query that was cut goes on.
    #[serde(skip_serializing_if = "Option::is_none")]
    next_cursor: Option<String>,
}

/// A column.
#[derive(Debug, Serialize)]
struct ColumnResult {
    name: String,
    /// PostgreSQL's name of the type.
    r#type: String,
    /// Present where the values are not shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    masked: Option<bool>,
}

impl StatementResult {
    /// One page, and where the next begins.
    pub(super) fn page((answer, next_cursor): (Answer, Option<String>)) -> Self {
        Self { next_cursor, ..Self::from(answer) }
    }

    /// Whether there are rows, and so what a database wrote.
    pub(super) fn has_rows(&self) -> bool {
        self.columns.is_some()
    }
}

/// The same for a second tool, whose schema need not repeat it.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub(super) struct QueryResult(pub(super) StatementResult);

impl JsonSchema for QueryResult {
    fn schema_name() -> Cow<'static, str> {
        "QueryResult".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_generator: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "object", "properties": {"success": {"type": "boolean"}}})
    }
}

fn rows_schema(_generator: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "items": {"type": "array"},
    })
}

impl From<Answer> for StatementResult {
    fn from(answer: Answer) -> Self {
        match answer {
            Answer::Done { affected_rows, elapsed } => Self {
                success: true,
                affected_rows: Some(affected_rows),
                elapsed_ms: millis(elapsed),
                ..Self::default()
            },
            Answer::Rows(set) => {
                let columns = set.columns.into_iter();
                let columns = columns.map(|column| ColumnResult {
                    name: column.name,
                    r#type: column.type_name,
                    masked: column.masked.then_some(true),
                });
                let (rows, csv) = match set.body {
                    Body::Rows(rows) => (Some(rows), None),
                    Body::Csv(text) => (None, Some(text)),
                };
                Self {
                    success: true,
                    columns: Some(columns.collect()),
                    rows,
                    csv,
                    row_count: Some(set.row_count),
                    truncated: Some(set.cut.is_some()),
                    truncated_reason: set.cut.map(|cut| cut.as_str()),
                    affected_rows: set.affected_rows,
                    elapsed_ms: millis(set.elapsed),
                    ..Self::default()
                }
            }
        }
    }
}

fn millis(elapsed: Duration) -> u64 {
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::sql::{Column, Cut, ResultSet};

    #[test]
    fn the_shapes_are_the_contracts() {
        let columns = vec![Column { name: "a".into(), type_name: "int4".into(), masked: false }];
        let elapsed = Duration::from_millis(3);
        let set = |body, cut| ResultSet {
            columns: columns.clone(),
            body,
            row_count: 1,
            affected_rows: None,
            cut,
            elapsed,
        };
        let to_json = |answer| serde_json::to_value(StatementResult::from(answer)).unwrap();
        assert_eq!(
            to_json(Answer::Rows(set(Body::Rows(vec![json!([1])]), Some(Cut::Rows)))),
            json!({"success": true, "columns": [{"name": "a", "type": "int4"}], "rows": [[1]],
                "row_count": 1, "truncated": true, "truncated_reason": "max_rows", "elapsed_ms": 3})
        );
        assert_eq!(
            to_json(Answer::Rows(set(Body::Csv("a\r\n1\r\n".into()), None))),
            json!({"success": true, "columns": [{"name": "a", "type": "int4"}],
                "csv": "a\r\n1\r\n", "row_count": 1, "truncated": false, "elapsed_ms": 3})
        );
        assert_eq!(
            to_json(Answer::Done { affected_rows: 2, elapsed }),
            json!({"success": true, "affected_rows": 2, "elapsed_ms": 3})
        );
    }
}
