//! JSON-RPC, one message a line, over any pair of byte streams: MCP's stdio framing (2025-11-25
//! and 2026-07-28, "stdio"), which Unix sockets share.
//!
//! rmcp has such a transport; this one bounds what a peer can make it hold, answers what it
//! cannot read, tells at once, and not only rmcp, that the peer is gone, and wipes what it has read.

mod input;

use std::io;
use std::time::Duration;

use rmcp::RoleServer;
use rmcp::model::ClientJsonRpcMessage;
use rmcp::service::{RxJsonRpcMessage, TxJsonRpcMessage};
use rmcp::transport::Transport;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use zeroize::{Zeroize as _, Zeroizing};

use self::input::Input;
use super::MAX_MESSAGE;
use super::message::{self, Refusal, Working};
use crate::app::Room;
use crate::mcp::call::Weight;

/// Answers that wait for a peer to read them. While there are so many, nothing more is read
/// from it.
const QUEUE: usize = 16;
/// Bytes of a line's memory that are kept for the next.
const KEPT: usize = 16 << 10;

/// A peer that writes and reads lines.
#[derive(Debug)]
pub(in crate::mcp) struct Lines<R> {
    input: Input<R>,
    line: Zeroizing<Vec<u8>>,
    /// Whether the rest of a line that is too long is being skipped.
    skipping: bool,
    /// Absent once closed.
    queue: Option<mpsc::Sender<Vec<u8>>>,
    ended: CancellationToken,
    room: Room,
    working: Working,
    /// Whether a request has begun the conversation.
    begun: bool,
}

/// What was read.
enum Read {
    Line,
    TooLong,
    End,
}

impl<R: AsyncRead + Send + Unpin> Lines<R> {
    /// The connection, and what writes to it: that must be polled, and is done when all is
    /// written after the connection was dropped. `ended` fires when nothing more comes, or
    /// nothing more can be sent: the peer must take each line within `patience`, if there is one.
    pub(in crate::mcp) fn new<W>(
        input: R,
        output: W,
        ended: CancellationToken,
        patience: Option<Duration>,
        room: Room,
    ) -> (Self, impl Future<Output = ()> + Send)
    where
        W: AsyncWrite + Send + Unpin,
    {
        let (queue, lines) = mpsc::channel(QUEUE);
        let writer = write(output, lines, ended.clone(), patience);
        let input = Input::new(input);
        let lines = Self {
            input,
            line: Zeroizing::default(),
            skipping: false,
            queue: Some(queue),
            ended,
            room,
            working: Working::default(),
            begun: false,
        };
        (lines, writer)
    }

    /// The message that the line is; `None` for one that nobody is told.
    fn message(&mut self) -> Result<Option<ClientJsonRpcMessage>, Refusal> {
        if self.line.iter().all(u8::is_ascii_whitespace) {
            return Ok(None);
        }
        let mut message = message::read(&self.line)?;
        self.working.enter(&mut message).map_err(Refusal::without_id)?;
        self.begun |= message::begins(&message);
        if !self.begun && !matches!(message, ClientJsonRpcMessage::Request(_)) {
            return Ok(None);
        }
        message.insert_extension(Weight(self.room.take(self.line.len())));
        Ok(Some(message))
    }

    /// Cancel safe: what was read of a line is kept.
    async fn read(&mut self) -> io::Result<Read> {
        loop {
            let read = self.input.fill().await?;
            if read.is_empty() {
                return Ok(Read::End);
            }
            let end = read.iter().position(|byte| *byte == b'\n');
            let (taken, whole) = end.map_or((read.len(), false), |end| (end + 1, true));
            let fits = self.line.len() + taken <= MAX_MESSAGE;
            if fits && !self.skipping {
                self.line.extend_from_slice(read.get(..taken).unwrap_or_default());
            }
            self.input.consume(taken);
            if whole && self.skipping {
                self.skipping = false;
            } else if !fits && !self.skipping {
                self.line = Zeroizing::default();
                self.skipping = !whole;
                return Ok(Read::TooLong);
            } else if whole {
                return Ok(Read::Line);
            }
        }
    }

    fn forget_line(&mut self) {
        // What lies behind it was wiped with a longer one.
        self.line.as_mut_slice().zeroize();
        self.line.clear();
        self.line.shrink_to(KEPT);
    }
}

impl<R: AsyncRead + Send + Unpin + 'static> Transport<RoleServer> for Lines<R> {
    type Error = io::Error;

    fn send(
        &mut self,
        message: TxJsonRpcMessage<RoleServer>,
    ) -> impl Future<Output = io::Result<()>> + Send + 'static {
        let queue = self.queue.clone();
        async move {
            let mut line = serde_json::to_vec(&message)?;
            line.push(b'\n');
            let queue = queue.ok_or(io::ErrorKind::NotConnected)?;
            queue.send(line).await.map_err(|_lost| io::ErrorKind::BrokenPipe.into())
        }
    }

    async fn receive(&mut self) -> Option<RxJsonRpcMessage<RoleServer>> {
        let queue = self.queue.clone()?;
        loop {
            // Before reading, so that what is then read can be answered.
            let room = queue.reserve().await.ok();
            let refusal = match (room.is_some(), self.read().await) {
                (true, Ok(Read::Line)) => {
                    let message = self.message();
                    self.forget_line();
                    match message {
                        Ok(Some(message)) => return Some(message),
                        Ok(None) => continue,
                        Err(refusal) => refusal,
                    }
                }
                (true, Ok(Read::TooLong)) => Refusal::too_long(),
                (true, Ok(Read::End) | Err(_)) | (false, _) => {
                    self.ended.cancel();
                    return None;
                }
            };
            if let (Some(room), Ok(mut line)) = (room, serde_json::to_vec(&refusal.into_message()))
            {
                line.push(b'\n');
                room.send(line);
            }
        }
    }

    async fn close(&mut self) -> io::Result<()> {
        self.queue = None;
        Ok(())
    }
}

