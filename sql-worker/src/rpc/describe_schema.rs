//! `DescribeSchema`: what a database holds, in steps that stay small.

use credbroker_proto::v1::describe_schema_request::Subject as Asked;
use credbroker_proto::v1::describe_schema_response::Description as Told;
use credbroker_proto::v1::{DescribeSchemaRequest, DescribeSchemaResponse, SqlObjects};
use serde_json::Value;

use super::place::place;
use super::value::object;
use crate::app::{App, Description, Principal, Subject};
use crate::error::Failure;
use crate::sql::catalogue::{Pattern, TableName};

pub(super) async fn run(
    app: &App,
    caller: &Principal,
    request: DescribeSchemaRequest,
) -> Result<DescribeSchemaResponse, Failure> {
    let place = place(request.target)?;
    let subject = match request.subject {
        None => Subject::Database,
        Some(Asked::Pattern(pattern)) => Subject::Tables(Pattern::parse(&pattern)?),
        Some(Asked::Table(table)) => Subject::Table(TableName::parse(&table)?),
    };
    let described = app.describe(caller, place.source(), &subject).await?;
    let description = match described.description {
        Description::Schemas(found) => Told::Schemas(objects(found)),
        Description::Tables(found) => Told::Tables(objects(found)),
        Description::Table(found) => Told::Table(object(found)),
    };
    let truncated = described.truncated;
    Ok(DescribeSchemaResponse { description: Some(description), truncated })
}

fn objects(found: Vec<Value>) -> SqlObjects {
    SqlObjects { objects: found.into_iter().map(object).collect() }
}
