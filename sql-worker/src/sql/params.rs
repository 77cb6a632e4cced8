//! Parameters: from JSON and `:name` to `$n` and text.
//!
//! Every value travels beside the statement as text and is turned into its type by the
//! database, `CAST($n::text AS type)`, where `type` is what the database itself inferred for
//! that parameter. So every type works, extensions included, and no value enters SQL text.

use std::collections::{BTreeMap, HashMap};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;

use super::lexer::{Kind, Token, tokens};
use super::with;
use crate::error::{Code, Failure};

/// What a caller gives for a statement's parameters.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Params {
    /// Nothing.
    #[default]
    None,
    /// For `$1`, `$2`, ….
    List(Vec<Value>),
    /// For `:name`.
    Named(BTreeMap<String, Value>),
}

/// A statement, cut at its parameters.
#[derive(Debug)]
pub struct Script<'a> {
    tokens: Vec<Token<'a>>,
    names: Vec<&'a str>,
    /// Where each of `names` stands: a statement may have tens of thousands.
    places: HashMap<&'a str, usize>,
}

impl<'a> Script<'a> {
    /// Reads `sql`; everything that is not a parameter is kept as it is.
    #[must_use]
    pub fn parse(sql: &'a str) -> Self {
        let tokens = tokens(sql);
        let (mut names, mut places) = (Vec::new(), HashMap::new());
        for token in tokens.iter().filter(|token| token.kind == Kind::Name) {
            let name = token.text.trim_start_matches(':');
            places.entry(name).or_insert_with(|| {
                names.push(name);
                names.len() - 1
            });
        }
        Self { tokens, names, places }
    }

    /// The names of the `:name` parameters, in the order in which they first appear.
    #[must_use]
    pub fn names(&self) -> &[&'a str] {
        &self.names
    }

    /// Matches the parameters with the statement.
    ///
    /// # Errors
    /// `INVALID_REQUEST` when one is missing or left over, naming it.
    pub(super) fn bind(self, params: &Params) -> Result<Bound<'a>, Failure> {
        let highest = self.positions().max().unwrap_or(0);
        let values = match params {
            Params::Named(_) if highest > 0 => {
                return Err(Failure::invalid(
                    "params is an object, but the statement uses $1: use :name, or give a list",
                ));
            }
            Params::Named(given) => self.named_values(given)?,
            Params::None | Params::List(_) => {
                let given: &[Value] = if let Params::List(list) = params { list } else { &[] };
                match self.names.first() {
                    Some(name) if given.is_empty() => {
                        return Err(Failure::invalid(format!("no value is given for :{name}")));
                    }
                    Some(name) if highest == 0 => {
                        return Err(Failure::invalid(format!(
                            "params is a list, but the statement uses :{name}: give an object"
                        )));
                    }
                    Some(_) | None => {}
                }
                if highest != given.len() {
                    return Err(Failure::invalid(format!(
                        "the statement uses {highest} positional parameter(s), {} given",
                        given.len()
                    )));
                }
                given.to_vec()
            }
        };
        Ok(Bound { named: matches!(params, Params::Named(_)), script: self, values })
    }

    fn named_values(&self, given: &BTreeMap<String, Value>) -> Result<Vec<Value>, Failure> {
        if given.keys().any(|name| !self.places.contains_key(name.as_str())) {
            // The stray name is the caller's own text, and may be anything.
            let used =
                if self.names.is_empty() { "none".to_owned() } else { self.names.join(", ") };
            return Err(Failure::invalid(format!(
                "params has a name that the statement does not use; it uses: {used}"
            )));
        }
        let value = |name: &&str| {
            let missing = || Failure::invalid(format!("no value is given for :{name}"));
            given.get(*name).cloned().ok_or_else(missing)
        };
        self.names.iter().map(value).collect()
    }

    fn positions(&self) -> impl Iterator<Item = usize> {
        self.tokens.iter().filter_map(position)
    }

    /// The words of the statement, without strings, identifiers in quotes and comments.
    fn words(&self) -> impl Iterator<Item = &'a str> {
        self.tokens.iter().filter(|token| token.kind == Kind::Word).map(|token| token.text)
    }
}

/// A statement and a value for each of its parameters.
#[derive(Debug)]
pub(super) struct Bound<'a> {
    script: Script<'a>,
    values: Vec<Value>,
    named: bool,
}

