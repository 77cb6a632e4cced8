//! What sqlx reports, as a [`Failure`]. The one place where its errors become text.
//!
//! sqlx's own texts are never used: some hold host names, paths or statements. Of a server's
//! error only `message`, `hint` and SQLSTATE pass; `detail`, `where` and the rest hold values.

use std::borrow::Cow;

use sqlx::postgres::PgDatabaseError;

use crate::error::{Code, Failure};

/// A door where nobody is.
pub(super) fn of_silence() -> Failure {
    Failure::new(Code::BrokerUnreachable, "the broker's door does not answer")
}

/// A login through a door that failed; no statement was sent.
pub(super) fn of_connect(error: &sqlx::Error) -> Failure {
    let Some(error) = database(error) else {
        return of_silence();
    };
    let refused = |code, message| Failure::new(code, message).with_reference(reference(error));
    // The door names its reason in the routine field; several reasons share a SQLSTATE. What
    // has none of these is the database's own answer.
    match error.routine().unwrap_or_default() {
        "HANDLE_INVALID" | "HANDLE_EXPIRED" => Failure::handle_invalid(),
        "ACCESS_DENIED" => refused(Code::AccessDenied, "access denied"),
        "LIMIT_REACHED" => {
            refused(Code::LimitReached, "too many sessions or requests; try again later")
        }
        "SUSPENDED" => refused(Code::Suspended, "an operator has suspended the connection"),
        "DRAINING" => refused(Code::Draining, "the broker is shutting down"),
        "INVALID_REQUEST" => {
            refused(Code::InvalidRequest, "the broker refused how the session was opened")
        }
        "UPSTREAM_UNREACHABLE" => {
            refused(Code::UpstreamUnreachable, "the database cannot be reached")
        }
        "UPSTREAM_REFUSED" => {
            refused(Code::UpstreamRefused, "the database refused the broker's credential")
        }
        "UPSTREAM_UNTRUSTED" => {
            refused(Code::UpstreamUntrusted, "the database did not prove who it is")
        }
        "AUDIT_UNAVAILABLE" => {
            refused(Code::AuditUnavailable, "the broker's audit log cannot be written")
        }
        "UNSUPPORTED" => refused(Code::Unsupported, "the broker does not offer this"),
        "INTERNAL" => refused(Code::Internal, "the broker met a fault of its own"),
        _ => Failure::quoting(Code::SqlError, bounded(error.message()))
            .with_sqlstate(error.code().to_owned()),
    }
}

/// A statement that failed, or whose session was lost. `values` are taken out of the text.
pub(super) fn of_statement(error: &sqlx::Error, values: &[Option<String>]) -> Failure {
    if let sqlx::Error::Protocol(_) = error {
        return Failure::new(Code::Unsupported, "the database answered in an unexpected way")
            .with_hint("COPY between client and server is not supported; use SELECT or INSERT");
    }
    if let sqlx::Error::ColumnDecode { .. } = error {
        // What is left of those after the types were looked up: see `Described`.
        return Failure::new(
            Code::Unsupported,
            "a column or a parameter has a type that is not known here; nothing was run",
        )
        .with_hint("name the columns, and cast that one to text: x::text");
    }
    let Some(error) = database(error) else {
        return Failure::new(
            Code::UpstreamUnreachable,
            "the session was lost while the statement ran; its effects are unknown",
        );
    };
    // A function of the database may raise any SQLSTATE with any words.
    let failure = match error.code() {
        "57014" if error.message().contains("statement timeout") => {
            Failure::new(Code::Timeout, "the server stopped the statement: it took too long")
        }
        "57014" => Failure::new(Code::Cancelled, "the statement was stopped in the server"),
        "57P01" | "57P02" | "57P03" => {
            Failure::new(Code::Cancelled, "the server ended the session")
        }
        "25006" => {
            Failure::new(Code::ReadOnly, "the statement changes something; nothing was kept")
        }
        code => {
            let message = without_values(code, &bounded(error.message()), values);
            Failure::quoting(Code::SqlError, message)
        }
    };
    let hint = own_hint(error).map(Cow::Borrowed);
    let servers = || error.hint().filter(|_| failure.quotes()).map(|hint| bounded(hint));
    let failure = match hint.or_else(servers) {
        Some(hint) => failure.with_hint(hint),
        None => failure,
    };
    failure.with_sqlstate(error.code().to_owned())
}

