//! JSON schemas that strict clients take, and arguments that do not fit them.
//!
//! Arguments are closed: what is not known is refused. Results are open and say little, because
//! every byte here is read by every model in every conversation: of a result, the names and
//! types of what it may hold; of a failure, which clients check against the same schema, that
//! there is `success`.

use rmcp::model::JsonObject;
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::error::Failure;

/// The schema of a tool's arguments.
pub(super) fn input<T: JsonSchema>() -> JsonObject {
    let mut schema = generate::<T>();
    schema.entry("properties").or_insert_with(|| json!({}));
    schema
}

/// The schema of a tool's result, or of its failure.
pub(super) fn output<T: JsonSchema>() -> JsonObject {
    let mut schema = generate::<T>();
    schema.insert("required".into(), json!(["success"]));
    if let Some(Value::Object(properties)) = schema.get_mut("properties") {
        properties.values_mut().for_each(undescribed);
    }
    schema
}

/// Arguments as `T`, which has this `schema`.
///
/// # Errors
/// `INVALID_REQUEST`, which says what does not fit the schema. The deserialiser's own text is
/// not used: it repeats the value, and that may be a password in the wrong place.
pub(super) fn read<T: DeserializeOwned>(
    schema: &JsonObject,
    arguments: JsonObject,
) -> Result<T, Failure> {
    let fault = fault(schema, &arguments);
    serde_json::from_value(Value::Object(arguments)).map_err(|_repeats_the_value| {
        Failure::invalid(fault.unwrap_or_else(|| "the arguments do not fit the schema".to_owned()))
    })
}

fn generate<T: JsonSchema>() -> JsonObject {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.inline_subschemas = true;
        settings.meta_schema = None;
    });
    let mut schema = settings.into_generator().into_root_schema_for::<T>().to_value();
    tidy(&mut schema);
    match schema {
        Value::Object(mut schema) => {
            schema.remove("title");
            schema.remove("description");
            schema
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            JsonObject::new()
        }
    }
}

/// `format: uint64` and the like are unknown to validators, and an optional argument is left
/// out rather than null. Names of properties are not keywords, so they are walked apart.
fn tidy(schema: &mut Value) {
    let Value::Object(object) = schema else { return };
    object.remove("format");
    if object.get("default") == Some(&Value::Null) {
        object.remove("default");
    }
    if let Some(Value::Array(types)) = object.get_mut("type")
        && types.len() == 2
    {
        types.retain(|name| name != "null");
        if let [only] = types.as_slice() {
            let only = only.clone();
            object.insert("type".into(), only);
        }
    }
    if let Some(Value::Array(choices)) = object.get_mut("anyOf") {
        // Two are an optional argument; a NULL among more is meant.
        if choices.len() == 2 {
            choices.retain(|choice| *choice != json!({"type": "null"}));
        }
        choices.iter_mut().for_each(tidy);
        if let [only] = choices.as_slice() {
            let only = only.clone();
            object.remove("anyOf");
            if let Value::Object(only) = only {
                object.extend(only);
            }
        }
    }
    if let Some(Value::Array(allowed)) = object.get_mut("enum") {
        allowed.retain(|value| !value.is_null());
    }
    if let Some(Value::Object(properties)) = object.get_mut("properties") {
        properties.values_mut().for_each(tidy);
    }
    for key in ["items", "additionalProperties"] {
        if let Some(inner) = object.get_mut(key) {
            tidy(inner);
        }
    }
}

/// Takes out what only readers need; names of properties are not keywords.
fn undescribed(schema: &mut Value) {
    let Value::Object(object) = schema else { return };
    object.remove("description");
    object.remove("minimum");
    object.remove("required");
    if let Some(Value::Object(properties)) = object.get_mut("properties") {
        properties.values_mut().for_each(undescribed);
    }
    if let Some(items) = object.get_mut("items") {
        undescribed(items);
    }
}

/// An object that is described in words only.
pub(super) fn object(_generator: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "object"})
}

/// A list of such.
pub(super) fn objects(_generator: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "array", "items": {"type": "object"}})
}

