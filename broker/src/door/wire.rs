//! What the codecs are made of: a reader that cannot run past its end, and a writer that cannot
//! get a length wrong.

#![forbid(unsafe_code)]

/// The bytes end where they should not, or a text has no end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

/// Reads a message front to back.
#[derive(Clone, Debug)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(Malformed)?;
        self.rest = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(Malformed)?;
        self.rest = rest;
        Ok(*taken)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    /// The bytes before the next NUL, which is consumed.
    pub(crate) fn c_bytes(&mut self) -> Result<&'a [u8], Malformed> {
        let end = self.rest.iter().position(|byte| *byte == 0).ok_or(Malformed)?;
        let text = self.take(end)?;
        self.take(1)?;
        Ok(text)
    }

    pub(crate) fn c_str(&mut self) -> Result<&'a str, Malformed> {
        std::str::from_utf8(self.c_bytes()?).map_err(|_not_text| Malformed)
    }

    /// All that is left.
    pub(crate) fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// Fails unless everything was read.
    pub(crate) fn end(self) -> Result<(), Malformed> {
        if self.rest.is_empty() { Ok(()) } else { Err(Malformed) }
    }
}

/// Builds one message: the length, which counts itself, is put in at the end.
#[derive(Debug)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
    length_at: usize,
}

impl Writer {
    /// A message with a type byte before its length.
    pub(crate) fn tagged(tag: u8) -> Self {
        Self { bytes: vec![tag, 0, 0, 0, 0], length_at: 1 }
    }

    /// A message that begins with its length.
    pub(crate) fn untagged() -> Self {
        Self { bytes: vec![0; 4], length_at: 0 }
    }

    pub(crate) fn u32(mut self, number: u32) -> Self {
        self.bytes.extend_from_slice(&number.to_be_bytes());
        self
    }

    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// A text and the NUL that ends it. A NUL within would end it early, so the text is cut there.
    pub(crate) fn c_str(self, text: &str) -> Self {
        self.c_bytes(text.as_bytes())
    }

    /// The same, of a text in whatever encoding.
    pub(crate) fn c_bytes(mut self, text: &[u8]) -> Self {
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        self.bytes.extend_from_slice(text);
        self.bytes.push(0);
        self
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        let length = self.bytes.len() - self.length_at;
        // Messages are built from bounded parts; a length past u32 cannot come about.
        let length = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
        for (place, byte) in self.bytes.iter_mut().skip(self.length_at).zip(length) {
            *place = byte;
        }
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read() {
        let message = Writer::tagged(b'X').u32(7).c_str("text").bytes(b"rest").finish();
        let mut reader = Reader::new(&message);
        assert_eq!(reader.array(), Ok([b'X']));
        assert_eq!(reader.u32(), Ok(17));
        assert_eq!(reader.u32(), Ok(7));
        assert_eq!(reader.c_str(), Ok("text"));
        assert_eq!(reader.clone().end(), Err(Malformed));
        assert_eq!(reader.rest(), b"rest");
    }

    #[test]
    fn nothing_is_read_past_the_end() {
        assert_eq!(Reader::new(b"abc").u32(), Err(Malformed));
        assert_eq!(Reader::new(b"abc").c_str(), Err(Malformed));
        assert_eq!(Reader::new(b"abc").take(4), Err(Malformed));
        assert_eq!(Reader::new(b"\xff\0").c_str(), Err(Malformed));
        assert_eq!(Reader::new(b"").end(), Ok(()));
    }

    #[test]
    fn a_nul_within_a_text_ends_it() {
        assert_eq!(Writer::untagged().c_str("a\0b").finish(), b"\0\0\0\x06a\0");
    }
}
