//! What can go wrong between a client and its broker.
//!
//! Invariant: no text made here holds a token, and what the broker wrote is bounded and
//! stripped of control characters, since it ends up in logs and on terminals.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use credbroker_proto::ERROR_DOMAIN;
use credbroker_proto::v1::{self, Reason};
use thiserror::Error;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::connector::Failure;
use crate::token;

/// The key of `google.rpc.ErrorInfo.metadata` under which the audit sequence number stands.
const REFERENCE_KEY: &str = "ref";
/// More than any message of the broker, little enough for a log line. In characters.
const MAX_MESSAGE: usize = 500;

/// Why a request to the broker failed.
#[derive(Debug, Error)]
#[expect(clippy::error_impl_error, reason = "read as credbroker_client::Error, the only one")]
#[non_exhaustive]
pub enum Error {
    /// The broker understood the request and refused it.
    #[error("{message} ({}{})", reason.wire_name(), reference_text(*reference))]
    Refused {
        /// Why; [`Reason::Unspecified`] for a reason that this version does not know.
        reason: Reason,
        /// The broker's words, for people.
        message: String,
        /// Number of the refusal in the audit log: what an operator needs to explain it.
        reference: Option<u64>,
        /// How long to wait before another attempt can help.
        retry_after: Option<Duration>,
    },
    /// Nobody could be reached at the broker's socket.
    #[error("cannot connect to the broker at {}: {source}", socket.display())]
    Connect {
        /// Path of the socket.
        socket: PathBuf,
        /// What connect(2) said.
        #[source]
        source: Arc<io::Error>,
    },
    /// Somebody serves the socket whom this client does not accept as the broker.
    #[error(
        "{} is served by uid {seen}, and the broker is expected to be uid {}; \
         if uid {seen} is the broker, set CREDBROKER_SERVER_UID={seen}",
        socket.display(), any_of(trusted)
    )]
    ServerUntrusted {
        /// Path of the socket.
        socket: PathBuf,
        /// The uid that serves it, from the kernel.
        seen: u32,
        /// The uids that would have been accepted.
        trusted: BTreeSet<u32>,
    },
    /// The broker gave no answer in time. Whether it did what was asked is not known.
    #[error("the broker did not answer within {} ms", after.as_millis())]
    Timeout {
        /// How long was waited.
        after: Duration,
    },
    /// The connection broke during a request. Whether it was done is not known.
    #[error("the connection to the broker was lost")]
    Disconnected,
    /// The answer is not one that a broker of this version gives.
    #[error("the broker's answer cannot be understood: {message}")]
    Protocol {
        /// What is wrong with it.
        message: String,
    },
    /// The database itself refused the session, after it had proved who it is.
    #[error("the database refused: {message} ({sqlstate})")]
    Database {
        /// Five characters.
        sqlstate: String,
        /// The server's words, for people.
        message: String,
    },
    /// A setting of this client cannot be used.
    #[error("{message}")]
    Configuration {
        /// Which one, and what it must be.
        message: String,
    },
    /// A text is not a handle token: `cbh_` and 43 characters of base64url.
    #[error("not a handle token")]
    InvalidToken,
}

