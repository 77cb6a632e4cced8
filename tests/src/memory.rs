//! The search for a secret in a living process: every mapping, the environment, the command
//! line and the open files.
//!
//! Non-dumpable processes can be read too, since the searcher is root (`CAP_SYS_PTRACE`).
//! Pages of memfd_secret(2) cannot be read by anybody (`EIO`); they are counted as unread,
//! which is what they are for.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use crate::canary::{Pattern, Search};

const CHUNK: usize = 1 << 20;
const PAGE: u64 = 4096;

/// A copy that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hit {
    /// In which form: see [`Pattern::form`].
    pub form: String,
    /// The name of the mapping, as /proc/PID/maps has it: `[heap]`, `/memfd:…`, or `anonymous`.
    pub mapping: String,
    /// Where in the address space.
    pub address: u64,
}

impl Hit {
    /// Whether it lies in locked memory that the process made for secrets.
    #[must_use]
    pub fn in_arena(&self) -> bool {
        is_arena(&self.mapping)
    }
}

/// What a search saw.
#[derive(Debug, Default)]
pub struct Scan {
    /// Every copy, in the order of addresses.
    pub hits: Vec<Hit>,
    /// How many bytes were looked at.
    pub bytes_read: u64,
    /// Mappings of the arena that the kernel lets nobody read.
    pub unreadable_arena: usize,
    /// Other mappings that ought to be readable and were not.
    pub unreadable: Vec<String>,
}

impl Scan {
    /// Copies outside the arena: the ones that must not be.
    #[must_use]
    pub fn outside_arena(&self) -> Vec<&Hit> {
        self.hits.iter().filter(|hit| !hit.in_arena()).collect()
    }

    /// Copies in the arena, where it can be read (`backend = "memfd"`).
    #[must_use]
    pub fn in_arena(&self) -> usize {
        self.hits.iter().filter(|hit| hit.in_arena()).count()
    }
}

/// Looks for `patterns` in every mapping of process `pid`.
///
/// # Errors
/// When the process is gone or may not be read.
pub fn scan(pid: u32, patterns: &[Pattern]) -> io::Result<Scan> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let overlap = patterns.iter().map(Pattern::length).max().unwrap_or(1).saturating_sub(1);
    let search = Search::new(patterns);
    let mut found = Scan::default();
    for mapping in maps.lines().filter_map(Mapping::parse) {
        let read = mapping.search(&memory, &search, overlap, &mut found.hits);
        found.bytes_read += read;
        if read == 0 && is_arena(&mapping.name) {
            found.unreadable_arena += 1;
        } else if read == 0 && mapping.readable && !mapping.is_kernels() && mapping.is_in(pid)? {
            found.unreadable.push(mapping.name);
        }
    }
    Ok(found)
}

/// What the arena of process `pid` holds, where it can be read (`backend = "memfd"`).
///
/// # Errors
/// When the process is gone, or its arena may not be read.
pub fn read_arena(pid: u32) -> io::Result<Vec<u8>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let mut all = Vec::new();
    for mapping in maps.lines().filter_map(Mapping::parse) {
        if mapping.readable && is_arena(&mapping.name) {
            let len = usize::try_from(mapping.end - mapping.start).unwrap_or_default();
            let mut bytes = vec![0; len];
            memory.read_exact_at(&mut bytes, mapping.start)?;
            all.extend(bytes);
        }
    }
    Ok(all)
}

/// Looks for `patterns` outside the memory of process `pid`: in its environment, its command
/// line, and the regular files that it has open. Gives `place: form` for each copy.
///
/// # Errors
/// When the process is gone or may not be read.
pub fn scan_surroundings(pid: u32, patterns: &[Pattern]) -> io::Result<Vec<String>> {
    let root = PathBuf::from(format!("/proc/{pid}"));
    let mut places = vec![root.join("environ"), root.join("cmdline")];
    for fd in fs::read_dir(root.join("fd"))?.flatten() {
        if fs::metadata(fd.path()).is_ok_and(|metadata| metadata.is_file()) {
            places.push(fd.path());
        }
    }
    let mut hits = Vec::new();
    for place in places {
        let Ok(content) = fs::read(&place) else { continue };
        let forms = patterns.iter().filter(|pattern| pattern.is_in(&content));
        hits.extend(forms.map(|pattern| format!("{}: {}", place.display(), pattern.form())));
    }
    Ok(hits)
}

/// The `VmFlags` (proc_pid_smaps(5)) of each mapping of the arena of process `pid`.
///
/// # Errors
/// When the process is gone or may not be read.
pub fn arena_flags(pid: u32) -> io::Result<Vec<Vec<String>>> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut flags = Vec::new();
    let mut in_arena = false;
    for line in smaps.lines() {
        if let Some(mapping) = Mapping::parse(line) {
            in_arena = is_arena(&mapping.name);
        } else if let Some(found) = line.strip_prefix("VmFlags:").filter(|_| in_arena) {
            flags.push(found.split_whitespace().map(str::to_owned).collect());
        }
    }
    Ok(flags)
}

