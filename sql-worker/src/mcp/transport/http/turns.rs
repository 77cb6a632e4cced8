//! How many requests of one principal are in the works, from their heads to the last byte of
//! their answers: what bounds their bodies in memory, and leaves connections for others.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use hyper::body::{Body, Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::places::{Busy, Place};
use crate::app::{Room, Share};

/// Requests of one principal at once, streams that wait included.
const MAX_REQUESTS: usize = 128;

/// The turns of one principal.
#[derive(Debug)]
pub(super) struct Turns {
    requests: Arc<Semaphore>,
    room: Room,
}

/// The right to one request.
#[derive(Debug)]
pub(super) struct Turn {
    _given_back_on_drop: OwnedSemaphorePermit,
    _connection: Busy,
    share: Option<Share>,
}

/// An answer that is over when its last byte is.
#[derive(Debug)]
pub(super) struct Held<B> {
    body: B,
    _turn: Turn,
}

impl Turns {
    /// Those of a principal who has `room`.
    pub(super) fn new(room: Room) -> Self {
        Self { requests: Arc::new(Semaphore::new(MAX_REQUESTS)), room }
    }

    /// `None` when all are taken. `place` is that of the connection that the request came by.
    pub(super) fn take(&self, place: &Place) -> Option<Turn> {
        let permit = Arc::clone(&self.requests).try_acquire_owned().ok()?;
        Some(Turn { _given_back_on_drop: permit, _connection: place.begin(), share: None })
    }

    /// Whether there is room for the body of a request, which `turn` then has.
    pub(super) fn weigh(&self, turn: &mut Turn, body: &[u8]) -> bool {
        turn.share = self.room.take(body.len()).ok();
        turn.share.is_some()
    }
}

impl Turn {
    pub(super) fn until_the_end_of<B>(self, body: B) -> Held<B> {
        Held { body, _turn: self }
    }
}

impl<B: Body + Unpin> Body for Held<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
