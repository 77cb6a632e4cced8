//! Whether the files of a source have changed, without reading them; and which directories a
//! sandbox must leave open so that their successors can be read.

#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

/// How all files of a source look from outside. Symbolic links are followed: Kubernetes swaps
/// the link to a directory, and no file in it changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stamp(Vec<Look>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Look {
    File {
        device: u64,
        inode: u64,
        size: u64,
        modified: (i64, i64),
        changed: (i64, i64),
    },
    /// A pipe or a device: reading it is what changes it, so it is not watched.
    Stream,
    /// Absent, or out of reach.
    Nothing,
}

impl Stamp {
    pub(super) fn of<'a>(paths: impl Iterator<Item = &'a Path>) -> Self {
        Self(paths.map(look).collect())
    }
}

fn look(path: &Path) -> Look {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => Look::File {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        },
        Ok(_) => Look::Stream,
        Err(_) => Look::Nothing,
    }
}

/// Directories that much else lies in: a link there is not expected to move, and opening them
/// would open the machine.
const SHARED: &[&str] = &[
    "/", "/dev", "/etc", "/home", "/mnt", "/opt", "/proc", "/root", "/run", "/srv", "/sys", "/tmp",
    "/usr", "/var", "/var/lib", "/var/run",
];
/// Symbolic links that are followed, as in path_resolution(7).
const MOST_LINKS: usize = 40;

/// The directory of `path` as it is now and, for every symbolic link on the way, the one that
/// the link stands in: what the link will point to is usually beside it.
pub(crate) fn directories(path: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = path.parent().map(Path::to_owned).into_iter().collect();
    let mut here = PathBuf::from("/");
    let mut links = 0;
    let mut pending = parts(path);
    while let Some(part) = pending.pop() {
        if part == Path::new("..") {
            here.pop();
            continue;
        }
        let next = here.join(&part);
        match fs::read_link(&next) {
            Ok(target) if links < MOST_LINKS => {
                links += 1;
                if !SHARED.iter().any(|shared| here == Path::new(shared)) {
                    found.push(here.clone());
                }
                if target.is_absolute() {
                    here = PathBuf::from("/");
                }
                pending.extend(parts(&target));
            }
            Ok(_) | Err(_) => here = next,
        }
    }
    found.extend(here.parent().map(Path::to_owned));
    found.sort();
    found.dedup();
    found
}

/// The parts of a path, the last one first.
fn parts(path: &Path) -> Vec<PathBuf> {
    let parts = path.components().rev().filter_map(|part| match part {
        Component::Normal(_) | Component::ParentDir => Some(PathBuf::from(part.as_os_str())),
        Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
    });
    parts.collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_directories_of_a_kubernetes_volume() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        let at = |name: &str| root.join(name);
        fs::create_dir_all(at("..1/db")).unwrap();
        fs::write(at("..1/db/password"), "x").unwrap();
        symlink("..1", at("..data")).unwrap();
        symlink("..data/db", at("db")).unwrap();
        let mut expected = [at("db"), root.clone(), at("..1/db")];
        expected.sort();
        assert_eq!(directories(&at("db/password")), expected);
    }

    #[test]
    fn a_link_in_a_shared_directory_opens_nothing_there() {
        let found = directories(Path::new("/var/run/no-such-directory/secret"));
        assert!(found.iter().all(|path| path.ends_with("no-such-directory")), "{found:?}");
    }

    #[test]
    fn a_link_to_itself_ends() {
        let root = tempfile::tempdir().unwrap();
        symlink("loop", root.path().join("loop")).unwrap();
        assert!(!directories(&root.path().join("loop/x")).is_empty());
    }

    #[test]
    fn every_way_to_replace_a_file_shows() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("secret");
        let stamp = || Stamp::of([path.as_path()].into_iter());
        let absent = stamp();
        fs::write(&path, "one").unwrap();
        let first = stamp();
        assert_ne!(first, absent);
        assert_eq!(first, stamp());
        let other = root.path().join("new");
        fs::write(&other, "two").unwrap();
        fs::rename(&other, &path).unwrap();
        let second = stamp();
        assert_ne!(second, first);
        fs::write(&path, "longer").unwrap();
        assert_ne!(stamp(), second);
    }
}
