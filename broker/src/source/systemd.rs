//! Secrets that systemd passes (LoadCredential=, SetCredentialEncrypted=): files of a directory
//! that only this service sees, named by the environment (man systemd.exec(5), CREDENTIALS).

#![forbid(unsafe_code)]

use std::path::PathBuf;

use super::SourceFault;

const DIRECTORY: &str = "CREDENTIALS_DIRECTORY";

/// Where they are; `None` when this is no service, or one without credentials.
pub(super) fn directory() -> Option<PathBuf> {
    std::env::var_os(DIRECTORY).map(PathBuf::from).filter(|path| path.is_absolute())
}

/// The file of a credential, which need not exist.
pub(super) fn path(name: &str) -> Result<PathBuf, SourceFault> {
    let directory = directory().ok_or_else(|| SourceFault::NoSystemd { name: name.to_owned() })?;
    Ok(directory.join(name))
}

/// As systemd takes them: a file name.
pub(crate) fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && name != "."
        && name != ".."
        && name.bytes().all(|byte| byte.is_ascii_graphic() && !b"/:".contains(&byte))
}
