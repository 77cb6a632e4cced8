//! The signals: SIGTERM and SIGINT end the broker, the first by draining, the second at once;
//! SIGHUP reads the configuration again.

#![forbid(unsafe_code)]

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::info;

/// The signals that mean something.
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

    /// The next signal.
    pub(crate) async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => { info!("SIGTERM"); Asked::End }
            _ = self.interrupt.recv() => { info!("SIGINT"); Asked::End }
            _ = self.hangup.recv() => { info!("SIGHUP"); Asked::Reload }
        }
    }

    /// Returns at the next signal to end. A reload that comes too late is not worth a word.
    pub(crate) async fn end(&mut self) {
        while self.next().await != Asked::End {}
    }
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    End,
    Reload,
}
