//! Every way to fail, with its exit code (sysexits.h, and 126 and 127 as shells use them).
//!
//! Invariant: a failure is one line on stderr that says what to do, or one JSON document.

use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use credbroker_client::{Error, Reason, SecretError};
use credbroker_proto::{ADMIN_PACKET_SOCKET, ADMIN_SOCKET};
use serde::Serialize;

use crate::output::Output;

/// Exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// EX_USAGE
    Usage,
    /// EX_DATAERR: what was read is not what it should be
    Data,
    /// EX_NOINPUT: what was to be read cannot be
    NoInput,
    /// EX_UNAVAILABLE: the broker, or what it needs, is not there
    Unavailable,
    /// EX_SOFTWARE
    Software,
    /// EX_IOERR
    Io,
    /// Whoever read our output has had enough: `credbroker list | head -1` is no failure
    ReaderGone,
    /// EX_NOPERM
    NoPermission,
    /// EX_CONFIG
    Config,
    /// The command of `exec` cannot be executed
    NotExecutable,
    /// The command of `exec` was not found
    NotFound,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::ReaderGone => 0_u8,
            Exit::Usage => 64,
            Exit::Data => 65,
            Exit::NoInput => 66,
            Exit::Unavailable => 69,
            Exit::Software => 70,
            Exit::Io => 74,
            Exit::NoPermission => 77,
            Exit::Config => 78,
            Exit::NotExecutable => 126,
            Exit::NotFound => 127,
        })
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct Failure {
    #[serde(skip)]
    exit: Exit,
    reason: &'static str,
    message: String,
    r#ref: Option<u64>,
}

impl Failure {
    pub(crate) fn new(exit: Exit, reason: &'static str, message: impl Into<String>) -> Self {
        Self { exit, reason, message: message.into(), r#ref: None }
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, "USAGE", message)
    }

    /// The operating system refused something that nearly never fails.
    pub(crate) fn system(what: &str, error: &io::Error) -> Self {
        Self::new(Exit::Software, "SYSTEM", format!("{what}: {error}"))
    }

    /// Results could not be written.
    pub(crate) fn output(error: &io::Error) -> Self {
        let gone = error.kind() == io::ErrorKind::BrokenPipe;
        let exit = if gone { Exit::ReaderGone } else { Exit::Io };
        Self::new(exit, "OUTPUT", format!("cannot write the result: {error}"))
    }

    /// Names the connection that the failure is about.
    pub(crate) fn about(mut self, connection: &str) -> Self {
        self.message = format!("{connection}: {}", self.message);
        self
    }

    /// Prints it and gives the exit code.
    pub(crate) fn report(&self, output: Output) -> ExitCode {
        if self.exit == Exit::ReaderGone {
            return self.exit.into();
        }
        // When stderr is gone, the exit code still tells.
        let mut stderr = io::stderr().lock();
        let _unheard = match output {
            Output::Text => writeln!(stderr, "credbroker: {}", self.message),
            Output::Json => writeln!(stderr, "{}", serde_json::json!({ "error": self })),
        };
        self.exit.into()
    }
}

