//! What a peer has sent, wiped as it is taken: a password in a call is not left in the buffer that
//! it came through, as it would be in tokio's.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _};
use zeroize::{Zeroize as _, Zeroizing};

/// Bytes that are read at once.
const ROOM: usize = 8 << 10;

/// A reader and what was read of it and not yet taken.
#[derive(Debug)]
pub(super) struct Input<R> {
    from: R,
    buffer: Zeroizing<Vec<u8>>,
    taken: usize,
    filled: usize,
}

impl<R: AsyncRead + Unpin> Input<R> {
    pub(super) fn new(from: R) -> Self {
        Self { from, buffer: Zeroizing::new(vec![0; ROOM]), taken: 0, filled: 0 }
    }

    /// What is there, after a read if there is nothing; empty at the end. Cancel safe.
    pub(super) async fn fill(&mut self) -> io::Result<&[u8]> {
        if self.taken == self.filled {
            (self.taken, self.filled) = (0, 0);
            self.filled = self.from.read(&mut self.buffer).await?;
        }
        Ok(self.buffer.get(self.taken..self.filled).unwrap_or_default())
    }

    /// Takes the first `count` bytes of what [`fill`](Self::fill) gave, and wipes them.
    pub(super) fn consume(&mut self, count: usize) {
        let end = self.filled.min(self.taken + count);
        if let Some(taken) = self.buffer.get_mut(self.taken..end) {
            taken.zeroize();
        }
        self.taken = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_taken_is_wiped_and_the_rest_stays() {
        let mut input = Input::new(&b"hunter2 and more"[..]);
        assert_eq!(input.fill().await.unwrap(), b"hunter2 and more");
        input.consume(8);
        assert_eq!(input.buffer.get(..16).unwrap(), b"\0\0\0\0\0\0\0\0and more");
        assert_eq!(input.fill().await.unwrap(), b"and more");
        input.consume(usize::from(u16::MAX));
        assert!(input.buffer.iter().all(|byte| *byte == 0));
        assert_eq!(input.fill().await.unwrap(), b"");
    }
}
