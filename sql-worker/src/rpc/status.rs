//! The one place where a failure gets its gRPC code.

use std::collections::HashMap;
use std::time::Duration;

use credbroker_proto::ERROR_DOMAIN;
use tonic::{Code as Grpc, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::error::{Code, Failure};

/// What is refused for now may be asked again after this.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Bytes of a text: it travels in a header block, twice, and percent-encoded once. Clients take
/// 8 KiB of that by default.
const MAX_TEXT: usize = 800;

/// The failure, with its reason where programs find it.
pub(super) fn refused(failure: &Failure) -> Status {
    let mut metadata = HashMap::new();
    let mut add = |key: &str, value: String| metadata.insert(key.to_owned(), value);
    if let Some(reference) = failure.reference() {
        add("ref", reference.to_string());
    }
    if let Some(sqlstate) = failure.sqlstate() {
        add("sqlstate", sqlstate.to_owned());
    }
    if let Some(hint) = failure.hint() {
        add("hint", head(hint).to_owned());
    }
    let reason = failure.code().as_str();
    let mut details = ErrorDetails::with_error_info(reason, ERROR_DOMAIN, metadata);
    if let Code::LimitReached | Code::PoolTimeout = failure.code() {
        details.set_retry_info(Some(RETRY_AFTER));
    }
    Status::with_error_details(code(failure), head(failure.message()), details)
}

fn code(failure: &Failure) -> Grpc {
    match failure.code() {
        Code::AccessDenied => Grpc::PermissionDenied,
        Code::InvalidRequest => Grpc::InvalidArgument,
        Code::HandleInvalid => Grpc::NotFound,
        Code::LimitReached | Code::PoolTimeout => Grpc::ResourceExhausted,
        Code::Suspended | Code::UpstreamUntrusted | Code::ReadOnly => Grpc::FailedPrecondition,
        Code::Draining
        | Code::UpstreamUnreachable
        | Code::AuditUnavailable
        | Code::BrokerUnreachable => Grpc::Unavailable,
        Code::UpstreamRefused | Code::Internal => Grpc::Internal,
        Code::Unsupported => Grpc::Unimplemented,
        // Lost a race with another transaction: the same statement may succeed.
        Code::SqlError
            if failure
                .sqlstate()
                .is_some_and(|state| state.starts_with("40") || state == "55P03") =>
        {
            Grpc::Aborted
        }
        Code::SqlError => Grpc::InvalidArgument,
        Code::Timeout => Grpc::DeadlineExceeded,
        Code::Cancelled => Grpc::Cancelled,
    }
}

fn head(text: &str) -> &str {
    let end = (0..=text.len().min(MAX_TEXT)).rev().find(|end| text.is_char_boundary(*end));
    text.split_at_checked(end.unwrap_or(0)).map_or("", |(head, _)| head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_the_state_and_the_reference_are_for_programs() {
        let failure = Failure::new(Code::SqlError, "relation \"t\" does not exist")
            .with_sqlstate("42P01")
            .with_hint("look")
            .with_reference(Some(81));
        let status = refused(&failure);
        assert_eq!(status.code(), Grpc::InvalidArgument);
        let info = status.get_details_error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("SQL_ERROR", "credbroker"));
        assert_eq!(info.metadata["sqlstate"], "42P01");
        assert_eq!(info.metadata["ref"], "81");
        assert_eq!(info.metadata["hint"], "look");
        assert!(status.get_details_retry_info().is_none());

        let limited = refused(&Failure::new(Code::LimitReached, "too many"));
        assert_eq!(limited.get_details_retry_info().unwrap().retry_delay, Some(RETRY_AFTER));
    }

    #[test]
    fn a_race_that_was_lost_is_told_apart() {
        for (sqlstate, code) in
            [("40001", Grpc::Aborted), ("55P03", Grpc::Aborted), ("22012", Grpc::InvalidArgument)]
        {
            let failure = Failure::new(Code::SqlError, "no").with_sqlstate(sqlstate);
            assert_eq!(refused(&failure).code(), code, "{sqlstate}");
        }
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let long = format!("x{}", "é".repeat(600));
        let status = refused(&Failure::invalid(long));
        assert_eq!(status.message().len(), MAX_TEXT - 1);
        assert_eq!(head("short"), "short");
    }
}