impl Error {
    /// The broker's reason, if it was the broker who refused.
    #[must_use]
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Self::Refused { reason, .. } => Some(*reason),
            Self::Connect { .. }
            | Self::ServerUntrusted { .. }
            | Self::Timeout { .. }
            | Self::Disconnected
            | Self::Protocol { .. }
            | Self::Database { .. }
            | Self::Configuration { .. }
            | Self::InvalidToken => None,
        }
    }

    /// Whether the same request may succeed later without anybody changing anything.
    ///
    /// [`Error::Timeout`] and [`Error::Disconnected`] count, although the first attempt may
    /// have been carried out: a repeated issue can leave a handle behind until it expires.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Timeout { .. } | Self::Disconnected => true,
            Self::Refused { reason, retry_after, .. } => {
                retry_after.is_some() || passes_by_itself(*reason)
            }
            Self::ServerUntrusted { .. }
            | Self::Protocol { .. }
            | Self::Database { .. }
            | Self::Configuration { .. }
            | Self::InvalidToken => false,
        }
    }

    pub(crate) fn retry_after(&self) -> Option<Duration> {
        if let Self::Refused { retry_after, .. } = self { *retry_after } else { None }
    }

    pub(crate) fn protocol(message: impl Into<String>) -> Self {
        Self::Protocol { message: message.into() }
    }

    /// Takes an ErrorResponse apart (PostgreSQL protocol 55.7, 55.8).
    pub(crate) fn database(response: &[u8]) -> Self {
        let fields = response.get(5..).unwrap_or_default().split(|byte| *byte == 0);
        let (mut sqlstate, mut message) = (String::new(), String::new());
        for field in fields {
            match field.split_first() {
                Some((b'C', text)) => sqlstate = presentable(&String::from_utf8_lossy(text)),
                Some((b'M', text)) => message = presentable(&String::from_utf8_lossy(text)),
                Some(_) | None => {}
            }
        }
        Self::Database { sqlstate, message }
    }

    /// Decodes what tonic made of an answer, or of the lack of one.
    pub(crate) fn from_status(status: &Status) -> Self {
        if let Some(failure) = find_failure(status) {
            return failure.into();
        }
        if let Some(info) = status.get_details_error_info()
            && info.domain == ERROR_DOMAIN
        {
            let reference = info.metadata.get(REFERENCE_KEY).and_then(|text| text.parse().ok());
            return Self::Refused {
                reason: Reason::from_wire_name(&info.reason).unwrap_or_default(),
                message: without_reference(status.message(), reference),
                reference,
                retry_after: status.get_details_retry_info().and_then(|info| info.retry_delay),
            };
        }
        // Only a status that was made on this side has a source.
        if std::error::Error::source(status).is_some() || status.code() == Code::Unavailable {
            return Self::Disconnected;
        }
        if status.code() == Code::Unimplemented {
            return Self::protocol("it does not know this request");
        }
        Self::protocol(format!("{}: {}", status.code(), presentable(status.message())))
    }

    /// Decodes a refusal that came as a packet.
    pub(crate) fn from_refused(refused: &v1::Refused) -> Self {
        let reason = refused.reason();
        Self::Refused {
            reason,
            message: without_reference(&refused.message, Some(refused.r#ref)),
            // The first record of a log has number 1.
            reference: (refused.r#ref != 0).then_some(refused.r#ref),
            retry_after: refused.retry_after.and_then(|after| after.try_into().ok()),
        }
    }

    /// Decodes why the first connection failed.
    pub(crate) fn from_transport(error: &tonic::transport::Error) -> Self {
        find_failure(error).map_or(Self::Disconnected, Self::from)
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Io { socket, source } => Self::Connect { socket, source },
            Failure::Untrusted { socket, seen, trusted } => {
                Self::ServerUntrusted { socket, seen, trusted }
            }
        }
    }
}

fn find_failure(error: &(dyn std::error::Error + 'static)) -> Option<Failure> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(failure) = error.downcast_ref::<Failure>() {
            return Some(failure.clone());
        }
        next = error.source();
    }
    None
}

fn passes_by_itself(reason: Reason) -> bool {
    match reason {
        Reason::LimitReached
        | Reason::Draining
        | Reason::UpstreamUnreachable
        | Reason::AuditUnavailable => true,
        Reason::Unspecified
        | Reason::AccessDenied
        | Reason::InvalidRequest
        | Reason::HandleInvalid
        | Reason::HandleExpired
        | Reason::Suspended
        | Reason::UpstreamRefused
        | Reason::UpstreamUntrusted
        | Reason::HandoffUnsupported
        | Reason::Unsupported
        | Reason::Internal => false,
    }
}

/// Where the reference is a field, the sentence need not repeat it.
fn without_reference(message: &str, reference: Option<u64>) -> String {
    let suffix = format!(" ({REFERENCE_KEY}={})", reference.unwrap_or_default());
    presentable(message.strip_suffix(&suffix).unwrap_or(message))
}

fn presentable(text: &str) -> String {
    let bounded: String = text.chars().take(MAX_MESSAGE).collect();
    token::redact(&bounded).replace(char::is_control, " ")
}

fn reference_text(reference: Option<u64>) -> String {
    reference.map(|number| format!(", ref={number}")).unwrap_or_default()
}

