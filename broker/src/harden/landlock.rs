//! Landlock: the files and ports that a broker needs, and no others, whatever its code is made
//! to do.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::{fmt, io};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible as _, NetPort,
    PathBeneath, PathFd, Ruleset, RulesetAttr as _, RulesetCreated, RulesetCreatedAttr as _,
    RulesetStatus, Scope,
};

/// What stays open.
#[derive(Debug, Default)]
pub(crate) struct Paths {
    /// Directories to write in: state, audit, runtime.
    pub(crate) write: Vec<PathBuf>,
    /// Files and directories to read.
    pub(crate) read: Vec<PathBuf>,
    /// TCP ports of databases.
    pub(crate) connect: Vec<u16>,
}

impl Paths {
    /// Whether everything in `wanted` is open already; else what is not, and why.
    pub(crate) fn covers(&self, wanted: &Self) -> Result<(), String> {
        let below = |path: &Path, of: &[PathBuf]| of.iter().any(|open| path.starts_with(open));
        for path in &wanted.write {
            if !below(path, &self.write) {
                return Err(format!("the sandbox does not let {} be written", path.display()));
            }
        }
        for path in &wanted.read {
            if !below(path, &self.read) && !below(path, &self.write) {
                return Err(format!("the sandbox does not let {} be read", path.display()));
            }
        }
        match wanted.connect.iter().find(|port| !self.connect.contains(port)) {
            Some(port) => Err(format!("the sandbox does not let port {port} be reached")),
            None => Ok(()),
        }
    }
}

/// How much the kernel enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Enforced {
    Fully,
    Partially,
    Not,
}

impl fmt::Display for Enforced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fully => "on",
            Self::Partially => "partial",
            Self::Not => "unavailable",
        })
    }
}

/// What name resolution and TLS read: glibc's resolver opens its files anew, and loads modules
/// that nsswitch.conf names. A reload looks up users and groups again, and the system's roots,
/// which lie in one of the last places or lead to one.
const SYSTEM_READ: &[&str] = &[
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/passwd",
    "/etc/group",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/run/systemd/resolve",
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/dev/urandom",
    "/dev/null",
    "/proc/self",
    "/sys/fs/cgroup",
    "/etc/ssl/certs",
    "/etc/ssl/cert.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/certs",
    "/etc/pki/tls/cert.pem",
    "/etc/pki/ca-trust",
    "/usr/share/ca-certificates",
    "/usr/local/share/ca-certificates",
];

/// DNS answers that do not fit a datagram come over TCP.
const DNS: u16 = 53;

/// Whether this kernel enforces any of it.
pub(crate) fn is_available() -> bool {
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    ruleset.handle_access(AccessFs::Execute).and_then(Ruleset::create).is_ok()
}

pub(super) fn restrict(paths: &Paths) -> io::Result<Enforced> {
    // The newest rules this code was written against; older kernels enforce what they know.
    let abi = ABI::V5;
    let read = AccessFs::from_read(abi);
    let created = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(abi)))
        .and_then(Ruleset::create)
        .map_err(io::Error::other)?;
    let mut rules = created;
    for path in &paths.write {
        rules = allow(rules, path, AccessFs::from_all(abi) & !AccessFs::Execute)?;
    }
    for path in paths.read.iter().map(PathBuf::as_path).chain(SYSTEM_READ.iter().map(Path::new)) {
        rules = allow(rules, path, read)?;
    }
    for port in paths.connect.iter().copied().chain([DNS]) {
        rules =
            rules.add_rule(NetPort::new(port, AccessNet::ConnectTcp)).map_err(io::Error::other)?;
    }
    restrict_self(rules)
}

/// Where programs of `exec` sources may write.
const SCRATCH: &[&str] = &["/dev/null", "/tmp"];

/// Reading and running stay; writing goes, but for temporary files; and so does signalling
/// anybody outside: the broker has the same uid.
pub(super) fn restrict_writing() -> io::Result<Enforced> {
    let abi = ABI::V6;
    let created = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))
        .and_then(|rules| rules.scope(Scope::Signal))
        .and_then(Ruleset::create)
        .map_err(io::Error::other)?;
    let mut rules = allow(created, Path::new("/"), AccessFs::from_read(abi))?;
    for path in SCRATCH {
        rules = allow(rules, Path::new(path), AccessFs::from_all(abi))?;
    }
    restrict_self(rules)
}

fn restrict_self(rules: RulesetCreated) -> io::Result<Enforced> {
    let status = rules.restrict_self().map_err(io::Error::other)?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => Enforced::Fully,
        RulesetStatus::PartiallyEnforced => Enforced::Partially,
        RulesetStatus::NotEnforced => Enforced::Not,
    })
}

/// What is not there needs no rule.
fn allow(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> io::Result<RulesetCreated> {
    let Ok(fd) = PathFd::new(path) else { return Ok(rules) };
    let access = if path.is_dir() { access } else { access & AccessFs::from_file(ABI::V5) };
    rules.add_rule(PathBeneath::new(fd, access)).map_err(io::Error::other)
}
