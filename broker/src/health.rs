//! `credbrokerd health`: asks a running broker whether it serves, for probes in images that have
//! neither a shell nor curl.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::net::UnixStream;
use tonic::transport::{Endpoint, Uri};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// For one question and its answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// Between two questions.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// Why it is not well.
#[derive(Debug, Error)]
pub(crate) enum Unhealthy {
    #[error("{socket}: no broker answers: {why}", socket = .socket.display())]
    NoAnswer { socket: PathBuf, why: String },
    #[error("{socket}: the broker does not serve: its audit log cannot be written, or it is shutting down", socket = .socket.display())]
    NotServing { socket: PathBuf },
}

/// Asks until the broker serves or `wait` is over.
pub(crate) async fn check(socket: &Path, wait: Duration) -> Result<(), Unhealthy> {
    let deadline = Instant::now() + wait;
    loop {
        match ask(socket).await {
            Err(_) if Instant::now() < deadline => tokio::time::sleep(ASK_AGAIN).await,
            answer => return answer,
        }
    }
}

async fn ask(socket: &Path) -> Result<(), Unhealthy> {
    let no_answer = |why: String| Unhealthy::NoAnswer { socket: socket.to_owned(), why };
    let path = socket.to_owned();
    let connect = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The name is not looked up; HTTP/2 wants one.
    let endpoint = Endpoint::from_static("http://localhost").timeout(ANSWER_WITHIN);
    let channel =
        tokio::time::timeout(ANSWER_WITHIN, endpoint.connect_with_connector(connect)).await;
    let channel = channel.map_err(|_elapsed| no_answer("timed out".into()))?;
    let channel = channel.map_err(|error| no_answer(root_cause(&error)))?;
    let request = HealthCheckRequest { service: String::new() };
    let answer = HealthClient::new(channel)
        .check(request)
        .await
        .map_err(|status| no_answer(status.message().to_owned()))?;
    match answer.into_inner().status() {
        ServingStatus::Serving => Ok(()),
        ServingStatus::Unknown | ServingStatus::NotServing | ServingStatus::ServiceUnknown => {
            Err(Unhealthy::NotServing { socket: socket.to_owned() })
        }
    }
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}
