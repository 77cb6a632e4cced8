//! Where a verb works: on a connection by its name, or on one that was opened.

use credbroker_proto::v1::{describe_schema_request, execute_query_request, explain_query_request};

use crate::app::Source;
use crate::broker::Token;
use crate::error::Failure;

/// A place, as a message names it.
#[derive(Debug)]
pub(super) enum Place {
    Name(String),
    Opened(String),
}

impl Place {
    /// The source of sessions there, under the worker's own handle.
    pub(super) fn source(&self) -> Source<'_> {
        match self {
            Self::Name(name) => Source::Own(name),
            Self::Opened(id) => Source::Reference(id),
        }
    }

    /// As [`source`](Self::source), under `token` where there is one.
    pub(super) fn source_with<'a>(
        &'a self,
        token: Option<&'a Token>,
    ) -> Result<Source<'a>, Failure> {
        match (self, token) {
            (_, None) => Ok(self.source()),
            (Self::Name(name), Some(token)) => Ok(Source::Token(name, token)),
            (Self::Opened(_), Some(_)) => {
                Err(Failure::invalid("credential_token goes with connection, not connection_id"))
            }
        }
    }
}

/// The place, if it was given.
pub(super) fn place(target: Option<impl Into<Place>>) -> Result<Place, Failure> {
    target.map(Into::into).ok_or_else(|| Failure::invalid("give connection or connection_id"))
}

impl From<execute_query_request::Target> for Place {
    fn from(target: execute_query_request::Target) -> Self {
        match target {
            execute_query_request::Target::Connection(name) => Self::Name(name),
            execute_query_request::Target::ConnectionId(id) => Self::Opened(id),
        }
    }
}

impl From<explain_query_request::Target> for Place {
    fn from(target: explain_query_request::Target) -> Self {
        match target {
            explain_query_request::Target::Connection(name) => Self::Name(name),
            explain_query_request::Target::ConnectionId(id) => Self::Opened(id),
        }
    }
}

impl From<describe_schema_request::Target> for Place {
    fn from(target: describe_schema_request::Target) -> Self {
        match target {
            describe_schema_request::Target::Connection(name) => Self::Name(name),
            describe_schema_request::Target::ConnectionId(id) => Self::Opened(id),
        }
    }
}
