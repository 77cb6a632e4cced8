//! Values between JSON and messages.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use credbroker_proto::v1::execute_query_request::Params as GivenParams;
use credbroker_proto::v1::sql_value::Kind;
use credbroker_proto::v1::{SqlRow, SqlValue};
use prost_types::value::Kind as PlainKind;
use prost_types::{ListValue, Struct, Value as Plain};
use serde_json::Value;

use crate::error::Failure;
use crate::sql::Params;

/// What a statement is given.
///
/// # Errors
/// `INVALID_REQUEST` for what says that it is JSON and is not.
pub(super) fn params(given: Option<GivenParams>) -> Result<Params, Failure> {
    Ok(match given {
        None => Params::None,
        Some(GivenParams::Positional(list)) => {
            Params::List(list.values.into_iter().map(param).collect::<Result<_, _>>()?)
        }
        Some(GivenParams::Named(map)) => {
            let named = map.values.into_iter().map(|(name, value)| Ok((name, param(value)?)));
            Params::Named(named.collect::<Result<BTreeMap<_, _>, Failure>>()?)
        }
    })
}

fn param(value: SqlValue) -> Result<Value, Failure> {
    Ok(match value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(value)) => value.into(),
        Some(Kind::Int64Value(value)) => value.into(),
        Some(Kind::DoubleValue(value)) if value.is_nan() => "NaN".into(),
        Some(Kind::DoubleValue(f64::INFINITY)) => "Infinity".into(),
        Some(Kind::DoubleValue(f64::NEG_INFINITY)) => "-Infinity".into(),
        Some(Kind::DoubleValue(value)) => value.into(),
        Some(Kind::StringValue(text)) => text.into(),
        Some(Kind::BytesValue(bytes)) => BASE64.encode(bytes).into(),
        Some(Kind::JsonValue(text)) => serde_json::from_str(&text)
            .map_err(|_quotes_it| Failure::invalid("a json_value among params is not JSON"))?,
    })
}

/// A row as results have it: an array of cells.
pub(super) fn row(row: Value) -> SqlRow {
    match row {
        Value::Array(cells) => SqlRow { cells: cells.into_iter().map(cell).collect() },
        other @ (Value::Null
        | Value::Bool(_)
        | Value::Number(_)
        | Value::String(_)
        | Value::Object(_)) => SqlRow { cells: vec![cell(other)] },
    }
}

fn cell(value: Value) -> SqlValue {
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(value) => Kind::BoolValue(value),
        Value::String(text) => Kind::StringValue(text),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(whole), _) => Kind::Int64Value(whole),
            (None, Some(float)) if number.is_f64() => Kind::DoubleValue(float),
            (None, _) => Kind::JsonValue(number.to_string()),
        },
        Value::Array(_) | Value::Object(_) => Kind::JsonValue(value.to_string()),
    };
    SqlValue { kind: Some(kind) }
}

/// What the catalogue says, whose numbers are counts and estimates.
pub(super) fn object(value: Value) -> Struct {
    match value {
        Value::Object(members) => Struct {
            fields: members.into_iter().map(|(name, value)| (name, plain(value))).collect(),
        },
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            Struct::default()
        }
    }
}

fn plain(value: Value) -> Plain {
    let kind = match value {
        Value::Null => PlainKind::NullValue(0),
        Value::Bool(value) => PlainKind::BoolValue(value),
        Value::Number(number) => PlainKind::NumberValue(number.as_f64().unwrap_or(f64::NAN)),
        Value::String(text) => PlainKind::StringValue(text),
        Value::Array(items) => {
            PlainKind::ListValue(ListValue { values: items.into_iter().map(plain).collect() })
        }
        Value::Object(_) => PlainKind::StructValue(object(value)),
    };
    Plain { kind: Some(kind) }
}

#[cfg(test)]
mod tests {
    use credbroker_proto::v1::SqlValueList;
    use serde_json::json;

    use super::*;

    fn kind(value: Value) -> Kind {
        cell(value).kind.unwrap()
    }

    #[test]
    fn cells_are_what_json_has() {
        assert_eq!(kind(Value::Null), Kind::NullValue(0));
        assert_eq!(kind(json!(-1)), Kind::Int64Value(-1));
        assert_eq!(kind(json!(1.0)), Kind::DoubleValue(1.0));
        assert_eq!(kind(json!(u64::MAX)), Kind::JsonValue(u64::MAX.to_string()));
        assert_eq!(kind(json!("9007199254740993")), Kind::StringValue("9007199254740993".into()));
        assert_eq!(kind(json!({"a": [1, null]})), Kind::JsonValue(r#"{"a":[1,null]}"#.into()));
        assert_eq!(row(json!([true, "a"])).cells.len(), 2);
    }

    #[test]
    fn params_come_as_any_kind() {
        let given = [
            None,
            Some(Kind::Int64Value(i64::MIN)),
            Some(Kind::DoubleValue(f64::NEG_INFINITY)),
            Some(Kind::DoubleValue(f64::NAN)),
            Some(Kind::DoubleValue(0.5)),
            Some(Kind::BytesValue(vec![0xde, 0xad])),
            Some(Kind::JsonValue("[1]".into())),
        ];
        let values = given.into_iter().map(|kind| SqlValue { kind }).collect();
        let read = params(Some(GivenParams::Positional(SqlValueList { values }))).unwrap();
        let expected = json!([null, i64::MIN, "-Infinity", "NaN", 0.5, "3q0=", [1]]);
        assert_eq!(read, Params::List(expected.as_array().unwrap().clone()));

        let wrong = SqlValue { kind: Some(Kind::JsonValue("canary".into())) };
        let refused = param(wrong).unwrap_err();
        assert!(!refused.to_string().contains("canary"), "{refused}");
    }
}
