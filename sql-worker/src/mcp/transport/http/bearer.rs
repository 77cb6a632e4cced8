//! Bearer tokens (RFC 6750): read once from files, kept as hashes, compared in constant time.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use http::header::{AUTHORIZATION, HeaderMap};
use ring::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use subtle::ConstantTimeEq as _;

use crate::app::{Name, Principal};

/// Characters of a token.
const LENGTH: std::ops::RangeInclusive<usize> = 32..=1024;

/// The tokens of all principals.
#[derive(Debug)]
pub(super) struct Bearers(Vec<(Principal, Hash)>);

/// Something of each principal, found by its token.
pub(super) struct Keyed<T>(Vec<(Hash, T)>);

/// SHA-256 of a token.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Hash([u8; SHA256_OUTPUT_LEN]);

/// Why a bearer's file was refused.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", file.display())]
pub struct BearerError {
    file: PathBuf,
    problem: String,
}

impl Bearers {
    /// Reads the file of each.
    ///
    /// # Errors
    /// When one cannot be read, when others can read or write it, when it holds no token, and
    /// when two hold the same.
    pub(super) fn load(files: &BTreeMap<Name, PathBuf>) -> Result<Self, BearerError> {
        let mut bearers: Vec<(Principal, Hash)> = Vec::with_capacity(files.len());
        for (name, file) in files {
            let error = |problem| BearerError { file: file.clone(), problem };
            let hash = read(file).map_err(error)?;
            if bearers.iter().any(|(_, other)| *other == hash) {
                return Err(error("it holds the token of another principal".to_owned()));
            }
            bearers.push((Principal::http(name), hash));
        }
        Ok(Self(bearers))
    }

    /// Makes something for each principal.
    pub(super) fn each<T>(self, mut make: impl FnMut(Principal) -> T) -> Keyed<T> {
        Keyed(self.0.into_iter().map(|(principal, hash)| (hash, make(principal))).collect())
    }
}

impl<T> Keyed<T> {
    /// What belongs to the bearer of these headers.
    pub(super) fn find(&self, headers: &HeaderMap) -> Option<&T> {
        let mut values = headers.get_all(AUTHORIZATION).iter();
        let value = values.next().filter(|_| values.next().is_none())?.to_str().ok()?;
        let (scheme, token) = value.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let presented = Hash::of(token.trim());
        // All are compared, whichever it is.
        let mut found = None;
        for (hash, keyed) in &self.0 {
            if bool::from(hash.0.ct_eq(&presented.0)) {
                found = Some(keyed);
            }
        }
        found
    }
}

impl Hash {
    fn of(token: &str) -> Self {
        let mut hash = [0; SHA256_OUTPUT_LEN];
        hash.copy_from_slice(digest(&SHA256, token.as_bytes()).as_ref());
        Self(hash)
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[REDACTED]")
    }
}

fn read(file: &Path) -> Result<Hash, String> {
    let mut opened = File::open(file).map_err(|error| error.to_string())?;
    // Of the open file, so that nobody can swap it in between.
    let metadata = opened.metadata().map_err(|error| error.to_string())?;
    let own = rustix::process::geteuid().as_raw();
    if !metadata.is_file() {
        return Err("it is not a file".to_owned());
    }
    if metadata.uid() != 0 && metadata.uid() != own {
        return Err("it must belong to root or to this user: chown it".to_owned());
    }
    if metadata.mode() & 0o027 != 0 {
        return Err("others can read it: chmod 0600 it, or 0640 for this user's group".to_owned());
    }
    if metadata.mode() & 0o040 != 0 && !is_own_group(metadata.gid()) {
        let gid = metadata.gid();
        return Err(format!("group {gid} can read it, which is not this user's: chmod 0600 it"));
    }
    let mut text = String::new();
    let longest = u64::try_from(*LENGTH.end() + 2).unwrap_or(u64::MAX);
    opened.by_ref().take(longest).read_to_string(&mut text).map_err(|error| error.to_string())?;
    let token = text.trim();
    // The b64token of RFC 6750 §2.1, and what else a header can carry whole.
    if !LENGTH.contains(&token.len()) || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        let (least, most) = (LENGTH.start(), LENGTH.end());
        return Err(format!(
            "it must hold one token: {least} to {most} visible ASCII characters on one line"
        ));
    }
    Ok(Hash::of(token))
}

