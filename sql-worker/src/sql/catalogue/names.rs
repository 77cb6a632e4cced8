//! Names of tables, as callers write them; pure.

use crate::error::Failure;

/// Bytes of a pattern or a name.
const MAX_NAME: usize = 256;

/// A glob over the names of tables: `ord*`, `sales.*`, `pg_catalog.pg_stat_*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    /// A LIKE pattern; `None`: every schema that is not the system's.
    pub(super) schema: Option<String>,
    /// A LIKE pattern.
    pub(super) table: String,
}

impl Pattern {
    /// `*` is any text and `?` any character, `%` is taken for `*`. What stands before the
    /// first dot is the schema. A table part without any of them matches anywhere in a name.
    ///
    /// # Errors
    /// `INVALID_REQUEST` when it is empty or longer than 256 bytes.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        if text.is_empty() || text.len() > MAX_NAME {
            return Err(Failure::invalid("pattern must have 1 to 256 bytes"));
        }
        let (schema, table) = match text.split_once('.') {
            Some((schema, table)) => (Some(schema), table),
            None => (None, text),
        };
        let table = match table {
            "" => "%".to_owned(),
            part if part.contains(['*', '?', '%']) => like(part),
            part => format!("%{}%", like(part)),
        };
        Ok(Self { schema: schema.map(like), table })
    }
}

fn like(glob: &str) -> String {
    let mut pattern = String::new();
    for character in glob.chars() {
        match character {
            '*' | '%' => pattern.push('%'),
            '?' => pattern.push('_'),
            '_' | '\\' => pattern.extend(['\\', character]),
            other => pattern.push(other),
        }
    }
    pattern
}

/// The name of a table: `orders`, `sales.orders`, `"Sales"."2024 orders"`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableName {
    pub(super) schema: Option<String>,
    pub(super) name: String,
}

impl TableName {
    /// Reads one or two identifiers; quotes are taken off, the case is kept.
    ///
    /// # Errors
    /// `INVALID_REQUEST` for anything else.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        let wrong = || Failure::invalid("table must be a name, or schema.name");
        if text.is_empty() || text.len() > MAX_NAME {
            return Err(wrong());
        }
        let (first, rest) = identifier(text).ok_or_else(wrong)?;
        match rest {
            None => Ok(Self { schema: None, name: first }),
            Some(rest) => match identifier(rest) {
                Some((name, None)) => Ok(Self { schema: Some(first), name }),
                Some((_, Some(_))) | None => Err(wrong()),
            },
        }
    }

    /// One in a schema.
    #[must_use]
    pub fn new(schema: &str, name: &str) -> Self {
        Self { schema: Some(schema.to_owned()), name: name.to_owned() }
    }

    /// In lower case, as PostgreSQL reads what is not quoted; `None` when that is no other.
    #[must_use]
    pub fn folded(&self) -> Option<Self> {
        let folded = Self {
            schema: self.schema.as_deref().map(str::to_lowercase),
            name: self.name.to_lowercase(),
        };
        (folded != *self).then_some(folded)
    }
}

/// The identifier that `text` begins with, and what stands behind the dot after it.
fn identifier(text: &str) -> Option<(String, Option<&str>)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let (name, rest) = match text.split_once('.') {
            Some((name, rest)) => (name, Some(rest)),
            None => (text, None),
        };
        return (!name.is_empty() && !name.contains('"')).then(|| (name.to_owned(), rest));
    };
    let mut name = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        if character != '"' {
            name.push(character);
            continue;
        }
        let rest = quoted.get(at + 1..)?;
        match rest.chars().next() {
            Some('"') => {
                characters.next();
                name.push('"');
            }
            None if !name.is_empty() => return Some((name, None)),
            Some('.') if !name.is_empty() => return Some((name, rest.get(1..))),
            Some(_) | None => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_become_like_patterns() {
        let parsed = |text: &str| {
            let Pattern { schema, table } = Pattern::parse(text).unwrap();
            (schema, table)
        };
        let cases = [
            ("order", (None, "%order%")),
            ("ord*", (None, "ord%")),
            ("%id?", (None, "%id_")),
            ("a_b*", (None, "a\\_b%")),
            ("Sales.*", (Some("Sales"), "%")),
            ("sales.", (Some("sales"), "%")),
            ("pg_catalog.pg_cl", (Some("pg\\_catalog"), "%pg\\_cl%")),
            ("*.a.b", (Some("%"), "%a.b%")),
        ];
        for (text, (schema, table)) in cases {
            assert_eq!(parsed(text), (schema.map(str::to_owned), table.to_owned()), "{text}");
        }
        assert!(Pattern::parse("").is_err() && Pattern::parse(&"x".repeat(257)).is_err());
    }

    #[test]
    fn names_are_one_or_two_identifiers() {
        let plain = |name: &str| TableName { schema: None, name: name.to_owned() };
        let cases = [
            ("orders", Some(plain("orders"))),
            ("sales.orders", Some(TableName::new("sales", "orders"))),
            ("\"My.Schema\".\"a\"\"b\"", Some(TableName::new("My.Schema", "a\"b"))),
            ("sales.\"Orders\"", Some(TableName::new("sales", "Orders"))),
            ("two words", Some(plain("two words"))),
            ("", None),
            (".a", None),
            ("a.", None),
            ("a.b.c", None),
            ("\"a", None),
            ("\"a\"b", None),
            ("\"\"", None),
            ("a\"b", None),
        ];
        for (text, expected) in cases {
            assert_eq!(TableName::parse(text).ok(), expected, "{text}");
        }
        assert_eq!(plain("Orders").folded(), Some(plain("orders")));
        assert_eq!(plain("orders").folded(), None);
    }
}
