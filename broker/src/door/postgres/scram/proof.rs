//! From the secret to the proof, in one synchronous place, run so that the stack and the vector
//! registers it used are wiped afterwards. What leaves it is the proof, which goes on the wire, the
//! signature that the server must show, which is no secret, and the SaltedPassword, in the arena.

#![forbid(unsafe_code)]

use std::num::NonZeroU32;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::{digest, hmac, pbkdf2};
use zeroize::{Zeroize as _, Zeroizing};

use super::{Challenge, ServerSignature};
use crate::credential::{Credential, SaltedPassword, SecretForm};
use crate::source::scram_keys;
use crate::sys;

pub(super) const SHA256_LEN: usize = digest::SHA256_OUTPUT_LEN;

type Hash = [u8; SHA256_LEN];

/// The proof is to be sent; the server must then show that it knows the password too.
#[derive(Debug)]
pub(in super::super) struct Proof {
    pub(in super::super) message: Vec<u8>,
    pub(in super::super) expected: ServerSignature,
    /// What had to be derived for it, if there was room.
    pub(in super::super) derived: Option<SaltedPassword>,
}

pub(super) fn is_cheap(credential: &Credential, salt: &[u8], iterations: NonZeroU32) -> bool {
    match credential.form() {
        SecretForm::ScramKeys => true,
        SecretForm::Password => credential.salted().has(salt, iterations),
    }
}

/// `None` when the secret is no keys where it should be.
pub(super) fn prove(challenge: Challenge, credential: &Credential) -> Option<Proof> {
    let ((mut proof, signature), derived) =
        sys::leaving_no_residue(|| compute(&challenge, credential))?;
    let Challenge { without_proof, salt, iterations, .. } = challenge;
    let mut message = without_proof.into_bytes();
    message.extend_from_slice(b",p=");
    message.extend_from_slice(BASE64.encode(proof).as_bytes());
    proof.zeroize();
    let derived = derived.map(|key| SaltedPassword { salt, iterations, key });
    Some(Proof { message, expected: ServerSignature(signature), derived })
}

/// Everything in here but the proof and the signature is as good as the password.
fn compute(
    challenge: &Challenge,
    credential: &Credential,
) -> Option<((Hash, Hash), Option<crate::arena::Slot>)> {
    let Challenge { auth_message, salt, iterations, .. } = challenge;
    let auth_message = auth_message.as_bytes();
    let secret = credential.secret();
    match credential.form() {
        SecretForm::ScramKeys => {
            let (client_key, server_key) = secret.expose(scram_keys)?;
            Some((from_keys(&client_key, &server_key, auth_message), None))
        }
        SecretForm::Password => {
            let known = |key: &[u8]| from_salted(key, auth_message);
            if let Some(proof) = credential.salted().expose(salt, *iterations, known) {
                return Some((proof, None));
            }
            let derive = |place: &mut [u8]| {
                secret.expose(|password| salted(password, salt, *iterations, place));
            };
            // Without room it is derived each time.
            if let Ok(mut slot) = secret.place_for_derived(SHA256_LEN) {
                slot.fill(derive);
                Some((slot.expose(known), Some(slot)))
            } else {
                let mut key = Zeroizing::new([0; SHA256_LEN]);
                derive(&mut *key);
                Some((known(&*key), None))
            }
        }
    }
}

/// SaltedPassword (RFC 5802 §3).
pub(super) fn salted(password: &[u8], salt: &[u8], iterations: NonZeroU32, place: &mut [u8]) {
    let prepared = sasl_prepared(password);
    let password = prepared.as_ref().map_or(password, |text| text.as_bytes());
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, iterations, salt, password, place);
}

pub(super) fn from_salted(salted: &[u8], auth_message: &[u8]) -> (Hash, Hash) {
    let key = hmac::Key::new(hmac::HMAC_SHA256, salted);
    let (mut client, mut server) =
        (Zeroizing::new([0; SHA256_LEN]), Zeroizing::new([0; SHA256_LEN]));
    client.copy_from_slice(hmac::sign(&key, b"Client Key").as_ref());
    server.copy_from_slice(hmac::sign(&key, b"Server Key").as_ref());
    from_keys(&client, &server, auth_message)
}

/// ClientProof and ServerSignature (RFC 5802 §3).
fn from_keys(client_key: &Hash, server_key: &Hash, auth_message: &[u8]) -> (Hash, Hash) {
    let stored_key = digest::digest(&digest::SHA256, client_key);
    let stored = hmac::Key::new(hmac::HMAC_SHA256, stored_key.as_ref());
    let client_signature = hmac::sign(&stored, auth_message);
    let mut proof = [0; SHA256_LEN];
    for ((proof, key), signature) in proof.iter_mut().zip(client_key).zip(client_signature.as_ref())
    {
        *proof = key ^ signature;
    }
    let server = hmac::Key::new(hmac::HMAC_SHA256, server_key);
    let mut signature = [0; SHA256_LEN];
    signature.copy_from_slice(hmac::sign(&server, auth_message).as_ref());
    (proof, signature)
}

/// RFC 4013, as the server prepared the password: text in its normal form, and whatever cannot
/// be prepared as it is. `None` when that is the password itself.
pub(super) fn sasl_prepared(password: &[u8]) -> Option<Zeroizing<String>> {
    if password.is_ascii() && !password.iter().any(u8::is_ascii_control) {
        return None;
    }
    let text = std::str::from_utf8(password).ok()?;
    stringprep::saslprep(text).ok().map(|prepared| Zeroizing::new(prepared.into_owned()))
}
