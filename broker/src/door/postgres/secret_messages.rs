//! The messages that carry a password, or a hash of it, for the methods that must be named in the
//! configuration. They are built in one synchronous place, and wiped when they have been sent.

#![forbid(unsafe_code)]

use data_encoding::HEXLOWER;
use md5::{Digest as _, Md5};
use zeroize::Zeroizing;

use super::backend::LoginFault;
use crate::credential::{Credential, SecretForm};
use crate::sys;

/// PasswordMessage (protocol 55.7): type, length, text, NUL.
const FRAME: usize = 6;
const MD5_HEX: usize = 32;

/// The password itself.
pub(super) fn password(credential: &Credential) -> Result<Zeroizing<Vec<u8>>, LoginFault> {
    message(credential, |password, text| text.extend_from_slice(password))
}

/// `"md5" + hex(md5(hex(md5(password + user)) + salt))` (protocol 55.2.1).
pub(super) fn md5(
    credential: &Credential,
    salt: [u8; 4],
) -> Result<Zeroizing<Vec<u8>>, LoginFault> {
    message(credential, |password, text| {
        let mut hex = Zeroizing::new([0; MD5_HEX]);
        let inner = [password, credential.username().as_bytes()];
        hashed(inner, &mut hex);
        let inner = Zeroizing::new(*hex);
        hashed([&*inner, &salt], &mut hex);
        text.extend_from_slice(b"md5");
        text.extend_from_slice(&*hex);
    })
}

fn hashed(parts: [&[u8]; 2], hex: &mut [u8; MD5_HEX]) {
    let hash = parts.into_iter().fold(Md5::new(), |hash, part| hash.chain_update(part));
    let digest = Zeroizing::new(<[u8; 16]>::from(hash.finalize()));
    HEXLOWER.encode_mut(&*digest, hex);
}

fn message(
    credential: &Credential,
    write: impl FnOnce(&[u8], &mut Vec<u8>),
) -> Result<Zeroizing<Vec<u8>>, LoginFault> {
    if credential.form() != SecretForm::Password {
        return Err(LoginFault::Untrusted("it asks for a password, and there are only SCRAM keys"));
    }
    Ok(sys::leaving_no_residue(|| {
        credential.secret().expose(|password| {
            // Enough for either, so that nothing is left behind by growing.
            let room = FRAME + password.len().max(b"md5".len() + MD5_HEX);
            let mut message = Zeroizing::new(Vec::with_capacity(room));
            message.extend_from_slice(&[b'p', 0, 0, 0, 0]);
            write(password, &mut message);
            message.push(0);
            let length = u32::try_from(message.len() - 1).unwrap_or(u32::MAX).to_be_bytes();
            message.iter_mut().skip(1).zip(length).for_each(|(place, byte)| *place = byte);
            message
        })
    }))
}

#[cfg(test)]
mod tests {
    use postgres_protocol::authentication::md5_hash;
    use postgres_protocol::message::frontend;

    use super::*;
    use crate::arena::{Arena, BackendChoice};

    #[test]
    fn they_are_what_other_clients_send() {
        let arena = Arena::map(BackendChoice::Auto, 64 * 1024).unwrap();
        for secret in ["x", "pencil", "pässword with spaces", &"long".repeat(500)] {
            let mut slot = arena.allocate(secret.len()).unwrap();
            slot.fill(|place| place.copy_from_slice(secret.as_bytes()));
            let credential = Credential::new("app".into(), slot);
            let mut theirs = bytes::BytesMut::new();
            frontend::password_message(secret.as_bytes(), &mut theirs).unwrap();
            assert_eq!(*password(&credential).unwrap(), theirs);
            let salt = [1, 2, 0xff, 0];
            let mut theirs = bytes::BytesMut::new();
            let hash = md5_hash(b"app", secret.as_bytes(), salt);
            frontend::password_message(hash.as_bytes(), &mut theirs).unwrap();
            assert_eq!(*md5(&credential, salt).unwrap(), theirs);
        }
    }
}
