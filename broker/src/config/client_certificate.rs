//! `tls.cert_file`, `tls.key` and `tls.negotiation`.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::sync::Arc;

use super::parse::{At, signing_key};
use super::{ConfigError, raw};
use crate::connection::Negotiation;
use crate::upstream::tls::ClientCertificate;

/// Refuses what would be silently of no effect: without TLS, and where TLS is not insisted on.
pub(super) fn none_without_tls(given: &raw::Tls, at: &At<'_>) -> Result<(), ConfigError> {
    let keys = [
        ("cert_file", given.cert_file.is_some()),
        ("key", given.key.is_some()),
        ("negotiation", given.negotiation.is_some()),
    ];
    match keys.into_iter().find(|(_, is_given)| *is_given) {
        None => Ok(()),
        Some((key, _)) => Err(at
            .below(key)
            .wrong("needs TLS for certain: set mode = \"verify-full\", or remove it")),
    }
}

pub(super) fn negotiation(given: Option<&str>, at: &At<'_>) -> Result<Negotiation, ConfigError> {
    match given {
        None => Ok(Negotiation::default()),
        Some("postgres") => Ok(Negotiation::Postgres),
        Some("direct") => Ok(Negotiation::Direct),
        Some(other) => Err(at.below("negotiation").wrong(format!(
            "{other:?} is not supported: use \"postgres\", or \"direct\" for PostgreSQL 17 and later"
        ))),
    }
}

pub(super) fn read(
    cert_file: Option<PathBuf>,
    key: Option<raw::SigningKey>,
    at: &At<'_>,
) -> Result<Option<Arc<ClientCertificate>>, ConfigError> {
    let (cert_at, key_at) = (at.below("cert_file"), at.below("key"));
    let (cert_file, key) = match (cert_file, key) {
        (None, None) => return Ok(None),
        (Some(cert_file), Some(key)) => (cert_file, key),
        (Some(_), None) => {
            return Err(key_at.wrong("is missing: write key = { file = \"…\" } beside cert_file"));
        }
        (None, Some(_)) => {
            return Err(cert_at.wrong("is missing: a key proves nothing without its certificate"));
        }
    };
    if !cert_file.is_absolute() {
        return Err(cert_at.wrong("must be an absolute path"));
    }
    let key = signing_key(key, &key_at)?;
    let client = ClientCertificate::read(cert_file, key, (key_at.file.to_owned(), key_at.key))
        .map_err(|why| cert_at.wrong(why.to_string()))?;
    Ok(Some(Arc::new(client)))
}
