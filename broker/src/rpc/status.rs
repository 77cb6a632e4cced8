//! The one place where a refusal gets its gRPC code.

#![forbid(unsafe_code)]

use std::collections::HashMap;

use credbroker_proto::ERROR_DOMAIN;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::core::{Refusal, Why};

/// The refusal, with its reason and reference where programs find them.
pub(super) fn refused(refusal: &Refusal) -> Status {
    let why = refusal.why();
    let mut metadata = HashMap::from([("ref".to_owned(), refusal.reference().to_string())]);
    if let Some(field) = why.field() {
        metadata.insert("field".to_owned(), field.to_owned());
    }
    let mut details = ErrorDetails::with_error_info(why.name(), ERROR_DOMAIN, metadata);
    if let Some(after) = why.retry_after() {
        details.set_retry_info(Some(after));
    }
    Status::with_error_details(code(why), refusal.message(), details)
}

/// A failure that is told to an operator in full. It is no refusal, so it has no reference.
pub(super) fn told(code: Code, reason: &str, message: String) -> Status {
    let details = ErrorDetails::with_error_info(reason, ERROR_DOMAIN, HashMap::new());
    Status::with_error_details(code, message, details)
}

fn code(why: &Why) -> Code {
    match why {
        Why::AccessDenied | Why::PeerExited => Code::PermissionDenied,
        Why::InvalidRequest { .. } | Why::SettingRefused(_) => Code::InvalidArgument,
        Why::HandleInvalid => Code::NotFound,
        Why::HandleExpired | Why::Suspended | Why::UpstreamUntrusted => Code::FailedPrecondition,
        Why::LimitReached { .. } => Code::ResourceExhausted,
        Why::Draining | Why::UpstreamUnreachable | Why::AuditUnavailable => Code::Unavailable,
        Why::HandoffUnsupported(_) | Why::Unsupported(_) => Code::Unimplemented,
        Why::UpstreamRefused(_)
        | Why::UpstreamHeld { .. }
        | Why::NoCredential(_)
        | Why::Internal(_)
        | Why::NotSaved(_) => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_in_the_contract() {
        let all = [
            Why::AccessDenied,
            Why::InvalidRequest { field: "ttl", must: "be" },
            Why::HandleInvalid,
            Why::HandleExpired,
            Why::limit("sessions"),
            Why::Suspended,
            Why::Draining,
            Why::HandoffUnsupported("x"),
            Why::UpstreamUnreachable,
            Why::UpstreamUntrusted,
            Why::AuditUnavailable,
            Why::Unsupported("x"),
            Why::Internal("x"),
            Why::NotSaved("x".to_owned()),
            Why::SettingRefused(None),
            Why::PeerExited,
        ];
        for why in all {
            assert!(
                credbroker_proto::v1::Reason::from_wire_name(why.name()).is_some(),
                "{}",
                why.name()
            );
        }
    }
}
