//! The first bytes of an HTTP/2 connection (RFC 9113 §3.4), read with a deadline: a connection
//! that says nothing would otherwise keep its place for ever, since pings begin behind them.

#![forbid(unsafe_code)]

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::time::timeout;

const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const WITHIN: Duration = Duration::from_secs(5);

/// A stream whose preface was read, and is read again by whoever takes it over.
#[derive(Debug)]
pub(super) struct Prefaced {
    stream: UnixStream,
    given: usize,
}

impl Prefaced {
    /// Fails when the peer is slow, or speaks something else.
    pub(super) async fn read(mut stream: UnixStream) -> io::Result<Self> {
        let mut preface = [0; PREFACE.len()];
        match timeout(WITHIN, stream.read_exact(&mut preface)).await {
            Ok(read) => read?,
            Err(_elapsed) => return Err(io::ErrorKind::TimedOut.into()),
        };
        if preface != *PREFACE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not HTTP/2"));
        }
        Ok(Self { stream, given: 0 })
    }
}

impl AsyncRead for Prefaced {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let rest = PREFACE.get(self.given..).unwrap_or_default();
        if rest.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let count = rest.len().min(buf.remaining());
        buf.put_slice(rest.get(..count).unwrap_or_default());
        self.given += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Prefaced {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    #[tokio::test]
    async fn the_preface_is_read_again_and_nothing_is_lost() {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(PREFACE).await.unwrap();
        client.write_all(b"frames").await.unwrap();
        drop(client);
        let mut stream = Prefaced::read(server).await.unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, [&PREFACE[..], b"frames"].concat());
    }

    #[tokio::test(start_paused = true)]
    async fn silence_and_other_protocols_are_refused() {
        let (_silent, server) = UnixStream::pair().unwrap();
        assert_eq!(Prefaced::read(server).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        assert_eq!(Prefaced::read(server).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
