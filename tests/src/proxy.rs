//! A hand on the wire between broker and PostgreSQL: it passes bytes on, and can hold a login
//! at any of its steps until the test lets go.
//!
//! Towards the broker it speaks plain TCP (`tls = { mode = "disable" }`); towards the server
//! it uses the Unix socket, so that the server's own rules need no exception.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::postgres::Server;

/// A point of a login at which nothing has been passed on yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The broker has connected and sent its startup message.
    Connect,
    /// The server asks for SASL.
    Sasl,
    /// The server's first SCRAM message.
    SaslContinue,
    /// The server's last SCRAM message, its signature.
    SaslFinal,
    /// The server lets the broker in.
    AuthenticationOk,
    /// The server is ready for queries; the whole login has been answered.
    ReadyForQuery,
}

impl Step {
    /// All of them, in the order of a login.
    pub const ALL: [Self; 6] = [
        Self::Connect,
        Self::Sasl,
        Self::SaslContinue,
        Self::SaslFinal,
        Self::AuthenticationOk,
        Self::ReadyForQuery,
    ];

    /// The step that a message of the server is.
    fn of(tag: u8, body: &[u8]) -> Option<Self> {
        match (tag, body.get(..4)?) {
            (b'R', [0, 0, 0, 10]) => Some(Self::Sasl),
            (b'R', [0, 0, 0, 11]) => Some(Self::SaslContinue),
            (b'R', [0, 0, 0, 12]) => Some(Self::SaslFinal),
            (b'R', [0, 0, 0, 0]) => Some(Self::AuthenticationOk),
            _ => None,
        }
    }
}

#[derive(Debug, Default)]
struct State {
    hold_at: Option<Step>,
    held: bool,
    accepted: usize,
    ended: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The proxy; it listens as long as it is not dropped.
#[derive(Debug)]
pub struct LoginProxy {
    shared: Arc<Shared>,
    port: u16,
}

impl LoginProxy {
    /// Listens on a free port of 127.0.0.1 and passes everything on to `server`.
    ///
    /// # Panics
    /// When there is no free port.
    #[must_use]
    pub fn start(server: &Server) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        let port = listener.local_addr().expect("a bound socket has an address").port();
        let shared = Arc::new(Shared::default());
        let upstream = server.socket_dir.join(format!(".s.PGSQL.{}", server.port));
        let accepting = Arc::clone(&shared);
        thread::spawn(move || accepting.accept(&listener, &upstream));
        Self { shared, port }
    }

    /// Where it listens.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Holds logins that come to `step`.
    pub fn hold_at(&self, step: Step) {
        self.shared.lock().hold_at = Some(step);
    }

    /// Waits until a login is held.
    ///
    /// # Panics
    /// When that takes longer than `limit`.
    pub fn wait_until_held(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut state = self.shared.lock();
        while !state.held {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no login came to {:?} within {limit:?}", state.hold_at);
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets go of what is held, and holds nothing any more.
    pub fn release(&self) {
        let mut state = self.shared.lock();
        state.hold_at = None;
        state.held = false;
        self.shared.changed.notify_all();
    }

    /// How many connections the broker has made.
    #[must_use]
    pub fn accepted(&self) -> usize {
        self.shared.lock().accepted
    }
}

impl Drop for LoginProxy {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.release();
        // Wakes the accepting thread, which then sees the end.
        let _woken = TcpStream::connect(("127.0.0.1", self.port));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: Arc<Self>, listener: &TcpListener, upstream: &Path) {
        for client in listener.incoming().flatten() {
            let mut state = self.lock();
            if state.ended {
                return;
            }
            state.accepted += 1;
            drop(state);
            let shared = Arc::clone(&self);
            let upstream: PathBuf = upstream.into();
            thread::spawn(move || {
                // A connection that breaks is the business of its two ends.
                let _broken = shared.pass_on(&client, &upstream);
            });
        }
    }

    fn pass_on(&self, client: &TcpStream, upstream: &Path) -> io::Result<()> {
        client.set_nodelay(true)?;
        let mut first = [0; 4];
        (&*client).read_exact(&mut first)?;
        self.wait_at(Step::Connect);
        let server = UnixStream::connect(upstream)?;
        (&server).write_all(&first)?;
        thread::scope(|scope| {
            scope.spawn(|| {
                let _broken = io::copy(&mut &*client, &mut &server);
                let _closed = server.shutdown(Shutdown::Write);
            });
            let ended = self.pass_back(&server, client);
            let _closed = client.shutdown(Shutdown::Both);
            let _closed = server.shutdown(Shutdown::Both);
            ended
        })
    }

    /// Passes the server's messages on one by one, up to the first ReadyForQuery, then bytes.
    fn pass_back(&self, mut server: &UnixStream, mut client: &TcpStream) -> io::Result<()> {
        loop {
            let mut header = [0; 5];
            server.read_exact(&mut header)?;
            let [tag, length @ ..] = header;
            let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(4);
            let mut body = vec![0; length.saturating_sub(4)];
            server.read_exact(&mut body)?;
            let ready = tag == b'Z';
            if let Some(step) = if ready { Some(Step::ReadyForQuery) } else { Step::of(tag, &body) }
            {
                self.wait_at(step);
            }
            client.write_all(&[&header, body.as_slice()].concat())?;
            if ready {
                return io::copy(&mut server, &mut client).map(|_bytes| ());
            }
        }
    }

    fn wait_at(&self, step: Step) {
        let mut state = self.lock();
        while state.hold_at == Some(step) {
            state.held = true;
            self.changed.notify_all();
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
