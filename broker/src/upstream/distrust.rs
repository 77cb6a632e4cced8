//! Why a server was not believed, for the operator: what its certificate lacks, and what to do.

#![forbid(unsafe_code)]

use std::io;

use rustls::CertificateError;
use rustls::pki_types::ServerName;
use thiserror::Error;

use crate::peer::Uid;

/// Names of a certificate that are told, and how much of each: they are a stranger's words.
const MOST_NAMES: usize = 8;
const LONGEST_NAME: usize = 80;

/// What a server failed to prove.
#[derive(Debug, Error)]
pub(crate) enum Distrust {
    /// It answered something else than `S` to SSLRequest.
    #[error("it refuses TLS: turn ssl on there, or set tls.mode = \"disable\"")]
    NoTls,
    /// What follows would be spoken to a server of whatever protocol shares the certificate.
    #[error(
        "it does not select the protocol postgresql (ALPN): direct TLS needs PostgreSQL 17, or a proxy that selects it"
    )]
    NoProtocol,
    /// What SO_PEERCRED says of the socket.
    #[error("it is of uid {found}, and peer_user is {wanted}")]
    User { found: Uid, wanted: Uid },
    #[error("its certificate has expired")]
    Expired,
    #[error("its certificate is not valid yet")]
    NotYet,
    #[error("its certificate is of no root that is trusted here: check tls.ca_file")]
    UnknownIssuer,
    #[error(
        "its certificate is signed by another key than its issuer's, or it has not the key that is in it: check tls.ca_file"
    )]
    Forged,
    #[error("its certificate is not for {wanted}, but for {names}")]
    OtherName { wanted: String, names: String },
    #[error(
        "its certificate has no subjectAltName, and a common name is not looked at: add a subjectAltName for {wanted}"
    )]
    NoName { wanted: String },
    #[error("TLS failed: {0}")]
    Other(#[source] io::Error),
}

impl Distrust {
    /// What a handshake ended with.
    pub(super) fn other(error: io::Error) -> Self {
        Self::Other(error)
    }

    /// What TLS ended with, where nothing of ours explains it.
    pub(crate) const fn by_io(&self) -> Option<&io::Error> {
        match self {
            Self::Other(source) => Some(source),
            Self::NoTls
            | Self::NoProtocol
            | Self::User { .. }
            | Self::Expired
            | Self::NotYet
            | Self::UnknownIssuer
            | Self::Forged
            | Self::OtherName { .. }
            | Self::NoName { .. } => None,
        }
    }

    /// What rustls found wrong.
    pub(super) fn by_tls(error: io::Error, wanted: &ServerName<'_>) -> Self {
        let found = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
        let Some(rustls::Error::InvalidCertificate(certificate)) = found else {
            return Self::Other(error);
        };
        let wanted = wanted.to_str().into_owned();
        if let CertificateError::NotValidForNameContext { presented, .. } = certificate {
            return if presented.is_empty() {
                Self::NoName { wanted }
            } else {
                Self::OtherName { wanted, names: told(presented) }
            };
        }
        let is = |them: &[CertificateError]| them.contains(certificate);
        if matches!(certificate, CertificateError::ExpiredContext { .. })
            || is(&[CertificateError::Expired])
        {
            Self::Expired
        } else if matches!(certificate, CertificateError::NotValidYetContext { .. })
            || is(&[CertificateError::NotValidYet])
        {
            Self::NotYet
        } else if is(&[CertificateError::UnknownIssuer]) {
            Self::UnknownIssuer
        } else if is(&[CertificateError::BadSignature]) {
            Self::Forged
        } else {
            Self::Other(error)
        }
    }
}

/// As much of a stranger's names as a line of a log bears: `DnsName("db2.internal")` becomes
/// `db2.internal`.
fn told(presented: &[String]) -> String {
    let plain = |name: &String| -> String {
        let inner = name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')'));
        let inner = inner.unwrap_or(name).trim_matches('"');
        inner.chars().filter(|letter| letter.is_ascii_graphic()).take(LONGEST_NAME).collect()
    };
    let names: Vec<String> = presented.iter().take(MOST_NAMES).map(plain).collect();
    let more = presented.len().saturating_sub(MOST_NAMES);
    let names = names.join(", ");
    if more == 0 { names } else { format!("{names} and {more} more") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(certificate: CertificateError) -> String {
        let error = io::Error::new(
            io::ErrorKind::InvalidData,
            rustls::Error::InvalidCertificate(certificate),
        );
        Distrust::by_tls(error, &ServerName::try_from("db.internal").unwrap()).to_string()
    }

    fn names(presented: &[&str]) -> String {
        let expected = ServerName::try_from("db.internal").unwrap();
        let presented = presented.iter().map(ToString::to_string).collect();
        said(CertificateError::NotValidForNameContext { expected, presented })
    }

    #[test]
    fn an_operator_reads_what_the_certificate_lacks() {
        assert_eq!(said(CertificateError::Expired), "its certificate has expired");
        assert!(said(CertificateError::UnknownIssuer).contains("tls.ca_file"));
        assert_eq!(
            names(&["DnsName(\"db2.internal\")", "IpAddress(10.0.0.5)"]),
            "its certificate is not for db.internal, but for db2.internal, 10.0.0.5"
        );
        assert!(names(&[]).contains("add a subjectAltName for db.internal"));
        assert!(said(CertificateError::BadSignature).contains("another key"));
        assert!(said(CertificateError::BadEncoding).starts_with("TLS failed: "));
    }

    #[test]
    fn a_strangers_names_are_bounded_and_printable() {
        let line = names(&["DnsName(\"a\n\u{1b}[31mb\")"]);
        assert!(line.ends_with("a[31mb"), "{line:?}");
        let long = format!("DnsName(\"{}\")", "x".repeat(10_000));
        let line = names(&[long.as_str(); 1000]);
        assert!(line.len() < 1000 && line.ends_with("and 992 more"), "{line}");
    }
}
