//! What a server's certificate must be, mode by mode.

#![forbid(unsafe_code)]

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

/// What is asked of a certificate (PostgreSQL 34.19.1). Whatever it is, the server must prove that
/// it holds the certificate's key.
#[derive(Debug)]
pub(super) enum Demand {
    /// `require`: no certificate is refused.
    Any,
    /// `verify-ca`: it is signed by one of these roots, for whatever name.
    Chain(RootCertStore),
    /// `verify-full`: it is signed by one of these roots, for the host's name or address.
    ChainAndName(RootCertStore),
}

#[derive(Debug)]
pub(super) struct Verifier {
    pub(super) demand: Demand,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    fn chain<'a>(
        &self,
        roots: &RootCertStore,
        end_entity: &'a CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ParsedCertificate<'a>, Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, roots, intermediates, now, algorithms)?;
        Ok(parsed)
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match &self.demand {
            Demand::Any => {}
            Demand::Chain(roots) => {
                self.chain(roots, end_entity, intermediates, now)?;
            }
            Demand::ChainAndName(roots) => {
                let parsed = self.chain(roots, end_entity, intermediates, now)?;
                verify_server_name(&parsed, server_name)?;
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
    use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
    use rustls::server::{ClientHello, ResolvesServerCert};
    use rustls::sign::CertifiedKey;
    use rustls::{CertificateError, ClientConnection, ServerConfig, ServerConnection, version};

    use super::*;
    use crate::connection::Check;

    struct Issued {
        root: CertificateDer<'static>,
        certificate: CertificateDer<'static>,
        key: KeyPair,
    }

    fn issue(ca: &str) -> Issued {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, ca);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let names = ["db.internal".to_owned(), "10.1.2.3".to_owned(), "fd00::5".to_owned()];
        let params = CertificateParams::new(names).unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap().der().clone();
        Issued { root: issuer.der().clone(), certificate, key }
    }

    fn roots(root: &CertificateDer<'static>) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(root.clone()).unwrap();
        roots
    }

    fn full(root: &CertificateDer<'static>) -> Demand {
        Demand::ChainAndName(roots(root))
    }

    fn chain(root: &CertificateDer<'static>) -> Demand {
        Demand::Chain(roots(root))
    }

    /// What a verifier says of a certificate, for a name, so many years after 1970.
    fn said(
        demand: Demand,
        certificate: &CertificateDer<'_>,
        name: &str,
        year: u64,
    ) -> Result<(), Error> {
        let provider = rustls::crypto::ring::default_provider();
        let verifier = Verifier { demand, algorithms: provider.signature_verification_algorithms };
        let name = ServerName::try_from(name).unwrap();
        let now = UnixTime::since_unix_epoch(Duration::from_secs(year * 31_556_952));
        verifier.verify_server_cert(certificate, &[], &name, &[], now).map(drop)
    }

    const NOW: u64 = 56;
    const EXPIRED: u64 = 3000;

    #[test]
    fn each_mode_refuses_what_libpq_refuses_in_it() {
        let (ours, other, namesake) = (issue("ours"), issue("other"), issue("ours"));
        let wrong = |said: Result<(), Error>| match said {
            Err(Error::InvalidCertificate(why)) => why,
            said => panic!("{said:?}"),
        };
        for name in ["db.internal", "10.1.2.3", "fd00::5"] {
            said(full(&ours.root), &ours.certificate, name, NOW).unwrap();
        }
        for name in ["db2.internal", "10.1.2.4", "fd00::6"] {
            let why = wrong(said(full(&ours.root), &ours.certificate, name, NOW));
            assert!(matches!(why, CertificateError::NotValidForNameContext { .. }), "{why:?}");
            said(chain(&ours.root), &ours.certificate, name, NOW).unwrap();
        }
        for demand in [full as fn(&CertificateDer<'static>) -> Demand, chain] {
            let why = wrong(said(demand(&other.root), &ours.certificate, "db.internal", NOW));
            assert!(matches!(why, CertificateError::UnknownIssuer), "{why:?}");
            let why = wrong(said(demand(&namesake.root), &ours.certificate, "db.internal", NOW));
            assert!(matches!(why, CertificateError::BadSignature), "{why:?}");
            let why = wrong(said(demand(&ours.root), &ours.certificate, "db.internal", EXPIRED));
            assert!(matches!(why, CertificateError::ExpiredContext { .. }), "{why:?}");
        }
        said(Demand::Any, &ours.certificate, "db2.internal", EXPIRED).unwrap();
    }

    /// A server that shows a certificate whose key it may not have.
    #[derive(Debug)]
    struct Shows(Arc<CertifiedKey>);

    impl ResolvesServerCert for Shows {
        fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
            Some(Arc::clone(&self.0))
        }
    }

    /// A handshake in memory, in mode `require`.
    fn shake(
        certificate: &CertificateDer<'static>,
        key: &KeyPair,
        version: &'static rustls::SupportedProtocolVersion,
    ) -> Result<(), Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let key = provider.key_provider.load_private_key(key).unwrap();
        let shown = CertifiedKey::new(vec![certificate.clone()], key);
        let server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(Shows(Arc::new(shown))));
        let mut server = ServerConnection::new(Arc::new(server)).unwrap();
        let (client, _roots) = super::super::client_config(Check::Nothing, None, None).unwrap();
        let name = ServerName::try_from("db.internal").unwrap();
        let mut client = ClientConnection::new(client, name).unwrap();
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
        Ok(())
    }

    #[test]
    fn a_certificate_of_somebody_else_is_of_no_use_in_any_mode() {
        let (ours, other) = (issue("ours"), issue("other"));
        for version in [&version::TLS12, &version::TLS13] {
            shake(&ours.certificate, &ours.key, version).unwrap();
            let why = shake(&ours.certificate, &other.key, version).unwrap_err();
            let bad = Error::InvalidCertificate(CertificateError::BadSignature);
            assert_eq!(why, bad, "{version:?}");
        }
    }
}
