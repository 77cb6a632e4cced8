//! CSV as in RFC 4180: CRLF, quotes where needed.
//!
//! NULL is an empty field and an empty string is `""`, as in PostgreSQL's own CSV, so that
//! the two stay different.

use serde_json::Value;

/// Appends one record.
pub(super) fn push_record<'a>(out: &mut String, cells: impl IntoIterator<Item = &'a Value>) {
    for (at, cell) in cells.into_iter().enumerate() {
        if at > 0 {
            out.push(',');
        }
        push_field(out, cell);
    }
    out.push_str("\r\n");
}

fn push_field(out: &mut String, cell: &Value) {
    match cell {
        Value::Null => {}
        Value::String(text) => push_text(out, text),
        Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            push_text(out, &cell.to_string());
        }
    }
}

fn push_text(out: &mut String, text: &str) {
    // A lone `\.` ends the data for COPY; leading and trailing blanks are lost by many readers.
    let plain = !text.is_empty()
        && text != "\\."
        && text.trim() == text
        && !text.contains(['"', ',', '\r', '\n']);
    if plain {
        out.push_str(text);
    } else {
        out.push('"');
        out.push_str(&text.replace('"', "\"\""));
        out.push('"');
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_are_quoted_where_they_must_be() {
        let cells = [
            json!(null),
            json!(""),
            json!("plain"),
            json!("a,b"),
            json!("say \"hi\""),
            json!("two\r\nlines"),
            json!(" blank "),
            json!(1.5),
            json!(true),
            json!([1, "x"]),
            json!("\\."),
        ];
        let mut out = String::new();
        push_record(&mut out, &cells);
        assert_eq!(
            out,
            ",\"\",plain,\"a,b\",\"say \"\"hi\"\"\",\"two\r\nlines\",\" blank \",1.5,true,\
             \"[1,\"\"x\"\"]\",\"\\.\"\r\n"
        );
    }
}
