//! Reading back what the kernel made of the arena: madvise(2) may answer 0 for an advice that a
//! kernel does not know how to follow.

#![forbid(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::io::{BufRead as _, BufReader};

/// What `VmFlags` of proc_pid_smaps(5) must say: the flag, and what it means.
const NEEDED: [(&str, &str); 3] = [
    ("lo", "is locked (lo)"),
    ("dc", "stays out of forked processes (dc)"),
    ("dd", "stays out of core dumps (dd)"),
];

/// What the kernel says of the mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmFlags {
    /// It is locked, kept out of children, and out of core dumps.
    Confirmed,
    /// It is not, and this is what lacks.
    Lacking(&'static str),
    /// /proc is not to be had, or does not show flags.
    Unknown,
}

impl fmt::Display for VmFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Confirmed => f.write_str("lo dc dd"),
            Self::Lacking(what) => write!(f, "not confirmed that it {what}"),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}

/// The flags of the mapping of `len` bytes at `base` in this process.
pub(super) fn of(base: usize, len: usize) -> VmFlags {
    match File::open("/proc/self/smaps") {
        Ok(smaps) => judge(BufReader::new(smaps).lines().map_while(Result::ok), base, len),
        Err(_no_proc) => VmFlags::Unknown,
    }
}

/// A mapping that is split has been treated differently in its parts, so that none of its parts
/// speaks for the whole.
fn judge(lines: impl Iterator<Item = String>, base: usize, len: usize) -> VmFlags {
    let heading = format!("{base:08x}-{:08x} ", base + len);
    let ours = lines.skip_while(|line| !line.starts_with(&heading)).skip(1);
    let mut details = ours.take_while(|line| !is_heading(line)).peekable();
    if details.peek().is_none() {
        return VmFlags::Lacking("is one mapping");
    }
    let Some(flags) = details.find_map(|line| line.strip_prefix("VmFlags:").map(str::to_owned))
    else {
        return VmFlags::Unknown;
    };
    let lacks = NEEDED.iter().find(|(flag, _)| !flags.split_whitespace().any(|one| one == *flag));
    lacks.map_or(VmFlags::Confirmed, |(_, what)| VmFlags::Lacking(what))
}

/// `7f00-8f00 rw-s …`; the details of a mapping are `Name: value`.
fn is_heading(line: &str) -> bool {
    line.split_whitespace().next().is_some_and(|first| !first.ends_with(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(flags: &str) -> VmFlags {
        let smaps = format!(
            "55d0c0a00000-55d0c0a01000 r--p 00000000 fe:00 12 /usr/bin/x\nSize: 4 kB\nVmFlags: rd lo dd dc\n\
             7f0000001000-7f0000003000 rw-s 00000000 00:11 4 /secretmem (deleted)\nSize: 8 kB\n{flags}\
             7f0000009000-7f000000a000 rw-p 00000000 00:00 0 \nVmFlags: rd wr mr mw lo dc dd\n"
        );
        judge(smaps.lines().map(str::to_owned), 0x7f00_0000_1000, 0x2000)
    }

    #[test]
    fn each_flag_is_needed() {
        assert_eq!(judged("VmFlags: rd wr sh mr mw lo dc dd\n"), VmFlags::Confirmed);
        assert_eq!(judged("VmFlags: rd wr sh dc dd\n"), VmFlags::Lacking("is locked (lo)"));
        let forked = VmFlags::Lacking("stays out of forked processes (dc)");
        assert_eq!(judged("VmFlags: rd wr lo dd\n"), forked);
        let dumped = VmFlags::Lacking("stays out of core dumps (dd)");
        assert_eq!(judged("VmFlags: rd wr lo dc\n"), dumped);
    }

    #[test]
    fn no_flags_are_unknown_and_a_split_mapping_is_not_ours() {
        assert_eq!(judged(""), VmFlags::Unknown);
        let one_page = judge(["1000-2000 rw-s 0 0 0".to_owned()].into_iter(), 0x1000, 0x2000);
        assert_eq!(one_page, VmFlags::Lacking("is one mapping"));
    }

    #[test]
    fn ordinary_memory_is_not_taken_for_an_arena() {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let heap = maps.lines().find(|line| line.ends_with("[heap]")).unwrap();
        let (start, end) = heap.split(' ').next().unwrap().split_once('-').unwrap();
        let number = |text| usize::from_str_radix(text, 16).unwrap();
        let (start, end) = (number(start), number(end));
        assert!(matches!(of(start, end - start), VmFlags::Lacking(_)));
    }
}
