//! `GET /metrics` over HTTP/1.1, and nothing else. Whoever connects is a stranger: few
//! connections, little to read from each, and no time to spare. One that holds a place gives it
//! up to the next who comes.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use super::{Metrics, Snapshot};
use crate::config::MetricsListen;
use crate::peer::{Accepting, BindError, Listener, SocketAccess};
use crate::trusted::distrust;

/// Scrapers at once. One more, and the oldest has had its time.
const MAX_OPEN: usize = 16;
/// Longest head of a request, in bytes: the smallest that hyper takes.
const MAX_HEAD: usize = 8 * 1024;
const MAX_HEADERS: usize = 32;
/// For a request to be read.
const HEAD_WITHIN: Duration = Duration::from_secs(5);
/// For all of it: the request, the answer, and the scraper's reading of that.
const DONE_WITHIN: Duration = Duration::from_secs(10);
/// How long accept pauses when descriptors or memory have run out.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);

/// OpenMetrics 1.0, "Content-Type".
const OPEN_METRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
const PLAIN: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// The metrics' socket could not be bound.
#[derive(Debug, Error)]
pub(crate) enum MetricsError {
    #[error("metrics.listen: cannot listen on {address}: {source}")]
    Tcp {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("metrics.listen: {path} {why}", path = .path.display())]
    Place { path: PathBuf, why: String },
    #[error("metrics.listen: {0}")]
    Unix(#[source] BindError),
}

/// Bound, and not served yet.
#[derive(Debug)]
pub(crate) struct Server {
    socket: Socket,
}

#[derive(Debug)]
enum Socket {
    Tcp(std::net::TcpListener),
    Unix(Listener),
}

impl Server {
    /// Binds where the configuration says. To be called before the sandbox, which allows it no
    /// more.
    ///
    /// # Errors
    /// When the address is in use, or the directory of a socket could be changed by others.
    pub(crate) fn bind(listen: &MetricsListen) -> Result<Self, MetricsError> {
        let socket = match listen {
            MetricsListen::Tcp(address) => {
                let address = *address;
                let failed = |source| MetricsError::Tcp { address, source };
                let listener = std::net::TcpListener::bind(address).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                // Port 0 is a port of the kernel's choice.
                let bound = listener.local_addr().map_err(failed)?;
                info!("metrics at http://{bound}/metrics");
                Socket::Tcp(listener)
            }
            MetricsListen::Unix(path) => {
                check_place(path)?;
                let listener =
                    Listener::bind(path, SocketAccess::Group).map_err(MetricsError::Unix)?;
                info!("metrics at unix:{}", path.display());
                Socket::Unix(listener)
            }
        };
        Ok(Self { socket })
    }
}

/// What lies at the path is replaced: it must be a socket, and nobody's any more.
fn check_place(path: &Path) -> Result<(), MetricsError> {
    let wrong = |why: String| MetricsError::Place { path: path.to_owned(), why };
    let directory = path.parent().unwrap_or(Path::new("/"));
    let metadata =
        directory.metadata().map_err(|error| wrong(format!("cannot be made: {error}")))?;
    if let Some(why) = distrust(&metadata) {
        return Err(wrong(format!("lies in a directory that {why}")));
    }
    match path.symlink_metadata() {
        Err(_absent) => Ok(()),
        Ok(found) if !found.file_type().is_socket() => Err(wrong("is there, and no socket".into())),
        Ok(_) if StdUnixStream::connect(path).is_ok() => {
            Err(wrong("is another process's socket".into()))
        }
        Ok(_) => Ok(()),
    }
}

/// Answers until `end` does.
pub(crate) async fn serve(
    server: Server,
    metrics: Metrics,
    snapshot: impl Fn() -> Snapshot + Send + Sync + 'static,
    tasks: TaskTracker,
    end: impl Future<Output = ()>,
) -> io::Result<()> {
    let incoming = match server.socket {
        Socket::Tcp(listener) => Either::Tcp(TcpListener::from_std(listener)?),
        Socket::Unix(listener) => Either::Unix(listener.serve()?),
    };
    let scrape: Arc<Scrape> = Arc::new(move || metrics.text(&snapshot()).unwrap_or_default());
    let mut open = VecDeque::new();
    tokio::pin!(end);
    loop {
        tokio::select! {
            () = &mut end => break,
            () = incoming.accept_into(&mut open, &scrape, &tasks) => {}
        }
    }
    open.iter().for_each(JoinHandle::abort);
    Ok(())
}

type Scrape = dyn Fn() -> String + Send + Sync;

enum Either {
    Tcp(TcpListener),
    Unix(Accepting),
}

impl Either {
    /// The next connection, and a task for it.
    async fn accept_into(
        &self,
        open: &mut VecDeque<JoinHandle<()>>,
        scrape: &Arc<Scrape>,
        tasks: &TaskTracker,
    ) {
        let scrape = Arc::clone(scrape);
        let task = match self {
            Self::Unix(listener) => {
                let accepted = listener.accept().await;
                tasks.spawn(answer(accepted.stream, scrape))
            }
            Self::Tcp(listener) => match listener.accept().await {
                Ok((stream, _)) => tasks.spawn(answer(stream, scrape)),
                Err(error) => {
                    warn!(%error, "cannot accept a connection for metrics");
                    return tokio::time::sleep(EXHAUSTED_PAUSE).await;
                }
            },
        };
        open.retain(|task| !task.is_finished());
        if open.len() >= MAX_OPEN
            && let Some(oldest) = open.pop_front()
        {
            oldest.abort();
        }
        open.push_back(task);
    }
}

/// One request on one connection.
async fn answer(stream: impl AsyncRead + AsyncWrite + Unpin, scrape: Arc<Scrape>) {
    let service = service_fn(|request: Request<Incoming>| {
        let response = respond(request.method(), request.uri().path(), &*scrape);
        async move { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(DONE_WITHIN, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "a connection for metrics ended badly"),
        Err(_elapsed) => debug!("a connection for metrics was too slow"),
    }
}

fn respond(method: &Method, path: &str, scrape: &Scrape) -> Response<String> {
    let (status, kind, body) = match (method, path) {
        (&Method::GET, "/metrics") => (StatusCode::OK, OPEN_METRICS, scrape()),
        (_, "/metrics") => (StatusCode::METHOD_NOT_ALLOWED, PLAIN, "only GET\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, PLAIN, "only /metrics\n".to_owned()),
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, kind);
    if status == StatusCode::METHOD_NOT_ALLOWED {
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_get_metrics_is_answered() {
        let status = |method: Method, path: &str| {
            respond(&method, path, &|| "text".to_owned()).status().as_u16()
        };
        assert_eq!(status(Method::GET, "/metrics"), 200);
        assert_eq!(status(Method::POST, "/metrics"), 405);
        assert_eq!(status(Method::HEAD, "/metrics"), 405);
        assert_eq!(status(Method::GET, "/"), 404);
        assert_eq!(status(Method::DELETE, "/metrics/"), 404);
    }

    #[test]
    fn a_file_that_is_no_socket_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.sock");
        std::fs::write(&path, "somebody's").unwrap();
        let refused = Server::bind(&MetricsListen::Unix(path.clone())).unwrap_err();
        assert!(refused.to_string().contains("no socket"), "{refused}");
        assert_eq!(std::fs::read(&path).unwrap(), b"somebody's");
    }

    #[test]
    fn a_socket_that_is_served_is_not_taken_over_and_a_stale_one_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.sock");
        let first = Server::bind(&MetricsListen::Unix(path.clone())).unwrap();
        let refused = Server::bind(&MetricsListen::Unix(path.clone())).unwrap_err();
        assert!(refused.to_string().contains("another process"), "{refused}");
        drop(first);
        assert!(path.exists(), "as after a crash");
        assert!(Server::bind(&MetricsListen::Unix(path)).is_ok());
    }
}
