//! The one place where a refusal gets its form on the packet sockets.

#![forbid(unsafe_code)]

use credbroker_proto::v1::{self, Reason};

use crate::core::{Refusal, Why};

/// The refusal, with its reason and reference where programs find them.
pub(super) fn refused(refusal: &Refusal) -> v1::Refused {
    let why = refusal.why();
    v1::Refused {
        reason: reason(why).into(),
        message: refusal.message(),
        r#ref: refusal.reference().0,
        field: why.field().unwrap_or_default().to_owned(),
        // Configured, or a constant: it always fits.
        retry_after: why.retry_after().and_then(|after| after.try_into().ok()),
    }
}

fn reason(why: &Why) -> Reason {
    match why {
        Why::AccessDenied | Why::PeerExited => Reason::AccessDenied,
        Why::InvalidRequest { .. } | Why::SettingRefused(_) => Reason::InvalidRequest,
        Why::HandleInvalid => Reason::HandleInvalid,
        Why::HandleExpired => Reason::HandleExpired,
        Why::LimitReached { .. } => Reason::LimitReached,
        Why::Suspended => Reason::Suspended,
        Why::Draining => Reason::Draining,
        Why::UpstreamUnreachable => Reason::UpstreamUnreachable,
        Why::UpstreamRefused(_) | Why::UpstreamHeld { .. } | Why::NoCredential(_) => {
            Reason::UpstreamRefused
        }
        Why::UpstreamUntrusted => Reason::UpstreamUntrusted,
        Why::AuditUnavailable => Reason::AuditUnavailable,
        Why::HandoffUnsupported(_) => Reason::HandoffUnsupported,
        Why::Unsupported(_) => Reason::Unsupported,
        Why::Internal(_) | Why::NotSaved(_) => Reason::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::ConnectionName;

    #[test]
    fn the_reason_is_the_one_that_the_records_say() {
        let all = [
            Why::AccessDenied,
            Why::InvalidRequest { field: "ttl", must: "be" },
            Why::HandleInvalid,
            Why::HandleExpired,
            Why::limit("sessions"),
            Why::Suspended,
            Why::Draining,
            Why::UpstreamUnreachable,
            Why::UpstreamRefused(ConnectionName::parse("main_db").unwrap()),
            Why::UpstreamUntrusted,
            Why::AuditUnavailable,
            Why::HandoffUnsupported("x"),
            Why::Unsupported("x"),
            Why::Internal("x"),
            Why::NotSaved("x".to_owned()),
            Why::SettingRefused(None),
            Why::PeerExited,
        ];
        for why in all {
            assert_eq!(reason(&why).wire_name(), why.name());
        }
    }
}
