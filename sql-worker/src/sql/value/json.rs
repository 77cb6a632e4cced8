//! json and jsonb, nested into the result without losing a digit.
//!
//! JSON numbers may have any number of digits, but most readers take them for doubles. A
//! number of more than 15 significant digits becomes a string with the same digits, as int8
//! and numeric columns do.

use serde_json::Value;

/// Digits that every double keeps: DBL_DIG.
const EXACT_DIGITS: usize = 15;

/// The value of a JSON text; the text itself where it nests too deep to be read.
pub(super) fn value(text: &str) -> Value {
    serde_json::from_str(&quote_long_numbers(text)).unwrap_or_else(|_too_deep| text.into())
}

fn quote_long_numbers(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let len = match first {
            '"' => string_len(rest),
            '-' | '0'..='9' => {
                let len = rest.bytes().take_while(|b| is_number_byte(*b)).count();
                let (number, tail) = rest.split_at_checked(len).unwrap_or((rest, ""));
                if is_exact(number) {
                    out.push_str(number);
                } else {
                    out.extend(["\"", number, "\""]);
                }
                rest = tail;
                continue;
            }
            _ => first.len_utf8(),
        };
        let (part, tail) = rest.split_at_checked(len).unwrap_or((rest, ""));
        out.push_str(part);
        rest = tail;
    }
    out
}

fn is_number_byte(byte: u8) -> bool {
    matches!(byte, b'-' | b'+' | b'.' | b'e' | b'E' | b'0'..=b'9')
}

fn is_exact(number: &str) -> bool {
    let (mantissa, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let digits = mantissa.bytes().filter(u8::is_ascii_digit).skip_while(|b| *b == b'0').count();
    digits <= EXACT_DIGITS && exponent.parse::<i16>().is_ok_and(|exponent| exponent.abs() < 280)
}

fn string_len(text: &str) -> usize {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn no_digit_is_lost() {
        let cases = [
            ("[1, -2.5, 1e3, 0.1]", json!([1, -2.5, 1000.0, 0.1])),
            ("999999999999999", json!(999_999_999_999_999_i64)),
            ("9007199254740993", json!("9007199254740993")),
            (r#"{"a": 1.000000000000000000001}"#, json!({"a": "1.000000000000000000001"})),
            ("1e400", json!("1e400")),
            ("0.00000000000000000000123", json!(1.23e-21)),
            (
                r#""9007199254740993 \" 12345678901234567890""#,
                json!("9007199254740993 \" 12345678901234567890"),
            ),
            ("null", json!(null)),
            ("\"é\"", json!("é")),
        ];
        for (text, expected) in cases {
            assert_eq!(value(text), expected, "{text}");
        }
    }

    #[test]
    fn what_nests_too_deep_stays_text() {
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        assert_eq!(value(&deep), json!(deep));
    }
}
