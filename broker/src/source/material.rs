//! From secret text to a user name and a password, or keys, without leaving the arena.

#![forbid(unsafe_code)]

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use super::SourceFault;
use crate::arena::Slot;
use crate::credential::{Credential, SecretForm};
use crate::sys::leaving_no_residue;

/// What a credential is made of, before it has a version.
pub(crate) struct Material {
    pub(crate) username: String,
    /// As its form has it: the password, or the text of the keys.
    pub(crate) secret: Slot,
    pub(crate) form: SecretForm,
}

impl Material {
    /// Parses secret text: with `username` the whole is the password, without it the text is
    /// split at the first colon. One trailing newline is dropped. `text` is left as it is.
    ///
    /// # Errors
    /// When it could not be logged in with.
    pub(crate) fn parse(
        text: &Slot,
        username: Option<&str>,
        form: SecretForm,
    ) -> Result<Self, SourceFault> {
        leaving_no_residue(|| {
            let (username, start) = match username {
                Some(name) => (parse_username(name.as_bytes())?, 0),
                None => text.expose(split_username)?,
            };
            let secret = secret(text, start)?;
            if form == SecretForm::ScramKeys && secret.expose(scram_keys).is_none() {
                return Err(SourceFault::NoKeys);
            }
            Ok(Self { username, secret, form })
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
                .secret
                .expose(|new| credential.secret().expose(|old| bool::from(new.ct_eq(old))));
            same && self.username == credential.username() && self.form == credential.form()
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

/// A key of SCRAM-SHA-256, wiped when dropped.
pub(crate) type ScramKey = Zeroizing<[u8; 32]>;

/// ClientKey and ServerKey (RFC 5802 §3) out of `CLIENT_KEY:SERVER_KEY`, as libpq writes them in
/// `scram_client_key` and `scram_server_key`: 32 bytes each, in base64. To be called where no
/// residue is left.
pub(crate) fn scram_keys(text: &[u8]) -> Option<(ScramKey, ScramKey)> {
    let colon = text.iter().position(|byte| *byte == b':')?;
    let (client, server) = (text.get(..colon)?, text.get(colon + 1..)?);
    Some((scram_key(client)?, scram_key(server)?))
}

fn scram_key(text: &[u8]) -> Option<ScramKey> {
    // The library wants room for the padding's bytes too.
    let mut decoded = Zeroizing::new([0; 33]);
    let length = BASE64.decode_slice(text, &mut *decoded).ok()?;
    let mut key = ScramKey::default();
    key.copy_from_slice(decoded.get(..length).filter(|_| length == 32)?);
    Some(key)
}

/// Copies the secret within the arena into a slot of its own size, which is counted as the
/// text's is: what a peer brings stays within the peer's part.
fn secret(text: &Slot, start: usize) -> Result<Slot, SourceFault> {
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
