//! MCP on a Unix socket: the framing of stdio, any number of clients, each named by the kernel.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::app::App;
use crate::mcp;
use crate::socket::Listener;

/// How long a client may leave an answer unread.
const PATIENCE: Duration = Duration::from_secs(60);

/// Serves everybody who connects, until `stop` fires; then until each has its answers, at
/// most half a second.
pub(super) async fn serve(
    listener: Listener,
    app: Arc<App>,
    stop: CancellationToken,
) -> io::Result<()> {
    let serve = |stream: tokio::net::UnixStream, caller| {
        let (app, stop) = (Arc::clone(&app), stop.clone());
        mcp::serve(app, caller, stream.into_split(), Some(PATIENCE), stop)
    };
    listener.serve_each("MCP", &stop, serve).await
}
