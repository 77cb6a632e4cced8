//! The one shape in which a tool refuses or fails.
//!
//! Invariant: nothing here carries a host, a DSN, a token, SQL text or a parameter's value.
//! Fixed texts are `&'static str`; the only foreign texts that pass are what a database server
//! says about the caller's own statement, with bound values, and those that a data exception
//! quotes, taken out, and its names of types. A failure knows when it has such a text.

use std::borrow::Cow;

use serde_json::{Map, Value, json};

/// Why a call failed, as the model and the client program see it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {message}", code.as_str())]
pub struct Failure {
    code: Code,
    message: Cow<'static, str>,
    sqlstate: Option<String>,
    hint: Option<Cow<'static, str>>,
    reference: Option<u64>,
    /// Whether a database wrote any of the texts.
    quotes: bool,
}

/// Stable names of failures: the broker's reasons, and the worker's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Denied, or no such connection.
    AccessDenied,
    /// The arguments are wrong.
    InvalidRequest,
    /// The handle is unknown, foreign, expired or revoked.
    HandleInvalid,
    /// Too many of something.
    LimitReached,
    /// An operator has suspended the connection.
    Suspended,
    /// The broker is shutting down.
    Draining,
    /// The database did not answer, or went away.
    UpstreamUnreachable,
    /// The database refused the broker's credential.
    UpstreamRefused,
    /// The database failed to prove who it is.
    UpstreamUntrusted,
    /// The broker's audit log cannot be written.
    AuditUnavailable,
    /// The broker itself does not answer.
    BrokerUnreachable,
    /// The connection or the call is read-only.
    ReadOnly,
    /// Not offered.
    Unsupported,
    /// A fault of the worker or the broker.
    Internal,
    /// The database refused the statement.
    SqlError,
    /// The statement took too long.
    Timeout,
    /// No connection became free in time; nothing was run.
    PoolTimeout,
    /// The call was cancelled, or its session was cut.
    Cancelled,
}

impl Code {
    /// The code as it stands in results.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AccessDenied => "ACCESS_DENIED",
            Self::InvalidRequest => "INVALID_REQUEST",
            Self::HandleInvalid => "HANDLE_INVALID",
            Self::LimitReached => "LIMIT_REACHED",
            Self::Suspended => "SUSPENDED",
            Self::Draining => "DRAINING",
            Self::UpstreamUnreachable => "UPSTREAM_UNREACHABLE",
            Self::UpstreamRefused => "UPSTREAM_REFUSED",
            Self::UpstreamUntrusted => "UPSTREAM_UNTRUSTED",
            Self::AuditUnavailable => "AUDIT_UNAVAILABLE",
            Self::BrokerUnreachable => "BROKER_UNREACHABLE",
            Self::ReadOnly => "READ_ONLY",
            Self::Unsupported => "UNSUPPORTED",
            Self::Internal => "INTERNAL",
            Self::SqlError => "SQL_ERROR",
            Self::Timeout => "TIMEOUT",
            Self::PoolTimeout => "POOL_TIMEOUT",
            Self::Cancelled => "CANCELLED",
        }
    }
}

impl Failure {
    /// A failure with a text that holds nothing from outside.
    #[must_use]
    pub fn new(code: Code, message: impl Into<Cow<'static, str>>) -> Self {
        let message = message.into();
        Self { code, message, sqlstate: None, hint: None, reference: None, quotes: false }
    }

    /// A failure whose text a database wrote, at least in part; hints that are added may be too.
    #[must_use]
    pub fn quoting(code: Code, message: impl Into<Cow<'static, str>>) -> Self {
        Self { quotes: true, ..Self::new(code, message) }
    }

