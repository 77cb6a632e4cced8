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

    /// Whether a result holds what a database wrote, and so is marked as untrusted.
    fn holds_data(_output: &Self::Output) -> bool {
        false
    }

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
    /// It runs a statement of the caller's, which may change or remove anything where any
    /// connection allows that. The list of tools cannot tell connections apart.
    Statement,
    /// It ends something; once is as good as twice.
    Ends,
}

/// A tool, its types erased.
pub(super) struct Entry {
    pub(super) definition: rmcp::model::Tool,
    pub(super) call: Call,
}

impl Entry {
    /// Runs the tool; what does not fit its schema is refused.
    pub(super) fn run<'a>(
        &'a self,
        app: &'a App,
        caller: &'a Principal,
        arguments: JsonObject,
    ) -> BoxFuture<'a, Outcome> {
        (self.call)(self, app, caller, arguments)
    }
}

type Call = for<'a> fn(&'a Entry, &'a App, &'a Principal, JsonObject) -> BoxFuture<'a, Outcome>;

/// What a call gave.
pub(super) type Outcome = Result<Success, Failure>;

/// A result, its type erased.
#[derive(Debug)]
pub(super) struct Success {
    pub(super) value: Value,
    /// Whether a database wrote any of it.
    pub(super) holds_data: bool,
}

/// Erases the types of `T`. `may_write`: whether any statement may change something.
pub(super) fn entry<T: Tool>(may_write: bool) -> Entry {
    let definition =
        rmcp::model::Tool::new(T::NAME, T::DESCRIPTION, schema::input::<T::Arguments>())
            .with_title(T::TITLE)
            .with_raw_output_schema(schema::output::<T::Output>().into())
            .with_annotations(T::HINTS.annotations(may_write));
    Entry { definition, call: call::<T> }
}

fn call<'a, T: Tool>(
    entry: &'a Entry,
    app: &'a App,
    caller: &'a Principal,
    arguments: JsonObject,
) -> BoxFuture<'a, Outcome> {
    Box::pin(async move {
        let arguments = schema::read::<T::Arguments>(&entry.definition.input_schema, arguments)?;
        let output = T::run(app, caller, arguments).await?;
        let holds_data = T::holds_data(&output);
        let value = serde_json::to_value(output)
            .map_err(|_unserialisable| Failure::new(Code::Internal, "the result is not JSON"))?;
        Ok(Success { value, holds_data })
    })
}

impl Hints {
    /// Without a second copy of the title, without what means nothing for a tool that changes
    /// nothing, and without `idempotentHint` where it has its default, false: every byte is read
    /// by every model in every conversation.
    fn annotations(self, may_write: bool) -> ToolAnnotations {
        let hints = ToolAnnotations::new().open_world(false);
        match self {
            Self::ReadOnly => hints.read_only(true),
            Self::Statement if !may_write => hints.read_only(true),
            Self::Adds => hints.read_only(false).destructive(false),
            Self::Statement => hints.read_only(false).destructive(true),
            Self::Ends => hints.read_only(false).destructive(true).idempotent(true),
        }
    }
}
