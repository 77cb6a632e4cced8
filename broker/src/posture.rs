//! What this machine gives a broker: said by `credbrokerd posture`, at start, by GetStatus, and
//! in the first audit record. The same facts everywhere, and what could not be found out is
//! `unknown`.

#![forbid(unsafe_code)]

use std::fmt;
use std::fs;

use rustix::process::{DumpableBehavior, Resource, dumpable_behavior, getrlimit};
use rustix::thread::no_new_privs;

use crate::arena::{self, Arena, Backend};
use crate::config::{Config, MetricsListen};
use crate::harden::Sandbox;
use crate::peer;

const UNKNOWN: &str = "unknown";
const NONE: &str = "none";

/// The facts that security rests on, as found and not as hoped for.
#[derive(Debug)]
pub(crate) struct Posture {
    arena: arena::Posture,
    process: Process,
    host: Host,
    pidfd: bool,
    /// Present once it is in force.
    pub(crate) sandbox: Option<Sandbox>,
    /// The keeper's, which is in force first.
    pub(crate) keeper: Option<Sandbox>,
    own_uid_allowed: bool,
    /// Connections whose link is not protected by TLS although it leaves the machine's sockets.
    plaintext: Vec<String>,
    unverified: Vec<String>,
    /// Connections whose secret came through the broker's environment.
    from_environment: Vec<String>,
    /// Selectors that can match nobody here, and why.
    unreadable: Vec<String>,
    metrics: &'static str,
}

/// What the process may and may not.
#[derive(Debug)]
struct Process {
    memlock: String,
    dumpable: &'static str,
    core_limit: String,
    no_new_privs: &'static str,
}

/// Where the host could write memory to.
#[derive(Debug)]
struct Host {
    swap: &'static str,
    hibernation: &'static str,
}

/// A name, what was found, and what that means where it is not plain.
struct Fact {
    name: &'static str,
    found: String,
    means: Option<&'static str>,
}

impl Posture {
    /// To be called before the sandbox, which hides the host.
    pub(crate) fn find(config: &Config, arena: &Arena) -> Self {
        let names = |which: fn(&crate::config::ConfiguredConnection) -> bool| {
            let picked = config.connections.iter().filter(|(_, configured)| which(configured));
            picked.map(|(name, _)| name.to_string()).collect()
        };
        Self {
            arena: arena.posture(),
            process: Process::find(),
            host: Host::find(),
            pidfd: peer::pidfd_is_available(),
            sandbox: None,
            keeper: None,
            own_uid_allowed: config.allow_own_uid,
            plaintext: names(|configured| configured.connection.is_plaintext_tcp()),
            unverified: names(|configured| configured.connection.is_unverified_tls()),
            from_environment: names(|configured| configured.source.is_environment()),
            unreadable: config.unreadable(),
            metrics: match &config.metrics {
                None => "off",
                Some(MetricsListen::Unix(_)) => "unix",
                Some(MetricsListen::Tcp(address)) if address.ip().is_loopback() => "loopback",
                Some(MetricsListen::Tcp(_)) => "network",
            },
        }
    }

    /// One line each, always the same names: for the audit record and for GetStatus.
    pub(crate) fn facts(&self) -> Vec<(&'static str, String)> {
        self.all().into_iter().map(|fact| (fact.name, fact.found)).collect()
    }