    /// The arguments are wrong; `message` says which and how, without their values.
    #[must_use]
    pub fn invalid(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Code::InvalidRequest, message)
    }

    /// The one answer for a handle that is unknown, foreign, expired or revoked.
    ///
    /// It has no reference number: the broker makes one only for handles that it refuses
    /// itself, so a number would tell an unknown handle from a foreign one.
    #[must_use]
    pub fn handle_invalid() -> Self {
        Self::new(Code::HandleInvalid, "the handle is unknown, expired or revoked")
            .with_hint("make a new one with create_credential_token, or leave credential_token out")
    }

    /// The broker has no credential for the connection that is called `name` in its
    /// configuration: the one thing here that only a person can mend.
    #[must_use]
    pub fn credential_missing(name: &str) -> Self {
        Self::new(Code::UpstreamRefused, "the broker has no credential for this connection")
            .with_hint(format!(
                "a person runs `credbroker put {name}` (or `credbroker entry {name}`) on the \
                 host; never ask for the password here. Then call this again"
            ))
    }

    /// The call was cancelled, or the worker is ending.
    #[must_use]
    pub fn cancelled() -> Self {
        Self::new(Code::Cancelled, "the call was cancelled; its statement was stopped")
    }

    /// The same failure, with what the caller can do about it.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<Cow<'static, str>>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same failure without what a database wrote: it may hold what is not to be shown.
    #[must_use]
    pub fn without_quotes(self) -> Self {
        if self.quotes {
            Self { message: "the statement failed".into(), hint: None, quotes: false, ..self }
        } else {
            self
        }
    }

    /// Whether a database wrote any of its texts.
    #[must_use]
    pub fn quotes(&self) -> bool {
        self.quotes
    }

    /// The same failure, with the server's SQLSTATE.
    #[must_use]
    pub fn with_sqlstate(mut self, sqlstate: impl Into<String>) -> Self {
        self.sqlstate = Some(sqlstate.into());
        self
    }

    /// The same failure, with the number under which the broker's audit log has it.
    #[must_use]
    pub fn with_reference(mut self, reference: Option<u64>) -> Self {
        if let Some(reference) = reference {
            self.message = format!("{} (ref={reference})", self.message).into();
            self.reference = Some(reference);
        }
        self
    }

    /// Which kind of failure it is.
    #[must_use]
    pub fn code(&self) -> Code {
        self.code
    }

    /// The SQLSTATE, where a database server gave one.
    #[must_use]
    pub fn sqlstate(&self) -> Option<&str> {
        self.sqlstate.as_deref()
    }

    /// What happened, for people.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What the caller can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The number under which the broker's audit log has it.
    #[must_use]
    pub fn reference(&self) -> Option<u64> {
        self.reference
    }

    /// `{"success": false, "error": {"code", "message", "sqlstate"?, "hint"?}}`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut error = Map::new();
        error.insert("code".into(), self.code.as_str().into());
        error.insert("message".into(), self.message.as_ref().into());
        if let Some(sqlstate) = &self.sqlstate {
            error.insert("sqlstate".into(), sqlstate.as_str().into());
        }
        if let Some(hint) = &self.hint {
            error.insert("hint".into(), hint.as_ref().into());
        }
        json!({ "success": false, "error": error })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_has_exactly_the_contracted_shape() {
        let bare = Failure::new(Code::PoolTimeout, "no connection became free in time");
        assert_eq!(
            bare.to_json(),
            json!({"success": false, "error": {
                "code": "POOL_TIMEOUT", "message": "no connection became free in time"}})
        );
        let full = Failure::new(Code::SqlError, "division by zero")
            .with_sqlstate("22012")
            .with_hint("mind the zeros");
        assert_eq!(
            full.to_json(),
            json!({"success": false, "error": {"code": "SQL_ERROR", "message": "division by zero",
                "sqlstate": "22012", "hint": "mind the zeros"}})
        );
    }

    #[test]
    fn a_reference_goes_into_the_text() {
        let failure = Failure::new(Code::AccessDenied, "access denied").with_reference(Some(81));
        assert_eq!(failure.to_json()["error"]["message"], "access denied (ref=81)");
    }
}
