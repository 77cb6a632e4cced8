//! The private key of a client certificate. Between two signatures it lies in the arena and
//! nowhere else: each signature makes ring's key pair anew, in one synchronous place, and what
//! that used of the stack and the vector registers is wiped. What it used of the heap the global
//! allocator wipes when it is freed (`credbroker_zeroing`).

#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;

use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, Ed25519KeyPair,
    KeyPair as _, RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512, RSA_PSS_SHA256,
    RSA_PSS_SHA384, RSA_PSS_SHA512, RsaEncoding, RsaKeyPair,
};
use rustls::pki_types::{AlgorithmIdentifier, SubjectPublicKeyInfoDer, alg_id};
use rustls::sign::{Signer, SigningKey, public_key_to_spki};
use rustls::{Error, SignatureAlgorithm, SignatureScheme};
use thiserror::Error as ThisError;

use self::pem::{Form, Found};
use crate::arena::{ArenaFull, Slot};
use crate::sys;

mod pem;
#[cfg(test)]
mod residue;
#[cfg(test)]
mod tests;

/// A text that holds no key that could be used.
#[derive(Debug, ThisError)]
pub(crate) enum KeyFault {
    /// No block of a private key.
    #[error(
        "holds no private key: give PEM with BEGIN PRIVATE KEY, BEGIN RSA PRIVATE KEY or BEGIN EC PRIVATE KEY"
    )]
    NoKey,
    /// The passphrase would be one more secret, and would have to lie beside it.
    #[error(
        "holds an encrypted private key: write it without a passphrase (openssl pkey -in KEY -out NEW) and let file permissions, or a systemd credential, protect it"
    )]
    Encrypted,
    /// The block does not end, or is not base64.
    #[error("holds a private key that is cut off or is not base64")]
    Damaged,
    /// ring takes none of this kind.
    #[error(
        "is not a key that can sign: give RSA of 2048 to 4096 bits, ECDSA P-256 or P-384, or Ed25519"
    )]
    Unsupported,
    /// It is the key of something else.
    #[error("does not fit the certificate in tls.cert_file: they must be made for each other")]
    Mismatch,
    /// No room.
    #[error(transparent)]
    ArenaFull(#[from] ArenaFull),
}

/// What the DER in the slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// RFC 8017, A.1.2.
    RsaPkcs1,
    /// RFC 5958, as the others.
    RsaPkcs8,
    EcdsaP256,
    EcdsaP384,
    Ed25519,
}

/// Lives for one piece of work, on the stack, which is wiped.
enum Pair {
    Rsa(RsaKeyPair),
    Ecdsa(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

/// A private key in the arena, and its public half.
pub(crate) struct ClientKey(Arc<Key>);

struct Key {
    der: Slot,
    kind: Kind,
    public: SubjectPublicKeyInfoDer<'static>,
}

/// One scheme of one key, for one handshake.
struct Signs {
    key: Arc<Key>,
    scheme: SignatureScheme,
}

impl ClientKey {
    /// Takes the first private key out of a PEM text (RFC 7468). The text may be dropped then.
    ///
    /// # Errors
    /// When there is none, or none that ring can sign with.
    pub(crate) fn parse(mut text: Slot) -> Result<Self, KeyFault> {
        let Found { form, der } = sys::leaving_no_residue(|| pem::decode(&mut text))?;
        let (kinds, der): (&[Kind], Slot) = match form {
            Form::Pkcs1 => (&[Kind::RsaPkcs1], der),
            Form::Pkcs8 => {
                (&[Kind::RsaPkcs8, Kind::EcdsaP256, Kind::EcdsaP384, Kind::Ed25519], der)
            }
            // Which curve it is on shows when the other one refuses it.
            Form::Sec1 => {
                for kind in [Kind::EcdsaP256, Kind::EcdsaP384] {
                    let wrapped = sys::leaving_no_residue(|| pem::sec1_as_pkcs8(&der, kind.oid()))?;
                    if let Some(public) = kind.public(&wrapped) {
                        return Ok(Self(Arc::new(Key { der: wrapped, kind, public })));
                    }
                }
                return Err(KeyFault::Unsupported);
            }
        };
        let known = kinds.iter().find_map(|kind| Some((*kind, kind.public(&der)?)));
        let (kind, public) = known.ok_or(KeyFault::Unsupported)?;
        Ok(Self(Arc::new(Key { der, kind, public })))
    }
}

impl Kind {
    /// The schemes of TLS that it signs in (RFC 8446 §4.2.3), the best first.
    fn schemes(self) -> &'static [SignatureScheme] {
        match self {
            Self::RsaPkcs1 | Self::RsaPkcs8 => &[
                SignatureScheme::RSA_PSS_SHA512,
                SignatureScheme::RSA_PSS_SHA384,
                SignatureScheme::RSA_PSS_SHA256,
                SignatureScheme::RSA_PKCS1_SHA512,
                SignatureScheme::RSA_PKCS1_SHA384,
                SignatureScheme::RSA_PKCS1_SHA256,
            ],
            Self::EcdsaP256 => &[SignatureScheme::ECDSA_NISTP256_SHA256],
            Self::EcdsaP384 => &[SignatureScheme::ECDSA_NISTP384_SHA384],
            Self::Ed25519 => &[SignatureScheme::ED25519],
        }
    }

    fn oid(self) -> AlgorithmIdentifier {
        match self {
            Self::RsaPkcs1 | Self::RsaPkcs8 => alg_id::RSA_ENCRYPTION,
            Self::EcdsaP256 => alg_id::ECDSA_P256,
            Self::EcdsaP384 => alg_id::ECDSA_P384,
            Self::Ed25519 => alg_id::ED25519,
        }
    }

    /// The public half; `None` when the DER is not a key of this kind.
    fn public(self, der: &Slot) -> Option<SubjectPublicKeyInfoDer<'static>> {
        self.with_pair(der, |pair| {
            let public = match pair {
                Pair::Rsa(pair) => pair.public_key().as_ref(),
                Pair::Ecdsa(pair) => pair.public_key().as_ref(),
                Pair::Ed25519(pair) => pair.public_key().as_ref(),
            };
            public_key_to_spki(&self.oid(), public)
        })
    }