impl Bound<'_> {
    /// One value a parameter: the first is that of `$1`.
    pub(super) fn values(&self) -> &[Value] {
        &self.values
    }

    /// The statement with every parameter, counted from zero, written by `write`.
    pub(super) fn render(&self, write: impl Fn(usize) -> String) -> String {
        self.write(&self.script.tokens, &write)
    }

    /// [`render`](Self::render) without the semicolons around the statement, for use inside
    /// another.
    pub(super) fn render_inner(&self, write: impl Fn(usize) -> String) -> String {
        self.write(&self.inner(), &write)
    }

    /// [`render_inner`](Self::render_inner) in two: a list of WITH, and the query behind it. `None`
    /// where there is no such list.
    pub(super) fn render_with(&self, write: impl Fn(usize) -> String) -> Option<(String, String)> {
        let inner = self.inner();
        let (list, main) = inner.split_at_checked(with::main_query(&inner)?)?;
        Some((self.write(list, &write), self.write(main, &write)))
    }

    /// It, with blanks for semicolons. Nothing is cut off: the server has described all of it, and
    /// a beginning could mean something else.
    fn inner(&self) -> Vec<Token<'_>> {
        let blank = Token { kind: Kind::Blank, text: " " };
        let semicolon = |token: &Token<'_>| token.kind == Kind::Symbol && token.text == ";";
        let tokens = self.script.tokens.iter();
        tokens.map(|token| if semicolon(token) { blank } else { *token }).collect()
    }

    fn write(&self, tokens: &[Token<'_>], write: &impl Fn(usize) -> String) -> String {
        let mut sql = String::new();
        for token in tokens {
            match self.index(token) {
                Some(index) => sql.push_str(&write(index)),
                None => sql.push_str(token.text),
            }
        }
        sql
    }

    /// Whether the statement may change something by what it says itself. Where this is
    /// wrong, a long result is read to its end, or a function's effects are rolled back.
    pub(super) fn may_write(&self) -> bool {
        self.has_word(&["insert", "update", "delete", "merge", "call", "do", "refresh", "create"])
    }

    /// Whether the first lexeme, behind brackets and empty statements, is one of `words`.
    pub(super) fn begins_with(&self, words: &[&str]) -> bool {
        let first = self.script.tokens.iter().find(|token| !is_filler(token));
        first.is_some_and(|first| {
            first.kind == Kind::Word
                && words.iter().any(|word| first.text.eq_ignore_ascii_case(word))
        })
    }

    /// Whether nothing is there to be run.
    pub(super) fn is_empty(&self) -> bool {
        self.script.tokens.iter().all(is_filler)
    }

    pub(super) fn has_second_word(&self, word: &str) -> bool {
        self.script.words().nth(1).is_some_and(|second| second.eq_ignore_ascii_case(word))
    }

    pub(super) fn has_word(&self, words: &[&str]) -> bool {
        self.script.words().any(|own| words.iter().any(|word| own.eq_ignore_ascii_case(word)))
    }

    /// Whether it is a COPY between server and client, which has no result set.
    pub(super) fn is_client_copy(&self) -> bool {
        let mut words = self.script.words();
        words.next().is_some_and(|word| word.eq_ignore_ascii_case("copy"))
            && words.any(|word| {
                word.eq_ignore_ascii_case("stdin") || word.eq_ignore_ascii_case("stdout")
            })
    }

    fn index(&self, token: &Token<'_>) -> Option<usize> {
        if self.named && token.kind == Kind::Name {
            return self.script.places.get(token.text.trim_start_matches(':')).copied();
        }
        position(token).and_then(|number| number.checked_sub(1))
    }
}

/// What may stand before the first word of a statement.
fn is_filler(token: &Token<'_>) -> bool {
    token.kind == Kind::Blank || matches!(token.text, "(" | ";")
}

fn position(token: &Token<'_>) -> Option<usize> {
    if token.kind != Kind::Position {
        return None;
    }
    // A number too large for usize is too large for PostgreSQL as well.
    Some(token.text.trim_start_matches('$').parse().unwrap_or(usize::MAX))
}

