//! Names that nobody can guess.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::error::{Code, Failure};

/// `prefix`, and 192 random bits in base64url.
pub(crate) fn name(prefix: &str) -> Result<String, Failure> {
    let mut bytes = [0; 24];
    let filled = getrandom(&mut bytes, GetRandomFlags::empty());
    // Up to 256 bytes come whole or not at all, getrandom(2).
    if filled.is_ok_and(|filled| filled == bytes.len()) {
        return Ok(format!("{prefix}{}", URL_SAFE_NO_PAD.encode(bytes)));
    }
    Err(Failure::new(Code::Internal, "the kernel gave no randomness"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_long_and_differ() {
        let (a, b) = (name("conn_").unwrap(), name("conn_").unwrap());
        assert_eq!(a.len(), "conn_".len() + 32);
        assert!(a.starts_with("conn_") && a != b);
    }
}
