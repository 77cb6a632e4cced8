//! How the worker learns that it is over: the end of its input, or a signal.
//!
//! rmcp notices the end of input, but leaves calls that are in flight alone and then waits
//! for them; so the input is watched here, below rmcp, and the calls are told.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, ReadBuf};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// An input that fires a token when it has come to its end, or fails.
#[derive(Debug)]
pub struct Watched<R> {
    inner: R,
    ended: CancellationToken,
}

impl<R> Watched<R> {
    /// Watches `inner` on behalf of `ended`.
    pub fn new(inner: R, ended: CancellationToken) -> Self {
        Self { inner, ended }
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for Watched<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let had_room = buffer.remaining() > 0;
        let polled = Pin::new(&mut self.inner).poll_read(context, buffer);
        match &polled {
            Poll::Ready(Ok(())) if had_room && buffer.filled().len() == before => {
                self.ended.cancel();
            }
            Poll::Ready(Err(_)) => self.ended.cancel(),
            Poll::Ready(Ok(())) | Poll::Pending => {}
        }
        polled
    }
}

/// Waits for SIGTERM, SIGINT or SIGHUP.
///
/// # Errors
/// When the handlers cannot be installed.
pub async fn signalled() -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        _ = hang_up.recv() => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn the_end_of_input_fires_after_the_last_byte() {
        let ended = CancellationToken::new();
        let mut input = Watched::new(&b"ab"[..], ended.clone());
        assert_eq!(input.read_u8().await.unwrap(), b'a');
        assert_eq!(input.read_u8().await.unwrap(), b'b');
        assert!(!ended.is_cancelled());
        assert!(input.read_u8().await.is_err());
        assert!(ended.is_cancelled());
    }
}
