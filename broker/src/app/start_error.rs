//! Why the broker did not start, and how its process ends for that.

#![forbid(unsafe_code)]

use thiserror::Error;

use super::runtime_dir::RuntimeDirError;
use crate::arena::RegionError;
use crate::audit::SinkError;
use crate::config::ConfigError;
use crate::core::SuspensionError;
use crate::exit::Exit;
use crate::harden::HardenError;
use crate::health::Unhealthy;
use crate::keeper::KeeperError;
use crate::metrics::MetricsError;
use crate::peer::BindError;
use crate::source::SourceError;

/// Why the broker did not start, in one line.
#[derive(Debug, Error)]
pub(super) enum StartError {
    #[error(transparent)]
    Harden(#[from] HardenError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    #[error(transparent)]
    Arena(#[from] RegionError),
    #[error(transparent)]
    Audit(#[from] SinkError),
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error(transparent)]
    Suspension(#[from] SuspensionError),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Unhealthy(#[from] Unhealthy),
    #[error(
        "the service manager passed a socket named {0:?}, which means nothing here: use FileDescriptorName=broker, packet, postgres, admin or admin-packet"
    )]
    UnknownSocket(String),
    #[error("the audit log cannot be written, so the broker does not start")]
    NoAudit,
    #[error("the runtime could not be started: {0}")]
    Runtime(#[source] std::io::Error),
}

impl StartError {
    pub(super) fn exit(&self) -> Exit {
        match self {
            Self::Config(error) if error.is_permission() => Exit::NoPermission,
            Self::Source(error) if error.fault.is_permission() => Exit::NoPermission,
            Self::Source(error) if error.fault.is_passing() => Exit::Unavailable,
            Self::RuntimeDir(error) if error.is_permission() => Exit::NoPermission,
            Self::Metrics(MetricsError::Place { .. }) => Exit::Config,
            Self::Audit(error) if error.is_permission() => Exit::NoPermission,
            Self::Config(_)
            | Self::Source(_)
            | Self::Suspension(_)
            | Self::RuntimeDir(RuntimeDirError::TooLong { .. })
            | Self::UnknownSocket(_) => Exit::Config,
            Self::Bind(BindError::PathTooLong { .. } | BindError::NotOurs { .. }) => Exit::Config,
            Self::Arena(RegionError::CapacityTooSmall { .. }) => Exit::Config,
            Self::Arena(_)
            | Self::Audit(_)
            | Self::NoAudit
            | Self::RuntimeDir(_)
            | Self::Metrics(_)
            | Self::Bind(BindError::Bind { .. })
            | Self::Unhealthy(_) => Exit::Unavailable,
            Self::Harden(_) | Self::Keeper(_) | Self::Runtime(_) => Exit::Software,
        }
    }
}
