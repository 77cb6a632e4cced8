//! Sessions of the era that has them (up to 2025-11-25), and who is still listening.
//!
//! That era says that a lost connection should not be read as a cancellation, because a client
//! may come back for the answer. The law here is that nothing runs for nobody: when the client
//! dropped the last stream of a session, and has opened none within [`GRACE`], the calls of the
//! session are cancelled, and the answer that waits for it says so. A client that keeps any
//! stream open is there, and its calls run on.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::future::{Either, ready};
use futures_util::{Stream, StreamExt as _, stream};
use rmcp::model::{ClientJsonRpcMessage, ServerJsonRpcMessage};
use rmcp::transport::streamable_http_server::session::local::{
    LocalSessionManager, LocalSessionManagerError,
};
use rmcp::transport::streamable_http_server::session::{
    ServerSseMessage, SessionId, SessionManager,
};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::super::message::Working;
use super::left::Left;
use crate::mcp::call::Gone;

/// How long a client may have no stream open before it counts as gone.
const GRACE: Duration = Duration::from_millis(300);
/// When a client is told to come back after it has lost a stream: while it does not count as gone.
pub(super) const RETRY: Duration = Duration::from_millis(100);
/// Sessions of one principal. One more ends the one that nobody listens to for the longest.
const MAX_SESSIONS: usize = 64;

/// The sessions of one principal.
#[derive(Debug)]
pub(in crate::mcp) struct Sessions {
    inner: LocalSessionManager,
    open: Mutex<HashMap<SessionId, Arc<Session>>>,
    left: Left,
    tasks: TaskTracker,
}

/// Why a session does not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(in crate::mcp) enum SessionsError {
    #[error("too many sessions are open, and each is in use: end one with DELETE")]
    TooMany,
    #[error(transparent)]
    Local(#[from] LocalSessionManagerError),
}

/// Who listens to one session, and what runs in it.
#[derive(Debug, Default)]
struct Session {
    attendance: Mutex<Attendance>,
    working: Working,
}

#[derive(Debug)]
struct Attendance {
    streams: usize,
    since: Instant,
    /// Of the calls that run now; a later call gets another.
    calls: CancellationToken,
}

impl Sessions {
    /// A session is over when nothing happened in it for `idle`.
    pub(in crate::mcp) fn new(idle: Duration, tasks: TaskTracker) -> Self {
        let mut inner = LocalSessionManager::default();
        inner.session_config.keep_alive = Some(idle);
        inner.session_config.init_timeout = Some(Duration::from_secs(10));
        inner.session_config.sse_retry = Some(RETRY);
        Self { inner, open: Mutex::default(), left: Left::new(tasks.clone()), tasks }
    }

    fn open(&self) -> MutexGuard<'_, HashMap<SessionId, Arc<Session>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place in a session. One that is unknown here is unknown to `inner` too, or just ending.
    fn seat(&self, id: &SessionId) -> (Gone, Seat) {
        let session = self.open().get(id).map(Arc::clone).unwrap_or_default();
        let gone = session.sit();
        (gone, Seat { session, tasks: self.tasks.clone(), over: false })
    }

    /// The session to end so that a new one can be: `Ok(None)` when there is room.
    fn to_evict(&self) -> Result<Option<SessionId>, SessionsError> {
        let open = self.open();
        if open.len() < MAX_SESSIONS {
            return Ok(None);
        }
        let idle = open.iter().filter_map(|(id, session)| session.idle_since().map(|at| (at, id)));
        let oldest = idle.min_by_key(|(at, _)| *at).map(|(_, id)| id.clone());
        oldest.map(Some).ok_or(SessionsError::TooMany)
    }
}

impl SessionManager for Sessions {
    type Error = SessionsError;
    type Transport = <LocalSessionManager as SessionManager>::Transport;

    async fn create_session(&self) -> Result<(SessionId, Self::Transport), SessionsError> {
        if let Some(oldest) = self.to_evict()? {
            self.close_session(&oldest).await?;
        }
        let (id, transport) = self.inner.create_session().await?;
        self.open().insert(id.clone(), Arc::default());
        Ok((id, transport))
    }

