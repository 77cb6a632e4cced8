//! A connected stream socket of a session, on the client's side or the server's.
//!
//! It is registered with the runtime for reading only. A registration for both directions is
//! woken by epoll(7) whenever the other end of a Unix socket reads, which in a relay is after
//! every message, and for nothing. Writing is tried at once, and only while it would block is a
//! duplicate of the socket registered for that.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustix::io::{ioctl_fionbio, retry_on_intr};
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

use crate::sys;

/// A stream socket. It belongs to the runtime on which it was made.
#[derive(Debug)]
pub(crate) struct Socket {
    reading: AsyncFd<Arc<OwnedFd>>,
    /// There while the other end does not take what is written.
    writing: Option<AsyncFd<Arc<OwnedFd>>>,
}

impl Socket {
    /// Takes a connected stream socket into the current runtime. Whether it is set non-blocking
    /// does not matter.
    ///
    /// # Errors
    /// When it cannot be registered.
    pub(crate) fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let registered = sys::register(Arc::new(fd), Interest::READABLE);
        let reading = registered.map_err(|(_fd, error)| error)?;
        Ok(Self { reading, writing: None })
    }

    /// Moves it to the current runtime.
    ///
    /// # Errors
    /// When it cannot be registered there. It stays where it was.
    pub(crate) fn move_here(&mut self) -> io::Result<()> {
        *self = Self::adopt(self.duplicate()?)?;
        Ok(())
    }

    /// The descriptor alone, in non-blocking mode and no longer known to the runtime.
    ///
    /// # Errors
    /// When it cannot be set non-blocking.
    pub(crate) fn into_descriptor(self) -> io::Result<OwnedFd> {
        let descriptor = match Arc::try_unwrap(self.reading.into_inner()) {
            Ok(descriptor) => descriptor,
            Err(shared) => shared.try_clone()?,
        };
        ioctl_fionbio(&descriptor, true)?;
        Ok(descriptor)
    }

    /// A duplicate of the descriptor.
    ///
    /// # Errors
    /// When there are no more descriptors.
    pub(crate) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.as_fd().try_clone_to_owned()
    }

    /// The descriptor itself, for who ends the connection from elsewhere. It stays open with it.
    pub(crate) fn share(&self) -> Arc<OwnedFd> {
        Arc::clone(self.reading.get_ref())
    }

    /// Writes what the other end takes at once.
    ///
    /// # Errors
    /// `WouldBlock` when it takes nothing; what the kernel says when the socket is broken.
    pub(crate) fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(retry_on_intr(|| send(self, bytes, flags))?)
    }

    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let (_, count) = retry_on_intr(|| recv(self, &mut *buffer, RecvFlags::DONTWAIT))?;
        Ok(count)
    }

    /// Returns when it is worth another try.
    fn await_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let writing = match &mut self.writing {
            Some(writing) => writing,
            none @ None => {
                let second = self.reading.get_ref().try_clone()?;
                let registered = sys::register(Arc::new(second), Interest::WRITABLE);
                none.insert(registered.map_err(|(_second, error)| error)?)
            }
        };
        ready!(writing.poll_write_ready(cx))?.clear_ready();
        Poll::Ready(Ok(()))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reading.get_ref().as_fd()
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            let mut ready = ready!(this.reading.poll_read_ready(cx))?;
            let room = buf.initialize_unfilled();
            match this.try_read(room) {
                Ok(count) => {
                    // A read that did not fill its buffer has emptied the socket; whatever comes
                    // next wakes again, and an end that came along stays known. To find that out
                    // by another read would cost a system call for each message.
                    if 0 < count && count < room.len() {
                        ready.clear_ready();
                    }
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        loop {
            match this.try_write(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(this.await_room(cx))?;
                }
                written => {
                    // Taken up again when there is reason to.
                    this.writing = None;
                    return Poll::Ready(written);
                }
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match shutdown(&*self, Shutdown::Write) {
            // The other end was faster.
            Ok(()) | Err(rustix::io::Errno::NOTCONN) => Poll::Ready(Ok(())),
            Err(errno) => Poll::Ready(Err(errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn pair() -> (Socket, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Socket::adopt(ours.into()).unwrap(), theirs)
    }

    #[tokio::test]
    async fn an_end_that_came_along_with_the_last_bytes_is_seen() {
        let (mut socket, mut other) = pair();
        other.write_all(b"last words").unwrap();
        drop(other);
        let mut said = Vec::new();
        socket.read_to_end(&mut said).await.unwrap();
        assert_eq!(said, b"last words");
    }

    #[tokio::test]
    async fn what_comes_after_a_short_read_wakes_again() {
        let (mut socket, mut other) = pair();
        let mut buffer = [0; 64];
        for message in [&b"one"[..], b"two", b"three"] {
            other.write_all(message).unwrap();
            let count = socket.read(&mut buffer).await.unwrap();
            assert_eq!(&buffer[..count], message);
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_reader_that_is_slow_blocks_nobody_and_gets_every_byte() {
        let (mut socket, mut other) = pair();
        let sent: Vec<u8> = (0..=255).cycle().take(3_000_000).collect();
        let reader = std::thread::spawn({
            let wanted = sent.len();
            move || {
                let mut got = vec![0; wanted];
                // Once the writer has filled the buffers of the kernel.
                std::thread::sleep(std::time::Duration::from_millis(50));
                other.read_exact(&mut got).unwrap();
                got
            }
        });
        let mut others_turns = 0;
        let written = socket.write_all(&sent);
        tokio::pin!(written);
        loop {
            tokio::select! {
                biased;
                done = &mut written => break done.unwrap(),
                () = tokio::time::sleep(std::time::Duration::from_millis(1)) => others_turns += 1,
            }
        }
        assert!(reader.join().unwrap() == sent);
        assert!(others_turns > 0, "the thread was free while it waited");
        assert!(socket.writing.is_none(), "the second registration is gone again");
    }

    #[tokio::test]
    async fn half_a_close_leaves_the_other_half() {
        let (mut socket, mut other) = pair();
        socket.shutdown().await.unwrap();
        assert_eq!(other.read(&mut [0]).unwrap(), 0);
        other.write_all(b"still here").unwrap();
        let mut said = [0; 10];
        socket.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"still here");
    }
}
