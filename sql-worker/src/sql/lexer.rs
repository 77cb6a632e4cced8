//! A lexer for as much of PostgreSQL's syntax as finding parameters needs.
//!
//! Values do not enter the SQL text, so a mistake here is never an injection. But what is run is
//! put together from these lexemes, and is to mean what was described and looked at. Lexical rules:
//! PostgreSQL 15, 4.1, with `standard_conforming_strings`, which our sessions have.

/// One lexeme; blanks and comments are [`Kind::Blank`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Token<'a> {
    pub(super) kind: Kind,
    pub(super) text: &'a str,
}

/// What a lexeme is, as far as parameters care.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// White space or a comment.
    Blank,
    /// A keyword, an unquoted identifier or the digits of a number.
    Word,
    /// A string or a quoted identifier, in any of their forms.
    Quoted,
    /// `$1`: the digits are the number.
    Position,
    /// `:name`.
    Name,
    /// Anything else, one character (or `::`, `:=`) at a time.
    Symbol,
}

/// Cuts `sql` into lexemes that together are `sql` again.
pub(super) fn tokens(sql: &str) -> Vec<Token<'_>> {
    let mut lexer = Lexer { rest: sql, open: Vec::new(), operand: false };
    let mut tokens = Vec::new();
    while let Some(token) = lexer.next() {
        lexer.follow(token);
        tokens.push(token);
    }
    tokens
}

struct Lexer<'a> {
    rest: &'a str,
    /// The brackets that are open: `:` directly inside `[…]` may be a slice's.
    open: Vec<u8>,
    /// Whether the last lexeme ended an operand, so that `:` after it cannot begin one.
    operand: bool,
}

impl<'a> Lexer<'a> {
    fn next(&mut self) -> Option<Token<'a>> {
        let bytes = self.rest.as_bytes();
        let first = *bytes.first()?;
        let second = bytes.get(1).copied().unwrap_or(0);
        let (kind, len) = match (first, second) {
            (b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c, _) => (Kind::Blank, 1),
            (b'-', b'-') => (Kind::Blank, line_comment(bytes)),
            (b'/', b'*') => (Kind::Blank, block_comment(bytes)),
            (b'\'', _) => (Kind::Quoted, quoted(bytes, 0, b'\'', false)),
            (b'"', _) => (Kind::Quoted, quoted(bytes, 0, b'"', false)),
            (b'e' | b'E', b'\'') => (Kind::Quoted, escape_string(bytes)),
            (b'$', b'0'..=b'9') => (Kind::Position, 1 + run(bytes, 1, |b| b.is_ascii_digit())),
            (b'$', _) => match dollar_quoted(self.rest) {
                Some(len) => (Kind::Quoted, len),
                None => (Kind::Symbol, 1),
            },
            (b':', b':' | b'=') => (Kind::Symbol, 2),
            (b':', next) if starts_word(next) && next < 0x80 && !self.in_slice() => {
                (Kind::Name, 1 + run(bytes, 1, |b| b.is_ascii_alphanumeric() || b == b'_'))
            }
            (byte, _) if starts_word(byte) => (Kind::Word, run(bytes, 0, in_word)),
            // A quote may come right behind: `1$$a$$`, and `1e'a'` before PostgreSQL 15.
            (b'0'..=b'9', _) => (Kind::Word, run(bytes, 0, |byte| byte.is_ascii_digit())),
            _ => (Kind::Symbol, 1),
        };
        let (text, rest) = self.rest.split_at_checked(len).unwrap_or((self.rest, ""));
        self.rest = rest;
        Some(Token { kind, text })
    }

    fn in_slice(&self) -> bool {
        self.open.last() == Some(&b'[') && self.operand
    }

    fn follow(&mut self, token: Token<'_>) {
        match token.kind {
            Kind::Blank => return,
            Kind::Symbol => match token.text.as_bytes().first() {
                Some(open @ (b'[' | b'(')) => self.open.push(*open),
                Some(b']' | b')') => {
                    self.open.pop();
                }
                _ => {}
            },
            Kind::Word | Kind::Quoted | Kind::Position | Kind::Name => {}
        }
        self.operand = token.kind != Kind::Symbol || matches!(token.text, "]" | ")");
    }
}

fn starts_word(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte == b'_' || byte >= 0x80
}

/// `$` may stand inside an identifier, so `a$b$` opens no dollar quote.
fn in_word(byte: u8) -> bool {
    starts_word(byte) || byte.is_ascii_digit() || byte == b'$'
}

fn run(bytes: &[u8], from: usize, belongs: impl Fn(u8) -> bool) -> usize {
    bytes.iter().skip(from).take_while(|byte| belongs(**byte)).count()
}

fn line_comment(bytes: &[u8]) -> usize {
    run(bytes, 0, |byte| byte != b'\n' && byte != b'\r')
}

