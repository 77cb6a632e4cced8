//! Public keys that are trusted, and what is signed with them: the broker's `audit::signer` says
//! the same from the other side.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use data_encoding::{BASE64, BASE64URL_NOPAD, HEXLOWER_PERMISSIVE};
use ring::signature::{ED25519, UnparsedPublicKey};

use super::ReadError;
use super::line::Line;

const CHECKPOINT: &[u8] = b"credbroker audit checkpoint v1\0";
const CERTIFICATE: &[u8] = b"credbroker audit key v1\0";
/// More than any `audit.pub`.
const MAX_FILE: u64 = 1024 * 1024;

/// An Ed25519 public key (RFC 8032).
pub(super) type PublicKey = [u8; 32];
pub(super) type Signature = [u8; 64];

/// Keys from a place that whoever could change the log could not change: copies of `audit.pub`,
/// or the public half of `audit.signing_key`.
#[derive(Clone, Debug, Default)]
pub struct Keys(pub(super) BTreeSet<PublicKey>);

impl Keys {
    /// None: the log's own keys are taken as they are.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Reads a file with one key a line, in hexadecimal or base64; what follows a space is ignored.
    ///
    /// # Errors
    /// When it cannot be read, or a line has no key.
    pub fn load(path: &Path) -> Result<Self, ReadError> {
        let failed = |source| ReadError::Io { path: path.to_owned(), source };
        let mut text = String::new();
        let file = File::open(path).map_err(failed)?;
        file.take(MAX_FILE).read_to_string(&mut text).map_err(failed)?;
        Self::parse(&text).ok_or_else(|| ReadError::NoKeys { path: path.to_owned() })
    }

    /// The same, from the text. `None` when a line has no key, or there is none.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let keys: Option<BTreeSet<_>> =
            lines.map(|line| parse(line.split_whitespace().next()?)).collect();
        keys.filter(|keys| !keys.is_empty()).map(Self)
    }

    /// Adds those of another file.
    pub fn extend(&mut self, more: Self) {
        self.0.extend(more.0);
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `key` is one of them, or was certified by one of them for that broker.
    pub(super) fn vouch_for(
        &self,
        key: &PublicKey,
        certificate: Option<&Signature>,
        broker: &str,
    ) -> bool {
        let certified = |certificate: &Signature| {
            let mut message = CERTIFICATE.to_vec();
            push_text(&mut message, broker);
            message.extend_from_slice(key);
            self.0.iter().any(|root| is_signed(root, &message, certificate))
        };
        self.0.contains(key) || certificate.is_some_and(certified)
    }
}

/// Whether `signature` is that of a checkpoint at the place of `line`.
pub(super) fn is_checkpoint(key: &PublicKey, signature: &Signature, line: &Line) -> bool {
    let mut message = CHECKPOINT.to_vec();
    push_text(&mut message, &line.broker);
    push_text(&mut message, &line.time);
    message.extend_from_slice(&line.seq.to_be_bytes());
    message.extend_from_slice(&line.prev);
    is_signed(key, &message, signature)
}

fn is_signed(key: &PublicKey, message: &[u8], signature: &Signature) -> bool {
    UnparsedPublicKey::new(&ED25519, key).verify(message, signature).is_ok()
}

fn push_text(message: &mut Vec<u8>, text: &str) {
    message.extend_from_slice(&(text.len() as u64).to_be_bytes());
    message.extend_from_slice(text.as_bytes());
}

fn parse(word: &str) -> Option<PublicKey> {
    let word = word.as_bytes();
    let decoded = HEXLOWER_PERMISSIVE
        .decode(word)
        .or_else(|_not_hex| BASE64.decode(word))
        .or_else(|_not_base64| BASE64URL_NOPAD.decode(word));
    decoded.ok()?.try_into().ok()
}
