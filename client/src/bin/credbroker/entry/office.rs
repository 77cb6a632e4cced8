//! Lets browsers in: the kernel names whose each connection is before a byte of it is read.

use std::convert::Infallible;
use std::io::{self, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_util::task::TaskTracker;

use super::desk::Desk;
use super::visitor::{Stranger, Tables, Visitor};

/// From the first byte of a request's head to the last.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// A whole connection: a form, or the wait for the broker.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);
/// How long answers that are on their way are waited for in the end.
const DRAIN: Duration = Duration::from_secs(1);
/// After accept(2) has failed: most likely there are no descriptors.
const RETRY: Duration = Duration::from_millis(100);
const CONNECTIONS: usize = 8;
const MAX_HEAD: usize = 16 << 10;
const MAX_HEADERS: usize = 64;
/// What a connection that is not the person's is told, as far as it fits into the socket.
const STRANGER: &[u8] = b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
/// How many of these are told of; there may be a flood.
const REPORTED: u8 = 5;

pub(super) struct Office {
    desk: Arc<Desk>,
    tables: Tables,
    opened_by: u32,
    places: Arc<Semaphore>,
    connections: TaskTracker,
    reported: AtomicU8,
}

impl Office {
    pub(super) fn new(desk: Desk, tables: Tables, opened_by: u32) -> Self {
        Self {
            desk: Arc::new(desk),
            tables,
            opened_by,
            places: Arc::new(Semaphore::new(CONNECTIONS)),
            connections: TaskTracker::new(),
            reported: AtomicU8::new(0),
        }
    }

    pub(super) fn desk(&self) -> &Desk {
        &self.desk
    }

    pub(super) async fn serve(&self, listener: &TcpListener) -> Infallible {
        loop {
            let Ok((stream, _address)) = listener.accept().await else {
                sleep(RETRY).await;
                continue;
            };
            match self.tables.admit(stream, self.opened_by) {
                Ok(visitor) => self.receive(visitor),
                Err((stranger, stream)) => self.turn_away(&stranger, &stream),
            }
        }
    }

    /// Lets answers that are being written get out.
    pub(super) async fn drain(&self) {
        self.connections.close();
        let _late = timeout(DRAIN, self.connections.wait()).await;
    }

    fn receive(&self, visitor: Visitor) {
        // Their own browser has so many open already: it will try again.
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else { return };
        self.connections.spawn(converse(Arc::clone(&self.desk), visitor, place));
    }

    fn turn_away(&self, stranger: &Stranger, stream: &TcpStream) {
        let _as_far_as_it_goes = stream.try_write(STRANGER);
        let before = self.reported.load(Ordering::Relaxed);
        if before >= REPORTED {
            return;
        }
        self.reported.store(before + 1, Ordering::Relaxed);
        let opened_by = self.opened_by;
        let mut stderr = io::stderr().lock();
        let _unheard = match stranger {
            Stranger::Other(uid) => writeln!(
                stderr,
                "credbroker: turned away a connection of uid {uid}: only uid {opened_by} may open \
                 the page (--opened-by)"
            ),
            Stranger::Unknown => writeln!(
                stderr,
                "credbroker: turned away a connection that the kernel tells no owner of"
            ),
        };
    }
}

/// One request, and its answer. What was read is wiped with the connection, by the allocator.
async fn converse(desk: Arc<Desk>, visitor: Visitor, _place: OwnedSemaphorePermit) {
    let told = AtomicBool::new(false);
    let service = service_fn(|request| {
        let (desk, told) = (&desk, &told);
        async move { Ok::<_, Infallible>(desk.answer(request, told).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .keep_alive(false)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(visitor.into_stream()), service);
    let ended = timeout(CONNECTION_TIMEOUT, connection).await;
    if matches!(ended, Ok(Ok(()))) && told.load(Ordering::Relaxed) {
        desk.set_told();
    }
}
