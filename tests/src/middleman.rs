//! Somebody between broker and PostgreSQL who has a certificate that the broker trusts: TLS ends
//! there, and begins anew towards the server.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::postgres::{Server, TlsIdentity};

/// PostgreSQL protocol 55.7.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// The man in the middle; he serves for as long as the process lives.
#[derive(Debug)]
pub struct Middleman {
    /// Where he listens, on 127.0.0.1.
    pub port: u16,
    /// The certificate of his CA, and of the server's: both are trusted.
    pub roots: String,
}

impl Middleman {
    /// Takes his place before `server`.
    ///
    /// # Panics
    /// When there is no free port, or the cryptography fails.
    #[must_use]
    pub fn start(server: &Server) -> Self {
        let identity = TlsIdentity::generate();
        let own = std::fs::read_to_string(&server.ca_file).expect("the CA's certificate");
        let (acceptor, connector) = (accepts(&identity), connects(&own));
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        listener.set_nonblocking(true).expect("a socket can be made so");
        let port = listener.local_addr().expect("a bound socket has an address").port();
        let upstream = SocketAddr::from(([127, 0, 0, 1], server.port));
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
                while let Ok((client, _)) = listener.accept().await {
                    // What breaks is the business of the two ends.
                    let _broken = pass_on(client, upstream, &acceptor, &connector).await;
                }
            });
        });
        Self { port, roots: [own, identity.ca].concat() }
    }
}

async fn pass_on(
    mut client: TcpStream,
    upstream: SocketAddr,
    acceptor: &TlsAcceptor,
    connector: &TlsConnector,
) -> std::io::Result<()> {
    let mut asked = [0; SSL_REQUEST.len()];
    client.read_exact(&mut asked).await?;
    client.write_all(b"S").await?;
    let mut client = acceptor.accept(client).await?;
    let mut server = TcpStream::connect(upstream).await?;
    server.write_all(&SSL_REQUEST).await?;
    let mut answer = [0];
    server.read_exact(&mut answer).await?;
    let name = ServerName::try_from("localhost").expect("a name");
    let mut server = connector.connect(name, server).await?;
    copy_bidirectional(&mut client, &mut server).await.map(drop)
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn accepts(identity: &TlsIdentity) -> TlsAcceptor {
    let certificate = CertificateDer::from_pem_slice(identity.certificate.as_bytes());
    let key = PrivateKeyDer::from_pem_slice(identity.key().as_bytes()).expect("a key");
    let config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![certificate.expect("a certificate")], key);
    TlsAcceptor::from(Arc::new(config.expect("a pair")))
}

fn connects(roots: &str) -> TlsConnector {
    let mut store = RootCertStore::empty();
    let root = CertificateDer::from_pem_slice(roots.as_bytes()).expect("a certificate");
    store.add(root).expect("a root");
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(store)
        .with_no_client_auth();
    TlsConnector::from(Arc::new(config))
}
