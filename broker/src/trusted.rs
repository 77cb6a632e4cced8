//! Whose files and directories are believed: root's and the broker's own, when nobody else can
//! write them.

#![forbid(unsafe_code)]

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;

use crate::peer::Uid;

const WRITABLE_BY_OTHERS: u32 = 0o022;

/// What is wrong with it and what to do, or nothing. The caller got `metadata` from what it then
/// uses, so that nothing can be exchanged in between.
pub(crate) fn distrust(metadata: &Metadata) -> Option<String> {
    let (owner, own, mode) = (metadata.uid(), Uid::own().as_raw(), metadata.mode());
    if owner != 0 && owner != own {
        return Some(format!(
            "belongs to uid {owner}; it must belong to root or to uid {own}: chown it"
        ));
    }
    (mode & WRITABLE_BY_OTHERS != 0)
        .then(|| format!("others can write to it (mode {:04o}): chmod go-w it", mode & 0o7777))
}
