//! The one place where a refusal gets its SQLSTATE.

#![forbid(unsafe_code)]

use super::codec;
use crate::core::{Refusal, Why};
use crate::session::CutReason;

/// `terminating connection due to administrator command`: what drivers know as a cut.
const ADMIN_SHUTDOWN: &str = "57P01";

/// The refusal as a fatal ErrorResponse.
pub(super) fn refusal(refusal: &Refusal) -> Vec<u8> {
    codec::fatal(code(refusal.why()), &refusal.message(), refusal.why().name(), None)
}

/// The end of a live session as a fatal ErrorResponse.
pub(super) fn cut(reason: CutReason) -> Vec<u8> {
    let (message, name) = match reason {
        CutReason::Revoked => ("terminating connection: the handle was revoked", "HANDLE_INVALID"),
        CutReason::Expired => ("terminating connection: the handle has expired", "HANDLE_EXPIRED"),
        CutReason::HolderExited => (
            "terminating connection: the process that held the handle has exited",
            "HANDLE_INVALID",
        ),
        CutReason::Suspended => {
            ("terminating connection: an operator suspended the connection", "SUSPENDED")
        }
        CutReason::Reloaded => (
            "terminating connection: the broker's configuration no longer allows it",
            "ACCESS_DENIED",
        ),
        CutReason::Rotated => {
            ("terminating connection: the credential was replaced", "UPSTREAM_REFUSED")
        }
        CutReason::Diverged => (
            "terminating connection: the database refuses the credential that it was opened with",
            "UPSTREAM_REFUSED",
        ),
        CutReason::Closed => ("terminating connection: an operator closed it", "ACCESS_DENIED"),
        CutReason::Aged => (
            "terminating connection: sessions of this connection may not last longer",
            "ACCESS_DENIED",
        ),
        CutReason::Draining => ("terminating connection: the broker is shutting down", "DRAINING"),
    };
    codec::fatal(ADMIN_SHUTDOWN, message, name, None)
}

fn code(why: &Why) -> &'static str {
    match why {
        Why::AccessDenied | Why::PeerExited => "28000",
        Why::InvalidRequest { .. } | Why::SettingRefused(_) => "08P01",
        Why::HandleInvalid | Why::HandleExpired => "28P01",
        Why::LimitReached { .. } => "53300",
        Why::Draining | Why::Suspended => "57P03",
        Why::UpstreamUnreachable
        | Why::UpstreamRefused(_)
        | Why::UpstreamHeld { .. }
        | Why::NoCredential(_)
        | Why::UpstreamUntrusted
        | Why::AuditUnavailable => "08006",
        Why::HandoffUnsupported(_) | Why::Unsupported(_) => "0A000",
        Why::Internal(_) | Why::NotSaved(_) => "XX000",
    }
}
