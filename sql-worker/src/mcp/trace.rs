//! `traceparent` of a request's `_meta`, W3C Trace Context: taken into the log only when it is
//! exactly one, because a log is no place for a peer's own texts.

/// A `traceparent` of version 00: `00-TRACE-PARENT-FLAGS` in lower-case hexadecimal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TraceParent<'a>(&'a str);

impl<'a> TraceParent<'a> {
    /// `None` when it is not one, or when it names no trace (Trace Context §3.2.2).
    pub(super) fn parse(text: &'a str) -> Option<Self> {
        let mut fields = text.split('-');
        let mut field = |length: usize| {
            let digits = fields.next().filter(|field| field.len() == length)?;
            let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
            digits.bytes().all(hex).then_some(digits)
        };
        let (version, trace, parent) = (field(2)?, field(32)?, field(16)?);
        let flags = field(2);
        let names = |id: &str| id.bytes().any(|byte| byte != b'0');
        let valid = version == "00" && flags.is_some() && names(trace) && names(parent);
        (valid && fields.next().is_none()).then_some(Self(text))
    }

    pub(super) fn as_str(self) -> &'a str {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_traceparent_is_one() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(TraceParent::parse(good).unwrap().as_str(), good);
        for bad in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473\n-00f067aa0ba902b7-01",
        ] {
            assert_eq!(TraceParent::parse(bad), None, "{bad:?}");
        }
    }
}
