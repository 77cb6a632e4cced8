//! A statement inside of another one, which bounds its rows, or gives columns as text.

use crate::sql::params::Bound;
use crate::sql::statement::Statement;
use crate::sql::value::Codec;

/// Beside the caller's own WITH queries, where a table may have the name of none of them.
const WITH_NAME: &str = "credbroker_result";

/// How a statement is put into another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wrap {
    Not,
    /// As a subquery; with at most so many rows, if that is said.
    Subquery(Option<usize>),
    /// As a WITH query, the last of its list, which is where a statement that writes may stand.
    With,
}

impl Wrap {
    /// As what `statement` is run so that it gives `most` rows, if that is said, and a column that
    /// has no codec as text.
    pub(super) fn of(
        statement: &Statement<'_>,
        codecs: &[Option<Codec>],
        most: Option<usize>,
    ) -> Self {
        let is_whole = codecs.iter().all(Option::is_some);
        let stands_alone = codecs.is_empty() || statement.is_report();
        match most {
            Some(_) if !stands_alone => Self::Subquery(most),
            Some(_) | None if is_whole => Self::Not,
            Some(_) | None if statement.is_change() || statement.is_list_of_changes() => Self::With,
            Some(_) | None => Self::Subquery(None),
        }
    }

    /// The statement of `bound` inside of another one, with its parameters written by `write`; for
    /// each column, whether that is given as it is. Ordering survives: PostgreSQL does not flatten a
    /// subquery that sorts, nor a WITH query that writes, nor one behind such a query.
    pub(super) fn around(
        self,
        bound: &Bound<'_>,
        write: impl Fn(usize) -> String,
        as_they_are: impl Iterator<Item = bool>,
    ) -> String {
        let (names, outer): (Vec<String>, Vec<String>) = (1..)
            .map(|number: usize| format!("c{number}"))
            .zip(as_they_are)
            .map(|(name, as_it_is)| {
                let outer = if as_it_is { name.clone() } else { as_text(&name) };
                (name, outer)
            })
            .unzip();
        let (names, outer) = (names.join(", "), outer.join(", "));
        // A line break ends a comment that the statement may end with.
        match self {
            Self::Not => bound.render(write),
            Self::Subquery(most) => {
                let sql = bound.render_inner(write);
                let limit = most.map(|rows| format!(" limit {rows}")).unwrap_or_default();
                format!("select {outer} from (\n{sql}\n) as q({names}){limit}")
            }
            Self::With => {
                let (list, main) = match bound.render_with(&write) {
                    Some((list, main)) => (format!("{list}\n,"), main),
                    None => ("with".to_owned(), bound.render_inner(&write)),
                };
                format!(
                    "{list} {WITH_NAME}({names}) as (\n{main}\n) select {outer} from {WITH_NAME}"
                )
            }
        }
    }
}

/// A column by its type's output function, as the server writes it. A cast to text may be one that
/// the type's owner made: it may write something else, and would run with the rights of the reader.
fn as_text(column: &str) -> String {
    format!("case when {column} is distinct from null then pg_catalog.format('%s', {column}) end")
}
