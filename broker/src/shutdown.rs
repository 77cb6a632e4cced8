//! The signals that end the broker: the first asks it to drain, the second ends it at once.

#![forbid(unsafe_code)]

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{info, warn};

/// SIGTERM and SIGINT.
#[derive(Debug)]
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Must be called before READY: a signal that comes earlier would kill the process.
    pub(crate) fn install() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Returns at the next signal to end.
    pub(crate) async fn end(&mut self) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => break info!("SIGTERM"),
                _ = self.interrupt.recv() => break info!("SIGINT"),
                // A terminal that closes, or a habit from other daemons, must not end it.
                _ = self.hangup.recv() => warn!("SIGHUP: this version cannot reload; restart it to read the configuration again"),
            }
        }
    }
}
