//! Servers that are not what they should be: each says what its script says, and writes down
//! every byte that the broker sends to it, as it came and as TLS opened it.
//!
//! A rogue listens on a port of 127.0.0.1 or on a Unix socket, and plays its script on every
//! connection. What it keeps, and how long it plays, are bounded.

use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

pub use self::case::{Case, Choice, Expected, Mode, Phase, Say, Then};
pub use self::cases::{ask, say};
pub use self::certificates::{Authority, ServerTls};
pub use self::evidence::Evidence;
pub use self::middle::{Heard, Middle, replay};
pub use self::scram::{Proven, Secrets, Verifier};
pub use self::wire::{Greeting, Wire, prelude};

mod case;
pub mod cases;
mod certificates;
mod evidence;
mod middle;
mod scram;
mod wire;

/// The most that is kept of what one rogue was sent. More is counted and dropped.
const MOST_KEPT: usize = 8 << 20;

/// What a rogue does with a connection. The connection ends when it returns.
pub type Script = Arc<dyn Fn(&mut Wire) -> io::Result<()> + Send + Sync>;

/// Where a rogue listens.
#[derive(Debug, Clone)]
pub enum Place {
    /// A free port of 127.0.0.1.
    Tcp,
    /// A free port of `::1`.
    Tcp6,
    /// `.s.PGSQL.PORT` in a directory that the broker can pass through.
    Unix(PathBuf, u16),
}

/// What a rogue was sent.
#[derive(Debug, Default, Clone)]
pub struct Record {
    /// The bytes of the sockets.
    pub raw: Vec<u8>,
    /// The bytes that came out of TLS; without TLS the same as `raw`.
    pub opened: Vec<u8>,
    /// What was more than is kept.
    pub dropped: usize,
}

impl Record {
    fn keep(&mut self, raw: bool, bytes: &[u8]) {
        let kept = if raw { &mut self.raw } else { &mut self.opened };
        let room = MOST_KEPT.saturating_sub(kept.len()).min(bytes.len());
        kept.extend_from_slice(&bytes[..room]);
        self.dropped += bytes.len() - room;
    }
}

#[derive(Debug, Default)]
struct Shared {
    record: Mutex<Record>,
    accepted: AtomicUsize,
    open: AtomicUsize,
    ended: AtomicBool,
}

/// A server with a script; it listens as long as it is not dropped.
pub struct Rogue {
    shared: Arc<Shared>,
    address: Address,
}

#[derive(Debug, Clone)]
enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf, u16),
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Rogue {
    /// Begins to listen.
    ///
    /// # Panics
    /// When it cannot.
    #[must_use]
    #[allow(clippy::disallowed_methods, reason = "it stands in for a database, not for the broker")]
    pub fn start(place: &Place, tls: Option<ServerTls>, script: Script) -> Self {
        let (listener, address) = match place {
            Place::Tcp | Place::Tcp6 => {
                let ip: IpAddr = match place {
                    Place::Tcp6 => Ipv6Addr::LOCALHOST.into(),
                    Place::Tcp | Place::Unix(..) => Ipv4Addr::LOCALHOST.into(),
                };
                let listener = TcpListener::bind((ip, 0)).expect("a free port");
                let address = listener.local_addr().expect("a bound socket has an address");
                (Listener::Tcp(listener), Address::Tcp(address))
            }
            Place::Unix(directory, port) => {
                let path = socket_path(directory, *port);
                let listener = UnixListener::bind(&path).expect("a socket in the directory");
                fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).expect("chmod");
                (Listener::Unix(listener), Address::Unix(directory.clone(), *port))
            }
        };
        let shared = Arc::new(Shared::default());
        let playing = Arc::clone(&shared);
        thread::spawn(move || {
            while let Ok(socket) = listener.accept() {
                if playing.ended.load(Ordering::SeqCst) {
                    return;
                }
                let number = playing.accepted.fetch_add(1, Ordering::SeqCst) + 1;
                playing.open.fetch_add(1, Ordering::SeqCst);
                let (shared, script, tls) =
                    (Arc::clone(&playing), Arc::clone(&script), tls.clone());
                thread::spawn(move || {
                    if let Ok(mut wire) = Wire::new(socket, tls, Arc::clone(&shared), number) {
                        // That the broker hangs up is what most scripts lead to.
                        let _ended = script(&mut wire);
                    }
                    shared.open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self { shared, address }
    }

    /// The host of a connection to it: a name for TCP, the directory of the socket otherwise.
    #[must_use]
    pub fn host(&self) -> &str {
        match &self.address {
            Address::Tcp(address) if address.is_ipv6() => "::1",
            Address::Tcp(_) => "localhost",
            Address::Unix(directory, _) => directory.to_str().expect("an ASCII path"),
        }
    }

    /// Its port.
    #[must_use]
    pub fn port(&self) -> u16 {
        match &self.address {
            Address::Tcp(address) => address.port(),
            Address::Unix(_, port) => *port,
        }
    }

    /// What the broker has sent to it until now.
    #[must_use]
    pub fn record(&self) -> Record {
        self.shared.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many connections the broker has made.
    #[must_use]
    pub fn accepted(&self) -> usize {
        self.shared.accepted.load(Ordering::SeqCst)
    }

    /// How many of them its script still plays on.
    #[must_use]
    pub fn open(&self) -> usize {
        self.shared.open.load(Ordering::SeqCst)
    }
}

impl Drop for Rogue {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        // Wakes the accepting thread, which then sees the end.
        match &self.address {
            Address::Tcp(address) => drop(TcpStream::connect(address)),
            Address::Unix(directory, port) => {
                drop(UnixStream::connect(socket_path(directory, *port)));
            }
        }
    }
}

impl fmt::Debug for Rogue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rogue").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Listener {
    fn accept(&self) -> io::Result<wire::Socket> {
        match self {
            Self::Tcp(listener) => listener.accept().map(|(socket, _)| wire::Socket::Tcp(socket)),
            Self::Unix(listener) => listener.accept().map(|(socket, _)| wire::Socket::Unix(socket)),
        }
    }
}

fn socket_path(directory: &Path, port: u16) -> PathBuf {
    directory.join(format!(".s.PGSQL.{port}"))
}
