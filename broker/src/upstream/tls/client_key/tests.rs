//! Keys as OpenSSL writes them, in handshakes with a server that demands a certificate.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};

use super::*;
use crate::arena::{Arena, BackendChoice};
use crate::config::SigningKey as Named;
use crate::connection::Check;
use crate::upstream::tls::{ClientCertificate, client_config};

pub(super) fn key_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/client-keys").join(name)
}

/// Certificates of one authority: each is for a key of the directory above.
pub(super) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: tempfile::TempDir,
}

impl Authority {
    pub(super) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "an authority of clients");
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ca.der"), issuer.der()).unwrap();
        Self { issuer, directory }
    }

    /// The certificate for the key in `pkcs8`, in a file.
    pub(super) fn certify(&self, pkcs8: &str) -> PathBuf {
        let key = std::fs::read_to_string(key_file(pkcs8)).unwrap();
        let key = KeyPair::from_pem(&key).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "app");
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let file = self.directory.path().join(format!("certificate-of-{pkcs8}"));
        std::fs::write(&file, [certificate.pem(), self.issuer.pem()].concat()).unwrap();
        file
    }

    pub(super) fn root(&self) -> PathBuf {
        self.directory.path().join("ca.der")
    }
}

pub(super) fn client(certificate: PathBuf, key: &str) -> Arc<ClientCertificate> {
    let at = ("/etc/broker.toml".into(), "connections.main_db.tls.key".into());
    let client = ClientCertificate::read(certificate, Named::File(key_file(key)), at);
    Arc::new(client.unwrap())
}

/// A server that demands a certificate by the authority of `root`.
pub(super) fn server(root: &Path) -> Arc<ServerConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(std::fs::read(root).unwrap())).unwrap();
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    let key = KeyPair::generate().unwrap();
    let own = CertificateParams::new(["db".to_owned()]).unwrap().self_signed(&key).unwrap();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(vec![own.der().clone()], key);
    Arc::new(config.unwrap())
}

pub(super) fn shake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Result<(), Error> {
    let mut server = ServerConnection::new(server).unwrap();
    let mut client = ClientConnection::new(client, ServerName::try_from("db").unwrap()).unwrap();
    while client.is_handshaking() || server.is_handshaking() {
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        server.read_tls(&mut bytes.as_slice()).unwrap();
        server.process_new_packets()?;
        let mut bytes = Vec::new();
        server.write_tls(&mut bytes).unwrap();
        client.read_tls(&mut bytes.as_slice()).unwrap();
        client.process_new_packets()?;
    }
    assert!(server.peer_certificates().is_some_and(|chain| chain.len() == 2));
    Ok(())
}

/// With one version only.
fn of_version(
    config: &ClientConfig,
    version: &'static rustls::SupportedProtocolVersion,
    client: &Arc<ClientCertificate>,
) -> Arc<ClientConfig> {
    let config = ClientConfig::builder_with_provider(Arc::clone(config.crypto_provider()))
        .with_protocol_versions(&[version])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(super::super::verifier::Verifier {
            demand: super::super::verifier::Demand::Any,
            algorithms: config.crypto_provider().signature_verification_algorithms,
        }))
        .with_client_cert_resolver(Arc::clone(client) as _);
    Arc::new(config)
}

/// The key's file, the file of the same key as PKCS#8, and its kind.
pub(super) const KEYS: [(&str, &str, &str); 7] = [
    ("rsa-pkcs8.pem", "rsa-pkcs8.pem", "RsaPkcs8"),
    ("rsa-pkcs1.pem", "rsa-pkcs8.pem", "RsaPkcs1"),
    ("p256-pkcs8.pem", "p256-pkcs8.pem", "EcdsaP256"),
    ("p256-sec1.pem", "p256-pkcs8.pem", "EcdsaP256"),
    ("p384-pkcs8.pem", "p384-pkcs8.pem", "EcdsaP384"),
    ("p384-sec1.pem", "p384-pkcs8.pem", "EcdsaP384"),
    ("ed25519-pkcs8.pem", "ed25519-pkcs8.pem", "Ed25519"),
];

#[test]
fn each_kind_of_key_convinces_a_server_in_both_versions() {
    let authority = Authority::new();
    let server = server(&authority.root());
    let arena = Arena::map(BackendChoice::Auto, 64 * 1024).unwrap();
    for (file, pkcs8, kind) in KEYS {
        let client = client(authority.certify(pkcs8), file);
        client.load_key(&arena).unwrap();
        let key = ClientKey::parse(crate::source::read_file(&key_file(file), &arena).unwrap());
        let key = key.unwrap();
        assert_eq!(format!("{:?} {key:?}", key.0.kind), format!("{kind} [REDACTED]"), "{file}");
        let (config, _roots) = client_config(Check::Nothing, None, Some(&client)).unwrap();
        shake(Arc::clone(&config), Arc::clone(&server)).unwrap();
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            let config = of_version(&config, version, &client);
            shake(config, Arc::clone(&server)).unwrap_or_else(|why| panic!("{file}: {why}"));
        }
        assert!(key.choose_scheme(&[SignatureScheme::RSA_PKCS1_SHA1]).is_none());
    }
    let (config, _roots) = client_config(Check::Nothing, None, None).unwrap();
    assert_eq!(shake(config, server).unwrap_err(), Error::NoCertificatesPresented);
}

#[test]
fn a_certificate_without_its_key_is_refused() {
    let authority = Authority::new();
    let arena = Arena::map(BackendChoice::Auto, 64 * 1024).unwrap();
    let free = arena.usage().free;
    let cases = [
        ("p384-pkcs8.pem", "does not fit the certificate"),
        ("rsa-pkcs1.pem", "does not fit the certificate"),
        ("p521-sec1.pem", "is not a key that can sign"),
        ("encrypted-pkcs8.pem", "openssl pkey -in KEY -out NEW"),
        ("encrypted-sec1.pem", "openssl pkey -in KEY -out NEW"),
        ("../../Cargo.toml", "holds no private key"),
        ("absent.pem", "cannot read"),
    ];
    for (file, expected) in cases {
        let client = client(authority.certify("p256-pkcs8.pem"), file);
        let refused = client.load_key(&arena).unwrap_err().to_string();
        assert!(
            refused.starts_with("/etc/broker.toml: connections.main_db.tls.key: "),
            "{refused}"
        );
        assert!(refused.contains(expected) && refused.contains(file), "{refused}");
    }
    assert_eq!(arena.usage().free, free, "what is refused leaves nothing in the arena");
}
