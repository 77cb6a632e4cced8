//! Certificates for rogues: of an authority that the broker trusts, and of others.

use std::fmt;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd,
};
use ring::digest;
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// An authority that signs for whatever name it is told.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// A server's certificate and key, ready for use.
#[derive(Clone)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    end_point: Vec<u8>,
}

impl Authority {
    /// Makes a new one.
    ///
    /// # Panics
    /// When the cryptography fails.
    #[must_use]
    pub fn generate() -> Self {
        Self::named("an authority of the tests")
    }

    /// Makes one of this name.
    ///
    /// # Panics
    /// When the cryptography fails.
    #[must_use]
    pub fn named(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let issuer = CertifiedIssuer::self_signed(params, key()).expect("a CA");
        Self { issuer }
    }

    /// Its certificate, as PEM.
    #[must_use]
    pub fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// A certificate for this name or address.
    ///
    /// # Panics
    /// When the cryptography fails.
    #[must_use]
    pub fn sign(&self, name: &str) -> ServerTls {
        self.sign_params(&CertificateParams::new([name.to_owned()]).expect("a name"))
    }

    /// The same, valid no more since 2001.
    ///
    /// # Panics
    /// When the cryptography fails.
    #[must_use]
    pub fn sign_expired(&self, name: &str) -> ServerTls {
        let mut params = CertificateParams::new([name.to_owned()]).expect("a name");
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(2001, 1, 1);
        self.sign_params(&params)
    }

    /// One that has the name where nobody looks any more (RFC 9525 §1.4): in its subject.
    ///
    /// # Panics
    /// When the cryptography fails.
    #[must_use]
    pub fn sign_common_name(&self, name: &str) -> ServerTls {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        self.sign_params(&params)
    }

    fn sign_params(&self, params: &CertificateParams) -> ServerTls {
        let key = key();
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        ServerTls::new(certificate.der().clone(), &key)
    }
}

impl ServerTls {
    /// A certificate that vouches for itself.
    ///
    /// # Panics
    /// When the cryptography fails.
    #[must_use]
    pub fn self_signed(name: &str) -> Self {
        Self::self_signed_with(name, &key())
    }

    /// One whose signature has no hash of its own (RFC 8032): nothing can be bound to it.
    ///
    /// # Panics
    /// When the cryptography fails.
    #[must_use]
    pub fn unbindable(name: &str) -> Self {
        let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).expect("a key pair");
        Self::self_signed_with(name, &key)
    }

    /// Its `tls-server-end-point` (RFC 5929 §4.1), for the signatures that are made here.
    #[must_use]
    pub fn end_point(&self) -> &[u8] {
        &self.end_point
    }

    fn self_signed_with(name: &str, key: &KeyPair) -> Self {
        let certificate = CertificateParams::new([name.to_owned()])
            .and_then(|params| params.self_signed(key))
            .expect("a certificate");
        Self::new(certificate.der().clone(), key)
    }

    fn new(certificate: CertificateDer<'static>, key: &KeyPair) -> Self {
        let end_point = digest::digest(&digest::SHA256, &certificate).as_ref().to_vec();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map(|builder| builder.with_no_client_auth())
            .and_then(|builder| builder.with_single_cert(vec![certificate], key));
        Self { config: Arc::new(config.expect("a certificate and its key")), end_point }
    }

    pub(super) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }
}

fn key() -> KeyPair {
    KeyPair::generate().expect("a key pair")
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authority")
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServerTls")
    }
}
