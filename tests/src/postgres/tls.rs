//! The certificates of a private server.

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

/// A CA and a server certificate signed by it, as PEM.
#[derive(Debug)]
pub struct TlsIdentity {
    /// The CA's certificate.
    pub ca: String,
    /// The server's certificate, for `localhost` and 127.0.0.1.
    pub certificate: String,
    pub(super) key: String,
}

impl TlsIdentity {
    /// The key of the server's certificate, as PEM.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Makes new ones.
    ///
    /// # Panics
    /// When the cryptography fails.
    #[must_use]
    pub fn generate() -> Self {
        let key = || KeyPair::generate().expect("a key pair");
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.distinguished_name.push(DnType::CommonName, "credbroker test CA");
        let authority = CertifiedIssuer::self_signed(authority, key()).expect("a CA");
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let server_key = key();
        let certificate = CertificateParams::new(names)
            .and_then(|params| params.signed_by(&server_key, &authority))
            .expect("a server certificate");
        Self {
            ca: authority.pem(),
            certificate: certificate.pem(),
            key: server_key.serialize_pem(),
        }
    }
}

/// A CA whose certificates clients prove themselves by.
#[derive(Debug)]
pub struct ClientAuthority(CertifiedIssuer<'static, KeyPair>);

impl ClientAuthority {
    /// Makes a new one of this name.
    ///
    /// # Panics
    /// When the cryptography fails.
    #[must_use]
    pub fn generate(name: &str) -> Self {
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key pair");
        Self(CertifiedIssuer::self_signed(authority, key).expect("a CA"))
    }

    /// Its certificate, as PEM.
    #[must_use]
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate for a role of this name with this key, as PEM.
    ///
    /// # Panics
    /// When the cryptography fails.
    #[must_use]
    pub fn issue(&self, role: &str, key: &KeyPair) -> String {
        let mut client = CertificateParams::default();
        client.distinguished_name.push(DnType::CommonName, role);
        client.signed_by(key, &self.0).expect("a client certificate").pem()
    }
}