    fn all(&self) -> Vec<Fact> {
        let plain = |name, found: String| Fact { name, found, means: None };
        let with = |name, found: &str, means| Fact { name, found: found.to_owned(), means };
        let Self { arena, process, host, .. } = self;
        let mut facts = vec![with(
            "arena",
            &arena.backend.to_string(),
            Some(match arena.backend {
                Backend::MemfdSecret => "not even the kernel's own mappings show it",
                Backend::Memfd => "locked and not dumped; root can still read it",
            }),
        )];
        facts.push(plain(
            "memfd_secret",
            arena.why_not_secret.map_or_else(|| "in use".to_owned(), |why| format!("no: {why}")),
        ));
        let capped = arena.capacity < arena.wanted;
        facts.push(Fact {
            name: "arena_bytes",
            found: arena.capacity.to_string(),
            means: capped.then_some("less than was asked for: RLIMIT_MEMLOCK caps it"),
        });
        facts.push(plain("arena_wanted_bytes", arena.wanted.to_string()));
        facts.push(plain("arena_vm_flags", arena.flags.to_string()));
        facts.push(plain("memlock", process.memlock.clone()));
        facts.push(plain("dumpable", process.dumpable.to_owned()));
        facts.push(plain("core_limit", process.core_limit.clone()));
        facts.push(plain("no_new_privs", process.no_new_privs.to_owned()));
        facts.push(with(
            "swap",
            host.swap,
            (host.swap != NONE).then_some("the arena is locked and never goes there"),
        ));
        facts.push(match arena.backend {
            Backend::MemfdSecret => with(
                "hibernation",
                "prevented",
                Some("the kernel does not hibernate while a memfd_secret is in use"),
            ),
            Backend::Memfd => with(
                "hibernation",
                host.hibernation,
                (host.hibernation != "unavailable")
                    .then_some("an image of the machine's memory would hold the arena"),
            ),
        });
        facts.push(match self.pidfd {
            true => with("pidfd", "available", Some("the exit of a bound process is seen")),
            false => with(
                "pidfd",
                "unavailable",
                Some("no handle can be bound to a process (Linux 6.5 has it)"),
            ),
        });
        let sandbox = self.sandbox.as_ref();
        let part = |of: fn(&Sandbox) -> String| sandbox.map_or_else(|| UNKNOWN.to_owned(), of);
        facts.push(plain("landlock", part(|sandbox| sandbox.landlock.to_string())));
        facts.push(plain(
            "seccomp",
            part(|sandbox| if sandbox.seccomp { "on" } else { "off" }.to_owned()),
        ));
        facts.push(plain("capabilities", part(|sandbox| sandbox.capabilities.to_string())));
        facts.push(plain(
            "keeper",
            self.keeper.as_ref().map_or_else(|| UNKNOWN.to_owned(), ToString::to_string),
        ));
        facts.push(match self.own_uid_allowed {
            true => with(
                "boundary",
                "none",
                Some("peers with the broker's own uid are let in, and could read its memory"),
            ),
            false => with("boundary", "uid", Some("peers with the broker's own uid are refused")),
        });
        facts.push(Fact {
            name: "plaintext_tcp",
            found: brief(&self.plaintext),
            means: (!self.plaintext.is_empty())
                .then_some("what these sessions say can be read on the way"),
        });
        facts.push(Fact {
            name: "unverified_tls",
            found: brief(&self.unverified),
            means: (!self.unverified.is_empty())
                .then_some("whoever is on the way can be the server: use verify-full"),
        });
        facts.push(Fact {
            name: "secrets_from_environment",
            found: brief(&self.from_environment),
            means: (!self.from_environment.is_empty())
                .then_some("whoever started the broker has them too"),
        });
        facts.push(Fact {
            name: "selectors_not_evaluated",
            found: self.unreadable.len().to_string(),
            means: (!self.unreadable.is_empty()).then_some("`credbrokerd check-config` names them"),
        });
        facts.push(Fact {
            name: "metrics",
            found: self.metrics.to_owned(),
            means: (self.metrics == "network")
                .then_some("whoever reaches the port learns the names of all connections"),
        });
        facts
    }
}

impl Process {
    fn find() -> Self {
        let yes_no = |yes| if yes { "yes" } else { "no" };
        let limit = |which| match getrlimit(which).current {
            Some(bytes) => bytes.to_string(),
            None => "unlimited".to_owned(),
        };
        Self {
            memlock: limit(Resource::Memlock),
            dumpable: dumpable_behavior()
                .map_or(UNKNOWN, |found| yes_no(found != DumpableBehavior::NotDumpable)),
            core_limit: limit(Resource::Core),
            no_new_privs: no_new_privs().map_or(UNKNOWN, yes_no),
        }
    }
}

impl Host {
    fn find() -> Self {
        Self {
            swap: swap(fs::read_to_string("/proc/swaps").ok().as_deref()),
            hibernation: hibernation(fs::read_to_string("/sys/power/state").ok().as_deref()),
        }
    }
}

