//! Schemas as resources: `schema://connection/NAME`, and `…/NAME/SCHEMA/TABLE`.
//!
//! What is read is the answer of `describe_schema`, as JSON. It is data that a database wrote,
//! so `_meta` marks it; the text stays JSON, because its type says so. Names are
//! percent-encoded (RFC 3986, 2.1). A resource that is not there and one that the worker may
//! not see are the same answer.

use rmcp::ErrorData;
use rmcp::model::{
    ListResourceTemplatesResult, ListResourcesResult, MetaObject, PaginatedRequestParams,
    ReadResourceResult, Resource, ResourceContents, ResourceTemplate,
};
use serde_json::json;

use super::describe_schema::Output;
use super::untrusted;
use crate::app::{App, Principal, Source, Subject};
use crate::error::{Code, Failure};
use crate::sql::catalogue::TableName;

const PREFIX: &str = "schema://connection/";
const TEMPLATE: &str = "schema://connection/{connection}/{schema}/{table}";
const JSON: &str = "application/json";
const MAX_URI: usize = 1024;

/// One resource a connection.
///
/// # Errors
/// The broker's, as a protocol error.
pub(super) async fn list(
    app: &App,
    page: Option<PaginatedRequestParams>,
) -> Result<ListResourcesResult, ErrorData> {
    first_page(page)?;
    let connections = app.connections().await.map_err(|failure| internal(&failure))?;
    let resources = connections
        .into_iter()
        .map(|connection| {
            let uri = format!("{PREFIX}{}", encoded(&connection.name));
            Resource::new(uri, connection.name)
                .with_title("Schemas and tables")
                .with_mime_type(JSON)
        })
        .collect();
    Ok(ListResourcesResult::with_all_items(resources))
}

/// The template for single tables.
///
/// # Errors
/// When a further page is asked for.
pub(super) fn templates(
    page: Option<PaginatedRequestParams>,
) -> Result<ListResourceTemplatesResult, ErrorData> {
    first_page(page)?;
    let table = ResourceTemplate::new(TEMPLATE, "table")
        .with_title("A table")
        .with_description("Columns, keys, checks, indexes and partitions of one table.")
        .with_mime_type(JSON);
    Ok(ListResourceTemplatesResult::with_all_items(vec![table]))
}

/// What a resource holds.
///
/// # Errors
/// Not found, by the code of the client's era; the failure as data of an internal error.
pub(super) async fn read(
    app: &App,
    caller: &Principal,
    uri: &str,
) -> Result<ReadResourceResult, ErrorData> {
    let (connection, subject) = parse(uri).ok_or_else(|| not_found(uri))?;
    let described = app.describe(caller, Source::Own(&connection), &subject).await;
    let output = described.map(Output::from).map_err(|failure| match failure.code() {
        Code::AccessDenied | Code::InvalidRequest => not_found(uri),
        Code::HandleInvalid
        | Code::LimitReached
        | Code::Suspended
        | Code::Draining
        | Code::UpstreamUnreachable
        | Code::UpstreamRefused
        | Code::UpstreamUntrusted
        | Code::AuditUnavailable
        | Code::BrokerUnreachable
        | Code::Unsupported
        | Code::Internal
        | Code::SqlError
        | Code::Timeout
        | Code::PoolTimeout
        | Code::Cancelled
        | Code::ReadOnly => internal(&failure),
    })?;
    let text = serde_json::to_string(&output).map_err(|_unserialisable| {
        internal(&Failure::new(Code::Internal, "the result is not JSON"))
    })?;
    let mut meta = MetaObject::default();
    meta.insert(untrusted::KEY.to_owned(), true.into());
    let contents = ResourceContents::text(text, uri).with_mime_type(JSON).with_meta(meta);
    Ok(ReadResourceResult::new(vec![contents]))
}

/// Lists come whole, so there is no page to go on from.
///
/// # Errors
/// -32602 for any cursor, as the specification tells for one that is not known.
pub(super) fn first_page(page: Option<PaginatedRequestParams>) -> Result<(), ErrorData> {
    match page.and_then(|page| page.cursor) {
        None => Ok(()),
        Some(_) => Err(ErrorData::invalid_params("the cursor is unknown", None)),
    }
}

/// The failure of a request that is no tool call.
pub(super) fn internal(failure: &Failure) -> ErrorData {
    // A protocol error has no place for marks.
    let failure = failure.clone().without_quotes();
    ErrorData::internal_error(failure.to_string(), Some(failure.to_json()))
}

fn not_found(uri: &str) -> ErrorData {
    let own = (uri.len() <= MAX_URI).then(|| json!({ "uri": uri }));
    ErrorData::resource_not_found("no such resource, or it may not be seen", own)
}

fn parse(uri: &str) -> Option<(String, Subject)> {
    let path = uri.strip_prefix(PREFIX).filter(|_| uri.len() <= MAX_URI)?;
    let mut parts = path.split('/').map(decoded);
    let connection = parts.next()??;
    let subject = match (parts.next(), parts.next(), parts.next()) {
        (None, _, _) => Subject::Database,
        (Some(schema), Some(table), None) => Subject::Table(TableName::new(&schema?, &table?)),
        (Some(_), _, _) => return None,
    };
    Some((connection, subject))
}

/// A segment that may be a name: it is not empty, and has no NUL.
fn decoded(segment: &str) -> Option<String> {
    let text = super::connection_string::decoded(segment).ok()?;
    (!text.is_empty() && !text.contains('\0')).then_some(text)
}

fn encoded(name: &str) -> String {
    let mut segment = String::new();
    for byte in name.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                segment.push(char::from(byte));
            }
            other => segment.push_str(&format!("%{other:02X}")),
        }
    }
    segment
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_connection_or_a_table() {
        let read = |uri: &str| {
            let (connection, subject) = parse(uri)?;
            let table = match subject {
                Subject::Database => None,
                Subject::Table(table) => Some(table),
                Subject::Tables(_) => panic!("{uri}"),
            };
            Some((connection, table))
        };
        assert_eq!(read("schema://connection/main_db"), Some(("main_db".into(), None)));
        assert_eq!(
            read("schema://connection/main%5Fdb/My%20Schema/a%2Fb"),
            Some(("main_db".into(), Some(TableName::new("My Schema", "a/b"))))
        );
        for uri in [
            "schema://connection/",
            "schema://connection/a/",
            "schema://connection/a/b",
            "schema://connection/a/b/",
            "schema://connection/a/b/c/d",
            "schema://connection/%zz",
            "schema://connection/a/b/c%00",
            "schema://other/a",
            "file:///etc/passwd",
            "",
        ] {
            assert_eq!(read(uri), None, "{uri}");
        }
        assert_eq!(read(&format!("{PREFIX}{}", "x".repeat(MAX_URI))), None);
        assert_eq!(encoded("main_db"), "main_db");
        assert_eq!(decoded(&encoded("a b/é%")), Some("a b/é%".to_owned()));
    }
}