/// The text in which PostgreSQL reads `value` as a parameter of type `type_name`.
///
/// It takes what results show: base64 for bytea (or `\x` and hexadecimal), years as ISO 8601
/// writes them, JSON text for json. Other strings go as they are; arrays become array literals,
/// or JSON where the type is json or jsonb. `None` is NULL.
///
/// # Errors
/// `INVALID_REQUEST` for an array or object where the type takes none, and for bytes that are
/// not base64; it tells the parameter's number, never its value.
pub(super) fn to_text(
    value: &Value,
    type_name: &str,
    number: usize,
) -> Result<Option<String>, Failure> {
    let is_json = matches!(type_name, "json" | "jsonb");
    // The name of a type is the database's.
    let wrong = |what: &str| {
        Failure::quoting(
            Code::InvalidRequest,
            format!("parameter {number} is an {what}, but the statement wants {type_name} there"),
        )
    };
    Ok(match value {
        Value::Null => None,
        Value::Bool(flag) => Some(flag.to_string()),
        Value::Number(number) => Some(number.to_string()),
        Value::String(text) => Some(scalar_text(text, type_name, &wrong)?),
        Value::Array(_) | Value::Object(_) if is_json => Some(value.to_string()),
        Value::Array(items) => {
            let element = type_name.strip_suffix("[]").ok_or_else(|| wrong("array"))?;
            Some(array_literal(items, element, &wrong)?)
        }
        Value::Object(_) => return Err(wrong("object")),
    })
}

fn scalar_text(
    text: &str,
    type_name: &str,
    wrong: &dyn Fn(&str) -> Failure,
) -> Result<String, Failure> {
    match type_name {
        "bytea" if !text.starts_with("\\x") => {
            let bytes = BASE64.decode(text).map_err(|_invalid| wrong("text that is not base64"))?;
            Ok(hexadecimal(&bytes))
        }
        "date" | "timestamp" | "timestamptz" => Ok(postgres_year(text)),
        _ => Ok(text.to_owned()),
    }
}

/// bytea's text, PostgreSQL 15, 8.4.1.
fn hexadecimal(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from_digit(value.into(), 16).unwrap_or('0');
    let mut text = String::with_capacity(2 + 2 * bytes.len());
    text.push_str("\\x");
    text.extend(bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]));
    text
}

/// A date whose year is signed (ISO 8601, year 0000 is 1 BC), as PostgreSQL reads it.
fn postgres_year(text: &str) -> String {
    let signed = text.strip_prefix(['+', '-']).is_some();
    let digits = text.trim_start_matches(['+', '-']);
    let Some((year, rest)) = digits.split_once('-') else {
        return text.to_owned();
    };
    let Ok(number) = year.parse::<u32>() else {
        return text.to_owned();
    };
    match (text.starts_with('-'), number) {
        (true, _) => format!("{:04}-{rest} BC", number.saturating_add(1)),
        (false, 0) => format!("0001-{rest} BC"),
        (false, _) if signed => format!("{year}-{rest}"),
        (false, _) => text.to_owned(),
    }
}

fn array_literal(
    items: &[Value],
    element: &str,
    wrong: &dyn Fn(&str) -> Failure,
) -> Result<String, Failure> {
    let of_json = matches!(element, "json" | "jsonb");
    let mut parts = Vec::with_capacity(items.len());
    for item in items {
        parts.push(match item {
            Value::Null => "NULL".to_owned(),
            Value::Array(_) | Value::Object(_) if of_json => quote(&item.to_string()),
            Value::Array(inner) => array_literal(inner, element, wrong)?,
            Value::Object(_) => return Err(wrong("array of objects")),
            Value::Bool(flag) => flag.to_string(),
            Value::Number(number) => number.to_string(),
            Value::String(text) => quote(&scalar_text(text, element, wrong)?),
        });
    }
    Ok(format!("{{{}}}", parts.join(",")))
}

