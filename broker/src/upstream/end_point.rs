//! `tls-server-end-point` (RFC 5929 §4.1): the hash of the server's certificate, which ties a
//! SCRAM exchange to the TLS channel that it runs in.
//!
//! The hash function is that of the certificate's own signature, so the outermost of its DER is
//! read here: as far as the signature's algorithm, and no further.

#![forbid(unsafe_code)]

use ring::digest::{Algorithm, SHA256, SHA384, SHA512, digest};

use super::Stream;

/// The channel that a login runs in.
#[derive(Debug)]
pub(crate) enum Channel {
    /// No TLS of ours.
    Plain,
    /// TLS, and what a login can be bound to, where its certificate gives something.
    Tls(Option<EndPoint>),
}

/// A hash of the server's certificate: 32, 48 or 64 bytes. Not a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EndPoint(Vec<u8>);

impl Stream {
    /// The channel that it is.
    pub(crate) fn channel(&self) -> Channel {
        match self {
            Self::Plain(_) => Channel::Plain,
            Self::Tls(stream) => {
                let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
                Channel::Tls(chain.first().and_then(|leaf| EndPoint::of(leaf)))
            }
        }
    }
}

impl EndPoint {
    /// Of a certificate in DER. `None` when it is none, or when its signature has no hash of its
    /// own, as those of Ed25519: RFC 5929 leaves these undefined.
    pub(crate) fn of(certificate: &[u8]) -> Option<Self> {
        let hash = signature_hash(certificate)?;
        Some(Self(digest(hash, certificate).as_ref().to_vec()))
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn dangerous_for_test(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }
}

const SEQUENCE: u8 = 0x30;
const OBJECT_IDENTIFIER: u8 = 0x06;
/// `hashAlgorithm [0]` of RSASSA-PSS-params.
const CONTEXT_0: u8 = 0xa0;

/// RFC 5280 §4.1: `SEQUENCE { tbsCertificate, signatureAlgorithm, signatureValue }`.
fn signature_hash(certificate: &[u8]) -> Option<&'static Algorithm> {
    let (certificate, _) = element(certificate, SEQUENCE)?;
    let (_to_be_signed, rest) = element(certificate, SEQUENCE)?;
    let (algorithm, _) = element(rest, SEQUENCE)?;
    let (oid, parameters) = element(algorithm, OBJECT_IDENTIFIER)?;
    if oid == RSASSA_PSS { pss_hash(parameters) } else { known(SIGNATURES, oid) }
}

/// RFC 4055 §3.1: `SEQUENCE { hashAlgorithm [0] AlgorithmIdentifier DEFAULT sha1, … }`.
fn pss_hash(parameters: &[u8]) -> Option<&'static Algorithm> {
    let (parameters, _) = element(parameters, SEQUENCE)?;
    let Some((tagged, _)) = element(parameters, CONTEXT_0) else { return Some(&SHA256) };
    let (algorithm, _) = element(tagged, SEQUENCE)?;
    let (oid, _) = element(algorithm, OBJECT_IDENTIFIER)?;
    known(HASHES, oid)
}

/// MD5 and SHA-1 become SHA-256 (RFC 5929 §4.1).
const HASHES: &[(&[u8], &Algorithm)] = &[
    // 1.2.840.113549.2.5 and 1.3.14.3.2.26
    (&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x02, 0x05], &SHA256),
    (&[0x2b, 0x0e, 0x03, 0x02, 0x1a], &SHA256),
    // 2.16.840.1.101.3.4.2.{1,2,3}
    (&[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01], &SHA256),
    (&[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02], &SHA384),
    (&[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x03], &SHA512),
];

/// 1.2.840.113549.1.1.10
const RSASSA_PSS: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0a];

const SIGNATURES: &[(&[u8], &Algorithm)] = &[
    // RSA, 1.2.840.113549.1.1.{4,5,11,12,13}: with MD5, SHA-1, SHA-256, SHA-384, SHA-512.
    (&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x04], &SHA256),
    (&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x05], &SHA256),
    (&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0b], &SHA256),
    (&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0c], &SHA384),
    (&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0d], &SHA512),
    // ECDSA, 1.2.840.10045.4.1 and 4.3.{2,3,4}: with SHA-1, SHA-256, SHA-384, SHA-512.
    (&[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x01], &SHA256),
    (&[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02], &SHA256),
    (&[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x03], &SHA384),
    (&[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x04], &SHA512),
];

