//! gRPC over a verified stream.
//!
//! Invariant: every request ends, at the latest after its limit.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::Stream;
use hyper_util::rt::TokioIo;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status, Streaming};

use crate::Error;
use crate::connector::Connector;

/// A Unix socket has no host name, and h2 refuses a path as `:authority`.
const AUTHORITY: &str = "http://localhost";

/// Connects within `limit`; the channel connects again by itself, and checks the server again.
pub(crate) async fn open(connector: Connector, limit: Duration) -> Result<Channel, Error> {
    let connector = Arc::new(connector);
    let dial = tower::service_fn(move |_: tonic::transport::Uri| {
        let connector = Arc::clone(&connector);
        async move { connector.connect().await.map(|stream| TokioIo::new(stream.into_inner())) }
    });
    let endpoint = Endpoint::from_static(AUTHORITY);
    timeout(limit, endpoint.connect_with_connector(dial))
        .await
        .map_err(|_elapsed| Error::Timeout { after: limit })?
        .map_err(|error| Error::from_transport(&error))
}

/// The answer, if it comes within `limit`.
pub(crate) async fn bounded<T>(
    limit: Duration,
    answer: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Error> {
    match timeout(limit, answer).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(Error::from_status(&status)),
        Err(_elapsed) => Err(Error::Timeout { after: limit }),
    }
}

/// What the broker tells as it happens, until the stream ends; dropping it ends it.
///
/// A stream that breaks gives [`Error::Disconnected`] as its last item, so that an end without
/// an error is the broker's own.
#[must_use = "the broker stops telling when this is dropped"]
pub struct Events<T>(Pin<Box<dyn Stream<Item = Result<T, Error>> + Send>>);

impl<T: 'static> Events<T> {
    /// `read` gives `None` for what this version does not know.
    pub(crate) fn new<W: 'static>(
        wire: Streaming<W>,
        read: fn(W) -> Option<Result<T, Error>>,
    ) -> Self {
        Self(Box::pin(Wire { stream: Some(wire), read }))
    }
}

impl<T> Events<T> {
    /// The next one; `None` at the end.
    ///
    /// Cancel-safe: an event is lost only when it has been returned.
    pub async fn next(&mut self) -> Option<Result<T, Error>> {
        std::future::poll_fn(|context| self.0.as_mut().poll_next(context)).await
    }
}

impl<T> Stream for Events<T> {
    type Item = Result<T, Error>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().0.as_mut().poll_next(context)
    }
}

impl<T> fmt::Debug for Events<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

struct Wire<W, T> {
    /// `None` after its end or its first error.
    stream: Option<Streaming<W>>,
    read: fn(W) -> Option<Result<T, Error>>,
}

impl<W, T> Stream for Wire<W, T> {
    type Item = Result<T, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let Some(stream) = &mut self.stream else { return Poll::Ready(None) };
            match ready!(Pin::new(stream).poll_next(context)) {
                Some(Ok(wire)) => {
                    if let Some(event) = (self.read)(wire) {
                        return Poll::Ready(Some(event));
                    }
                }
                Some(Err(status)) => {
                    self.stream = None;
                    return Poll::Ready(Some(Err(Error::from_status(&status))));
                }
                None => self.stream = None,
            }
        }
    }
}
