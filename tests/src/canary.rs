//! A password that can be recognised anywhere, and every form in which it could hide.

use std::fmt;
use std::fmt::Write as _;
use std::slice;

use data_encoding::{BASE64_NOPAD, BASE64URL_NOPAD, HEXLOWER, HEXUPPER};
use ring::rand::{SecureRandom as _, SystemRandom};

/// Random letters on each side of the marks.
const HALF: usize = 16;

/// Characters that URLs, connection strings and base64 treat in a special way: in the middle,
/// so that each encoding of the canary is different from the canary.
const MARKS: &str = "/@+%:";

/// A random password for one test.
pub struct Canary(String);

impl Canary {
    /// A new one.
    ///
    /// # Panics
    /// When the system has no randomness.
    #[must_use]
    pub fn random() -> Self {
        Self(format!("{}{MARKS}{}", random_word(HALF), random_word(HALF)))
    }

    /// A given one, for a scan of something that was prepared elsewhere.
    #[must_use]
    pub fn known(text: &str) -> Self {
        Self(text.into())
    }

    /// The password.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// The forms to look for: raw, UTF-16, hex, base64 at each of its three alignments, and
    /// as part of a URL.
    ///
    /// The base64 forms leave out the outermost characters, which depend on the neighbours.
    #[must_use]
    pub fn patterns(&self) -> Vec<Pattern> {
        let raw = self.0.as_bytes();
        let utf16: Vec<u8> = self.0.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let mut patterns = vec![
            Pattern::new("raw", raw),
            Pattern::new("utf-16", &utf16),
            Pattern::new("hex", HEXLOWER.encode(raw).as_bytes()),
            Pattern::new("HEX", HEXUPPER.encode(raw).as_bytes()),
            Pattern::new("url", url_encoded(&self.0, false).as_bytes()),
            Pattern::new("URL", url_encoded(&self.0, true).as_bytes()),
        ];
        for shift in 0..3 {
            let whole = raw.len() - (raw.len() - shift) % 3;
            let aligned = raw.get(shift..whole).unwrap_or_default();
            patterns.push(Pattern::new("base64", BASE64_NOPAD.encode(aligned).as_bytes()));
            patterns.push(Pattern::new("base64url", BASE64URL_NOPAD.encode(aligned).as_bytes()));
        }
        patterns
    }
}

impl fmt::Debug for Canary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Canary([REDACTED])")
    }
}

/// Bytes to look for, and what they mean.
#[derive(Clone)]
pub struct Pattern {
    form: String,
    bytes: Vec<u8>,
}

impl Pattern {
    /// Bytes in a form of this name.
    ///
    /// # Panics
    /// When there are fewer than two bytes, which would be found everywhere.
    #[must_use]
    pub fn new(form: &str, bytes: &[u8]) -> Self {
        assert!(bytes.len() >= 2, "{form}: too short to look for");
        Self { form: form.into(), bytes: bytes.into() }
    }

    /// What the bytes mean: `raw`, `hex`, `SaltedPassword`.
    #[must_use]
    pub fn form(&self) -> &str {
        &self.form
    }

    /// How many bytes they are.
    #[must_use]
    pub fn length(&self) -> usize {
        self.bytes.len()
    }

    /// Whether `haystack` has them.
    #[must_use]
    pub fn is_in(&self, haystack: &[u8]) -> bool {
        let mut found = false;
        Search::new(slice::from_ref(self)).each(haystack, |_pattern, _place| found = true);
        found
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pattern").field("form", &self.form).finish_non_exhaustive()
    }
}

/// A search for many patterns in one pass. Hundreds of megabytes are searched without
/// optimisation in a second: this is why it is no library's.
pub(crate) struct Search<'a> {
    patterns: &'a [Pattern],
    /// For each pair of bytes, whether a pattern begins with it.
    begins: Vec<bool>,
}

impl<'a> Search<'a> {
    pub(crate) fn new(patterns: &'a [Pattern]) -> Self {
        let mut begins = vec![false; 1 << 16];
        for pattern in patterns {
            begins[pair(pattern.bytes[0], pattern.bytes[1])] = true;
        }
        Self { patterns, begins }
    }

