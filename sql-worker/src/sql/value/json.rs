//! json and jsonb, nested into the result without losing anything that they mean.
//!
//! A JSON value is nested as it is, unless it would change on the way: a number of more than 15
//! significant digits, which most readers take for a double; a name that an object has twice; a
//! text that is all there is, or `null`, which could not be told from SQL's text and NULL. Such
//! a value comes as its JSON text, and so the rule is: in a json column a string is always JSON
//! text, which is also what a parameter of that type takes. White space and the order of names
//! are not kept.

use serde_json::Value;

/// Digits that every double keeps: DBL_DIG.
const EXACT_DIGITS: usize = 15;

/// The value of a JSON text, or that text.
pub(super) fn value(text: &str) -> Value {
    let names = match exact_names(text) {
        Some(names) => names,
        None => return text.into(),
    };
    match serde_json::from_str(text) {
        Ok(value @ (Value::Array(_) | Value::Object(_))) if count_names(&value) == names => value,
        Ok(value @ (Value::Bool(_) | Value::Number(_))) => value,
        Ok(Value::Null | Value::String(_) | Value::Array(_) | Value::Object(_)) => text.into(),
        // It nests too deep.
        Err(_) => text.into(),
    }
}

/// How many names of objects there are in a JSON text; `None` when a number in it is not exact.
fn exact_names(text: &str) -> Option<usize> {
    let mut names = 0;
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let len = match first {
            '"' => string_len(rest),
            '-' | '0'..='9' => {
                let len = rest.bytes().take_while(|b| is_number_byte(*b)).count();
                if !rest.get(..len).is_some_and(is_exact) {
                    return None;
                }
                len
            }
            ':' => {
                names += 1;
                1
            }
            _ => first.len_utf8(),
        };
        rest = rest.get(len..).unwrap_or("");
    }
    Some(names)
}

fn count_names(value: &Value) -> usize {
    match value {
        Value::Array(items) => items.iter().map(count_names).sum(),
        Value::Object(map) => map.len() + map.values().map(count_names).sum::<usize>(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => 0,
    }
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
    fn what_is_exact_is_nested() {
        let cases = [
            ("[1, -2.5, 1e3, 0.1]", json!([1, -2.5, 1000.0, 0.1])),
            ("999999999999999", json!(999_999_999_999_999_i64)),
            ("[0.00000000000000000000123]", json!([1.23e-21])),
            (r#"{"a": "9007199254740993 \" :"}"#, json!({"a": "9007199254740993 \" :"})),
            ("true", json!(true)),
            ("[\"é\", null]", json!(["é", null])),
        ];
        for (text, expected) in cases {
            assert_eq!(value(text), expected, "{text}");
        }
    }

    #[test]
    fn what_would_change_is_text() {
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        for text in [
            "9007199254740993",
            r#"{"a": 1.000000000000000000001}"#,
            "[1e400]",
            "null",
            "\"é\"",
            r#"{"a": 1, "a": 2}"#,
            r#"[{"a": {"b": 1, "b": 2}}]"#,
            &deep,
        ] {
            assert_eq!(value(text), json!(text));
        }
    }
}
