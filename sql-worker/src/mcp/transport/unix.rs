//! MCP on a Unix socket: the framing of stdio, any number of clients, each named by the kernel.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use crate::app::App;
use crate::mcp;
use crate::socket::Listener;

/// For who finds no place: one message, which answers none.
const FULL: &[u8] =
    b"{\"jsonrpc\":\"2.0\",\"error\":{\"code\":-32000,\"message\":\"this user has too many \
    connections here: close one, and connect again\"}}\n";

/// How long a client may leave an answer unread.
const PATIENCE: Duration = Duration::from_secs(60);

/// Serves everybody who connects, until `stop` fires; then until each has its answers, at
/// most half a second.
pub(super) async fn serve(
    listener: Listener,
    app: Arc<App>,
    stop: CancellationToken,
) -> io::Result<()> {
    let serve = |stream: UnixStream, caller| {
        let (app, stop) = (Arc::clone(&app), stop.clone());
        mcp::serve(app, caller, stream.into_split(), Some(PATIENCE), stop)
    };
    let refuse = async |stream| {
        // Whoever has left already need not be told.
        let _told = say_full(stream).await;
    };
    listener.serve_each("MCP", &stop, serve, refuse).await
}

/// Says so, and waits until the client has hung up: one that still writes when its other end is
/// closed does not read.
async fn say_full(mut stream: UnixStream) -> io::Result<()> {
    stream.write_all(FULL).await?;
    stream.shutdown().await?;
    while stream.read(&mut [0; 512]).await? > 0 {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn who_is_turned_away_is_told_so_in_one_message() {
        let (last, line) = FULL.split_last().unwrap();
        assert!(*last == b'\n' && !line.contains(&b'\n'));
        let said: Value = serde_json::from_slice(line).unwrap();
        assert_eq!((&said["jsonrpc"], &said["error"]["code"]), (&json!("2.0"), &json!(-32000)));
        assert!(said["error"]["message"].as_str().unwrap().contains("close one"));
    }
}