    /// Calls `found` for each place of each pattern, in the order of places.
    pub(crate) fn each(&self, haystack: &[u8], mut found: impl FnMut(&Pattern, usize)) {
        const ZEROS: [u8; 4096] = [0; 4096];
        let skip_zeros = !self.begins[0];
        let mut at = 0;
        while at + 1 < haystack.len() {
            let end = at + ZEROS.len();
            // Most memory is zero. The last of the zeros may yet be the first of a pattern.
            if skip_zeros
                && end <= haystack.len()
                && haystack[at] == 0
                && haystack[at..end] == ZEROS
            {
                at = end - 1;
                continue;
            }
            if self.begins[pair(haystack[at], haystack[at + 1])] {
                for pattern in self.patterns {
                    if haystack[at..].starts_with(&pattern.bytes) {
                        found(pattern, at);
                    }
                }
            }
            at += 1;
        }
    }
}

fn pair(first: u8, second: u8) -> usize {
    usize::from(first) << 8 | usize::from(second)
}

/// `length` random lower-case letters and digits, beginning with a letter.
///
/// # Panics
/// When the system has no randomness.
#[must_use]
pub fn random_word(length: usize) -> String {
    const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let mut bytes = vec![0; length];
    SystemRandom::new().fill(&mut bytes).expect("the system has randomness");
    let letter = |(at, byte): (usize, &u8)| {
        let size = if at == 0 { 26 } else { 32 };
        char::from(LETTERS[usize::from(*byte) % size])
    };
    bytes.iter().enumerate().map(letter).collect()
}

fn url_encoded(text: &str, upper: bool) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        let written = match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                encoded.push(char::from(byte));
                Ok(())
            }
            _ if upper => write!(encoded, "%{byte:02X}"),
            _ => write!(encoded, "%{byte:02x}"),
        };
        written.expect("writing to a string does not fail");
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forms_found(haystack: &[u8], canary: &Canary) -> Vec<String> {
        let hit = |pattern: &Pattern| pattern.is_in(haystack).then(|| pattern.form().to_owned());
        canary.patterns().iter().filter_map(hit).collect()
    }

    #[test]
    fn every_form_is_found_and_only_that_form() {
        let canary = Canary::random();
        let text = canary.reveal();
        let url = format!("postgresql://u:{}@h/d", url_encoded(text, true));
        assert_eq!(forms_found(format!("x{text}y").as_bytes(), &canary), ["raw"]);
        assert_eq!(forms_found(HEXLOWER.encode(text.as_bytes()).as_bytes(), &canary), ["hex"]);
        assert_eq!(forms_found(url.as_bytes(), &canary), ["URL"]);
        let wide: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert_eq!(forms_found(&wide, &canary), ["utf-16"]);
    }

    #[test]
    fn base64_is_found_at_each_alignment() {
        let canary = Canary::random();
        for prefix in ["", "a", "ab", "abc:"] {
            let text = format!("{prefix}{}suffix", canary.reveal());
            let plain = BASE64_NOPAD.encode(text.as_bytes());
            let url = BASE64URL_NOPAD.encode(text.as_bytes());
            assert!(!forms_found(plain.as_bytes(), &canary).is_empty(), "prefix {prefix:?}");
            assert!(!forms_found(url.as_bytes(), &canary).is_empty(), "prefix {prefix:?}");
        }
    }

    #[test]
    fn patterns_are_found_after_zeros_and_across_them() {
        let patterns = [Pattern::new("zero", b"\0x"), Pattern::new("end", b"yz")];
        let mut haystack = vec![0; 10_000];
        haystack.extend_from_slice(b"x...yz");
        let mut places = Vec::new();
        Search::new(&patterns).each(&haystack, |_pattern, at| places.push(at));
        assert_eq!(places, [9_999, 10_004]);
    }

    #[test]
    fn another_canary_is_not_found() {
        let text = Canary::random();
        assert!(forms_found(text.reveal().as_bytes(), &Canary::random()).is_empty());
    }
}
