//! Answers that came when their client had lost its stream, for when it comes back.
//!
//! rmcp forgets a request when its answer has left, whether anybody got that or not. So what a
//! client did not read of a stream is read here, and the last of it, the answer, is kept.
//!
//! Invariant: of one principal at most [`MAX_LEFT`] answers are kept; the oldest give way.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures_util::{Stream, StreamExt as _};
use rmcp::model::ServerJsonRpcMessage;
use rmcp::transport::streamable_http_server::session::{ServerSseMessage, SessionId};
use tokio::sync::oneshot;
use tokio_util::task::TaskTracker;

const MAX_LEFT: usize = 8;

/// What the clients of one principal left.
#[derive(Debug, Clone)]
pub(super) struct Left {
    answers: Arc<Mutex<VecDeque<Answer>>>,
    tasks: TaskTracker,
}

#[derive(Debug)]
struct Answer {
    session: SessionId,
    request: u64,
    coming: oneshot::Receiver<ServerSseMessage>,
}

/// The stream of a request, the rest of which is read when it is dropped.
pub(super) struct Watched<S: Events> {
    left: Left,
    session: SessionId,
    /// rmcp's number of the request, which its events tell.
    request: Option<u64>,
    /// Until it is over.
    stream: Option<Pin<Box<S>>>,
}

/// A stream of events.
pub(super) trait Events: Stream<Item = ServerSseMessage> + Send + 'static {}

impl<S: Stream<Item = ServerSseMessage> + Send + 'static> Events for S {}

impl Left {
    /// `tasks` are those that are waited for at the end.
    pub(super) fn new(tasks: TaskTracker) -> Self {
        Self { answers: Arc::default(), tasks }
    }

    pub(super) fn watch<S: Events>(&self, session: &SessionId, stream: S) -> Watched<S> {
        let (left, session) = (self.clone(), session.clone());
        Watched { left, session, request: None, stream: Some(Box::pin(stream)) }
    }

    /// The answer that follows the event `last`, as soon as it is there.
    pub(super) async fn take(&self, session: &SessionId, last: &str) -> Option<ServerSseMessage> {
        let request = number(last)?;
        let answer = {
            let mut answers = self.answers();
            let mine = |answer: &Answer| answer.session == *session && answer.request == request;
            let at = answers.iter().position(mine)?;
            answers.remove(at)?
        };
        answer.coming.await.ok()
    }

    pub(super) fn forget(&self, session: &SessionId) {
        self.answers().retain(|answer| answer.session != *session);
    }

    fn keep<S: Events>(&self, session: SessionId, request: u64, mut stream: Pin<Box<S>>) {
        // Without a runtime nothing comes either.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (there, coming) = oneshot::channel();
        let mut answers = self.answers();
        answers.retain(|answer| (&answer.session, answer.request) != (&session, request));
        answers.push_back(Answer { session, request, coming });
        if answers.len() > MAX_LEFT {
            answers.pop_front();
        }
        drop(answers);
        let reading = async move {
            let mut last = None;
            while let Some(event) = stream.next().await {
                last = Some(event).filter(is_answer);
            }
            if let Some(answer) = last {
                let _nobody_waits = there.send(answer);
            }
        };
        self.tasks.spawn_on(reading, &runtime);
    }

    fn answers(&self) -> MutexGuard<'_, VecDeque<Answer>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Events> Stream for Watched<S> {
    type Item = ServerSseMessage;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(stream) = &mut self.stream else { return Poll::Ready(None) };
        let polled = stream.as_mut().poll_next(context);
        match &polled {
            Poll::Ready(Some(event)) => {
                self.request = event.event_id.as_deref().and_then(number).or(self.request);
            }
            Poll::Ready(None) => self.stream = None,
            Poll::Pending => {}
        }
        polled
    }
}

impl<S: Events> Drop for Watched<S> {
    fn drop(&mut self) {
        // Who has got no event has nothing to come back by.
        if let (Some(stream), Some(request)) = (self.stream.take(), self.request) {
            self.left.keep(self.session.clone(), request, stream);
        }
    }
}

/// The request of an event, whose id is `INDEX/REQUEST`.
fn number(id: &str) -> Option<u64> {
    id.split_once('/')?.1.parse().ok()
}

fn is_answer(event: &ServerSseMessage) -> bool {
    matches!(
        event.message.as_deref(),
        Some(ServerJsonRpcMessage::Response(_) | ServerJsonRpcMessage::Error(_))
    )
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use rmcp::ErrorData;

    use super::*;

    fn event(id: &str) -> ServerSseMessage {
        let error = ErrorData::invalid_request("an answer", None);
        ServerSseMessage::new(id, ServerJsonRpcMessage::error(error, None))
    }

    async fn lose(left: &Left, session: &SessionId, request: usize) {
        let events = [event(&format!("0/{request}")), event(&format!("1/{request}"))];
        let mut watched = left.watch(session, stream::iter(events));
        assert!(watched.next().await.is_some());
    }

    #[tokio::test]
    async fn an_answer_is_kept_once_and_for_its_session() {
        let left = Left::new(TaskTracker::new());
        let (mine, other) = (SessionId::from("mine"), SessionId::from("other"));
        lose(&left, &mine, 7).await;
        assert!(left.take(&other, "0/7").await.is_none());
        assert!(left.take(&mine, "0/8").await.is_none());
        assert!(left.take(&mine, "0").await.is_none());
        let answer = left.take(&mine, "0/7").await.unwrap();
        assert_eq!(answer.event_id.as_deref(), Some("1/7"));
        assert!(left.take(&mine, "0/7").await.is_none());
        lose(&left, &mine, 9).await;
        left.forget(&mine);
        assert!(left.take(&mine, "0/9").await.is_none());
    }

    #[tokio::test]
    async fn what_was_read_to_its_end_or_not_at_all_is_not_kept() {
        let left = Left::new(TaskTracker::new());
        let session = SessionId::from("mine");
        let mut whole = left.watch(&session, stream::iter([event("0/1")]));
        while whole.next().await.is_some() {}
        drop(whole);
        drop(left.watch(&session, stream::iter([event("0/2")])));
        assert!(left.answers().is_empty() && left.tasks.is_empty());
    }

    #[tokio::test]
    async fn the_oldest_give_way() {
        let left = Left::new(TaskTracker::new());
        let session = SessionId::from("mine");
        for request in 0..=MAX_LEFT {
            lose(&left, &session, request).await;
        }
        assert!(left.take(&session, "0/0").await.is_none());
        assert!(left.take(&session, "0/1").await.is_some());
    }
}
