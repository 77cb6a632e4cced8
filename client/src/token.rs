//! The bearer form of a handle.
//!
//! Invariant: no text that this library makes contains a token, unless it is asked for by
//! name ([`Token::expose`], [`Handle::url`](crate::Handle::url)).

use std::fmt;

use zeroize::Zeroizing;

use crate::Error;

const PREFIX: &str = "cbh_";
/// 256 random bits in base64url without padding.
const RANDOM_CHARS: usize = 43;
const REDACTED: &str = "[REDACTED]";

/// The bearer form of a handle: `cbh_` and 43 characters of base64url.
///
/// A token is no secret, since another uid cannot use it, but it is a right: it is wiped on
/// drop, has no `Display`, and its `Debug` does not show it.
///
/// ```compile_fail,E0277
/// let token = credbroker_client::Token::parse("cbh_…").unwrap();
/// println!("{token}"); // a token has no `Display`
/// ```
pub struct Token(Zeroizing<String>);

impl Token {
    /// Checks the form of `text`; whether such a handle exists, only the broker knows.
    ///
    /// # Errors
    /// [`Error::InvalidToken`], which does not repeat `text`.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let random = text.strip_prefix(PREFIX).ok_or(Error::InvalidToken)?;
        if random.len() == RANDOM_CHARS && random.bytes().all(is_base64url) {
            Ok(Self(Zeroizing::new(text.to_owned())))
        } else {
            Err(Error::InvalidToken)
        }
    }

    /// The token itself, to be given to a database client as the password.
    ///
    /// Keep it out of logs and command lines: argv is readable by everybody.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// A second copy, for whoever gives up a handle but must leave the first one in place.
    pub(crate) fn duplicate(&self) -> Self {
        Self(self.0.clone())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Token").field(&format_args!("{REDACTED}")).finish()
    }
}

/// `text` with everything that looks like a token replaced.
///
/// The broker never puts a token into a message; this holds even if one day it does.
pub(crate) fn redact(text: &str) -> String {
    let mut pieces = text.split(PREFIX);
    let mut clean = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        clean.push_str(REDACTED);
        clean.push_str(piece.trim_start_matches(|c: char| u8::try_from(c).is_ok_and(is_base64url)));
    }
    clean
}

fn is_base64url(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_'
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "cbh_0123456789-abcdefghijklmnopqrstuvwxyz_ABCDE";

    #[test]
    fn a_token_comes_back_as_it_was() {
        assert_eq!(Token::parse(TEXT).unwrap().expose(), TEXT);
    }

    #[test]
    fn wrong_forms_are_refused_without_being_repeated() {
        let short = TEXT.get(..TEXT.len() - 1).unwrap();
        let long = format!("{TEXT}A");
        let padded = format!("{short}=");
        for text in ["", "cbh_", "hdl_abcdefghijklmnop", short, &long, &padded] {
            let error = Token::parse(text).unwrap_err();
            assert!(matches!(error, Error::InvalidToken), "{text}");
            assert!(text.len() < 5 || !error.to_string().contains(text), "{error}");
        }
    }

    #[test]
    fn debug_does_not_show_it() {
        let token = Token::parse(TEXT).unwrap();
        assert_eq!(format!("{token:?}"), "Token([REDACTED])");
        assert_eq!(format!("{:?}", token.duplicate()), "Token([REDACTED])");
    }

    #[test]
    fn tokens_are_cut_out_of_texts() {
        assert_eq!(redact("no such handle"), "no such handle");
        assert_eq!(redact(&format!("bad {TEXT}, sorry")), "bad [REDACTED], sorry");
        assert_eq!(redact(&format!("{TEXT}{TEXT} cbh_")), "[REDACTED][REDACTED] [REDACTED]");
    }
}
