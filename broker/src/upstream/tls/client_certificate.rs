//! The certificate by which the broker proves itself to a server that asks for one. The
//! certificate is read with the configuration; its key when there is an arena to read it into.

#![forbid(unsafe_code)]

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use ring::digest::{self, SHA256_OUTPUT_LEN};
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;

use super::TlsError;
use super::client_key::{ClientKey, KeyFault};
use crate::arena::Arena;
use crate::config::SigningKey;
use crate::source::{self, SourceError, SourceFault};

/// Longest chain in bytes of PEM.
const MAX_CHAIN: u64 = 256 * 1024;

/// A certificate, and where its key is.
pub(crate) struct ClientCertificate {
    pub(crate) cert_file: PathBuf,
    pub(crate) key: SigningKey,
    /// The configuration file and key that names the private key, for messages.
    at: (PathBuf, String),
    chain: Vec<CertificateDer<'static>>,
    /// Set before the configuration is in force.
    certified: OnceLock<Arc<CertifiedKey>>,
}

impl ClientCertificate {
    /// Reads the certificate and those that signed it, its own first.
    ///
    /// # Errors
    /// When there is none in the file.
    pub(crate) fn read(
        cert_file: PathBuf,
        key: SigningKey,
        at: (PathBuf, String),
    ) -> Result<Self, TlsError> {
        let wrong = |why: String| TlsError::Certificate { file: cert_file.clone(), why };
        let length = std::fs::metadata(&cert_file).map_err(|error| wrong(error.to_string()))?.len();
        if length > MAX_CHAIN {
            return Err(wrong(format!("it is longer than {MAX_CHAIN} bytes")));
        }
        let chain = CertificateDer::pem_file_iter(&cert_file)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|error| wrong(error.to_string()))?;
        let own = chain.first().ok_or_else(|| wrong("there is none in it".into()))?;
        ParsedCertificate::try_from(own).map_err(|error| wrong(error.to_string()))?;
        Ok(Self { cert_file, key, at, chain, certified: OnceLock::new() })
    }

    /// Reads the private key into the arena. Blocks.
    ///
    /// # Errors
    /// When there is none, or it is not the certificate's.
    pub(crate) fn load_key(&self, arena: &Arena) -> Result<(), SourceError> {
        let (config, key) = &self.at;
        let certified =
            self.certify(arena).map_err(|fault| fault.at(config.clone(), key.clone()))?;
        // A second read of the same configuration changes nothing.
        let _ = self.certified.set(Arc::new(certified));
        Ok(())
    }

    fn certify(&self, arena: &Arena) -> Result<CertifiedKey, SourceFault> {
        let path = self.key.path();
        let wrong = |fault| SourceFault::PrivateKey { path: path.to_owned(), fault };
        let key = ClientKey::parse(source::read_file(path, arena)?).map_err(wrong)?;
        let certified = CertifiedKey::new(self.chain.clone(), Arc::new(key));
        certified.keys_match().map_err(|_other| wrong(KeyFault::Mismatch))?;
        Ok(certified)
    }

    /// Tells one certificate from another.
    pub(crate) fn id(&self) -> [u8; SHA256_OUTPUT_LEN] {
        let mut hash = digest::Context::new(&digest::SHA256);
        for certificate in &self.chain {
            hash.update(&certificate.len().to_be_bytes());
            hash.update(certificate);
        }
        let mut id = [0; SHA256_OUTPUT_LEN];
        id.copy_from_slice(hash.finish().as_ref());
        id
    }

    /// Directories that must stay readable for a reload to read what replaced the files.
    pub(crate) fn directories(&self) -> impl Iterator<Item = PathBuf> {
        let files: [&Path; 2] = [&self.cert_file, self.key.path()];
        files.into_iter().flat_map(source::directories)
    }
}

impl ResolvesClientCert for ClientCertificate {
    /// Whichever authorities the server names: as libpq, and its refusal says more.
    fn resolve(
        &self,
        _root_hint_subjects: &[&[u8]],
        _sigschemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        self.certified.get().cloned()
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl fmt::Debug for ClientCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientCertificate")
            .field("cert_file", &self.cert_file)
            .finish_non_exhaustive()
    }
}
