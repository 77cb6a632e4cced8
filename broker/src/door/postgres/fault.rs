//! What a failed login to a server means: in full for the log, and in the broker's words for
//! whoever waits.

#![forbid(unsafe_code)]

use std::io;

use tracing::{info, warn};

use super::backend::LoginFault;
use crate::connection::ConnectionName;
use crate::core::Why;
use crate::upstream::DialError;
use crate::upstream::tls::refused_certificate;

/// What broke the link, as the socket or TLS has it.
fn broken_by(fault: &LoginFault) -> Option<&io::Error> {
    match fault {
        LoginFault::Dial(DialError::Unreachable(source)) | LoginFault::Link(source) => Some(source),
        LoginFault::Dial(DialError::Untrusted(distrust)) => distrust.by_io(),
        LoginFault::Untrusted(_)
        | LoginFault::Refused { .. }
        | LoginFault::Held { .. }
        | LoginFault::Server { .. }
        | LoginFault::Unproven(_) => None,
    }
}

/// The word for the audit record, and why. Logs what the caller is not told.
pub(super) fn explain(fault: &LoginFault, connection: &ConnectionName) -> (&'static str, Why) {
    if let Some(alert) = broken_by(fault).and_then(refused_certificate) {
        warn!(%connection, alert, "the server refuses the broker's client certificate");
        return ("upstream_refused", Why::UpstreamRefused(connection.clone()));
    }
    match fault {
        LoginFault::Server { sqlstate, .. } => {
            info!(%connection, sqlstate, "the server ended a login");
            ("server_error", Why::UpstreamUnreachable)
        }
        LoginFault::Dial(DialError::Untrusted(source)) => {
            warn!(%connection, %source, "the server failed to prove who it is");
            ("upstream_untrusted", Why::UpstreamUntrusted)
        }
        LoginFault::Dial(DialError::Unreachable(source)) | LoginFault::Link(source) => {
            warn!(%connection, %source, "the server cannot be reached");
            ("upstream_unreachable", Why::UpstreamUnreachable)
        }
        LoginFault::Untrusted(what) => {
            warn!(%connection, what, "the server cannot be trusted");
            ("upstream_untrusted", Why::UpstreamUntrusted)
        }
        LoginFault::Refused { sqlstate, .. } => {
            warn!(%connection, sqlstate, "the server refuses the broker's credential");
            ("upstream_refused", Why::UpstreamRefused(connection.clone()))
        }
        LoginFault::Held { retry } => {
            let (connection, retry) = (connection.clone(), *retry);
            ("breaker_open", Why::UpstreamHeld { connection, retry })
        }
        LoginFault::Unproven(sqlstate) => {
            warn!(%connection, sqlstate, "the server ended a login before it proved itself");
            ("upstream_unreachable", Why::UpstreamUnreachable)
        }
    }
}
