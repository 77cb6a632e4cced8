//! Ends of audit files for the fuzzer.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::Write as _;

use data_encoding::HEXLOWER;
use ring::digest::{SHA256, digest};
use rustix::fs::{MemfdFlags, memfd_create};

use super::chain::{Chain, MAX_LINE};
use super::file::end_of;

/// The broker goes on behind the last whole line only if that line has its hash, and keeps all
/// that is torn. The same once more with the hash put right, which no fuzzer finds by itself.
#[must_use]
pub fn audit_line(bytes: &[u8]) -> bool {
    let found = continues(bytes);
    let body = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let body = body.rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
    let hash = HEXLOWER.encode(digest(&SHA256, body).as_ref());
    let line = [body, b",\"hash\":\"", hash.as_bytes(), b"\"}\n"].concat();
    let sealed = continues(&line);
    if sealed && line.len() <= MAX_LINE {
        // One bit of it, another one for each input.
        let at = body.iter().fold(0_usize, |sum, byte| sum.wrapping_mul(31) + usize::from(*byte));
        let mut edited = line;
        let last = edited.len() - 2;
        if let Some(byte) = edited.get_mut(at % last) {
            *byte ^= 1 << (at % 7);
        }
        let broken = std::str::from_utf8(&edited).ok().and_then(Chain::head_of);
        assert!(broken.is_none() || edited.iter().filter(|byte| **byte == b'\n').count() > 1);
    }
    found || sealed
}

fn continues(bytes: &[u8]) -> bool {
    let Ok(mut file) = memfd_create("audit", MemfdFlags::CLOEXEC).map(File::from) else {
        return false;
    };
    let end = file.write_all(bytes).and_then(|()| end_of(&file));
    let Ok((torn, line, head)) = end else { unreachable!("a memfd can be written and read") };
    assert!(bytes.ends_with(&torn) || bytes.len() > torn.len());
    assert_eq!(line.is_some(), bytes.contains(&b'\n'));
    let (Some(line), Some(head)) = (line, head) else { return false };
    assert!(line.len() <= MAX_LINE);
    let tail = format!(",\"hash\":\"{}\"}}", head.hex());
    let body = line.strip_suffix(tail.as_bytes());
    assert_eq!(body.map(|body| digest(&SHA256, body).as_ref() == head.hash), Some(true));
    true
}
