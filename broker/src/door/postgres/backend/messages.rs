//! Reading a server's messages one by one, and sending to it.

#![forbid(unsafe_code)]

use std::io;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::LoginFault;
use crate::upstream::Stream;

/// Longest message of a login; ParameterStatus and notices are far shorter.
pub(super) const MAX_MESSAGE: usize = 32 * 1024;
/// All that a server may say in a login: a few messages, and what it greets with. Without this a
/// server that sends notices as fast as it can keeps a core busy until the clock ends the login.
const MAX_LOGIN: usize = 512 * 1024;
/// A type byte and a length.
pub(super) const HEADER: usize = 5;

/// Reads whole messages, and no more memory than one of them needs.
#[derive(Debug)]
pub(in super::super) struct Messages {
    pub(in super::super) stream: Stream,
    buffer: Vec<u8>,
    received: usize,
}

impl Messages {
    pub(in super::super) fn new(stream: Stream) -> Self {
        Self { stream, buffer: Vec::new(), received: 0 }
    }

    pub(in super::super) async fn send(&mut self, message: &[u8]) -> Result<(), LoginFault> {
        self.stream.write_all(message).await.map_err(LoginFault::Link)?;
        self.stream.flush().await.map_err(LoginFault::Link)
    }

    /// Whether more has come than was asked for.
    pub(super) fn has_more(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// The next message's type and body.
    pub(in super::super) async fn next(&mut self) -> Result<(u8, Vec<u8>), LoginFault> {
        loop {
            if let Some((tag, length)) = self.header()? {
                let whole = length + 1;
                if self.buffer.len() >= whole {
                    let body = self.buffer.get(HEADER..whole).unwrap_or_default().to_vec();
                    self.buffer.drain(..whole);
                    return Ok((tag, body));
                }
            }
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk).await.map_err(LoginFault::Link)? {
                0 => return Err(LoginFault::Link(io::ErrorKind::UnexpectedEof.into())),
                count => {
                    self.received += count;
                    if self.received > MAX_LOGIN {
                        return Err(LoginFault::Untrusted("it goes on and on before it is ready"));
                    }
                    self.buffer.extend_from_slice(chunk.get(..count).unwrap_or_default());
                }
            }
        }
    }

    fn header(&self) -> Result<Option<(u8, usize)>, LoginFault> {
        let Some([tag, length @ ..]) = self.buffer.first_chunk::<HEADER>() else { return Ok(None) };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if !(4..=MAX_MESSAGE).contains(&length) {
            return Err(LoginFault::Untrusted(
                "it announces a message of a length that no login has",
            ));
        }
        Ok(Some((*tag, length)))
    }
}
