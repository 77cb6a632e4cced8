//! From PEM to DER (RFC 7468) within the arena: the base64 is moved together where it stands, and
//! decoded from one slot into another.

#![forbid(unsafe_code)]

use std::ops::Range;

use data_encoding::BASE64;
use rustls::pki_types::AlgorithmIdentifier;

use super::KeyFault;
use crate::arena::{ArenaFull, Slot};

/// Which structure a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// RFC 5958.
    Pkcs8,
    /// RFC 8017, A.1.2.
    Pkcs1,
    /// RFC 5915.
    Sec1,
}

#[derive(Debug)]
pub(super) struct Found {
    pub(super) form: Form,
    pub(super) der: Slot,
}

/// Decodes the first private key. The text is garbage afterwards.
pub(super) fn decode(text: &mut Slot) -> Result<Found, KeyFault> {
    let (form, place) = text.expose(find)?;
    let digits = text.fill(|text| Some(move_together(text.get_mut(place.clone())?)));
    let digits = place.start..place.start + digits.ok_or(KeyFault::Damaged)?;
    let room = BASE64.decode_len(digits.len()).map_err(|_odd| KeyFault::Damaged)?;
    let mut der = text.place_for_derived(room)?;
    let len = der.fill(|der| text.expose(|text| BASE64.decode_mut(text.get(digits)?, der).ok()));
    let len = len.filter(|len| *len > 0).ok_or(KeyFault::Damaged)?;
    der.truncate(len);
    Ok(Found { form, der })
}

/// Where the content of the first private key stands.
fn find(text: &[u8]) -> Result<(Form, Range<usize>), KeyFault> {
    let mut begun: Option<(Form, &[u8], usize)> = None;
    let mut at = 0;
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        let start = at;
        at += line.len();
        let line = line.trim_ascii();
        match begun {
            None => {
                let label = line.strip_prefix(b"-----BEGIN ");
                match label.and_then(|rest| rest.strip_suffix(b"-----")) {
                    Some(label @ b"PRIVATE KEY") => begun = Some((Form::Pkcs8, label, at)),
                    Some(label @ b"RSA PRIVATE KEY") => begun = Some((Form::Pkcs1, label, at)),
                    Some(label @ b"EC PRIVATE KEY") => begun = Some((Form::Sec1, label, at)),
                    Some(b"ENCRYPTED PRIVATE KEY") => return Err(KeyFault::Encrypted),
                    // Certificates and EC PARAMETERS may stand before it.
                    Some(_) | None => {}
                }
            }
            // RFC 1421 §4.6: OpenSSL's older form of encryption.
            Some(_) if line.starts_with(b"Proc-Type:") => return Err(KeyFault::Encrypted),
            Some((form, label, from)) => {
                let end = line.strip_prefix(b"-----END ");
                if end.and_then(|rest| rest.strip_suffix(b"-----")) == Some(label) {
                    return Ok((form, from..start));
                }
            }
        }
    }
    Err(if begun.is_some() { KeyFault::Damaged } else { KeyFault::NoKey })
}

/// Moves what is no white space to the front, wipes what is behind it, and gives its length.
fn move_together(text: &mut [u8]) -> usize {
    let mut len = 0;
    for at in 0..text.len() {
        let byte = text.get(at).copied().filter(|byte| !byte.is_ascii_whitespace());
        if let (Some(byte), Some(place)) = (byte, text.get_mut(len)) {
            *place = byte;
            len += 1;
        }
    }
    text.iter_mut().skip(len).for_each(|byte| *byte = 0);
    len
}

