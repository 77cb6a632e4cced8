//! The one place where a refusal gets its SQLSTATE.

#![forbid(unsafe_code)]

use std::sync::LazyLock;

use super::codec;
use crate::core::{Refusal, Why};
use crate::session::CutReason;

/// `terminating connection due to administrator command`: what drivers know as a cut.
const ADMIN_SHUTDOWN: &str = "57P01";

/// The refusal as a fatal ErrorResponse.
pub(super) fn refusal(refusal: &Refusal) -> Vec<u8> {
    codec::fatal(code(refusal.why()), &refusal.message(), refusal.why().name(), None)
}

/// The end of a live session as a fatal ErrorResponse. Each is made once: a thousand sessions may
/// be told at the same moment.
pub(super) fn cut(reason: CutReason) -> &'static [u8] {
    macro_rules! fatal {
        ($message:literal, $name:literal) => {{
            static MADE: LazyLock<Vec<u8>> = LazyLock::new(|| {
                let message = concat!("terminating connection: ", $message);
                codec::fatal(ADMIN_SHUTDOWN, message, $name, None)
            });
            &MADE
        }};
    }
    match reason {
        CutReason::Revoked => fatal!("the handle was revoked", "HANDLE_INVALID"),
        CutReason::Expired => fatal!("the handle has expired", "HANDLE_EXPIRED"),
        CutReason::HolderExited => {
            fatal!("the process that held the handle has exited", "HANDLE_INVALID")
        }
        CutReason::Suspended => fatal!("an operator suspended the connection", "SUSPENDED"),
        CutReason::Reloaded => {
            fatal!("the broker's configuration no longer allows it", "ACCESS_DENIED")
        }
        CutReason::Rotated => fatal!("the credential was replaced", "UPSTREAM_REFUSED"),
        CutReason::Diverged => fatal!(
            "the database refuses the credential that it was opened with",
            "UPSTREAM_REFUSED"
        ),
        CutReason::Closed => fatal!("an operator closed it", "ACCESS_DENIED"),
        CutReason::Aged => {
            fatal!("sessions of this connection may not last longer", "ACCESS_DENIED")
        }
        CutReason::Draining => fatal!("the broker is shutting down", "DRAINING"),
    }
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