    fn with_pair<R>(self, der: &Slot, work: impl FnOnce(&Pair) -> R) -> Option<R> {
        sys::leaving_no_residue(|| {
            der.expose(|der| {
                let ecdsa = |curve| EcdsaKeyPair::from_pkcs8(curve, der, &SystemRandom::new());
                let pair = match self {
                    Self::RsaPkcs1 => RsaKeyPair::from_der(der).map(Pair::Rsa),
                    Self::RsaPkcs8 => RsaKeyPair::from_pkcs8(der).map(Pair::Rsa),
                    Self::EcdsaP256 => ecdsa(&ECDSA_P256_SHA256_ASN1_SIGNING).map(Pair::Ecdsa),
                    Self::EcdsaP384 => ecdsa(&ECDSA_P384_SHA384_ASN1_SIGNING).map(Pair::Ecdsa),
                    // OpenSSL writes no public key beside it.
                    Self::Ed25519 => {
                        Ed25519KeyPair::from_pkcs8_maybe_unchecked(der).map(Pair::Ed25519)
                    }
                };
                pair.ok().map(|pair| work(&pair))
            })
        })
    }

    fn algorithm(self) -> SignatureAlgorithm {
        match self {
            Self::RsaPkcs1 | Self::RsaPkcs8 => SignatureAlgorithm::RSA,
            Self::EcdsaP256 | Self::EcdsaP384 => SignatureAlgorithm::ECDSA,
            Self::Ed25519 => SignatureAlgorithm::ED25519,
        }
    }
}

impl SigningKey for ClientKey {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        let scheme = *self.0.kind.schemes().iter().find(|scheme| offered.contains(scheme))?;
        Some(Box::new(Signs { key: Arc::clone(&self.0), scheme }))
    }

    fn public_key(&self) -> Option<SubjectPublicKeyInfoDer<'_>> {
        Some(self.0.public.clone())
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        self.0.kind.algorithm()
    }
}

impl Signer for Signs {
    /// Takes milliseconds for RSA, and a fraction of one for the others.
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        let signature = self.key.kind.with_pair(&self.key.der, |pair| {
            let random = SystemRandom::new();
            match pair {
                Pair::Rsa(pair) => {
                    let mut signature = vec![0; pair.public().modulus_len()];
                    let encoding = rsa_encoding(self.scheme)?;
                    pair.sign(encoding, &random, message, &mut signature).ok()?;
                    Some(signature)
                }
                Pair::Ecdsa(pair) => {
                    pair.sign(&random, message).ok().map(|signed| signed.as_ref().to_vec())
                }
                Pair::Ed25519(pair) => Some(pair.sign(message).as_ref().to_vec()),
            }
        });
        signature.flatten().ok_or_else(|| Error::General("the client key does not sign".into()))
    }

    fn scheme(&self) -> SignatureScheme {
        self.scheme
    }
}

fn rsa_encoding(scheme: SignatureScheme) -> Option<&'static dyn RsaEncoding> {
    let all: [(_, &'static dyn RsaEncoding); 6] = [
        (SignatureScheme::RSA_PSS_SHA512, &RSA_PSS_SHA512),
        (SignatureScheme::RSA_PSS_SHA384, &RSA_PSS_SHA384),
        (SignatureScheme::RSA_PSS_SHA256, &RSA_PSS_SHA256),
        (SignatureScheme::RSA_PKCS1_SHA512, &RSA_PKCS1_SHA512),
        (SignatureScheme::RSA_PKCS1_SHA384, &RSA_PKCS1_SHA384),
        (SignatureScheme::RSA_PKCS1_SHA256, &RSA_PKCS1_SHA256),
    ];
    all.into_iter().find(|(known, _)| *known == scheme).map(|(_, encoding)| encoding)
}

impl fmt::Debug for ClientKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[REDACTED]")
    }
}

impl fmt::Debug for Signs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[REDACTED]")
    }
}
