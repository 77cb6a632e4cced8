//! What goes on when nobody waits for it: revocation after a drop, renewal.

use std::future::Future;

use tokio::runtime;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Tasks on the runtime in which the client connected, counted so that `close` can wait for
/// them.
pub(crate) struct Background {
    runtime: runtime::Handle,
    tasks: TaskTracker,
    closing: CancellationToken,
}

impl Background {
    /// Must be called inside a runtime.
    pub(crate) fn here() -> Self {
        Self {
            runtime: runtime::Handle::current(),
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
        }
    }

    /// Runs `work`, which must end by itself.
    pub(crate) fn run(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn_on(work, &self.runtime);
    }

    /// Cancelled when [`Background::close`] is called.
    pub(crate) fn closing(&self) -> CancellationToken {
        self.closing.child_token()
    }

    /// Tells everything that goes on until told otherwise to end, and waits for all of it.
    pub(crate) async fn close(&self) {
        self.closing.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}
