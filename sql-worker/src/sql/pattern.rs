//! Names of tables and columns as the configuration writes them: `public.*`, `*.ssn`.
//!
//! Names are the catalogue's: as they are stored, so in lower case unless they were quoted.

/// A name in which `*` stands for any characters.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Glob(String);

/// Tables: `schema.table`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablePattern {
    schema: Glob,
    table: Glob,
}

/// Columns: `table.column`, in any schema, or `schema.table.column`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ColumnPattern {
    table: TablePattern,
    column: Glob,
}

impl TablePattern {
    /// Reads `schema.table`; `None` when it is not that.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match *parts(text)?.as_slice() {
            [schema, table] => Some(Self { schema: Glob::new(schema), table: Glob::new(table) }),
            _ => None,
        }
    }

    /// Schema and table as LIKE patterns.
    pub(super) fn to_like(&self) -> [String; 2] {
        [self.schema.to_like(), self.table.to_like()]
    }

    pub(super) fn matches(&self, schema: &str, table: &str) -> bool {
        self.schema.matches(schema) && self.table.matches(table)
    }
}

impl ColumnPattern {
    /// Reads `table.column` or `schema.table.column`; `None` when it is neither.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (schema, table, column) = match *parts(text)?.as_slice() {
            [table, column] => ("*", table, column),
            [schema, table, column] => (schema, table, column),
            _ => return None,
        };
        let table = TablePattern { schema: Glob::new(schema), table: Glob::new(table) };
        Some(Self { table, column: Glob::new(column) })
    }

    /// Schema, table and column as LIKE patterns.
    pub(super) fn to_like(&self) -> [String; 3] {
        let [schema, table] = self.table.to_like();
        [schema, table, self.column.to_like()]
    }

    pub(super) fn matches(&self, schema: &str, table: &str, column: &str) -> bool {
        self.table.matches(schema, table) && self.column.matches(column)
    }
}

impl Glob {
    fn new(text: &str) -> Self {
        Self(text.to_owned())
    }

    fn to_like(&self) -> String {
        let mut pattern = String::with_capacity(self.0.len());
        for character in self.0.chars() {
            match character {
                '*' => pattern.push('%'),
                '%' | '_' | '\\' => pattern.extend(['\\', character]),
                other => pattern.push(other),
            }
        }
        pattern
    }

    fn matches(&self, name: &str) -> bool {
        let mut rest = name;
        let mut pieces = self.0.split('*');
        let first = pieces.next().unwrap_or_default();
        let Some(tail) = rest.strip_prefix(first) else {
            return false;
        };
        rest = tail;
        let mut pieces: Vec<&str> = pieces.collect();
        let Some(last) = pieces.pop() else {
            return rest.is_empty();
        };
        for piece in pieces {
            match rest.split_once(piece) {
                Some((_, tail)) => rest = tail,
                None => return false,
            }
        }
        rest.ends_with(last)
    }
}

fn parts(text: &str) -> Option<Vec<&str>> {
    let parts: Vec<&str> = text.split('.').collect();
    parts.iter().all(|part| !part.trim().is_empty()).then_some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_anything() {
        let cases = [
            ("users", "users", true),
            ("users", "users2", false),
            ("*", "", true),
            ("log_*", "log_2024", true),
            ("log_*", "xlog_2024", false),
            ("*_2024", "log_2024", true),
            ("a*b*c", "a1b2c", true),
            ("a*b*c", "a1c", false),
            ("a*a", "a", false),
        ];
        for (glob, name, expected) in cases {
            assert_eq!(Glob::new(glob).matches(name), expected, "{glob} {name}");
        }
    }

    #[test]
    fn a_pattern_means_the_same_to_like() {
        let table = TablePattern::parse("a_b.50%*").unwrap();
        assert_eq!(table.to_like(), ["a\\_b", "50\\%%"]);
        let column = ColumnPattern::parse("users.*\\").unwrap();
        assert_eq!(column.to_like(), ["%", "users", "%\\\\"]);
    }

    #[test]
    fn patterns_have_two_or_three_parts() {
        let ssn = ColumnPattern::parse("*.ssn").unwrap();
        assert!(ssn.matches("any", "people", "ssn") && !ssn.matches("any", "people", "id"));
        let phone = ColumnPattern::parse("public.users.phone").unwrap();
        assert!(phone.matches("public", "users", "phone"));
        assert!(!phone.matches("sales", "users", "phone"));
        let orders = TablePattern::parse("sales.orders").unwrap();
        assert!(orders.matches("sales", "orders") && !orders.matches("sales", "users"));
        assert_eq!(ColumnPattern::parse("ssn"), None);
        assert_eq!(ColumnPattern::parse("a.b.c.d"), None);
        assert_eq!(ColumnPattern::parse("a..b"), None);
        assert_eq!(TablePattern::parse("users"), None);
    }
}
