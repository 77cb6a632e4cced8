//! From secret text to a user name and a password, without leaving the arena.

#![forbid(unsafe_code)]

use std::fmt;

use subtle::ConstantTimeEq as _;

use super::SourceFault;
use crate::arena::Slot;
use crate::credential::Credential;
use crate::sys::leaving_no_residue;

/// What a credential is made of, before it has a version.
pub(crate) struct Material {
    pub(crate) username: String,
    pub(crate) password: Slot,
}

impl Material {
    /// Parses secret text: with `username` the whole is the password, without it the text is
    /// split at the first colon. One trailing newline is dropped. `text` is left as it is.
    ///
    /// # Errors
    /// When it could not be logged in with.
    pub(crate) fn parse(text: &Slot, username: Option<&str>) -> Result<Self, SourceFault> {
        leaving_no_residue(|| match username {
            Some(name) => Ok(Self {
                username: parse_username(name.as_bytes())?,
                password: password(text, 0)?,
            }),
            None => {
                let (username, start) = text.expose(split_username)?;
                Ok(Self { username, password: password(text, start)? })
            }
        })
    }

    /// The database role; not a secret.
    pub(crate) fn username(&self) -> &str {
        &self.username
    }

    /// Whether it is what the credential holds already; in constant time.
    pub(crate) fn is_same_as(&self, credential: &Credential) -> bool {
        leaving_no_residue(|| {
            let same = self
                .password
                .expose(|new| credential.password().expose(|old| bool::from(new.ct_eq(old))));
            same && self.username == credential.username()
        })
    }
}

impl fmt::Debug for Material {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[REDACTED]")
    }
}

/// One trailing newline is what editors and `echo` add; nobody means it.
pub(super) fn trimmed(text: &[u8]) -> &[u8] {
    let text = text.strip_suffix(b"\n").unwrap_or(text);
    text.strip_suffix(b"\r").unwrap_or(text)
}

/// The user name before the first colon, and where the password starts.
fn split_username(text: &[u8]) -> Result<(String, usize), SourceFault> {
    let colon = text.iter().position(|byte| *byte == b':').ok_or(SourceFault::NoUsername)?;
    let name = text.get(..colon).unwrap_or_default();
    Ok((parse_username(name)?, colon + 1))
}

pub(super) fn parse_username(bytes: &[u8]) -> Result<String, SourceFault> {
    let text = std::str::from_utf8(bytes).map_err(|_not_text| SourceFault::BadUsername)?;
    if text.is_empty() || text.len() > 63 || text.contains(['\0', '\n']) {
        return Err(SourceFault::BadUsername);
    }
    Ok(text.to_owned())
}

/// Copies the password within the arena into a slot of its own size, which is counted as the
/// text's is: what a peer brings stays within the peer's part.
fn password(text: &Slot, start: usize) -> Result<Slot, SourceFault> {
    text.expose(|bytes| {
        let password = trimmed(bytes.get(start..).unwrap_or_default());
        if password.is_empty() {
            return Err(SourceFault::Empty);
        }
        if password.contains(&0) {
            return Err(SourceFault::NulByte);
        }
        let mut slot = text.place_for_copy(password.len())?;
        slot.fill(|place| place.copy_from_slice(password));
        Ok(slot)
    })
}
