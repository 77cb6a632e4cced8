//! The bearer form of a handle. The broker keeps its hash only, so nothing that reads the
//! broker's memory or logs can use a handle.

#![forbid(unsafe_code)]

use std::fmt;

use data_encoding::BASE64URL_NOPAD;
use ring::digest::{Context, SHA256};
use zeroize::{Zeroize as _, Zeroizing};

use super::{NoRandomness, random};

const PREFIX: &str = "cbh_";
/// 256 bits in base64url without padding.
const ENCODED_LEN: usize = 43;
/// Keeps these hashes apart from every other use of SHA-256.
const DOMAIN: &[u8] = b"credbroker handle token v1\0";

/// A new token, on its way to whom it was issued for.
pub(crate) struct Token(Zeroizing<String>);

/// What is kept of a token. A look-up by it tells nothing through its timing: to steer the
/// hash, an attacker would have to know a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct TokenHash([u8; 32]);

impl Token {
    pub(crate) fn random() -> Result<Self, NoRandomness> {
        let mut bytes = random::<32>()?;
        let mut text = Zeroizing::new(String::with_capacity(PREFIX.len() + ENCODED_LEN));
        text.push_str(PREFIX);
        BASE64URL_NOPAD.encode_append(&bytes, &mut text);
        bytes.zeroize();
        Ok(Self(text))
    }

    pub(crate) fn hash(&self) -> TokenHash {
        hash(self.0.as_bytes())
    }

    /// The text, for the one reply that carries it.
    pub(crate) fn into_public(self) -> String {
        self.0.to_string()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[REDACTED]")
    }
}

impl TokenHash {
    /// The hash of what a caller presents; `None` when it has not the form of a token.
    pub(crate) fn of(text: &str) -> Option<Self> {
        let encoded = text.strip_prefix(PREFIX)?;
        let well_formed = encoded.len() == ENCODED_LEN
            && encoded
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
        well_formed.then(|| hash(text.as_bytes()))
    }
}

fn hash(text: &[u8]) -> TokenHash {
    let mut context = Context::new(&SHA256);
    context.update(DOMAIN);
    context.update(text);
    let mut hash = [0; 32];
    hash.copy_from_slice(context.finish().as_ref());
    TokenHash(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_the_documented_form_and_is_found_by_its_hash() {
        let token = Token::random().unwrap();
        let hash = token.hash();
        assert_eq!(format!("{token:?}"), "[REDACTED]");
        let text = token.into_public();
        assert_eq!(text.len(), 47);
        assert_eq!(TokenHash::of(&text), Some(hash));
    }

    #[test]
    fn what_is_no_token_has_no_hash() {
        let token = Token::random().unwrap().into_public();
        for bad in [
            "",
            "cbh_",
            "secret",
            token.trim_start_matches('c'),
            &format!("{token}="),
            &token.replace("cbh_", "hdl_"),
        ] {
            assert_eq!(TokenHash::of(bad), None, "{bad}");
        }
    }
}
