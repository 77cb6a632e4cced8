//! What the person must bring: the path of the page, the token in its form, and the code that
//! only the terminal shows.
//!
//! Invariants: each is random, is compared in constant time, and opens this one entry alone.

use data_encoding::BASE64URL_NOPAD;
use ring::rand::{SecureRandom as _, SystemRandom};
use subtle::ConstantTimeEq as _;

use crate::failure::{Exit, Failure};

/// Digits and capitals without those that look alike: 32, so that each is five random bits.
const SYMBOLS: &[u8; 32] = b"23456789ABCDEFGHJKLMNPQRSTUVWXYZ";
const CODE: usize = 6;

/// 256 random bits, in base64url.
pub(super) struct Token(String);

/// 30 random bits: enough for a handful of tries.
pub(super) struct Code([u8; CODE]);

impl Token {
    pub(super) fn random() -> Result<Self, Failure> {
        Ok(Self(BASE64URL_NOPAD.encode(&random::<32>()?)))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    pub(super) fn is(&self, given: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(given).into()
    }
}

impl Code {
    pub(super) fn random() -> Result<Self, Failure> {
        let symbol = |byte: u8| SYMBOLS.get(usize::from(byte % 32)).copied().unwrap_or_default();
        Ok(Self(random::<CODE>()?.map(symbol)))
    }

    /// In two halves, as it is read aloud.
    pub(super) fn to_text(&self) -> String {
        let text = |symbols: &[u8]| String::from_utf8_lossy(symbols).into_owned();
        let (first, second) = self.0.split_at(CODE / 2);
        format!("{}-{}", text(first), text(second))
    }

    /// Whatever the case, and with or without what stands between the halves.
    pub(super) fn is(&self, given: &[u8]) -> bool {
        let between = |byte: &u8| matches!(byte, b' ' | b'-');
        let given = given.iter().filter(|byte| !between(byte)).map(u8::to_ascii_uppercase);
        let given: Vec<u8> = given.take(CODE + 1).collect();
        self.0.ct_eq(given.as_slice()).into()
    }
}

fn random<const N: usize>() -> Result<[u8; N], Failure> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_unspecified| {
        Failure::new(Exit::Software, "SYSTEM", "the system gives no random bytes")
    })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_itself_alone() {
        let token = Token::random().unwrap();
        assert_eq!(token.as_str().len(), 43);
        assert!(token.is(token.as_str().as_bytes()));
        let other = Token::random().unwrap();
        let short = token.as_str().strip_suffix(|_last| true).unwrap();
        for wrong in [other.as_str(), "", short, &format!("{}A", token.as_str())] {
            assert!(!token.is(wrong.as_bytes()), "{wrong}");
        }
    }

    #[test]
    fn a_code_is_taken_as_people_type_it() {
        let code = Code(*b"7KQXB2");
        assert_eq!(code.to_text(), "7KQ-XB2");
        for typed in ["7KQ-XB2", "7kqxb2", " 7kq xb2 "] {
            assert!(code.is(typed.as_bytes()), "{typed}");
        }
        for wrong in ["", "7KQXB", "7KQXB22", "7KQXB3", "------"] {
            assert!(!code.is(wrong.as_bytes()), "{wrong}");
        }
    }
}