/// Whether this process is in the group: as its own, or as one that a pod was given (fsGroup).
fn is_own_group(gid: u32) -> bool {
    let own = rustix::process::getegid().as_raw();
    let others = rustix::process::getgroups().unwrap_or_default();
    gid == own || others.iter().any(|other| other.as_raw() == gid)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use http::HeaderValue;

    use super::*;

    const ALICE: &str = "alice-alice-alice-alice-alice-alice";
    const BOB: &str = "bob-bob-bob-bob-bob-bob-bob-bob-bob-bob";

    fn load(files: &[(&str, &str, u32)]) -> Result<Keyed<String>, String> {
        let directory = tempfile::tempdir().unwrap();
        let files = files.iter().map(|(name, text, mode)| {
            let file = directory.path().join(name);
            std::fs::write(&file, text).unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(*mode)).unwrap();
            (Name::parse(name).unwrap(), file)
        });
        let bearers = Bearers::load(&files.collect()).map_err(|error| error.to_string())?;
        Ok(bearers.each(|principal| principal.subject().to_owned()))
    }

    fn with(values: &[&str]) -> HeaderMap {
        let values = values.iter().map(|value| HeaderValue::from_str(value).unwrap());
        values.map(|value| (AUTHORIZATION, value)).fold(
            HeaderMap::new(),
            |mut map, (name, value)| {
                map.append(name, value);
                map
            },
        )
    }

    #[test]
    fn a_bearer_is_its_principal_and_nobody_else() {
        let keyed = load(&[("alice", &format!("{ALICE}\n"), 0o600), ("bob", BOB, 0o640)]).unwrap();
        let found = |values: &[&str]| keyed.find(&with(values)).cloned();
        assert_eq!(found(&[&format!("Bearer {ALICE}")]).as_deref(), Some("http:alice"));
        assert_eq!(found(&[&format!("bearer {BOB}")]).as_deref(), Some("http:bob"));
        for values in [
            &[][..],
            &["Bearer"],
            &["Bearer "],
            &["Bearer wrong-wrong-wrong-wrong-wrong-wrong"],
            &[&format!("Basic {ALICE}")],
            &[&format!("Bearer {ALICE}x")],
            &[&format!("Bearer {ALICE}"), &format!("Bearer {ALICE}")],
        ] {
            assert_eq!(found(values), None, "{values:?}");
        }
    }

    #[test]
    fn a_file_must_be_private_and_hold_one_good_token() {
        let problem = |text: &str, mode| load(&[("alice", text, mode)]).err().unwrap();
        assert!(problem(ALICE, 0o644).contains("others can read it"));
        assert!(problem(ALICE, 0o620).contains("others can read it"));
        for text in ["", "short", &"x".repeat(1025), &format!("{ALICE} {ALICE}")] {
            assert!(problem(text, 0o600).contains("it must hold one token: 32 to 1024"));
        }
        let same = load(&[("alice", ALICE, 0o600), ("bob", ALICE, 0o600)]).err().unwrap();
        assert!(same.contains("bob: it holds the token of another principal"), "{same}");
        assert!(!same.contains(ALICE));
    }

    #[test]
    fn a_group_that_reads_it_is_ours() {
        let gid = rustix::process::getegid().as_raw();
        assert!(is_own_group(gid) && !is_own_group(gid.wrapping_add(54_321)));
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), ALICE).unwrap();
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(read(file.path()).is_ok());
        std::os::unix::fs::chown(file.path(), None, Some(54_321)).unwrap();
        assert!(read(file.path()).unwrap_err().starts_with("group 54321 can read it"));
    }

    #[test]
    fn hashes_are_not_shown() {
        assert_eq!(format!("{:?}", Hash::of(ALICE)), "[REDACTED]");
    }
}