/// /proc/swaps has a heading and a line for each area.
fn swap(swaps: Option<&str>) -> &'static str {
    match swaps.map(|text| text.lines().count().saturating_sub(1)) {
        None => UNKNOWN,
        Some(0) => NONE,
        Some(_) => "active",
    }
}

/// /sys/power/state names the states that the machine can go to; `disk` is hibernation.
fn hibernation(states: Option<&str>) -> &'static str {
    match states {
        None => UNKNOWN,
        Some(states) if states.split_whitespace().any(|state| state == "disk") => "possible",
        Some(_) => "unavailable",
    }
}

impl fmt::Display for Posture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Fact { name, found, means } in self.all() {
            match means {
                Some(means) => writeln!(f, "{name:<24} {found}: {means}")?,
                None => writeln!(f, "{name:<24} {found}")?,
            }
        }
        Ok(())
    }
}

/// A record has a bound, and the effective configuration names each of them anyway.
fn brief(names: &[String]) -> String {
    const SHOWN: usize = 10;
    if names.is_empty() {
        return NONE.to_owned();
    }
    let shown = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(" ");
    match names.len().checked_sub(SHOWN) {
        None | Some(0) => shown,
        Some(more) => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::{NoSecretMemory, VmFlags};

    fn posture(arena: arena::Posture, host: Host) -> Posture {
        Posture {
            arena,
            process: Process::find(),
            host,
            pidfd: true,
            sandbox: None,
            keeper: None,
            own_uid_allowed: false,
            plaintext: (0..12).map(|number| format!("c{number}")).collect(),
            unverified: Vec::new(),
            from_environment: Vec::new(),
            unreadable: Vec::new(),
            metrics: "off",
        }
    }

    fn locked(why: NoSecretMemory) -> arena::Posture {
        let (capacity, wanted) = (48 * 1024, 1 << 20);
        let (backend, flags) = (Backend::Memfd, VmFlags::Unknown);
        arena::Posture { backend, why_not_secret: Some(why), flags, capacity, wanted }
    }

    #[test]
    fn what_is_not_known_is_said_to_be_unknown() {
        let host = Host { swap: swap(None), hibernation: hibernation(None) };
        let facts = posture(locked(NoSecretMemory::Absent), host).facts();
        let found = |name| facts.iter().find(|(fact, _)| *fact == name).unwrap().1.as_str();
        for name in ["swap", "hibernation", "arena_vm_flags", "landlock", "seccomp", "capabilities"]
        {
            assert_eq!(found(name), "unknown", "{name}");
        }
        assert_eq!(found("secrets_from_environment"), "none");
        assert_eq!(found("plaintext_tcp"), "c0 c1 c2 c3 c4 c5 c6 c7 c8 c9 and 2 more");
        assert_eq!((found("arena_bytes"), found("arena_wanted_bytes")), ("49152", "1048576"));
    }

    #[test]
    fn the_three_answers_to_memfd_secret_are_three_facts() {
        let said = |why| {
            let host = Host { swap: swap(Some("h\n")), hibernation: "possible" };
            let facts = posture(locked(why), host).facts();
            facts.into_iter().find(|(fact, _)| *fact == "memfd_secret").unwrap().1
        };
        assert!(said(NoSecretMemory::Absent).contains("ENOSYS"));
        assert!(said(NoSecretMemory::Forbidden).contains("EPERM"));
        assert!(said(NoSecretMemory::LimitReached).contains("EAGAIN"));
        assert!(said(NoSecretMemory::NotAskedFor).contains("arena.backend"));
    }

    #[test]
    fn the_host_is_read_as_the_kernel_writes() {
        assert_eq!(swap(Some("Filename\tType\n")), "none");
        assert_eq!(swap(Some("Filename\tType\n/dev/sda2 partition\n")), "active");
        assert_eq!(hibernation(Some("freeze mem disk\n")), "possible");
        assert_eq!(hibernation(Some("freeze mem\n")), "unavailable");
        assert_eq!(hibernation(Some("")), "unavailable");
    }
}
