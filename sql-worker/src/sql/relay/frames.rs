//! Where the messages of a server begin and end, however their bytes arrive (PostgreSQL 15, 55.7:
//! a byte for the type, then 32 bits that count themselves).

/// Bytes of a length, which counts itself.
const LENGTH: usize = 4;
/// Type and length.
pub(super) const HEAD: usize = 1 + LENGTH;
/// Bytes of a body that is kept: more than any description has, of 1664 columns or of 65535
/// parameters. Of a longer one nothing is.
pub(super) const KEPT: usize = 512 << 10;

/// Where in a stream of messages one stands.
#[derive(Debug, Default)]
pub(super) struct Frames {
    head: Vec<u8>,
    /// Bytes of the message that are still to come.
    body: usize,
    /// What came of its body, where that is of interest.
    kept: Option<Kept>,
}

/// A message whose body is kept.
#[derive(Debug)]
struct Kept {
    kind: u8,
    /// `None` where it is too long.
    body: Option<Vec<u8>>,
}

impl Frames {
    /// How many messages begin in `bytes`; `None` if one has more than `longest`. Those of the types
    /// `wanted` are given to `hear` once they are whole: the type, and the body unless that is too
    /// long to be kept.
    pub(super) fn follow(
        &mut self,
        mut bytes: &[u8],
        longest: usize,
        wanted: &[u8],
        mut hear: impl FnMut(u8, Option<&[u8]>),
    ) -> Option<usize> {
        let mut begun = 0;
        while !bytes.is_empty() {
            let (missing, of_body) = match self.body {
                0 => (HEAD - self.head.len(), false),
                left => (left, true),
            };
            let (taken, rest) = bytes.split_at_checked(missing).unwrap_or((bytes, &[]));
            bytes = rest;
            if of_body {
                self.body -= taken.len();
                if let Some(Kept { body: Some(body), .. }) = &mut self.kept {
                    body.extend_from_slice(taken);
                }
            } else {
                self.head.extend_from_slice(taken);
                let [kind, length @ ..] = self.head.as_slice() else { continue };
                let Ok(length) = <[u8; LENGTH]>::try_from(length) else { continue };
                let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
                match length.checked_sub(LENGTH) {
                    Some(body) if length <= longest => self.body = body,
                    Some(_) | None => return None,
                }
                begun += 1;
                let body = (self.body <= KEPT).then(Vec::new);
                self.kept = wanted.contains(kind).then_some(Kept { kind: *kind, body });
                self.head.clear();
            }
            if self.body == 0
                && let Some(Kept { kind, body }) = self.kept.take()
            {
                hear(kind, body.as_deref());
            }
        }
        Some(begun)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: u8, length: usize) -> Vec<u8> {
        let mut bytes = vec![kind];
        bytes.extend(u32::try_from(length + LENGTH).unwrap().to_be_bytes());
        bytes.resize(HEAD + length, kind);
        bytes
    }

    #[test]
    fn what_is_no_length_is_refused() {
        let follow = |head: &[u8]| Frames::default().follow(head, 10, b"D", |_, _| {});
        for head in [b"D\0\0\0\0", b"D\0\0\0\x03", b"D\xff\xff\xff\xff", b"D\0\0\0\x0b"] {
            assert_eq!(follow(head), None, "{head:?}");
        }
        assert_eq!(follow(b"D\0\0\0\x0a"), Some(1));
    }

    #[test]
    fn what_is_too_long_for_a_description_is_not_kept() {
        let heard = |length: usize| {
            let mut heard = None;
            let hear = |_kind, body: Option<&[u8]>| heard = Some(body.map(<[u8]>::len));
            let begun = Frames::default().follow(&message(b'T', length), 1 << 20, b"T", hear);
            assert_eq!(begun, Some(1));
            heard
        };
        assert_eq!((heard(KEPT), heard(KEPT + 1)), (Some(Some(KEPT)), Some(None)));
    }

    proptest! {
        #[test]
        fn messages_are_found_however_the_stream_is_cut(
            messages in proptest::collection::vec((0..3_usize, 0_usize..40), 0..20),
            cuts in proptest::collection::vec(1_usize..30, 1..40),
            longest in 4_usize..50,
        ) {
            let messages = messages.into_iter().map(|(kind, length)| (b"DTn"[kind], length));
            let messages: Vec<(u8, usize)> = messages.collect();
            let stream: Vec<u8> =
                messages.iter().flat_map(|(kind, length)| message(*kind, *length)).collect();
            let (mut frames, mut begun, mut heard) = (Frames::default(), Some(0), Vec::new());
            let (mut rest, mut cuts) = (stream.as_slice(), cuts.iter().cycle());
            while let Some(before) = begun && !rest.is_empty() {
                let (piece, tail) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
                let hear = |kind, body: Option<&[u8]>| heard.push((kind, body.unwrap().to_vec()));
                begun = frames.follow(piece, longest, b"Tn", hear).map(|more| before + more);
                rest = tail;
            }
            let short = messages.iter().take_while(|(_, length)| length + LENGTH <= longest);
            let all = short.clone().count() == messages.len();
            prop_assert_eq!(begun, all.then_some(messages.len()));
            let wanted = short.filter(|(kind, _)| *kind != b'D');
            let wanted: Vec<_> =
                wanted.map(|(kind, length)| (*kind, vec![*kind; *length])).collect();
            prop_assert_eq!(heard, wanted);
        }
    }
}
