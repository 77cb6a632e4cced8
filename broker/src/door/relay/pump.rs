//! One direction of a relay.

#![forbid(unsafe_code)]

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Carries bytes one way. Holds none while the other side takes them as they come.
#[derive(Debug, Default)]
pub(super) struct Pump {
    /// What was read and not yet written, from `written` on.
    waiting: Vec<u8>,
    written: usize,
    /// TLS keeps what it was given until it is flushed.
    unflushed: bool,
}

/// What a step did.
#[derive(Debug)]
pub(super) enum Moved {
    /// This many bytes of the scratch buffer were read, and have been written or kept.
    Bytes(usize),
    /// No more will come.
    Ended,
}

impl Pump {
    /// Whether bytes wait for the other side to take them.
    pub(super) fn is_stalled(&self) -> bool {
        self.unflushed || !self.waiting.is_empty()
    }

    /// Writes what waits, then reads once into `scratch` and writes that. Nothing is read before
    /// all that was read earlier has been taken, so a side that is slow slows the other down.
    ///
    /// `may_write` is asked before every write.
    pub(super) fn step<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        scratch: &mut [u8],
        may_write: impl Fn() -> bool,
    ) -> Poll<io::Result<Moved>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        ready!(self.write_waiting(cx, writer, &may_write))?;
        let mut buffer = ReadBuf::new(scratch);
        ready!(Pin::new(reader).poll_read(cx, &mut buffer))?;
        let read = buffer.filled();
        if read.is_empty() {
            return Poll::Ready(Ok(Moved::Ended));
        }
        let mut rest = read;
        while !rest.is_empty() && may_write() {
            match Pin::new(&mut *writer).poll_write(cx, rest)? {
                Poll::Ready(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(count) => {
                    self.unflushed = true;
                    rest = rest.get(count..).unwrap_or_default();
                }
                Poll::Pending => break,
            }
        }
        self.waiting.extend_from_slice(rest);
        if rest.is_empty() {
            // If it cannot be done now, the next step does it first.
            let _later = self.flush(cx, writer)?;
        }
        Poll::Ready(Ok(Moved::Bytes(read.len())))
    }

    fn write_waiting<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        writer: &mut W,
        may_write: &impl Fn() -> bool,
    ) -> Poll<io::Result<()>> {
        while let Some(rest) = self.waiting.get(self.written..).filter(|rest| !rest.is_empty()) {
            if !may_write() {
                return Poll::Pending;
            }
            let count = ready!(Pin::new(&mut *writer).poll_write(cx, rest))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unflushed = true;
            self.written += count;
        }
        // Given back: an idle session needs no buffer.
        (self.waiting, self.written) = (Vec::new(), 0);
        self.flush(cx, writer)
    }

    fn flush<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        writer: &mut W,
    ) -> Poll<io::Result<()>> {
        if self.unflushed {
            ready!(Pin::new(writer).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    /// Takes a little at a time, now and then nothing, and is slow to flush: what TLS does on a
    /// full socket.
    #[derive(Default)]
    struct Reluctant {
        taken: Vec<u8>,
        flushed: usize,
        turns: usize,
    }

    impl AsyncWrite for Reluctant {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.turns += 1;
            if self.turns.is_multiple_of(4) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let count = buf.len().min(7_001);
            self.taken.extend_from_slice(&buf[..count]);
            Poll::Ready(Ok(count))
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.turns += 1;
            if self.turns.is_multiple_of(3) {
                self.flushed = self.taken.len();
                return Poll::Ready(Ok(()));
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn every_byte_goes_out_once_in_order_and_flushed() {
        let sent: Vec<u8> = (0..=250).cycle().take(300_000).collect();
        let (mut reader, mut writer, mut pump) = (&sent[..], Reluctant::default(), Pump::default());
        let mut scratch = vec![0; 64 * 1024];
        let mut seen = 0;
        loop {
            let moved =
                poll_fn(|cx| pump.step(cx, &mut reader, &mut writer, &mut scratch, || true)).await;
            match moved.unwrap() {
                Moved::Bytes(count) => seen += count,
                Moved::Ended => break,
            }
        }
        assert_eq!((seen, writer.flushed), (sent.len(), sent.len()));
        assert!(writer.taken == sent);
        assert!(!pump.is_stalled());
    }

    #[tokio::test]
    async fn nothing_is_written_once_it_may_not_be() {
        let (mut reader, mut writer, mut pump) = (&b"bytes"[..], Vec::new(), Pump::default());
        let mut scratch = [0; 16];
        let moved =
            poll_fn(|cx| pump.step(cx, &mut reader, &mut writer, &mut scratch, || false)).await;
        assert!(matches!(moved, Ok(Moved::Bytes(5))));
        assert!(writer.is_empty() && pump.is_stalled());
        let again = poll_fn(|cx| {
            Poll::Ready(
                pump.step(cx, &mut reader, &mut writer, &mut scratch, || false).is_pending(),
            )
        });
        assert!(again.await && writer.is_empty());
    }
}
