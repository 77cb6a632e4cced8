//! MCP over streamable HTTP on loopback, one bearer token for each principal.
//!
//! Invariants: no request reaches the protocol that did not name this very address as its
//! host, come from no web page but a local one, and carry a valid bearer; each bearer has a
//! service of its own, so that a session of one is not merely forbidden to another, it is not
//! there. What a client can make us hold is bounded in length, time and number.

mod bearer;
mod gate;
mod left;
mod places;
mod sessions;
mod turns;

use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rmcp::transport::streamable_http_server::{StreamableHttpServerConfig, StreamableHttpService};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::bearer::Bearers;
use self::places::{Place, Places};
#[cfg(feature = "conformance-fixtures")]
pub(in crate::mcp) use self::sessions::HangUp;
use self::sessions::Sessions;
use self::turns::Turns;
use super::MAX_MESSAGE;
use super::message::{self as sent, Refusal};
use crate::app::App;
use crate::config::Config;
use crate::mcp::{DRAIN, Handler};
use crate::socket::{EXHAUSTED_PAUSE, is_exhausted};

/// The one path that is served.
const PATH: &str = "/mcp";
const MAX_HEADERS: usize = 64;
/// Bytes of a request's head.
const MAX_HEAD: usize = 32 << 10;
/// From a connection's first byte, or from its last answer, to the end of the next head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

type Answer = Response<BoxBody<Bytes, Infallible>>;
type Service = StreamableHttpService<Handler, Sessions>;

/// A loopback address that listens and is not served yet.
#[derive(Debug)]
pub struct Listener {
    socket: StdListener,
    address: SocketAddr,
    bearers: Bearers,
    session_idle: Duration,
}

/// Why HTTP cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Others could reach it.
    #[error(
        "--http {0}: only a loopback address is served, such as 127.0.0.1:{port}: put a proxy \
         with TLS in front for others",
        port = .0.port()
    )]
    NotLoopback(SocketAddr),
    /// Nobody could use it.
    #[error(
        "--http needs a bearer token for each principal: run `(umask 077; head -c 32 /dev/urandom \
         | base64 > FILE)` and name the file in the configuration: [http] bearers = {{ NAME = \
         \"/path/of/FILE\" }}"
    )]
    NoBearers,
    /// A bearer's file.
    #[error(transparent)]
    Bearer(#[from] bearer::BearerError),
    /// A system call failed.
    #[error("--http {address}: cannot listen: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl Listener {
    /// Listens at `address`, port 0 for any, for those whom the configuration names. Their
    /// tokens are read here, once.
    pub(super) fn bind(address: SocketAddr, config: &Config) -> Result<Self, BindError> {
        if !address.ip().is_loopback() {
            return Err(BindError::NotLoopback(address));
        }
        if config.bearers.is_empty() {
            return Err(BindError::NoBearers);
        }
        let bearers = Bearers::load(&config.bearers)?;
        let failed = |source| BindError::Listen { address, source };
        let socket = StdListener::bind(address).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        let address = socket.local_addr().map_err(failed)?;
        // Longer than any statement may be silent.
        let session_idle = config.limits.statement_timeout + Duration::from_secs(300);
        Ok(Self { socket, address, bearers, session_idle })
    }

    /// Serves everybody who connects, until `stop` fires; then until each has its answers, at
    /// most half a second.
    ///
    /// # Errors
    /// When the socket cannot be handed to the runtime.
    pub async fn serve(self, app: Arc<App>, stop: CancellationToken) -> io::Result<()> {
        let listener = TcpListener::from_std(self.socket)?;
        let (tasks, streams) = (TaskTracker::new(), CancellationToken::new());
        let services = self.bearers.each(|principal| {
            let (app, stop) = (Arc::clone(&app), stop.clone());
            let sessions = Sessions::new(self.session_idle, tasks.clone());
            let turns = Turns::new(app.room(&principal));
            let service =
                move || Ok(Handler::new(Arc::clone(&app), principal.clone(), stop.child_token()));
            let protocol = protocol(streams.clone());
            (Service::new(service, Arc::new(sessions), protocol), turns)
        });
        let door = Arc::new(Door { port: self.address.port(), services });
        let places = Places::default();
        tracing::info!(address = %self.address, path = PATH, "serving MCP");
        while let Some((stream, place)) = accept(&listener, &places, &stop).await {
            let (door, stop) = (Arc::clone(&door), stop.clone());
            tasks.spawn(door.serve(stream, place, stop));
        }
        tasks.close();
        // Calls have been cancelled, and answers leave; streams that wait for nothing are cut.
        if timeout(DRAIN / 2, tasks.wait()).await.is_err() {
            streams.cancel();
            if timeout(DRAIN / 2, tasks.wait()).await.is_err() {
                tracing::warn!("answers were left unsent");
            }
        }
        Ok(())
    }
}