/// What is wrong with `arguments`, in words that repeat none of them.
fn fault(schema: &JsonObject, arguments: &JsonObject) -> Option<String> {
    let properties = schema.get("properties").and_then(Value::as_object)?;
    if arguments.keys().any(|name| !properties.contains_key(name)) {
        let known: Vec<&str> = properties.keys().map(String::as_str).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        return Some(format!("unknown argument; the tool takes: {known}"));
    }
    let required = schema.get("required").and_then(Value::as_array).into_iter().flatten();
    if let Some(missing) =
        required.filter_map(Value::as_str).find(|name| !arguments.contains_key(*name))
    {
        return Some(format!("argument {missing} is missing"));
    }
    properties.iter().find_map(|(name, property)| {
        let value = arguments.get(name)?;
        if let Some(allowed) = property.get("enum").and_then(Value::as_array)
            && !allowed.contains(value)
        {
            let allowed: Vec<&str> = allowed.iter().filter_map(Value::as_str).collect();
            return Some(format!("argument {name} must be one of {}", allowed.join(", ")));
        }
        let wanted = types(property);
        if !wanted.is_empty() && !wanted.iter().any(|kind| is_of(value, kind)) {
            return Some(format!("argument {name} is not of type {}", wanted.join(" or ")));
        }
        let least = property.get("minimum").and_then(Value::as_i64)?;
        value.as_i64().filter(|value| *value < least)?;
        Some(format!("argument {name} must be at least {least}"))
    })
}

/// The types of which a property is one.
fn types(property: &Value) -> Vec<&str> {
    let several = property.get("anyOf").and_then(Value::as_array).into_iter().flatten();
    let each = std::iter::once(property).chain(several);
    each.filter_map(|schema| schema.get("type").and_then(Value::as_str)).collect()
}

fn is_of(value: &Value, kind: &str) -> bool {
    match kind {
        "string" => value.is_string(),
        "integer" => value.is_u64() || value.is_i64(),
        "boolean" => value.is_boolean(),
        "object" => value.is_object(),
        "array" => value.is_array(),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        /// A text.
        #[expect(dead_code, reason = "only its schema matters")]
        format: String,
        #[expect(dead_code, reason = "only its schema matters")]
        count: Option<u64>,
        #[expect(dead_code, reason = "only its schema matters")]
        either: Option<Either>,
    }

    #[derive(Debug, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Nothing {}

    #[derive(Debug, Deserialize, JsonSchema)]
    #[serde(untagged)]
    enum Either {
        List(#[expect(dead_code, reason = "only its schema matters")] Vec<String>),
        Map(#[expect(dead_code, reason = "only its schema matters")] BTreeMap<String, String>),
    }

    #[test]
    fn a_property_may_be_called_like_a_keyword() {
        assert_eq!(
            Value::Object(input::<Arguments>()),
            json!({
                "type": "object",
                "properties": {
                    "format": {"type": "string", "description": "A text."},
                    "count": {"type": "integer", "minimum": 0},
                    "either": {"anyOf": [
                        {"type": "array", "items": {"type": "string"}},
                        {"type": "object", "additionalProperties": {"type": "string"}},
                    ]},
                },
                "required": ["format"],
                "additionalProperties": false,
            })
        );
    }

    #[test]
    fn faults_are_told_without_values() {
        let cases = [
            (json!({}), "argument format is missing"),
            (json!({"format": 5}), "argument format is not of type string"),
            (json!({"format": "x", "count": "hunter2"}), "argument count is not of type integer"),
            (
                json!({"format": "x", "hunter2": 1}),
                "unknown argument; the tool takes: count, either, format",
            ),
            (json!({"format": "x", "count": -1}), "argument count must be at least 0"),
            (
                json!({"format": "x", "either": "hunter2"}),
                "argument either is not of type array or object",
            ),
            (json!({"format": "x", "either": [1]}), "the arguments do not fit the schema"),
        ];
        for (arguments, message) in cases {
            let Value::Object(arguments) = arguments else { unreachable!() };
            let failure = read::<Arguments>(&input::<Arguments>(), arguments).unwrap_err();
            assert_eq!(failure.to_json()["error"]["message"], message);
        }
        let Value::Object(arguments) = json!({ "hunter2": 1 }) else { unreachable!() };
        let failure = read::<Nothing>(&input::<Nothing>(), arguments).unwrap_err();
        let message = "unknown argument; the tool takes: none";
        assert_eq!(failure.to_json()["error"]["message"], message);
    }
}