/// Bytes of a text of the server's. What needs more quotes values.
const MAX_TEXT: usize = 2000;

fn bounded(text: &str) -> Cow<'static, str> {
    if text.len() <= MAX_TEXT {
        return text.to_owned().into();
    }
    format!("(a text of {} bytes, which is left out)", text.len()).into()
}

/// Whether the server refused, and so the session is still in step.
pub(super) fn is_in_step(error: &sqlx::Error) -> bool {
    database(error).is_some_and(|error| !error.code().starts_with("57P"))
}

fn database(error: &sqlx::Error) -> Option<&PgDatabaseError> {
    error.as_database_error()?.try_downcast_ref::<PgDatabaseError>()
}

/// The number after `ref=` in a door's message.
fn reference(error: &PgDatabaseError) -> Option<u64> {
    let (_, after) = error.message().split_once("ref=")?;
    after.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// What there is to do about it, where that is known here.
fn own_hint(error: &PgDatabaseError) -> Option<&'static str> {
    match error.code() {
        "42601" if error.message().contains("multiple commands") => {
            Some("send one statement a call")
        }
        "25006" => Some(
            "the call is read-only; writing takes access = \"read-write\" for this connection in \
             the worker's configuration",
        ),
        "55P03" => Some("another transaction holds the lock; try again later"),
        "42P18" => Some("say which type the parameter has: CAST($1 AS integer)"),
        _ => None,
    }
}

/// PostgreSQL quotes the input that it could not read: `… for type integer: "abc"`. That may be
/// a parameter, a part of the statement, or what stands in a row that nobody meant to show.
fn without_values(sqlstate: &str, message: &str, values: &[Option<String>]) -> String {
    let mut message = message.to_owned();
    for value in values.iter().flatten().filter(|value| !value.is_empty()) {
        message = message.replace(&format!("\"{value}\""), "(the parameter's value)");
        if value.len() >= 4 {
            message = message.replace(value.as_str(), "(the parameter's value)");
        }
    }
    // Class 22, data exceptions: what is quoted there is a value, and may hold quotes itself.
    if sqlstate.starts_with("22")
        && let Some((before, rest)) = message.split_once('"')
        && let Some((_value, after)) = rest.rsplit_once('"')
    {
        return format!("{before}(a value){after}");
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bound_values_do_not_come_back() {
        let values = [Some("hunter2".to_owned()), None, Some("1".to_owned()), Some(String::new())];
        assert_eq!(
            without_values("22P02", "invalid input syntax for type integer: \"hunter2\"", &values),
            "invalid input syntax for type integer: (the parameter's value)"
        );
        assert_eq!(
            without_values("42601", "column 1 is \"1\"", &values),
            "column 1 is (the parameter's value)"
        );
        assert_eq!(
            without_values("42601", "Token \"hunter2,\" is invalid", &values),
            "Token \"(the parameter's value),\" is invalid"
        );
    }

    #[test]
    fn a_value_of_a_row_does_not_come_out_in_an_error() {
        let cases = [
            ("22P02", "for type integer: \"a\"b\"", "for type integer: (a value)"),
            ("22003", "value \"999\" is out of range", "value (a value) is out of range"),
            ("22012", "division by zero", "division by zero"),
            ("42P01", "relation \"t\" does not exist", "relation \"t\" does not exist"),
        ];
        for (sqlstate, message, expected) in cases {
            assert_eq!(without_values(sqlstate, message, &[]), expected);
        }
    }

    #[test]
    fn what_is_no_server_message_gets_a_fixed_text() {
        let error = sqlx::Error::Protocol("host db.internal".into());
        assert_eq!(of_statement(&error, &[]).code(), Code::Unsupported);
        let error = sqlx::Error::Io(std::io::Error::other("/run/secret/path"));
        let failure = of_connect(&error);
        assert_eq!(failure.code(), Code::BrokerUnreachable);
        assert!(!failure.to_string().contains("path"));
        assert_eq!(of_statement(&error, &[]).code(), Code::UpstreamUnreachable);
    }
}