impl From<SecretError> for Failure {
    fn from(error: SecretError) -> Self {
        let exit = if matches!(error, SecretError::Io(_)) { Exit::Io } else { Exit::Usage };
        Self::new(exit, "SECRET", error.to_string())
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let (exit, reason, hint) = classify(&error);
        let mut message = error.to_string();
        if let Some(hint) = hint {
            message.push_str("; ");
            message.push_str(hint);
        }
        let r#ref = if let Error::Refused { reference, .. } = error { reference } else { None };
        Self { exit, reason, message, r#ref }
    }
}

/// Exit code, stable name, and what to do about it.
fn classify(error: &Error) -> (Exit, &'static str, Option<&'static str>) {
    match error {
        Error::Refused { reason, .. } => {
            let (exit, hint) = classify_reason(*reason);
            (exit, reason.wire_name(), hint)
        }
        Error::Connect { socket, source } => {
            let denied = source.kind() == io::ErrorKind::PermissionDenied;
            let (exit, hint) = match (denied, is_for_operators(socket)) {
                (true, true) => {
                    (Exit::NoPermission, "this is for operators: run it as root, or as the broker")
                }
                (true, false) => {
                    (Exit::NoPermission, "join the group that owns the socket, and log in anew")
                }
                (false, true) => {
                    (Exit::Unavailable, "start credbrokerd, or say where it is with --admin-dir")
                }
                (false, false) => {
                    (Exit::Unavailable, "start credbrokerd, or say where it is with --runtime-dir")
                }
            };
            (exit, "CONNECT", Some(hint))
        }
        Error::ServerUntrusted { .. } => (Exit::NoPermission, "SERVER_UNTRUSTED", None),
        Error::Timeout { .. } => (Exit::Unavailable, "TIMEOUT", Some("try again")),
        Error::Disconnected => (Exit::Unavailable, "DISCONNECTED", Some("try again")),
        Error::Protocol { .. } => (
            Exit::Software,
            "PROTOCOL",
            Some("use versions of credbroker and credbrokerd that belong together"),
        ),
        Error::Database { .. } => (Exit::Unavailable, "DATABASE", None),
        Error::Configuration { .. } => (Exit::Config, "CONFIGURATION", None),
        Error::InvalidToken => {
            (Exit::Usage, "INVALID_TOKEN", Some("a token is cbh_ and 43 characters, on one line"))
        }
        // The enum may grow without this program: then its own words must do.
        _ => (Exit::Software, "ERROR", None),
    }
}

fn is_for_operators(socket: &Path) -> bool {
    socket.file_name().is_some_and(|name| name == ADMIN_SOCKET || name == ADMIN_PACKET_SOCKET)
}

fn classify_reason(reason: Reason) -> (Exit, Option<&'static str>) {
    match reason {
        Reason::AccessDenied => (
            Exit::NoPermission,
            Some(
                "`credbroker whoami` shows your grants, and the broker's log the cause by its ref",
            ),
        ),
        Reason::HandleInvalid => (
            Exit::NoPermission,
            Some("`credbroker handle list` shows the handles that are yours and live"),
        ),
        Reason::HandleExpired => (Exit::NoPermission, Some("issue a new one")),
        Reason::InvalidRequest => (Exit::Usage, None),
        Reason::LimitReached => (Exit::Unavailable, Some("wait, or revoke what is not needed")),
        Reason::Suspended => (Exit::Unavailable, Some("an operator must `credbroker resume` it")),
        Reason::Draining => (Exit::Unavailable, Some("try again when it has restarted")),
        Reason::AuditUnavailable => {
            (Exit::Unavailable, Some("an operator must look at the broker's audit log"))
        }
        Reason::UpstreamUnreachable
        | Reason::UpstreamRefused
        | Reason::UpstreamUntrusted
        | Reason::HandoffUnsupported
        | Reason::Unsupported => (Exit::Unavailable, None),
        Reason::Internal | Reason::Unspecified => (Exit::Software, None),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn connect(kind: io::ErrorKind) -> Failure {
        let socket = "/run/credbroker/broker.sock".into();
        Error::Connect { socket, source: Arc::new(kind.into()) }.into()
    }

    #[test]
    fn a_missing_broker_is_unavailable_and_says_what_to_do() {
        let failure = connect(io::ErrorKind::NotFound);
        assert_eq!(failure.exit, Exit::Unavailable);
        assert!(failure.message.contains("/run/credbroker/broker.sock"), "{failure:?}");
        assert!(failure.message.contains("start credbrokerd"), "{failure:?}");
        assert!(!failure.message.contains('\n'), "{failure:?}");
    }

    #[test]
    fn a_socket_of_another_group_is_no_permission() {
        assert_eq!(connect(io::ErrorKind::PermissionDenied).exit, Exit::NoPermission);
    }

    #[test]
    fn the_admin_sockets_have_hints_of_their_own() {
        let connect = |kind: io::ErrorKind| {
            let socket = "/run/credbroker-admin/admin.sock".into();
            Failure::from(Error::Connect { socket, source: Arc::new(kind.into()) })
        };
        let denied = connect(io::ErrorKind::PermissionDenied);
        assert_eq!(denied.exit, Exit::NoPermission);
        assert!(denied.message.contains("for operators"), "{denied:?}");
        let absent = connect(io::ErrorKind::NotFound);
        assert_eq!(absent.exit, Exit::Unavailable);
        assert!(absent.message.contains("--admin-dir"), "{absent:?}");
    }

    #[test]
    fn a_refusal_keeps_its_reason_and_reference_in_json() {
        let failure = Failure::from(Error::Refused {
            reason: Reason::AccessDenied,
            message: "denied".into(),
            reference: Some(81),
            retry_after: None,
        });
        assert_eq!(failure.exit, Exit::NoPermission);
        let json = serde_json::to_value(failure.about("main_db")).unwrap();
        assert_eq!(json["reason"], "ACCESS_DENIED");
        assert_eq!(json["ref"], 81);
        assert!(json["message"].as_str().unwrap().starts_with("main_db: denied"), "{json}");
    }

    #[test]
    fn a_closed_pipe_is_no_failure() {
        let failure = Failure::output(&io::ErrorKind::BrokenPipe.into());
        assert_eq!(failure.exit, Exit::ReaderGone);
        assert_eq!(Failure::output(&io::ErrorKind::StorageFull.into()).exit, Exit::Io);
    }
}
