//! What the page's form sends: `application/x-www-form-urlencoded` (URL Standard §5.1), decoded
//! where it lies.
//!
//! Invariant: no byte of it is copied; the buffer is the caller's to wipe.

/// The fields, decoded; a field that is not there is empty.
#[derive(Default)]
pub(super) struct Form<'a> {
    pub(super) token: &'a [u8],
    pub(super) code: &'a [u8],
    pub(super) username: &'a [u8],
    pub(super) secret: &'a [u8],
    pub(super) again: &'a [u8],
}

/// Decodes `body` in place. `None`: it is no such form, or has fields that ours has not.
pub(super) fn parse(body: &mut [u8]) -> Option<Form<'_>> {
    let mut form = Form::default();
    let mut seen = 0_u8;
    for pair in body.split_mut(|byte| *byte == b'&') {
        let equals = pair.iter().position(|byte| *byte == b'=')?;
        let (name, value) = pair.split_at_mut(equals);
        let (bit, field) = match &*name {
            b"token" => (1, &mut form.token),
            b"code" => (2, &mut form.code),
            b"username" => (4, &mut form.username),
            b"secret" => (8, &mut form.secret),
            b"again" => (16, &mut form.again),
            _ => return None,
        };
        if seen & bit != 0 {
            return None;
        }
        seen |= bit;
        *field = decode(value.get_mut(1..)?)?;
    }
    Some(form)
}

fn decode(value: &mut [u8]) -> Option<&[u8]> {
    let (mut from, mut to) = (0_usize, 0_usize);
    while let Some(byte) = value.get(from) {
        let (decoded, used) = match byte {
            b'%' => (hex(*value.get(from + 1)?)? << 4 | hex(*value.get(from + 2)?)?, 3),
            b'+' => (b' ', 1),
            other => (*other, 1),
        };
        // Never ahead of what is read.
        *value.get_mut(to)? = decoded;
        from += used;
        to += 1;
    }
    value.get(..to)
}

fn hex(digit: u8) -> Option<u8> {
    let value = char::from(digit).to_digit(16)?;
    u8::try_from(value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_decoded_where_they_lie() {
        let mut body =
            b"token=t&code=7KQ-XB2&username=a+b&secret=%2F%40%2B%25%3a%00%ff&again=".to_vec();
        let form = parse(&mut body).unwrap();
        assert_eq!(
            (form.token, form.code, form.username),
            (&b"t"[..], &b"7KQ-XB2"[..], &b"a b"[..])
        );
        assert_eq!(form.secret, b"/@+%:\x00\xff");
        assert_eq!(form.again, b"");
    }

    #[test]
    fn what_is_no_such_form_is_refused() {
        for wrong in [
            "",
            "secret",
            "secret=%",
            "secret=%2",
            "secret=%2g",
            "secret=%+1",
            "secret=a&secret=b",
            "secret=a&",
            "=a",
            "Secret=a",
            "secret=a&other=b",
        ] {
            assert!(parse(&mut wrong.as_bytes().to_vec()).is_none(), "{wrong}");
        }
    }

    #[test]
    fn every_byte_comes_through() {
        let all: Vec<u8> = (0..=255).collect();
        let encoded: String = all.iter().map(|byte| format!("%{byte:02x}")).collect();
        let mut body = format!("secret={encoded}").into_bytes();
        assert_eq!(parse(&mut body).unwrap().secret, all);
    }
}