/// Looks for `patterns` in all regular files below `roots`. Gives `path: form` for each.
#[must_use]
pub fn scan_files(roots: &[PathBuf], patterns: &[Pattern]) -> Vec<String> {
    let mut hits = Vec::new();
    let mut open = roots.to_vec();
    while let Some(path) = open.pop() {
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        if metadata.is_dir() {
            open.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|e| e.path()));
        } else if metadata.is_file() {
            let content = fs::read(&path).unwrap_or_default();
            let forms = patterns.iter().filter(|pattern| pattern.is_in(&content));
            hits.extend(forms.map(|pattern| format!("{}: {}", path.display(), pattern.form())));
        }
    }
    hits
}

/// Whether a mapping of this name is locked memory for secrets.
fn is_arena(name: &str) -> bool {
    name.starts_with("/memfd:") || name.starts_with("/secretmem")
}

/// One line of /proc/PID/maps.
struct Mapping {
    start: u64,
    end: u64,
    readable: bool,
    name: String,
}

impl Mapping {
    /// `start-end perms offset dev inode name`, see proc(5).
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let readable = fields.next()?.starts_with('r');
        let name = fields.skip(3).collect::<Vec<_>>().join(" ");
        Some(Self {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            readable,
            name: if name.is_empty() { "anonymous".into() } else { name },
        })
    }

    /// Pages of the kernel that /proc/PID/mem does not show.
    fn is_kernels(&self) -> bool {
        self.name.starts_with("[vvar") || self.name == "[vsyscall]"
    }

    /// Whether the process still has it: the stack of a thread goes when the thread ends.
    fn is_in(&self, pid: u32) -> io::Result<bool> {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        Ok(maps.lines().filter_map(Self::parse).any(|mapping| mapping.start == self.start))
    }

    /// Reads the mapping in overlapping chunks, notes what is found, and gives the number of
    /// bytes read. Pages that cannot be read are stepped over one by one.
    fn search(
        &self,
        memory: &File,
        search: &Search<'_>,
        overlap: usize,
        hits: &mut Vec<Hit>,
    ) -> u64 {
        let mut buffer = vec![0; overlap + CHUNK];
        let (mut kept, mut at, mut total) = (0, self.start, 0_u64);
        while at < self.end {
            let left = usize::try_from(self.end - at).unwrap_or(CHUNK).min(CHUNK);
            let read = match memory.read_at(&mut buffer[kept..kept + left], at) {
                Ok(read) if read > 0 => read,
                Ok(_) | Err(_) => {
                    // The whole of a secret mapping fails alike; do not try all its pages.
                    if is_arena(&self.name) || !self.readable {
                        return total;
                    }
                    kept = 0;
                    at += PAGE;
                    continue;
                }
            };
            let filled = kept + read;
            let origin = at - kept as u64;
            search.each(&buffer[..filled], |pattern, place| {
                // What lies wholly in the kept part was reported with the last chunk.
                if place + pattern.length() > kept {
                    hits.push(Hit {
                        form: pattern.form().into(),
                        mapping: self.name.clone(),
                        address: origin + place as u64,
                    });
                }
            });
            total += read as u64;
            at += read as u64;
            kept = overlap.min(filled);
            buffer.copy_within(filled - kept..filled, 0);
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::canary::Canary;

    #[test]
    fn a_line_of_maps_is_understood() {
        let line = "7f00-8f00 rw-s 00000000 00:05 1234    /memfd:arena (deleted)";
        let mapping = Mapping::parse(line).expect("a good line");
        assert_eq!((mapping.start, mapping.end), (0x7f00, 0x8f00));
        assert_eq!(mapping.name, "/memfd:arena (deleted)");
        assert!(mapping.readable && is_arena(&mapping.name));
    }

    #[test]
    fn a_copy_across_chunks_is_found_once() {
        let canary = Canary::random();
        let secret = canary.reveal().as_bytes();
        let file = tempfile::NamedTempFile::new().expect("a file");
        let mut content = vec![b'.'; CHUNK - 7];
        content.extend_from_slice(secret);
        content.extend_from_slice(&[b'.'; 100]);
        content.extend_from_slice(secret);
        fs::write(file.path(), &content).expect("written");
        let mapping =
            Mapping { start: 0, end: content.len() as u64, readable: true, name: "file".into() };
        let mut hits = Vec::new();
        let patterns = [Pattern::new("raw", secret)];
        let opened = File::open(file.path()).expect("opened");
        let read = mapping.search(&opened, &Search::new(&patterns), secret.len() - 1, &mut hits);
        assert_eq!(read, content.len() as u64);
        let places: Vec<u64> = hits.iter().map(|hit| hit.address).collect();
        let second = CHUNK + 93 + secret.len();
        assert_eq!(places, [CHUNK as u64 - 7, second as u64]);
    }
}