    async fn initialize_session(
        &self,
        id: &SessionId,
        message: ClientJsonRpcMessage,
    ) -> Result<ServerJsonRpcMessage, SessionsError> {
        Ok(self.inner.initialize_session(id, message).await?)
    }

    async fn has_session(&self, id: &SessionId) -> Result<bool, SessionsError> {
        Ok(self.inner.has_session(id).await?)
    }

    async fn close_session(&self, id: &SessionId) -> Result<(), SessionsError> {
        // rmcp would wait for the calls first.
        if let Some(session) = self.open().remove(id) {
            session.attendance().calls.cancel();
        }
        self.left.forget(id);
        Ok(self.inner.close_session(id).await?)
    }

    async fn create_stream(
        &self,
        id: &SessionId,
        mut message: ClientJsonRpcMessage,
    ) -> Result<impl Stream<Item = ServerSseMessage> + Send + Sync + 'static, SessionsError> {
        // Taken before the call begins, so that no moment is without it.
        let (gone, seat) = self.seat(id);
        message.insert_extension(gone);
        if let Err(refusal) = seat.session.working.enter(&mut message) {
            let refusal = ServerSseMessage::from_message(refusal.into_message());
            return Ok(Either::Right(stream::iter([refusal])));
        }
        #[cfg(feature = "conformance-fixtures")]
        let hang_up = HangUp::ride_in(&mut message);
        let answers = self.left.watch(id, self.inner.create_stream(id, message).await?);
        #[cfg(feature = "conformance-fixtures")]
        let answers = answers.take_until(hang_up);
        Ok(Either::Left(seat.listen(answers)))
    }

    async fn accept_message(
        &self,
        id: &SessionId,
        message: ClientJsonRpcMessage,
    ) -> Result<(), SessionsError> {
        Ok(self.inner.accept_message(id, message).await?)
    }

    async fn create_standalone_stream(
        &self,
        id: &SessionId,
    ) -> Result<impl Stream<Item = ServerSseMessage> + Send + Sync + 'static, SessionsError> {
        let (_, seat) = self.seat(id);
        Ok(seat.listen(self.inner.create_standalone_stream(id).await?))
    }

    async fn resume(
        &self,
        id: &SessionId,
        last_event_id: String,
    ) -> Result<impl Stream<Item = ServerSseMessage> + Send + Sync + 'static, SessionsError> {
        let (_, seat) = self.seat(id);
        // Of the events of a request rmcp repeats the last that the client has.
        let seen = last_event_id.contains('/').then(|| last_event_id.clone());
        let missed = match self.inner.resume(id, last_event_id.clone()).await {
            Ok(missed) => Either::Left(self.left.watch(id, missed)),
            // It has been answered.
            Err(unknown) => match self.left.take(id, &last_event_id).await {
                Some(answer) => Either::Right(stream::iter([answer])),
                None => return Err(unknown.into()),
            },
        };
        Ok(seat.listen(missed.filter(move |event| ready(seen.is_none() || event.event_id != seen))))
    }
}

impl Session {
    fn attendance(&self) -> MutexGuard<'_, Attendance> {
        self.attendance.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sit(&self) -> Gone {
        let mut attendance = self.attendance();
        attendance.streams += 1;
        Gone(attendance.calls.clone())
    }

    fn idle_since(&self) -> Option<Instant> {
        let attendance = self.attendance();
        (attendance.streams == 0).then_some(attendance.since)
    }

    /// Cancels the calls, if nobody listens.
    fn abandon(&self) {
        let mut attendance = self.attendance();
        if attendance.streams == 0 {
            std::mem::take(&mut attendance.calls).cancel();
        }
    }
}

impl Default for Attendance {
    fn default() -> Self {
        Self { streams: 0, since: Instant::now(), calls: CancellationToken::new() }
    }
}

/// One open stream.
#[derive(Debug)]
struct Seat {
    session: Arc<Session>,
    tasks: TaskTracker,
    /// Whether the server ended the stream, having sent all of it.
    over: bool,
}

