//! Signatures of checkpoints. Each start makes a key of its own, which never leaves the arena and
//! dies with the process; `audit.signing_key`, where there is one, certifies it and is wiped.
//!
//! What is signed begins with a domain, so that no signature can be taken for another kind, and
//! has a length before everything that has no fixed one:
//! - a checkpoint: `credbroker audit checkpoint v1` NUL, broker, time, number (8 bytes, big
//!   endian), hash of the record before (32 bytes);
//! - a certificate: `credbroker audit key v1` NUL, broker, the key of the start (32 bytes).
//!
//! Text has its length before it, 8 bytes, big endian. Ed25519: RFC 8032.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use data_encoding::HEXLOWER_PERMISSIVE;
use data_encoding::{BASE64, BASE64_NOPAD, BASE64URL, BASE64URL_NOPAD, Encoding, HEXLOWER};
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use rustix::fs::OFlags;
use thiserror::Error;

use super::Record;
use super::chain::{Link, timestamp};
use crate::arena::{Arena, ArenaFull, Slot};
use crate::config::AuditConfig;
use crate::sys;
use crate::trusted::distrust;

const CHECKPOINT: &[u8] = b"credbroker audit checkpoint v1\0";
const CERTIFICATE: &[u8] = b"credbroker audit key v1\0";

/// Bytes of a seed, as RFC 8032 calls the private key.
const SEED: usize = 32;
/// Longest text of a signing key: 64 hexadecimal digits and a line's end.
const MAX_TEXT: usize = 66;
/// `audit.pub` keeps the newest keys, about 700 of them.
const MAX_PUBLIC: usize = 64 * 1024;

