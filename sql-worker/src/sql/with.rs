//! Where the list of a statement that begins with WITH ends, and its main query begins.
//!
//! As the lexer, this decides nothing about what is safe: the server describes what is made of it
//! before anything runs. Grammar: PostgreSQL 15, SELECT, "WITH Clause".

use super::lexer::{Kind, Token};

/// The index in `tokens` at which the main query begins; `None` where the statement does not begin
/// with WITH, or is not what the grammar says.
pub(super) fn main_query(tokens: &[Token<'_>]) -> Option<usize> {
    let significant = tokens.iter().enumerate().filter(|(_, token)| token.kind != Kind::Blank);
    let all: Vec<(usize, &Token<'_>)> = significant.collect();
    let mut rest = Rest(&all);
    rest.word("with")?;
    if !rest.begins_query_of("recursive") {
        // Else it is the first query's name.
        let _recursive = rest.word("recursive");
    }
    loop {
        rest.name()?;
        let _columns = rest.brackets();
        rest.word("as")?;
        let _not = rest.word("not");
        let _materialized = rest.word("materialized");
        rest.brackets()?;
        if rest.word("search").is_some() {
            rest.name_behind("set")?;
        }
        if rest.word("cycle").is_some() {
            rest.name_behind("using")?;
        }
        if rest.symbol(",").is_none() {
            return rest.0.first().map(|(at, _)| *at);
        }
    }
}

/// The lexemes that are left.
struct Rest<'t>(&'t [(usize, &'t Token<'t>)]);

impl Rest<'_> {
    fn take(&mut self, wanted: impl Fn(&Token<'_>) -> bool) -> Option<()> {
        let ((_, first), rest) = self.0.split_first()?;
        wanted(first).then(|| self.0 = rest)
    }

    fn symbol(&mut self, symbol: &str) -> Option<()> {
        self.take(|token| token.kind == Kind::Symbol && token.text == symbol)
    }

    fn word(&mut self, word: &str) -> Option<()> {
        self.take(|token| token.kind == Kind::Word && token.text.eq_ignore_ascii_case(word))
    }

    /// `a`, `"a"`, or `U&"a" UESCAPE '!'`, which is several lexemes.
    fn name(&mut self) -> Option<()> {
        self.take(|token| matches!(token.kind, Kind::Word | Kind::Quoted))?;
        if self.symbol("&").is_some() {
            self.quoted()?;
            if self.word("uescape").is_some() {
                self.quoted()?;
            }
        }
        Some(())
    }

    fn quoted(&mut self) -> Option<()> {
        self.take(|token| token.kind == Kind::Quoted)
    }

    /// Everything up to `word`, and the name behind it.
    fn name_behind(&mut self, word: &str) -> Option<()> {
        while self.word(word).is_none() {
            self.take(|_| true)?;
        }
        self.name()
    }

    /// From an opening bracket to the one that closes it.
    fn brackets(&mut self) -> Option<()> {
        self.symbol("(")?;
        let mut open = 1_usize;
        while open > 0 {
            if self.symbol("(").is_some() {
                open += 1;
            } else if self.symbol(")").is_some() {
                open -= 1;
            } else {
                self.take(|_| true)?;
            }
        }
        Some(())
    }

    /// Whether a query of this name is what comes.
    fn begins_query_of(&self, name: &str) -> bool {
        let mut ahead = Self(self.0);
        ahead.word(name).is_some() && (ahead.word("as").is_some() || ahead.symbol("(").is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::lexer::tokens;

    #[test]
    fn the_main_query_is_found() {
        for (list, main) in [
            ("with a as (select 1) ", "select * from a"),
            ("WITH a AS (select ')' /* ) */ as \")\") -- )\n", "table a"),
            (
                "with a(x, y) as not materialized (values (1, (2))), \"b c\" as (table a)",
                "(select 1)",
            ),
            ("with recursive a as (select 1)", " delete from a returning x"),
            ("with U&\"\\0061\" as (select 1), u&\"!0062\" uescape '!' as (select 2) ", "table a"),
            ("with recursive as (select 1)", "select * from recursive"),
            ("with recursive (x) as (select 1)", "select * from recursive"),
            ("with update as (select 1), delete as (select 2) ", "update t set a = 1 returning *"),
            (
                "with recursive t(id) as (select 1 union all select id from t) \
                 search depth first by id, x set o cycle id set is_cycle to 1 default 0 using p, \
                 u as (select 1) ",
                "insert into x select id from t returning *",
            ),
        ] {
            let sql = format!("{list}{main}");
            let tokens = tokens(&sql);
            let at = main_query(&tokens).unwrap_or_else(|| panic!("{sql}"));
            let found: String = tokens[at..].iter().map(|token| token.text).collect();
            assert_eq!(found, main.trim_start(), "{sql}");
        }
    }

    #[test]
    fn what_is_no_list_has_no_main_query() {
        for sql in [
            "",
            "select 1",
            "; with a as (select 1) select 1",
            "with",
            "with a",
            "with a as",
            "with a as (select 1",
            "with a as (select 1)",
            "with a as (select 1),",
            "with U& as (select 1) select 1",
            "with U&\"!0061\" uescape as (select 1) select 1",
            "with a as (select 1), select 1",
            "with a as (select 1) search depth first by x",
            "with a as (select 1) cycle x using",
            "with ((((",
            "(with a as (select 1) select 1)",
        ] {
            assert_eq!(main_query(&tokens(sql)), None, "{sql}");
        }
    }
}