fn any_of(uids: &BTreeSet<u32>) -> String {
    let uids: Vec<String> = uids.iter().map(u32::to_string).collect();
    uids.join(" or ")
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    const TOKEN: &str = "cbh_0123456789012345678901234567890123456789abc";

    fn refusal(code: Code, reason: &str, message: &str, retry: Option<Duration>) -> Status {
        let metadata = HashMap::from([("ref".to_owned(), "81".to_owned())]);
        let mut details = ErrorDetails::with_error_info(reason, ERROR_DOMAIN, metadata);
        if retry.is_some() {
            details.set_retry_info(retry);
        }
        Status::with_error_details(code, message, details)
    }

    #[test]
    fn a_refusal_is_decoded_from_its_details() {
        let status = refusal(Code::PermissionDenied, "ACCESS_DENIED", "denied", None);
        let error = Error::from_status(&status);
        assert_eq!(error.to_string(), "denied (ACCESS_DENIED, ref=81)");
        assert_eq!(error.reason(), Some(Reason::AccessDenied));
        assert!(!error.is_retryable());
    }

    #[test]
    fn a_refusal_by_packet_is_the_same_as_one_by_rpc() {
        let refused = v1::Refused {
            reason: Reason::LimitReached.into(),
            message: "slow down (ref=81)".into(),
            r#ref: 81,
            field: String::new(),
            retry_after: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
        };
        let status = refusal(
            Code::ResourceExhausted,
            "LIMIT_REACHED",
            "slow down (ref=81)",
            Some(Duration::from_secs(1)),
        );
        let (packet, rpc) = (Error::from_refused(&refused), Error::from_status(&status));
        assert_eq!(format!("{packet:?}"), format!("{rpc:?}"));
        assert_eq!(packet.to_string(), "slow down (LIMIT_REACHED, ref=81)");

        let hostile = v1::Refused { message: format!("\u{1b}[2J{TOKEN}"), ..Default::default() };
        let text = Error::from_refused(&hostile).to_string();
        assert!(!text.contains("cbh_") && !text.contains('\u{1b}'), "{text}");
    }

    #[test]
    fn the_reference_is_told_once() {
        let status = refusal(Code::PermissionDenied, "ACCESS_DENIED", "denied (ref=81)", None);
        let error = Error::from_status(&status);
        assert_eq!(error.to_string(), "denied (ACCESS_DENIED, ref=81)");
    }

    #[test]
    fn retry_info_is_decoded() {
        let wait = Duration::from_millis(250);
        let status = refusal(Code::ResourceExhausted, "LIMIT_REACHED", "slow down", Some(wait));
        let error = Error::from_status(&status);
        assert!(error.is_retryable());
        assert!(
            matches!(error, Error::Refused { retry_after, .. } if retry_after == Some(wait)),
            "{error:?}"
        );
    }

    #[test]
    fn a_reason_of_a_newer_broker_is_still_a_refusal() {
        let status = refusal(Code::FailedPrecondition, "MOON_PHASE", "not today", None);
        let error = Error::from_status(&status);
        assert_eq!(error.reason(), Some(Reason::Unspecified));
    }

    #[test]
    fn details_of_another_domain_are_no_refusal_of_ours() {
        let details = ErrorDetails::with_error_info("ACCESS_DENIED", "elsewhere", []);
        let status = Status::with_error_details(Code::PermissionDenied, "no", details);
        assert!(matches!(Error::from_status(&status), Error::Protocol { .. }));
    }

    #[test]
    fn neither_tokens_nor_control_characters_come_through() {
        let message = format!("\u{1b}[31mbad handle {TOKEN}\n{}", "x".repeat(2000));
        for status in [
            refusal(Code::NotFound, "HANDLE_INVALID", &message, None),
            Status::new(Code::Internal, message.clone()),
        ] {
            let error = Error::from_status(&status);
            for text in [error.to_string(), format!("{error:?}")] {
                assert!(!text.contains("cbh_"), "{text}");
                assert!(!text.contains(|c: char| c.is_control()), "{text}");
                assert!(text.len() < 800, "{}", text.len());
            }
        }
    }

    #[test]
    fn an_untrusted_server_is_told_with_the_remedy() {
        let error = Error::from(Failure::Untrusted {
            socket: "/run/credbroker/broker.sock".into(),
            seen: 1001,
            trusted: BTreeSet::from([0, 1000]),
        });
        assert_eq!(
            error.to_string(),
            "/run/credbroker/broker.sock is served by uid 1001, and the broker is expected to be \
             uid 0 or 1000; if uid 1001 is the broker, set CREDBROKER_SERVER_UID=1001"
        );
    }

    #[test]
    fn what_may_pass_by_itself() {
        let refused = |reason| Error::Refused {
            reason,
            message: String::new(),
            reference: None,
            retry_after: None,
        };
        assert!(refused(Reason::Draining).is_retryable());
        assert!(refused(Reason::AuditUnavailable).is_retryable());
        assert!(!refused(Reason::HandleInvalid).is_retryable());
        assert!(Error::Disconnected.is_retryable());
        assert!(!Error::InvalidToken.is_retryable());
    }
}