/// The key could not be made, read or published.
#[derive(Debug, Error)]
pub(crate) enum SignerError {
    /// The file of the signing key cannot be read.
    #[error("{path}: cannot read audit.signing_key: {source}; make it readable for uid {uid}", path = .path.display(), uid = crate::peer::Uid::own())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody else could have written it.
    #[error("{path}: audit.signing_key {why}", path = .path.display())]
    Untrusted {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        why: String,
    },
    /// What is in there is no seed.
    #[error("{path}: audit.signing_key is not an Ed25519 seed: write 32 random bytes, or 64 hexadecimal digits, or their base64", path = .path.display())]
    NotASeed {
        /// Which file.
        path: PathBuf,
    },
    /// The public keys cannot be put beside the log.
    #[error("{path}: cannot write the public keys: {source}; make the directory writable for uid {uid}", path = .path.display(), uid = crate::peer::Uid::own())]
    Publish {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No room for the key.
    #[error(transparent)]
    ArenaFull(#[from] ArenaFull),
    /// The kernel gives no randomness.
    #[error("the kernel gives no randomness for the audit key")]
    NoRandomness,
}

impl SignerError {
    /// Whether it is about who may read or write, rather than about what is there.
    #[must_use]
    pub(crate) fn is_permission(&self) -> bool {
        match self {
            Self::Read { source, .. } | Self::Publish { source, .. } => {
                source.kind() == io::ErrorKind::PermissionDenied
            }
            Self::Untrusted { .. } => true,
            Self::NotASeed { .. } | Self::ArenaFull(_) | Self::NoRandomness => false,
        }
    }
}

/// A seed in the arena and the key that it makes.
struct Key {
    seed: Slot,
    public: [u8; 32],
}

/// Signs checkpoints.
#[derive(Debug)]
pub(super) struct Signer {
    key: Key,
    /// Of the signing key, over this start's key; in hexadecimal.
    certificate: Option<String>,
    signing_key: Option<[u8; 32]>,
}

impl Signer {
    /// Makes the key of this start, and has it certified.
    pub(super) fn make(
        config: &AuditConfig,
        broker: &str,
        arena: &Arena,
    ) -> Result<Self, SignerError> {
        let mut seed = arena.allocate(SEED)?;
        seed.fill(|seed| SystemRandom::new().fill(seed))
            .map_err(|_unspecified| SignerError::NoRandomness)?;
        let key = Key::new(seed).ok_or(SignerError::NoRandomness)?;
        let mut signer = Self { key, certificate: None, signing_key: None };
        if let Some(path) = config.signing_key.as_ref().map(|configured| configured.path()) {
            let not_a_seed = || SignerError::NotASeed { path: path.to_owned() };
            let root = Key::new(read_seed(path, arena)?).ok_or_else(not_a_seed)?;
            let message = certificate_message(broker, &signer.key.public);
            let signature = root.sign(&message).ok_or_else(not_a_seed)?;
            signer.certificate = Some(HEXLOWER.encode(&signature));
            signer.signing_key = Some(root.public);
        }
        Ok(signer)
    }

    /// Adds this start's key to `audit.pub` beside the log, 0644.
    pub(super) fn publish(&self, log: &Path) -> Result<(), SignerError> {
        let path = log.with_extension("pub");
        let now = timestamp(SystemTime::now());
        let mut lines = format!("{} {now}\n", HEXLOWER.encode(&self.key.public));
        if let Some(root) = &self.signing_key {
            lines = format!("{} {now} signing_key\n{lines}", HEXLOWER.encode(root));
        }
        replace(&path, &lines).map_err(|source| SignerError::Publish { path, source })
    }

    /// The key, and who vouches for it, for the first record of a start.
    pub(super) fn introduction(&self) -> Vec<(&'static str, String)> {
        let mut facts = vec![("key", HEXLOWER.encode(&self.key.public))];
        facts.extend(self.certificate.clone().map(|certificate| ("certificate", certificate)));
        facts.extend(self.signing_key.map(|root| ("signing_key", HEXLOWER.encode(&root))));
        facts
    }

    /// The signature over the place that the next record has in the chain.
    pub(super) fn checkpoint(
        &self,
        record: Record,
        broker: &str,
        (seq, time): (u64, SystemTime),
        before: &Link,
    ) -> Record {
        let mut message = CHECKPOINT.to_vec();
        push_text(&mut message, broker);
        push_text(&mut message, &timestamp(time).to_string());
        message.extend_from_slice(&seq.to_be_bytes());
        message.extend_from_slice(&before.hash);
        // A seed of the right length always signs; zeros would show as a forged signature.
        let signature = self.key.sign(&message).unwrap_or([0; 64]);
        let record = record.detail("key", HEXLOWER.encode(&self.key.public));
        let record = match &self.certificate {
            Some(certificate) => record.detail("certificate", certificate.as_str()),
            None => record,
        };
        record.detail("signature", HEXLOWER.encode(&signature))
    }
}

impl Key {
    fn new(seed: Slot) -> Option<Self> {
        let public = with_pair(&seed, |pair| {
            let mut public = [0; 32];
            public.copy_from_slice(pair.public_key().as_ref());
            public
        })?;
        Some(Self { seed, public })
    }

    fn sign(&self, message: &[u8]) -> Option<[u8; 64]> {
        with_pair(&self.seed, |pair| {
            let mut signature = [0; 64];
            signature.copy_from_slice(pair.sign(message).as_ref());
            signature
        })
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[REDACTED]")
    }
}

/// Lends the key pair, which is made anew each time: between two signatures only the seed is there.
fn with_pair<R>(seed: &Slot, work: impl FnOnce(&Ed25519KeyPair) -> R) -> Option<R> {
    sys::leaving_no_residue(|| {
        seed.expose(|seed| Ed25519KeyPair::from_seed_unchecked(seed).ok().map(|pair| work(&pair)))
    })
}

fn certificate_message(broker: &str, key: &[u8; 32]) -> Vec<u8> {
    let mut message = CERTIFICATE.to_vec();
    push_text(&mut message, broker);
    message.extend_from_slice(key);
    message
}

fn push_text(message: &mut Vec<u8>, text: &str) {
    message.extend_from_slice(&(text.len() as u64).to_be_bytes());
    message.extend_from_slice(text.as_bytes());
}

/// Reads a seed straight into the arena.
fn read_seed(path: &Path, arena: &Arena) -> Result<Slot, SignerError> {
    let failed = |source| SignerError::Read { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if let Some(why) = distrust(&metadata) {
        return Err(SignerError::Untrusted { path: path.to_owned(), why });
    }
    let mut text = arena.allocate(MAX_TEXT + 1)?;
    let len = text.fill(|buffer| {
        let mut len = 0;
        while let Some(rest) = buffer.get_mut(len..).filter(|rest| !rest.is_empty()) {
            match file.read(rest) {
                Ok(0) => break,
                Ok(count) => len += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(len)
    });
    text.truncate(len.map_err(failed)?);
    let mut seed = arena.allocate(SEED)?;
    let parsed =
        sys::leaving_no_residue(|| text.expose(|text| seed.fill(|seed| parse_seed(text, seed))));
    parsed.ok_or_else(|| SignerError::NotASeed { path: path.to_owned() })?;
    Ok(seed)
}

fn parse_seed(text: &[u8], seed: &mut [u8]) -> Option<()> {
    let mut decode = |encoding: &Encoding, text: &[u8]| {
        if encoding.decode_len(text.len()).ok()? < SEED {
            return None;
        }
        // The encodings with padding may need up to two bytes more than they give.
        let mut room = zeroize::Zeroizing::new([0; SEED + 2]);
        let room = room.get_mut(..encoding.decode_len(text.len()).ok()?)?;
        let len = encoding.decode_mut(text, room).ok()?;
        seed.copy_from_slice(room.get(..len).filter(|bytes| bytes.len() == SEED)?);
        Some(())
    };
    // Only a text has a line's end; a raw seed may happen to look as if it had one.
    let line = text.strip_suffix(b"\n").unwrap_or(text);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    match (text.len(), line.len()) {
        (SEED, _) => {
            seed.copy_from_slice(text);
            Some(())
        }
        (_, 64) => decode(&HEXLOWER_PERMISSIVE, line),
        (_, 44) => decode(&BASE64, line).or_else(|| decode(&BASE64URL, line)),
        (_, 43) => decode(&BASE64_NOPAD, line).or_else(|| decode(&BASE64URL_NOPAD, line)),
        (_, _) => None,
    }
}

/// Appends `lines` to the file at `path`, whole or not at all, leaving out keys that stand there
/// already and, when there are too many, the oldest.
fn replace(path: &Path, lines: &str) -> io::Result<()> {
    let flags = i32::try_from((OFlags::NOFOLLOW | OFlags::CLOEXEC).bits()).unwrap_or_default();
    let mut text = String::new();
    match File::options().read(true).custom_flags(flags).open(path) {
        Ok(file) => {
            // One that is longer is not ours, and what is cut off is its end.
            file.take(2 * MAX_PUBLIC as u64).read_to_string(&mut text)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let key = |line: &str| line.split(' ').next().map(str::to_owned);
    let mut all: Vec<&str> = text.lines().collect();
    let fresh = lines.lines().filter(|line| !text.lines().any(|old| key(old) == key(line)));
    all.extend(fresh);
    let mut len: usize = all.iter().map(|line| line.len() + 1).sum();
    // A signing key outlives starts; only their keys are dropped.
    while len > MAX_PUBLIC
        && let Some(oldest) = all.iter().position(|line| !line.ends_with("signing_key"))
    {
        len -= all.remove(oldest).len() + 1;
    }
    let fresh = path.with_extension("pub.new");
    let _ = std::fs::remove_file(&fresh);
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .custom_flags(flags)
        .mode(0o600)
        .open(&fresh)?;
    for line in all {
        writeln!(file, "{line}")?;
    }
    // Public keys are for whoever wants to verify; the umask would hide them.
    file.set_permissions(std::fs::Permissions::from_mode(0o644))?;
    file.sync_all()?;
    std::fs::rename(&fresh, path)
}

#[cfg(test)]
mod tests {
    use ring::signature::{ED25519, UnparsedPublicKey};

    use super::*;
    use crate::arena::BackendChoice;

    fn arena() -> Arena {
        Arena::map(BackendChoice::Auto, 64 * 1024).unwrap()
    }

    fn seed_of(text: &[u8]) -> Option<Vec<u8>> {
        let mut seed = [0; SEED];
        parse_seed(text, &mut seed)?;
        Some(seed.to_vec())
    }

    #[test]
    fn a_seed_may_be_raw_hexadecimal_or_base64() {
        let seed: Vec<u8> = (200..232).collect();
        let hex = HEXLOWER.encode(&seed);
        let texts = [
            seed.clone(),
            hex.clone().into_bytes(),
            format!("{}\n", hex.to_uppercase()).into_bytes(),
            format!("{}\r\n", BASE64.encode(&seed)).into_bytes(),
            BASE64URL.encode(&seed).into_bytes(),
            BASE64_NOPAD.encode(&seed).into_bytes(),
            BASE64URL_NOPAD.encode(&seed).into_bytes(),
        ];
        for text in texts {
            assert_eq!(seed_of(&text).as_ref(), Some(&seed), "{}", text.escape_ascii());
        }
        let short = hex.strip_suffix(&hex.chars().skip(62).collect::<String>()).unwrap();
        for wrong in ["", "x", short, &format!("{short}zz"), &format!("{hex}00")] {
            assert_eq!(seed_of(wrong.as_bytes()), None, "{wrong}");
        }
        let newline = [b'\n'; SEED];
        assert_eq!(seed_of(&newline), Some(newline.to_vec()), "32 bytes are 32 bytes");
    }

    #[test]
    fn the_key_of_rfc_8032_signs_as_it_says() {
        // Section 7.1, test 2.
        let seed = "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb";
        let public = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c";
        let signature = "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da\
                         085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00";
        let mut slot = arena().allocate(SEED).unwrap();
        slot.fill(|place| place.copy_from_slice(&HEXLOWER.decode(seed.as_bytes()).unwrap()));
        let key = Key::new(slot).unwrap();
        assert_eq!(HEXLOWER.encode(&key.public), public);
        assert_eq!(HEXLOWER.encode(&key.sign(&[0x72]).unwrap()), signature);
        assert_eq!(format!("{key:?}"), "[REDACTED]");
    }

    #[test]
    fn a_configured_key_vouches_for_the_one_of_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let (path, log) = (dir.path().join("key"), dir.path().join("audit.jsonl"));
        std::fs::write(&path, [7; SEED]).unwrap();
        let mut config = crate::audit::tests::config(&log);
        config.signing_key = Some(crate::config::SigningKey::File(path.clone()));
        let signer = Signer::make(&config, "host", &arena()).unwrap();
        let root = Ed25519KeyPair::from_seed_unchecked(&[7; SEED]).unwrap();
        let certificate = HEXLOWER.decode(signer.certificate.as_ref().unwrap().as_bytes()).unwrap();
        let message = certificate_message("host", &signer.key.public);
        UnparsedPublicKey::new(&ED25519, root.public_key()).verify(&message, &certificate).unwrap();

        signer.publish(&log).unwrap();
        Signer::make(&config, "host", &arena()).unwrap().publish(&log).unwrap();
        let text = std::fs::read_to_string(dir.path().join("audit.pub")).unwrap();
        assert_eq!(text.lines().count(), 3, "the signing key once, each start's key:\n{text}");
        assert!(text.starts_with(&HEXLOWER.encode(root.public_key().as_ref())));
        let mode = std::fs::metadata(dir.path().join("audit.pub")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o644);

        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        let untrusted = Signer::make(&config, "host", &arena()).unwrap_err();
        assert!(untrusted.to_string().contains("chmod go-w"), "{untrusted}");
    }

    #[test]
    fn public_keys_do_not_grow_without_end_and_follow_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.pub");
        let mut old = String::from("root now signing_key\n");
        for n in 0..999 {
            old.push_str(&format!("{n:064} 2026-11-24T00:00:00.000000Z\n"));
        }
        std::fs::write(&path, old).unwrap();
        replace(&path, &format!("{:064} 2026-11-24T00:00:00.000000Z\n", 999)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.len() <= MAX_PUBLIC && text.contains("0999 ") && text.contains("root now"));
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), &path).unwrap();
        assert!(replace(&path, "x").is_err());
    }
}
