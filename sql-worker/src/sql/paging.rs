//! Later pages of a query's rows; pure.
//!
//! No transaction and no cursor of the database is held between two pages: the query is run
//! again, as a subquery behind an OFFSET. Rows that were added or removed meanwhile, and a
//! query that nothing orders, show as rows that are missing or come twice.

use super::lexer::{Kind, Token, tokens};

/// Whether `sql` can be read on from an offset: a query and nothing else.
///
/// It keeps nobody from anything: what is told wrong here fails in the database, or merely
/// has no further page.
#[must_use]
pub fn is_pageable(sql: &str) -> bool {
    let tokens = tokens(sql);
    let (query, rest) = parted(&tokens);
    let mut words = query.iter().filter(|token| token.kind == Kind::Word);
    let begins = |word: &str| {
        ["select", "with", "values", "table"].iter().any(|query| word.eq_ignore_ascii_case(query))
    };
    // A statement that changes rows cannot stand in a subquery, INTO makes a table, and FOR
    // UPDATE locks.
    let changes = |word: &str| {
        ["insert", "update", "delete", "merge", "into"]
            .iter()
            .any(|change| word.eq_ignore_ascii_case(change))
    };
    words.next().is_some_and(|word| begins(word.text))
        && !words.any(|word| changes(word.text))
        && rest.iter().all(|token| token.kind == Kind::Blank || token.text == ";")
}

/// `sql`, which [`is_pageable`], without its first `offset` rows.
#[must_use]
pub fn from_offset(sql: &str, offset: u64) -> String {
    let tokens = tokens(sql);
    let (query, _) = parted(&tokens);
    let query: String = query.iter().map(|token| token.text).collect();
    // The line break ends a comment that the query may end with.
    format!("select * from (\n{query}\n) as page offset {offset}")
}

/// Parted at the semicolon that ends the statement.
fn parted<'t, 's>(tokens: &'t [Token<'s>]) -> (&'t [Token<'s>], &'t [Token<'s>]) {
    let semicolon = |token: &Token<'_>| token.kind == Kind::Symbol && token.text == ";";
    let end = tokens.iter().position(semicolon).unwrap_or(tokens.len());
    tokens.split_at_checked(end).unwrap_or((tokens, &[]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_queries_have_pages() {
        for sql in [
            "select 1",
            " -- c\n(select 1) union all (select 2);  -- end",
            "with x as (select 1) select * from x",
            "values (1)",
            "TABLE t",
            "select 'delete', \"update\" from t",
        ] {
            assert!(is_pageable(sql), "{sql}");
        }
        for sql in [
            "",
            "explain select 1",
            "show all",
            "fetch all from c",
            "insert into t values (1) returning a",
            "with x as (delete from t returning *) select * from x",
            "select a into t from b",
            "select 1 for update",
            "select 1; select 2",
            "call p()",
        ] {
            assert!(!is_pageable(sql), "{sql}");
        }
    }

    #[test]
    fn a_page_is_the_query_behind_an_offset() {
        assert_eq!(
            from_offset("select a from t order by a; -- x", 20),
            "select * from (\nselect a from t order by a\n) as page offset 20"
        );
        assert_eq!(
            from_offset("select a -- why", 1),
            "select * from (\nselect a -- why\n) as page offset 1"
        );
    }
}
