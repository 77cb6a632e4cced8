//! What a tool is: a name, hints, argument and result types, and one function.

use futures_util::future::BoxFuture;
use rmcp::model::{JsonObject, ToolAnnotations};
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::schema;
use crate::app::{App, Principal};
use crate::error::{Code, Failure};

/// One tool. Its arguments must `deny_unknown_fields`.
pub(super) trait Tool {
    const NAME: &'static str;
    const TITLE: &'static str;
    const DESCRIPTION: &'static str;
    const HINTS: Hints;
    type Arguments: DeserializeOwned + JsonSchema + Send + 'static;
    type Output: Serialize + JsonSchema;

    /// Does it. Dropping the future cancels the call.
    fn run(
        app: &App,
        caller: &Principal,
        arguments: Self::Arguments,
    ) -> impl Future<Output = Result<Self::Output, Failure>> + Send;
}

/// What a client may be told about a tool's effects.
#[derive(Debug, Clone, Copy)]
pub(super) enum Hints {
    /// It changes nothing.
    ReadOnly,
    /// It adds something that was not there.
    Adds,
    /// It may change or remove anything, and more when it is repeated.
    Changes,
    /// It ends something; once is as good as twice.
    Ends,
}

/// A tool, its types erased.
pub(super) struct Entry {
    pub(super) definition: rmcp::model::Tool,
    pub(super) call: Call,
}

type Call = for<'a> fn(&'a App, &'a Principal, JsonObject) -> BoxFuture<'a, Outcome>;
type Outcome = Result<Value, Failure>;

/// Erases the types of `T`.
pub(super) fn entry<T: Tool>() -> Entry {
    let definition =
        rmcp::model::Tool::new(T::NAME, T::DESCRIPTION, schema::input::<T::Arguments>())
            .with_title(T::TITLE)
            .with_raw_output_schema(schema::output::<T::Output>().into())
            .with_annotations(T::HINTS.annotations(T::TITLE));
    Entry { definition, call: call::<T> }
}

fn call<'a, T: Tool>(
    app: &'a App,
    caller: &'a Principal,
    arguments: JsonObject,
) -> BoxFuture<'a, Outcome> {
    Box::pin(async move {
        let arguments = schema::read::<T::Arguments>(arguments)?;
        let output = T::run(app, caller, arguments).await?;
        serde_json::to_value(output)
            .map_err(|_unserialisable| Failure::new(Code::Internal, "the result is not JSON"))
    })
}

impl Hints {
    fn annotations(self, title: &str) -> ToolAnnotations {
        let (read_only, destructive, idempotent) = match self {
            Self::ReadOnly => (true, false, true),
            Self::Adds => (false, false, false),
            Self::Changes => (false, true, false),
            Self::Ends => (false, true, true),
        };
        ToolAnnotations::with_title(title)
            .read_only(read_only)
            .destructive(destructive)
            .idempotent(idempotent)
            .open_world(false)
    }
}
