//! Passwords as tool arguments: models know tools that take them, so the arguments are there.
//!
//! They are refused: what a model is given to pass on has already leaked. They are not read
//! beyond whether they are there, and never repeated.

use crate::error::{Code, Failure};

/// What to do about a password among the arguments; `given` says whether there is one.
///
/// # Errors
/// `UNSUPPORTED`, which says what to do instead.
pub(super) fn inline_secret(given: bool) -> Result<(), Failure> {
    if !given {
        return Ok(());
    }
    Err(Failure::new(
        Code::Unsupported,
        "usernames and passwords are not taken here, because they would pass through the model; \
         nothing was stored",
    )
    .with_hint(
        "a person runs `credbroker put NAME` (or `credbroker entry NAME`) on the host; then call \
         this again without them. A password that was sent here should be changed",
    ))
}
