//! The gRPC edge: `credbroker.v1.SqlService` on a Unix socket, the same verbs as the MCP tools.
//!
//! Invariants: each connection gets a service of its own, made with the [`Principal`] that the
//! kernel gave, so a verb without a caller cannot be written; a call ends, and its statement
//! with it, when its client, its deadline or the worker does; no message carries a password.

mod call;
mod connect;
mod connect_named;
mod create_credential_token;
mod describe_schema;
mod disconnect;
mod execute_query;
mod explain_query;
mod list_connections;
mod outlet;
mod place;
mod revoke_credential_token;
mod service;
mod status;
mod value;

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use credbroker_proto::SQL_FILE_DESCRIPTOR_SET;
use credbroker_proto::v1::sql_service_server::SqlServiceServer;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::AsyncReadExt as _;
use tokio::net::UnixStream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::health_reporter;
use tonic_reflection::server::v1::{ServerReflection, ServerReflectionServer};

use self::service::Service;
use crate::app::{App, Principal};
use crate::error::{Code, Failure};
use crate::socket::Listener;

/// What the health service knows the service as.
const SERVICE: &str = "credbroker.v1.SqlService";
/// Requests at once on one connection.
const MAX_STREAMS: u32 = 64;
/// The longest request, in bytes.
const MAX_MESSAGE: usize = 1 << 20;
/// The longest header block.
const MAX_HEADERS: u32 = 16 * 1024;
/// Bytes of one answer that wait to be taken, beyond the message that is being sent.
const SEND_BUFFER: usize = 64 << 10;
/// A quiet client is pinged this often.
const PING_AFTER: Duration = Duration::from_secs(30);
/// One that does not answer within this is gone.
const PONG_WITHIN: Duration = Duration::from_secs(10);
/// Half of the second in which the worker promises to be gone: answers may still leave.
const DRAIN: Duration = Duration::from_millis(500);

/// What an HTTP/2 client says first (RFC 9113 §3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// It has this long to say it: pings begin behind it.
const PREFACE_WITHIN: Duration = Duration::from_secs(5);

/// Serves everybody who connects, until `stop` fires; then until each has its answers, at most
/// half a second.
///
/// # Errors
/// When the socket cannot be handed to the runtime.
pub async fn serve(listener: Listener, app: Arc<App>, stop: CancellationToken) -> io::Result<()> {
    let (health, health_service) = health_reporter();
    health.set_service_status(SERVICE, ServingStatus::Serving).await;
    let reflection = reflection().map_err(io::Error::other)?;
    let tasks = TaskTracker::new();
    let serve = |stream, caller: Principal| {
        let (app, lost) = (Arc::clone(&app), stop.child_token());
        let service = Service::new(app, caller, stop.clone(), lost.clone(), tasks.clone());
        let routes =
            Routes::new(SqlServiceServer::new(service).max_decoding_message_size(MAX_MESSAGE));
        let routes = routes.add_service(health_service.clone()).add_service(reflection.clone());
        connection(stream, routes, stop.clone(), lost)
    };
    let served = listener.serve_each("gRPC", &stop, serve, refuse).await;
    tasks.close();
    tasks.wait().await;
    served
}

/// Answers every call of one who finds no place. To hang up says less, and GOAWAY has some clients
/// wait for their deadline.
async fn refuse(stream: UnixStream) {
    let service = service_fn(async |_request| {
        let failure = Failure::new(Code::LimitReached, "this user has too many connections here")
            .with_hint("close one, or use one for several calls");
        Ok::<_, Infallible>(status::refused(&failure).into_http::<tonic::body::Body>())
    });
    let serving = http2::Builder::new(TokioExecutor::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = serving.await {
        tracing::debug!(%error, "a connection that found no place ended badly");
    }
}

/// One connection, from its preface to its end. When `lost` alone fires, that is at once.
async fn connection(
    mut stream: UnixStream,
    routes: Routes,
    stop: CancellationToken,
    lost: CancellationToken,
) {
    // Whatever waits for this client waits no longer than it is there.
    let _gone = lost.clone().drop_guard();
    let mut preface = [0; PREFACE.len()];
    let read = stop.run_until_cancelled(timeout(PREFACE_WITHIN, stream.read_exact(&mut preface)));
    if !matches!(read.await, Some(Ok(Ok(_)))) || preface != *PREFACE {
        return tracing::debug!("a connection did not begin as gRPC");
    }
    let (reading, writing) = stream.into_split();
    let stream = tokio::io::join(PREFACE.chain(reading), writing);
    let mut server = http2::Builder::new(TokioExecutor::new());
    server
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .max_send_buf_size(SEND_BUFFER)
        .keep_alive_interval(PING_AFTER)
        .keep_alive_timeout(PONG_WITHIN);
    let serving = server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    tokio::pin!(serving);
    let ended = tokio::select! {
        biased;
        ended = serving.as_mut() => ended,
        () = stop.cancelled() => {
            serving.as_mut().graceful_shutdown();
            timeout(DRAIN, serving.as_mut()).await.unwrap_or(Ok(()))
        }
        () = lost.cancelled() => Ok(()),
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a gRPC connection ended badly");
    }
}

fn reflection()
-> Result<ServerReflectionServer<impl ServerReflection>, tonic_reflection::server::Error> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(SQL_FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
}