/// An element of an array literal, PostgreSQL 8.15.6.
fn quote(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn named(value: Value) -> Params {
        Params::Named(serde_json::from_value(value).unwrap())
    }

    #[test]
    fn a_long_bytea_takes_linear_time() {
        // With a copy for each byte, this is still at it when the runner ends it.
        let bytes = vec![0xa5; 4 << 20];
        let text = to_text(&json!(BASE64.encode(&bytes)), "bytea", 1).unwrap().unwrap();
        assert_eq!(text.len(), 2 + 2 * bytes.len());
        assert!(text.starts_with("\\xa5a5"));
    }

    #[test]
    fn names_become_numbers_and_repeat() {
        let script = Script::parse("select :b, ':b', :a, :b::text; -- :c");
        let bound = script.bind(&named(json!({"a": 1, "b": "x"}))).unwrap();
        assert_eq!(bound.values(), [json!("x"), json!(1)]);
        let sql = bound.render(|index| format!("${}", index + 1));
        assert_eq!(sql, "select $1, ':b', $2, $1::text; -- :c");
        let inner = bound.render_inner(|index| format!("${}", index + 1));
        assert_eq!(inner, "select $1, ':b', $2, $1::text  -- :c");
    }

    #[test]
    fn what_is_missing_or_left_over_is_said_without_values() {
        let cases = [
            ("select :a", Params::None, "no value is given for :a"),
            ("select :a, :b", named(json!({"a": 1})), "no value is given for :b"),
            (
                "select :a",
                named(json!({"a": 1, "hunter2": 1})),
                "params has a name that the statement does not use; it uses: a",
            ),
            (
                "select 1",
                named(json!({"hunter2": 1})),
                "params has a name that the statement does not use; it uses: none",
            ),
            (
                "select :a",
                Params::List(vec![json!("hunter2")]),
                "params is a list, but the statement uses :a: give an object",
            ),
            (
                "select $1, $3",
                Params::List(vec![json!(1)]),
                "the statement uses 3 positional parameter(s), 1 given",
            ),
            (
                "select 1",
                Params::List(vec![json!("hunter2")]),
                "the statement uses 0 positional parameter(s), 1 given",
            ),
            (
                "select $1",
                named(json!({})),
                "params is an object, but the statement uses $1: use :name, or give a list",
            ),
        ];
        for (sql, params, message) in cases {
            let failure = Script::parse(sql).bind(&params).unwrap_err();
            assert_eq!(failure.to_json()["error"]["message"], message, "{sql}");
        }
    }

    #[test]
    fn values_become_text() {
        let cases = [
            (json!(null), "int4", None),
            (json!(true), "boolean", Some("true")),
            (json!(9_007_199_254_740_993_i64), "bigint", Some("9007199254740993")),
            (json!("a'b"), "text", Some("a'b")),
            (json!({"a": [1]}), "jsonb", Some(r#"{"a":[1]}"#)),
            (json!([1, null, 2]), "integer[]", Some("{1,NULL,2}")),
            (
                json!([["a\"b", "c\\"], ["", "NULL"]]),
                "text[]",
                Some(r#"{{"a\"b","c\\"},{"","NULL"}}"#),
            ),
            (json!([{"a": "b"}]), "jsonb[]", Some(r#"{"{\"a\":\"b\"}"}"#)),
            (json!([]), "text[]", Some("{}")),
            (json!("3q0="), "bytea", Some("\\xdead")),
            (json!("\\xdead"), "bytea", Some("\\xdead")),
            (json!(["3q0="]), "bytea[]", Some(r#"{"\\xdead"}"#)),
            (json!("-0043-03-15"), "date", Some("0044-03-15 BC")),
            (json!("0000-01-01T00:00:00Z"), "timestamptz", Some("0001-01-01T00:00:00Z BC")),
            (json!("+10000-01-01"), "date", Some("10000-01-01")),
            (json!("2024-02-29"), "date", Some("2024-02-29")),
            (json!("-infinity"), "timestamp", Some("-infinity")),
            (json!("tomorrow"), "date", Some("tomorrow")),
            (json!("-0043-03-15"), "text", Some("-0043-03-15")),
        ];
        for (value, type_name, expected) in cases {
            let text = to_text(&value, type_name, 1).unwrap();
            assert_eq!(text.as_deref(), expected, "{value} as {type_name}");
        }
        assert!(to_text(&json!([1]), "integer", 1).is_err());
        assert!(to_text(&json!({}), "text", 1).is_err());
        assert!(to_text(&json!("no base64"), "bytea", 1).is_err());
        assert!(to_text(&json!([{}]), "text[]", 1).is_err());
    }

    #[test]
    fn writes_are_told_from_reads() {
        let bound = |sql| Script::parse(sql).bind(&Params::None).unwrap();
        assert!(bound("with x as (delete from t returning *) select * from x").may_write());
        assert!(bound("INSERT into t default values returning a").may_write());
        assert!(!bound("select 'update', \"delete\" from t -- insert").may_write());
        assert!(bound("copy t from stdin").is_client_copy());
        assert!(!bound("select 'copy stdin'").is_client_copy());
    }
}
