//! The `params` argument: a list for `$1`, or an object for `:name`.

use std::borrow::Cow;
use std::collections::BTreeMap;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde_json::Value;

use crate::sql::Params;

/// Values of a statement's parameters.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum ParamsArgument {
    List(Vec<Value>),
    Named(BTreeMap<String, Value>),
}

impl From<Option<ParamsArgument>> for Params {
    fn from(argument: Option<ParamsArgument>) -> Self {
        match argument {
            None => Self::None,
            Some(ParamsArgument::List(list)) => Self::List(list),
            Some(ParamsArgument::Named(named)) => Self::Named(named),
        }
    }
}

impl JsonSchema for ParamsArgument {
    fn schema_name() -> Cow<'static, str> {
        "Params".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_generator: &mut SchemaGenerator) -> Schema {
        // Spelt out, because strict clients refuse the schema `true`, and some an array without
        // items or a list of types. An element of an array parameter is its text in any type.
        json_schema!({
            "anyOf": [
                {"type": "array", "items": {"anyOf": [
                    {"type": "string"},
                    {"type": "number"},
                    {"type": "boolean"},
                    {"type": "null"},
                    {"type": "array", "items": {"type": "string"}},
                    {"type": "object"},
                ]}},
                {"type": "object"},
            ]
        })
    }
}
