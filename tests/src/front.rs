//! A proxy before PostgreSQL that speaks TLS from the first byte, as PostgreSQL 17 does itself:
//! TLS ends here, and goes on in plaintext to the server's Unix socket.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsAcceptor;

use crate::postgres::{Server, TlsIdentity};

/// The proxy; it serves for as long as the process lives.
#[derive(Debug)]
pub struct Front {
    /// Where it listens, on 127.0.0.1.
    pub port: u16,
    /// The certificate of its CA.
    pub ca: String,
    handshakes: Arc<AtomicUsize>,
}

impl Front {
    /// Takes its place before `server`, and selects one of these protocols (RFC 7301).
    ///
    /// # Panics
    /// When there is no free port, or the cryptography fails.
    #[must_use]
    pub fn start(server: &Server, protocols: &[&str]) -> Self {
        let identity = TlsIdentity::generate();
        let acceptor = accepts(&identity, protocols);
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        listener.set_nonblocking(true).expect("a socket can be made so");
        let port = listener.local_addr().expect("a bound socket has an address").port();
        let upstream = server.socket_dir.join(format!(".s.PGSQL.{}", server.port));
        let handshakes = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&handshakes);
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
                // A cancel request comes while a session is open.
                let mut sessions = tokio::task::JoinSet::new();
                while let Ok((client, _)) = listener.accept().await {
                    let (acceptor, count) = (acceptor.clone(), Arc::clone(&count));
                    let upstream = upstream.clone();
                    sessions.spawn(async move {
                        let server = UnixStream::connect(upstream).await?;
                        pass_on(client, server, &acceptor, &count).await
                    });
                }
            });
        });
        Self { port, ca: identity.ca, handshakes }
    }

    /// How many handshakes were finished.
    #[must_use]
    pub fn handshakes(&self) -> usize {
        self.handshakes.load(Ordering::SeqCst)
    }
}

async fn pass_on(
    client: TcpStream,
    mut server: UnixStream,
    acceptor: &TlsAcceptor,
    count: &AtomicUsize,
) -> std::io::Result<()> {
    let mut client = acceptor.accept(client).await?;
    count.fetch_add(1, Ordering::SeqCst);
    copy_bidirectional(&mut client, &mut server).await.map(drop)
}

fn accepts(identity: &TlsIdentity, protocols: &[&str]) -> TlsAcceptor {
    let certificate = CertificateDer::from_pem_slice(identity.certificate.as_bytes());
    let key = PrivateKeyDer::from_pem_slice(identity.key().as_bytes()).expect("a key");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![certificate.expect("a certificate")], key);
    let mut config = config.expect("a pair");
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    TlsAcceptor::from(Arc::new(config))
}