/// What rmcp is to do; it gets only requests that the door let through.
fn protocol(streams: CancellationToken) -> StreamableHttpServerConfig {
    StreamableHttpServerConfig::default()
        .with_sse_retry(Some(sessions::RETRY))
        .with_cancellation_token(streams)
        .with_json_response(true)
        .with_max_request_body_bytes(MAX_MESSAGE)
        .disable_allowed_hosts()
}

async fn accept(
    listener: &TcpListener,
    places: &Places,
    stop: &CancellationToken,
) -> Option<(TcpStream, Place)> {
    loop {
        match stop.run_until_cancelled(listener.accept()).await? {
            Ok((stream, _)) => {
                let place = stop.run_until_cancelled(places.take()).await??;
                return Some((stream, place));
            }
            Err(error) if is_exhausted(&error) => {
                tracing::warn!(%error, "cannot accept: out of descriptors or memory");
                tokio::time::sleep(EXHAUSTED_PAUSE).await;
            }
            Err(error) => tracing::debug!(%error, "a client left before it was accepted"),
        }
    }
}

/// Lets requests through to the service of whoever they are from.
struct Door {
    port: u16,
    services: bearer::Keyed<(Service, Turns)>,
}

impl Door {
    async fn serve(self: Arc<Self>, stream: TcpStream, place: Place, stop: CancellationToken) {
        let closed = place.closed();
        let place = Arc::new(place);
        let service = service_fn(move |request| {
            let (door, place) = (Arc::clone(&self), Arc::clone(&place));
            async move { Ok::<_, Infallible>(door.answer(request, &place).await) }
        });
        let mut connection = std::pin::pin!(
            http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .max_headers(MAX_HEADERS)
                .max_buf_size(MAX_HEAD)
                .serve_connection(TokioIo::new(stream), service)
        );
        let served = tokio::select! {
            served = connection.as_mut() => served,
            () = closed.cancelled() => return,
            () = stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = served {
            tracing::debug!(%error, "a connection failed");
        }
    }

    async fn answer(&self, request: Request<Incoming>, place: &Place) -> Answer {
        if let Err(refused) = gate::check(request.uri(), request.headers(), self.port) {
            return text(StatusCode::FORBIDDEN, refused.as_str());
        }
        if request.uri().path() != PATH {
            return text(StatusCode::NOT_FOUND, "MCP is served at /mcp");
        }
        // Who sends none and who sends a wrong one hear the same.
        let Some((service, turns)) = self.services.find(request.headers()) else {
            let mut answer = text(
                StatusCode::UNAUTHORIZED,
                "a valid bearer token is needed: send the header \"Authorization: Bearer TOKEN\"",
            );
            answer.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            return answer;
        };
        let Some(mut turn) = turns.take(place) else { return busy() };
        let (mut head, body) = request.into_parts();
        head.headers.remove(AUTHORIZATION);
        let body = if head.method == Method::POST {
            match message(body).await {
                Ok(message) if turns.weigh(&mut turn, &message) => message,
                Ok(_too_large_for_now) => return busy(),
                Err(refusal) => return refusal,
            }
        } else {
            Bytes::new()
        };
        let answer = service.handle(Request::from_parts(head, Full::new(body))).await;
        answer.map(|body| turn.until_the_end_of(body).boxed())
    }
}

/// The answer to a bearer of whom too much is in the works.
fn busy() -> Answer {
    let mut answer =
        text(StatusCode::SERVICE_UNAVAILABLE, "too many requests of this bearer at once");
    answer.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    answer
}

/// A body that is a message, read whole.
async fn message(body: Incoming) -> Result<Bytes, Answer> {
    let read = timeout(BODY_TIMEOUT, Limited::new(body, MAX_MESSAGE).collect()).await;
    let Ok(read) = read else {
        return Err(text(StatusCode::REQUEST_TIMEOUT, "the body did not come in time"));
    };
    let body = read.map_err(|error| {
        if error.is::<LengthLimitError>() {
            json(StatusCode::PAYLOAD_TOO_LARGE, Refusal::too_long())
        } else {
            text(StatusCode::BAD_REQUEST, "the body did not come whole")
        }
    })?;
    let body = body.to_bytes();
    match sent::read(&body) {
        Ok(_) => Ok(body),
        Err(refusal) => Err(json(StatusCode::BAD_REQUEST, refusal)),
    }
}

fn json(status: StatusCode, refusal: Refusal) -> Answer {
    let message = serde_json::to_vec(&refusal.into_message());
    answer(status, "application/json", message.unwrap_or_default().into())
}

fn text(status: StatusCode, text: &'static str) -> Answer {
    answer(status, "text/plain; charset=utf-8", Bytes::from_static(text.as_bytes()))
}

fn answer(status: StatusCode, kind: &'static str, body: Bytes) -> Answer {
    let mut answer = Response::new(Full::new(body).boxed());
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}
