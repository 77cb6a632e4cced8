//! Whether somebody is still there who can have a socket that was handed over: the process that
//! connected, and where the kernel does not show its exit, the connection.

#![forbid(unsafe_code)]

use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::peer::{Departure, Peer};

/// Of one connection's peer.
#[derive(Debug)]
pub(super) struct Presence {
    departed: CancellationToken,
    /// Where the end of the connection is all that shows.
    _connection: Option<DropGuard>,
}

impl Presence {
    /// Begins to watch. `None` when there are no descriptors left for it.
    pub(super) fn of(peer: &Peer, tasks: &TaskTracker) -> Option<Self> {
        let departed = CancellationToken::new();
        let connection = match peer.exit() {
            Departure::NoDescriptor => return None,
            Departure::Unknown => Some(departed.clone().drop_guard()),
            Departure::Shown(exit) => {
                let departed = departed.clone();
                // It ends with the last session of this peer, if that is before the process.
                tasks.spawn(async move {
                    if exit.wait().await.is_some() {
                        departed.cancel();
                    }
                });
                None
            }
        };
        Some(Self { departed, _connection: connection })
    }

    /// Cancelled when nobody is there any more.
    pub(super) fn departed(&self) -> CancellationToken {
        self.departed.clone()
    }
}
