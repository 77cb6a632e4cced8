//! The gRPC edge: decode, call a verb of the core, encode. It decides nothing.
//!
//! Each accepted connection gets services of its own, made with its [`Peer`]: a handler without
//! an identity cannot be written.

#![forbid(unsafe_code)]

use std::time::Duration;

use credbroker_proto::v1::admin_service_server::AdminServiceServer;
use credbroker_proto::v1::handle_service_server::HandleServiceServer;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::time::timeout;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::server::HealthReporter;
use tonic_reflection::server::v1::{ServerReflection, ServerReflectionServer};
use tonic_reflection::server::{Builder as Reflection, Error as ReflectionError};
use tracing::{debug, error};

use self::admin::Admin;
use self::handles::Handles;
use self::preface::Prefaced;
use crate::core::Core;
use crate::lobby::Lobby;
use crate::peer::{Accepted, Accepting, Peer};

mod admin;
mod admin_convert;
pub(crate) mod convert;
mod handles;
mod preface;
mod status;

/// What the health service knows the handle service as.
const HANDLE_SERVICE: &str = "credbroker.v1.HandleService";
/// Open connections over all peers.
const MAX_CONNECTIONS: usize = 512;
/// Requests at once on one connection: all the news of a handle, and room to end it.
const MAX_STREAMS: u32 = 64;
/// Longest message in either direction that a request is made of.
const MAX_MESSAGE: usize = 64 * 1024;
/// Longest answer to an operator: lists have at most 1000 entries.
const MAX_LISTING: usize = 4 * 1024 * 1024;
/// Longest header block.
const MAX_HEADERS: u32 = 16 * 1024;
/// A quiet peer is pinged this often.
const PING_AFTER: Duration = Duration::from_secs(30);
/// One that does not answer within this is gone.
const PONG_WITHIN: Duration = Duration::from_secs(10);
/// For requests that are being answered when the broker shuts down.
const FINISH_WITHIN: Duration = Duration::from_secs(5);

/// Whom a socket is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Audience {
    /// Workloads, until the broker drains.
    Workloads,
    /// Operators, until it has drained: they may still look, and cut.
    Operators,
}

/// Serves a socket until its time is over.
pub(crate) async fn serve<H: Health>(
    listener: Accepting,
    audience: Audience,
    core: Core,
    health: HealthServer<H>,
) {
    let lobby = Lobby::new(MAX_CONNECTIONS);
    let reflection = match reflection() {
        Ok(reflection) => reflection,
        Err(error) => return error!(%error, "the descriptors of the contract cannot be read"),
    };
    loop {
        let accepted = tokio::select! {
            () = audience.over(&core) => return,
            accepted = listener.accept() => accepted,
        };
        let Accepted { stream, peer } = accepted;
        let Some(place) = lobby.enter(peer.uid()) else {
            debug!(uid = %peer.uid(), "closed a connection: too many are open");
            continue;
        };
        let routes = routes(audience, &core, &peer, health.clone(), reflection.clone());
        let core = core.clone();
        core.clone().tasks().spawn(async move {
            let _place = place;
            let stream = match Prefaced::read(stream).await {
                Ok(stream) => stream,
                Err(error) => {
                    return debug!(uid = %peer.uid(), %error, "a connection did not begin as gRPC");
                }
            };
            let mut server = http2::Builder::new(TokioExecutor::new());
            server
                .timer(TokioTimer::new())
                .max_concurrent_streams(MAX_STREAMS)
                .max_header_list_size(MAX_HEADERS)
                .keep_alive_interval(PING_AFTER)
                .keep_alive_timeout(PONG_WITHIN);
            let connection =
                server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
            tokio::pin!(connection);
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = audience.over(&core) => {
                    connection.as_mut().graceful_shutdown();
                    timeout(FINISH_WITHIN, connection.as_mut()).await.unwrap_or(Ok(()))
                }
            };
            if let Err(error) = ended {
                debug!(uid = %peer.uid(), %error, "a gRPC connection ended badly");
            }
        });
    }
}

impl Audience {
    /// Returns when the time of this audience's sockets is over.
    pub(crate) async fn over(self, core: &Core) {
        match self {
            Self::Workloads => core.draining().await,
            Self::Operators => core.drained().await,
        }
    }
}

/// The services of one connection.
fn routes<H: Health, R: ServerReflection>(
    audience: Audience,
    core: &Core,
    peer: &Peer,
    health: HealthServer<H>,
    reflection: ServerReflectionServer<R>,
) -> Routes {
    let routes = match audience {
        Audience::Workloads => Routes::new(
            HandleServiceServer::new(Handles::new(core.clone(), peer.clone()))
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(2 * MAX_MESSAGE),
        ),
        Audience::Operators => Routes::new(
            AdminServiceServer::new(Admin::new(core.clone(), peer.clone()))
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_LISTING),
        ),
    };
    routes.add_service(health).add_service(reflection)
}

fn reflection() -> Result<ServerReflectionServer<impl ServerReflection>, ReflectionError> {
    Reflection::configure()
        .register_encoded_file_descriptor_set(credbroker_proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
}

/// Keeps the health service's state by what the core says of itself.
pub(crate) async fn run_health(core: Core, reporter: HealthReporter) {
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = core.draining() => {}
        }
        let status =
            if core.is_serving() { ServingStatus::Serving } else { ServingStatus::NotServing };
        reporter.set_service_status("", status).await;
        reporter.set_service_status(HANDLE_SERVICE, status).await;
        if core.is_draining() {
            return;
        }
    }
}