fn known(table: &[(&[u8], &'static Algorithm)], oid: &[u8]) -> Option<&'static Algorithm> {
    table.iter().find(|(known, _)| *known == oid).map(|(_, hash)| *hash)
}

/// The contents of a DER element with this tag, and what follows it (X.690 §8.1.3, §10.1: definite
/// lengths of at most four bytes).
fn element(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (found, rest) = bytes.split_first()?;
    let (first, rest) = rest.split_first()?;
    if *found != tag {
        return None;
    }
    if *first < 0x80 {
        return rest.split_at_checked(usize::from(*first));
    }
    let (length, rest) = rest.split_at_checked(usize::from(*first & 0x7f))?;
    if !(1..=4).contains(&length.len()) {
        return None;
    }
    let length = length.iter().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
    rest.split_at_checked(usize::try_from(length).ok()?)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn made(algorithm: &'static rcgen::SignatureAlgorithm) -> Vec<u8> {
        let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
        let params = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    /// A certificate of openssl's own making.
    fn openssl(arguments: &[&str]) -> Vec<u8> {
        let directory = tempfile::tempdir().unwrap();
        let key = directory.path().join("key.pem");
        let made = Command::new("openssl")
            .args(["req", "-x509", "-nodes", "-subj", "/CN=localhost", "-days", "2"])
            .args(["-outform", "DER", "-keyout"])
            .arg(&key)
            .args(arguments)
            .output()
            .expect("openssl is installed (Debian: apt-get install openssl)");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        made.stdout
    }

    fn end_point(hash: &'static Algorithm, certificate: &[u8]) -> Option<EndPoint> {
        Some(EndPoint(digest(hash, certificate).as_ref().to_vec()))
    }

    #[test]
    fn the_hash_is_that_of_the_signature() {
        let certificate = made(&rcgen::PKCS_ECDSA_P256_SHA256);
        assert_eq!(EndPoint::of(&certificate), end_point(&SHA256, &certificate));
        let certificate = made(&rcgen::PKCS_ECDSA_P384_SHA384);
        assert_eq!(EndPoint::of(&certificate), end_point(&SHA384, &certificate));
    }

    #[test]
    fn certificates_of_openssl_have_the_same() {
        let rsa = ["-newkey", "rsa:2048"];
        let pss = ["-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:-1"];
        let cases: [(&[&str], &[&str], &'static Algorithm); 6] = [
            (&["-sha1"], &[], &SHA256),
            (&["-sha256"], &[], &SHA256),
            (&["-sha384"], &[], &SHA384),
            (&["-sha512"], &[], &SHA512),
            (&["-sha384"], &pss, &SHA384),
            (&["-sha512"], &pss, &SHA512),
        ];
        for (hash, options, expected) in cases {
            let certificate = openssl(&[&rsa[..], hash, options].concat());
            assert_eq!(EndPoint::of(&certificate), end_point(expected, &certificate), "{hash:?}");
        }
    }

    #[test]
    fn ed25519_has_no_hash_to_bind_to() {
        assert_eq!(EndPoint::of(&made(&rcgen::PKCS_ED25519)), None);
    }

    #[test]
    fn no_bytes_are_too_strange() {
        let certificate = made(&rcgen::PKCS_ECDSA_P256_SHA256);
        let at = certificate.windows(8).position(|oid| oid == SIGNATURES[6].0).unwrap();
        assert!(EndPoint::of(&certificate[..at]).is_none());
        for cut in 0..certificate.len().min(40) {
            assert_eq!(EndPoint::of(&certificate[..cut]), None, "{cut}");
        }
        for strange in [
            &[][..],
            &[0x30],
            &[0x30, 0x80, 0, 0],
            &[0x30, 0x84, 0xff, 0xff, 0xff, 0xff, 0],
            &[0x30, 0x85, 0, 0, 0, 0, 1, 0],
            &[0x30, 0xff],
        ] {
            assert_eq!(EndPoint::of(strange), None, "{strange:?}");
        }
        for place in 0..certificate.len() {
            let mut spoilt = certificate.clone();
            spoilt[place] ^= 0xff;
            let _ = EndPoint::of(&spoilt);
        }
    }
}
