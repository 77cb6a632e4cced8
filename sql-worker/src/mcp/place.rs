//! `database` or `connection_id`: where a tool works that takes either.

use crate::app::Source;
use crate::error::Failure;

/// The one of both that was given.
///
/// # Errors
/// `INVALID_REQUEST` when it is none of them, or both.
pub(super) fn place<'a>(
    database: Option<&'a str>,
    connection_id: Option<&'a str>,
) -> Result<Source<'a>, Failure> {
    match (database, connection_id) {
        (Some(database), None) => Ok(Source::Own(database)),
        (None, Some(id)) => Ok(Source::Reference(id)),
        (None, None) => Err(Failure::invalid("argument database or connection_id is missing")),
        (Some(_), Some(_)) => Err(Failure::invalid("give database or connection_id, not both")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_one_of_both() {
        assert!(matches!(place(Some("a"), None), Ok(Source::Own("a"))));
        assert!(matches!(place(None, Some("b")), Ok(Source::Reference("b"))));
        assert!(place(None, None).is_err() && place(Some("a"), Some("b")).is_err());
    }
}