/// Block comments nest, unlike in C.
fn block_comment(bytes: &[u8]) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while let Some(pair) = bytes.get(at..at + 2) {
        match pair {
            b"/*" => depth += 1,
            b"*/" => depth = depth.saturating_sub(1),
            _ => {
                at += 1;
                continue;
            }
        }
        at += 2;
        if depth == 0 {
            return at;
        }
    }
    bytes.len()
}

/// Length of a quoted lexeme whose opening quote stands at `open`. A doubled quote needs no
/// care beyond the loop: it ends one string and begins another.
fn quoted(bytes: &[u8], open: usize, quote: u8, backslash: bool) -> usize {
    let mut at = open + 1;
    while let Some(&byte) = bytes.get(at) {
        at += 1;
        if backslash && byte == b'\\' {
            at += 1;
        } else if byte == quote {
            if bytes.get(at) != Some(&quote) {
                return at;
            }
            at += 1;
        }
    }
    bytes.len()
}

/// `E'…'`, with what continues it in another line (4.1.2.1): backslashes escape there as well.
fn escape_string(bytes: &[u8]) -> usize {
    let mut end = quoted(bytes, 1, b'\'', true);
    while let Some(open) = bytes.get(end..).and_then(continuation) {
        end = quoted(bytes, end + open, b'\'', true);
    }
    end
}

/// Where the quote is that continues a string after its end: behind blanks with a line break. A
/// comment among them has one of its own.
fn continuation(bytes: &[u8]) -> Option<usize> {
    let (mut at, mut broken) = (0, false);
    loop {
        match bytes.get(at..)? {
            [b'\'', ..] => return broken.then_some(at),
            [b'\n' | b'\r', ..] => (at, broken) = (at + 1, true),
            [b' ' | b'\t' | 0x0b | 0x0c, ..] => at += 1,
            comment @ [b'-', b'-', ..] => at += line_comment(comment),
            _ => return None,
        }
    }
}

fn dollar_quoted(text: &str) -> Option<usize> {
    let tag_len = run(text.as_bytes(), 1, |byte| in_word(byte) && byte != b'$');
    let tag = text.get(..tag_len + 2)?;
    if !tag.ends_with('$') {
        return None;
    }
    let body = text.get(tag.len()..)?;
    Some(body.find(tag).map_or(text.len(), |end| tag.len() + end + tag.len()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names(sql: &str) -> Vec<&str> {
        tokens(sql).iter().filter(|t| t.kind == Kind::Name).map(|t| t.text).collect()
    }

    #[test]
    fn a_name_is_found_only_where_it_is_one() {
        let cases: &[(&str, &[&str])] = &[
            ("select :a", &[":a"]),
            ("select :a::int, :b_2", &[":a", ":b_2"]),
            ("select ':a', \":a\", E'\\':a', e'\\\\', :b", &[":b"]),
            ("select 'it''s :a', :b", &[":b"]),
            ("select $$ :a $$, $t$ :a $$ :a $t$, :b", &[":b"]),
            ("select -- :a\n :b", &[":b"]),
            ("select /* :a /* :b */ :c */ :d", &[":d"]),
            ("select a[1:n], a[lo:hi], a[:n], a[f(:x):y]", &[":n", ":x"]),
            ("select a[(1):n], a['1':n], a[b[1]:n]", &[]),
            ("select array[:a, :b]", &[":a", ":b"]),
            ("select f(a := 1, b => :b)", &[":b"]),
            ("select a$b$ :c", &[":c"]),
            ("select x::text", &[]),
            ("select U&'\\0041:a', N':a', B'01', :b", &[":b"]),
            ("select 'open :a", &[]),
            ("select /* open :a", &[]),
            ("select $x$ open :a", &[]),
            ("select E'\\", &[]),
            ("select E'a'\n'\\' :a', :b", &[":b"]),
            ("select e'a' -- '\r\n\t-- x\n  '\\' :a'\n'\\' :b', :c", &[":c"]),
            ("select E'a' '\\', :b, ''", &[":b"]),
            ("select E'a' -- x", &[]),
            ("select 'a'\n'\\', :b", &[":b"]),
            ("select 1$$ :a $$, 1e'\\' :a', :b", &[":b"]),
            ("select 1:é", &[]),
        ];
        for (sql, expected) in cases {
            assert_eq!(&names(sql), expected, "{sql}");
        }
    }

    #[test]
    fn positions_are_not_dollar_quotes() {
        let found: Vec<_> = tokens("select $1, $12::int, a$1, $$ $3 $$")
            .into_iter()
            .filter(|token| token.kind == Kind::Position)
            .map(|token| token.text)
            .collect();
        assert_eq!(found, ["$1", "$12"]);
    }

    proptest! {
        #[test]
        fn nothing_is_lost(sql in "[a-zé:$'\"\\[\\]()/*\\-\\\\E1 \n;=]{0,60}") {
            let joined: String = tokens(&sql).iter().map(|token| token.text).collect();
            prop_assert_eq!(joined, sql);
        }
    }
}