/// A stream, and the seat that it is.
struct Listening<S> {
    seat: Seat,
    stream: Pin<Box<S>>,
}

impl Seat {
    fn listen<S>(self, stream: S) -> Listening<S> {
        Listening { seat: self, stream: Box::pin(stream) }
    }
}

impl<S: Stream> Stream for Listening<S> {
    type Item = S::Item;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<S::Item>> {
        let polled = self.stream.as_mut().poll_next(context);
        if matches!(polled, Poll::Ready(None)) {
            self.seat.over = true;
        }
        polled
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let left = {
            let mut attendance = self.session.attendance();
            attendance.streams = attendance.streams.saturating_sub(1);
            attendance.since = Instant::now();
            attendance.streams
        };
        if self.over || left > 0 {
            return;
        }
        let session = Arc::clone(&self.session);
        let abandon = async move {
            tokio::time::sleep(GRACE).await;
            session.abandon();
        };
        // Without a runtime nothing runs either.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            self.tasks.spawn_on(abandon, &runtime);
        }
    }
}

/// Test builds only: ends the stream of a request, which goes on.
#[cfg(feature = "conformance-fixtures")]
#[derive(Debug, Clone)]
pub(in crate::mcp) struct HangUp(CancellationToken);

#[cfg(feature = "conformance-fixtures")]
impl HangUp {
    fn ride_in(
        message: &mut ClientJsonRpcMessage,
    ) -> impl Future<Output = ()> + Send + Sync + use<> {
        let hang_up = CancellationToken::new();
        message.insert_extension(Self(hang_up.clone()));
        hang_up.cancelled_owned()
    }

    pub(in crate::mcp) fn now(&self) {
        self.0.cancel();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;
    use futures_util::stream::{empty, pending};

    use super::*;

    fn sessions() -> (Sessions, SessionId, Arc<Session>) {
        let sessions = Sessions::new(Duration::from_secs(60), TaskTracker::new());
        let (id, session) = (SessionId::from("one"), Arc::<Session>::default());
        sessions.open().insert(id.clone(), Arc::clone(&session));
        (sessions, id, session)
    }

    #[tokio::test]
    async fn calls_end_when_the_last_stream_was_dropped_and_nobody_came_back() {
        let (sessions, id, session) = sessions();
        let (Gone(gone), call) = sessions.seat(&id);
        let call = call.listen(pending::<()>());
        let other = sessions.seat(&id).1.listen(pending::<()>());
        drop(call);
        assert!(sessions.tasks.is_empty());
        session.abandon();
        assert!(!gone.is_cancelled(), "somebody listens");
        drop(other);
        let back = sessions.seat(&id).1.listen(pending::<()>());
        session.abandon();
        assert!(!gone.is_cancelled(), "the client came back in time");
        drop(back);
        tokio::time::timeout(Duration::from_secs(10), gone.cancelled()).await.unwrap();
        let (Gone(next), _seat) = sessions.seat(&id);
        assert!(!next.is_cancelled(), "a later call is another matter");
    }

    #[tokio::test]
    async fn a_stream_that_ended_was_not_dropped() {
        let (sessions, id, _) = sessions();
        let mut answered = sessions.seat(&id).1.listen(empty::<()>());
        assert_eq!(answered.next().await, None);
        drop(answered);
        assert!(sessions.tasks.is_empty());
    }

    #[tokio::test]
    async fn the_session_that_nobody_listens_to_gives_way() {
        let (sessions, _, session) = sessions();
        let _heard = Seat { session, tasks: TaskTracker::new(), over: false };
        assert_eq!(sessions.to_evict().unwrap(), None);
        for number in 1..MAX_SESSIONS {
            sessions.open().insert(number.to_string().into(), Arc::default());
        }
        assert!(sessions.to_evict().unwrap().is_some());
        for session in sessions.open().values() {
            let _ = session.sit();
        }
        assert!(matches!(sessions.to_evict(), Err(SessionsError::TooMany)));
    }
}
