//! The client half of TLS, in libpq's modes that insist on it: require, verify-ca, verify-full.
//! Roots are those of `ca_file`, else the system's, else the bundled set.

#![forbid(unsafe_code)]

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ring::digest::{self, SHA256_OUTPUT_LEN};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{AlertDescription, ClientConfig, RootCertStore};
use thiserror::Error;

pub(crate) use self::client_certificate::ClientCertificate;
pub(crate) use self::client_key::KeyFault;
use self::verifier::{Demand, Verifier};
use crate::connection::Check;

mod client_certificate;
mod client_key;
mod verifier;

/// The protocol of ALPN that PostgreSQL 17 registered; older servers ignore it.
pub(super) const ALPN: &[u8] = b"postgresql";

/// TLS cannot be set up as configured.
#[derive(Debug, Error)]
pub(crate) enum TlsError {
    #[error("cannot read the roots in {file}: {why}", file = .file.display())]
    Roots { file: PathBuf, why: String },
    #[error("there is no certificate in {file}", file = .file.display())]
    NoRoots { file: PathBuf },
    #[error("cannot read a certificate in {file}: {why}", file = .file.display())]
    Certificate { file: PathBuf, why: String },
    #[error("{host:?} is not a name that a certificate can be for")]
    Name { host: String },
    #[error("the TLS library refuses the configuration: {0}")]
    Library(#[source] rustls::Error),
}

/// Tells one set of roots from another: a hash over their names and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RootsId([u8; SHA256_OUTPUT_LEN]);

impl RootsId {
    fn of(roots: &RootCertStore) -> Self {
        let mut hash = digest::Context::new(&digest::SHA256);
        for root in &roots.roots {
            for part in [root.subject.as_ref(), root.subject_public_key_info.as_ref()] {
                hash.update(&part.len().to_be_bytes());
                hash.update(part);
            }
        }
        let mut id = [0; SHA256_OUTPUT_LEN];
        id.copy_from_slice(hash.finish().as_ref());
        Self(id)
    }
}

/// The configuration, and what tells its roots from others.
pub(crate) fn client_config(
    check: Check,
    ca_file: Option<&Path>,
    client: Option<&Arc<ClientCertificate>>,
) -> Result<(Arc<ClientConfig>, RootsId), TlsError> {
    let roots = match (check, ca_file) {
        (Check::Nothing, _) => RootCertStore::empty(),
        (Check::Chain | Check::ChainAndName, Some(file)) => from_file(file)?,
        (Check::Chain | Check::ChainAndName, None) => from_system(),
    };
    let id = RootsId::of(&roots);
    let demand = match check {
        Check::Nothing => Demand::Any,
        Check::Chain => Demand::Chain(roots),
        Check::ChainAndName => Demand::ChainAndName(roots),
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Verifier { demand, algorithms: provider.signature_verification_algorithms };
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Library)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match client.map(Arc::clone) {
        Some(client) => config.with_client_cert_resolver(client),
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok((Arc::new(config), id))
}

pub(crate) fn server_name(host: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(host.to_owned())
        .map_err(|_invalid| TlsError::Name { host: host.to_owned() })
}

/// What a server says that refuses our certificate (RFC 8446 §6.2). In TLS 1.3 it comes behind
/// the handshake, in place of an answer to what was sent.
pub(crate) fn refused_certificate(error: &io::Error) -> Option<&'static str> {
    let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    let rustls::Error::AlertReceived(alert) = error else { return None };
    let known = [
        (AlertDescription::BadCertificate, "bad_certificate"),
        (AlertDescription::UnsupportedCertificate, "unsupported_certificate"),
        (AlertDescription::CertificateRevoked, "certificate_revoked"),
        (AlertDescription::CertificateExpired, "certificate_expired"),
        (AlertDescription::CertificateUnknown, "certificate_unknown"),
        (AlertDescription::UnknownCA, "unknown_ca"),
        // OpenSSL, for one that an authority of the right name and another key has signed.
        (AlertDescription::DecryptError, "decrypt_error"),
        (AlertDescription::AccessDenied, "access_denied"),
        (AlertDescription::CertificateRequired, "certificate_required"),
    ];
    known.into_iter().find(|(known, _)| known == alert).map(|(_, name)| name)
}

fn from_file(file: &Path) -> Result<RootCertStore, TlsError> {
    let wrong = |why: String| TlsError::Roots { file: file.to_owned(), why };
    let mut roots = RootCertStore::empty();
    for certificate in
        CertificateDer::pem_file_iter(file).map_err(|error| wrong(error.to_string()))?
    {
        let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
        roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
    }
    if roots.is_empty() { Err(TlsError::NoRoots { file: file.to_owned() }) } else { Ok(roots) }
}

fn from_system() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    // What the system offers and a strict parser refuses is passed over, as other clients do.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    }
    roots
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_file_without_a_certificate_is_refused() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"not a certificate\n").unwrap();
        assert!(matches!(
            client_config(Check::ChainAndName, Some(file.path()), None),
            Err(TlsError::NoRoots { .. })
        ));
        assert!(matches!(
            client_config(Check::Chain, Some(Path::new("/does/not/exist")), None),
            Err(TlsError::Roots { .. })
        ));
    }

    #[test]
    fn names_and_addresses() {
        for good in ["db.internal", "127.0.0.1", "::1"] {
            assert!(server_name(good).is_ok(), "{good}");
        }
        assert!(server_name("not a name").is_err());
    }

    #[test]
    fn without_a_file_there_are_roots() {
        assert!(!from_system().is_empty());
    }
}