async fn write<W: AsyncWrite + Unpin>(
    mut output: W,
    mut lines: mpsc::Receiver<Vec<u8>>,
    ended: CancellationToken,
    patience: Option<Duration>,
) {
    while let Some(line) = lines.recv().await {
        let writing = async {
            output.write_all(&line).await?;
            output.flush().await
        };
        let written = match patience {
            Some(patience) => {
                timeout(patience, writing).await.unwrap_or_else(|late| Err(late.into()))
            }
            None => writing.await,
        };
        if written.is_err() {
            // Nobody gets the answers of what still runs.
            ended.cancel();
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use tokio::io::{AsyncReadExt as _, DuplexStream};

    use super::*;

    const PING: &[u8] = b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"}\n";

    struct Peer {
        to: DuplexStream,
        from: DuplexStream,
        ended: CancellationToken,
        writer: tokio::task::JoinSet<()>,
    }

    fn lines(room: usize) -> (Lines<DuplexStream>, Peer) {
        let (to, input) = tokio::io::duplex(1 << 20);
        let (output, from) = tokio::io::duplex(room);
        let ended = CancellationToken::new();
        let (lines, writing) = Lines::new(input, output, ended.clone(), None, Room::new(1));
        let mut writer = tokio::task::JoinSet::new();
        writer.spawn(writing);
        (lines, Peer { to, from, ended, writer })
    }

    #[tokio::test]
    async fn what_is_no_message_is_answered_and_the_next_one_is_read() {
        let (mut lines, mut peer) = lines(1 << 16);
        let long = vec![b'x'; MAX_MESSAGE + 1];
        let sending = async {
            for line in [b"{", &b"[1]"[..], &long, b"{\"secret\": 1}", b"  "] {
                peer.to.write_all(line).await.unwrap();
                peer.to.write_all(b"\n").await.unwrap();
            }
            peer.to.write_all(PING).await.unwrap();
        };
        let (message, ()) = tokio::join!(lines.receive(), sending);
        assert!(matches!(message, Some(ClientJsonRpcMessage::Request(_))));
        drop(lines);
        peer.writer.join_next().await.unwrap().unwrap();
        let mut answers = String::new();
        peer.from.read_to_string(&mut answers).await.unwrap();
        let codes: Vec<i64> = answers
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["error"]["code"].clone())
            .map(|code| code.as_i64().unwrap())
            .collect();
        assert_eq!(codes, [-32700, -32600, -32600, -32600]);
        assert!(!answers.contains("secret"), "{answers}");
    }

    #[tokio::test]
    async fn what_comes_before_the_first_request_is_not_told() {
        let (mut lines, mut peer) = lines(1 << 16);
        let early = b"{\"jsonrpc\":\"2.0\",\"method\":\"notifications/initialized\"}\n";
        let answer = b"{\"jsonrpc\":\"2.0\",\"id\":9,\"result\":{}}\n";
        let greeting = b"{\"jsonrpc\":\"2.0\",\"id\":2,\"method\":\"initialize\",\"params\":{\
            \"protocolVersion\":\"2025-11-25\",\"capabilities\":{},\
            \"clientInfo\":{\"name\":\"x\",\"version\":\"1\"}}}\n";
        for line in [&early[..], answer, PING, early, greeting, early] {
            peer.to.write_all(line).await.unwrap();
        }
        for _ in ["ping", "initialize"] {
            assert!(matches!(lines.receive().await, Some(ClientJsonRpcMessage::Request(_))));
        }
        assert!(matches!(lines.receive().await, Some(ClientJsonRpcMessage::Notification(_))));
    }

    #[tokio::test]
    async fn an_id_that_is_in_the_works_is_not_taken_again() {
        let (mut lines, mut peer) = lines(1 << 16);
        peer.to.write_all(&[PING, PING].concat()).await.unwrap();
        let first = lines.receive().await;
        drop(peer.to);
        assert!(lines.receive().await.is_none());
        drop((first, lines));
        peer.writer.join_next().await.unwrap().unwrap();
        let mut answer = String::new();
        peer.from.read_to_string(&mut answer).await.unwrap();
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!((answer.get("id"), &answer["error"]["code"]), (None, &Value::from(-32600)));
    }

    #[tokio::test]
    async fn the_end_of_input_is_told_after_the_last_message() {
        let (mut lines, mut peer) = lines(1 << 16);
        peer.to.write_all(PING).await.unwrap();
        drop(peer.to);
        assert!(lines.receive().await.is_some());
        assert!(!peer.ended.is_cancelled());
        assert!(lines.receive().await.is_none());
        assert!(peer.ended.is_cancelled());
    }

    #[tokio::test]
    async fn a_peer_that_does_not_read_is_not_read_from() {
        let (mut lines, mut peer) = lines(16);
        for _ in 0..200 {
            peer.to.write_all(b"{\n").await.unwrap();
        }
        let receiving = timeout(Duration::from_millis(200), lines.receive()).await;
        assert!(receiving.is_err());
        // One line is being written; the rest of the two hundred was left where it was.
        assert_eq!(lines.queue.as_ref().unwrap().capacity(), 0);
        drop(peer.from);
        tokio::time::timeout(Duration::from_secs(5), peer.ended.cancelled()).await.unwrap();
        assert!(lines.receive().await.is_none());
    }
}
