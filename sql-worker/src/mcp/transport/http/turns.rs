//! How many requests of one principal are in the works, from their heads to the last byte of
//! their answers: what bounds their bodies in memory, and leaves connections for others.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use hyper::body::{Body, Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Requests of one principal at once, streams that wait included.
const MAX_REQUESTS: usize = 128;

/// The turns of one principal.
#[derive(Debug)]
pub(super) struct Turns(Arc<Semaphore>);

/// The right to one request.
#[derive(Debug)]
pub(super) struct Turn {
    _given_back_on_drop: OwnedSemaphorePermit,
}

/// An answer that is over when its last byte is.
#[derive(Debug)]
pub(super) struct Held<B> {
    body: B,
    _turn: Turn,
}

impl Default for Turns {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MAX_REQUESTS)))
    }
}

impl Turns {
    /// `None` when all are taken.
    pub(super) fn take(&self) -> Option<Turn> {
        Arc::clone(&self.0)
            .try_acquire_owned()
            .ok()
            .map(|permit| Turn { _given_back_on_drop: permit })
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