/// Puts RFC 5915's structure into that of RFC 5958, which is what ring reads.
pub(super) fn sec1_as_pkcs8(
    sec1: &Slot,
    algorithm: AlgorithmIdentifier,
) -> Result<Slot, ArenaFull> {
    // INTEGER 0: version 1.
    let mut front = vec![0x02, 0x01, 0x00];
    front.extend_from_slice(&header(0x30, algorithm.len()));
    front.extend_from_slice(&algorithm);
    front.extend_from_slice(&header(0x04, sec1.len()));
    let mut whole = header(0x30, front.len() + sec1.len());
    whole.append(&mut front);
    let mut place = sec1.place_for_derived(whole.len() + sec1.len())?;
    place.fill(|place| {
        sec1.expose(|sec1| {
            let bytes = whole.iter().chain(sec1);
            place.iter_mut().zip(bytes).for_each(|(place, byte)| *place = *byte);
        });
    });
    Ok(place)
}

/// Tag and length in DER (X.690 §8.1.3).
fn header(tag: u8, len: usize) -> Vec<u8> {
    let bytes = len.to_be_bytes();
    let long: Vec<u8> = bytes.into_iter().skip_while(|byte| *byte == 0).collect();
    match long.as_slice() {
        [] => vec![tag, 0],
        [short @ 0..=0x7f] => vec![tag, *short],
        long => {
            let count = u8::try_from(long.len()).unwrap_or(u8::MAX);
            [&[tag, 0x80 | count], long].concat()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::{Arena, BackendChoice};

    fn slot(text: &[u8]) -> Slot {
        let arena = Arena::map(BackendChoice::Auto, 64 * 1024).unwrap();
        let mut slot = arena.allocate(text.len()).unwrap();
        slot.fill(|place| place.copy_from_slice(text));
        slot
    }

    fn decoded(text: &str) -> Result<(Form, Vec<u8>), KeyFault> {
        let found = decode(&mut slot(text.as_bytes()))?;
        Ok((found.form, found.der.expose(<[u8]>::to_vec)))
    }

    #[test]
    fn the_first_private_key_is_taken_whatever_stands_before_it() {
        let text = "Bag Attributes\n-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\r\n\
             -----BEGIN EC PARAMETERS-----\nBgg=\n-----END EC PARAMETERS-----\n\
             -----BEGIN EC PRIVATE KEY-----\r\nAQID\r\n BA==\r\n-----END EC PRIVATE KEY-----\n\
             -----BEGIN PRIVATE KEY-----\nBBBB\n-----END PRIVATE KEY-----\n";
        assert_eq!(decoded(text).unwrap(), (Form::Sec1, vec![1, 2, 3, 4]));
        let (form, _) =
            decoded("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----").unwrap();
        assert_eq!(form, Form::Pkcs8);
    }

    #[test]
    fn what_is_no_key_is_told_from_what_is_encrypted_and_what_is_damaged() {
        let block = |label: &str, content: &str| {
            decoded(&format!("-----BEGIN {label}-----\n{content}\n-----END {label}-----\n"))
        };
        assert!(matches!(decoded(""), Err(KeyFault::NoKey)));
        assert!(matches!(block("CERTIFICATE", "AAAA"), Err(KeyFault::NoKey)));
        assert!(matches!(block("OPENSSH PRIVATE KEY", "AAAA"), Err(KeyFault::NoKey)));
        assert!(matches!(block("ENCRYPTED PRIVATE KEY", "AAAA"), Err(KeyFault::Encrypted)));
        let old = "Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,00\n\nAAAA";
        assert!(matches!(block("RSA PRIVATE KEY", old), Err(KeyFault::Encrypted)));
        for content in ["", "A", "AAA", "AA=A", "A*AA", "AAAA=", "\0\0\0\0"] {
            assert!(matches!(block("PRIVATE KEY", content), Err(KeyFault::Damaged)), "{content}");
        }
        let open = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END RSA PRIVATE KEY-----\n";
        assert!(matches!(decoded(open), Err(KeyFault::Damaged)));
    }

    #[test]
    fn lengths_in_der() {
        assert_eq!(header(0x30, 0), [0x30, 0]);
        assert_eq!(header(0x30, 127), [0x30, 127]);
        assert_eq!(header(0x30, 128), [0x30, 0x81, 128]);
        assert_eq!(header(4, 258), [4, 0x82, 1, 2]);
    }
}
