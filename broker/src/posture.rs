//! What this machine gives a broker: said by `credbrokerd posture`, at start, and in the first
//! audit record.

#![forbid(unsafe_code)]

use std::fmt;

use rustix::process::{Resource, getrlimit};

use crate::arena::{self, Arena, Backend};
use crate::config::Config;
use crate::harden::Sandbox;
use crate::peer;

/// The facts that security rests on, as found and not as hoped for.
#[derive(Debug)]
pub(crate) struct Posture {
    pub(crate) arena: arena::Posture,
    pub(crate) memlock: Option<u64>,
    pub(crate) pidfd: bool,
    /// Present once it is in force.
    pub(crate) sandbox: Option<Sandbox>,
    /// The keeper's, which is in force first.
    pub(crate) keeper: Option<Sandbox>,
    pub(crate) own_uid_allowed: bool,
    /// Connections whose link is not protected by TLS although it leaves the machine's sockets.
    pub(crate) plaintext: Vec<String>,
    /// Connections whose secret came through the broker's environment.
    pub(crate) from_environment: Vec<String>,
    /// Selectors that can match nobody here, and why.
    pub(crate) unreadable: Vec<String>,
}

impl Posture {
    pub(crate) fn find(config: &Config, arena: &Arena) -> Self {
        let names = |which: fn(&crate::config::ConfiguredConnection) -> bool| {
            let picked = config.connections.iter().filter(|(_, configured)| which(configured));
            picked.map(|(name, _)| name.to_string()).collect()
        };
        Self {
            arena: arena.posture(),
            memlock: getrlimit(Resource::Memlock).current,
            pidfd: peer::pidfd_is_available(),
            sandbox: None,
            keeper: None,
            own_uid_allowed: config.allow_own_uid,
            plaintext: names(|configured| configured.connection.is_plaintext_tcp()),
            from_environment: names(|configured| configured.source.is_environment()),
            unreadable: config.unreadable(),
        }
    }

    /// One line each, for the audit record.
    pub(crate) fn facts(&self) -> Vec<(&'static str, String)> {
        let mut facts = vec![
            ("arena", self.arena.backend.to_string()),
            ("arena_bytes", self.arena.capacity.to_string()),
            ("pidfd", if self.pidfd { "available" } else { "unavailable" }.to_owned()),
            ("boundary", if self.own_uid_allowed { "none" } else { "uid" }.to_owned()),
        ];
        if let Some(sandbox) = self.sandbox {
            facts.push(("sandbox", sandbox.to_string()));
        }
        if let Some(keeper) = self.keeper {
            facts.push(("keeper", keeper.to_string()));
        }
        if !self.plaintext.is_empty() {
            facts.push(("plaintext_tcp", brief(&self.plaintext)));
        }
        if !self.from_environment.is_empty() {
            facts.push(("secrets_from_environment", brief(&self.from_environment)));
        }
        if !self.unreadable.is_empty() {
            facts.push(("selectors_not_evaluated", self.unreadable.len().to_string()));
        }
        facts
    }
}

impl fmt::Display for Posture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let arena = &self.arena;
        writeln!(f, "arena      {} bytes in {}", arena.capacity, arena.backend)?;
        if arena.capacity < arena.wanted {
            writeln!(f, "           {} were asked for; RLIMIT_MEMLOCK caps it", arena.wanted)?;
        }
        match arena.backend {
            Backend::MemfdSecret => {
                writeln!(f, "           not even the kernel's own mappings show it")?
            }
            Backend::Memfd => {
                writeln!(f, "           locked and not dumped; root can still read it")?
            }
        }
        match self.memlock {
            Some(limit) => writeln!(f, "memlock    {limit} bytes")?,
            None => writeln!(f, "memlock    unlimited")?,
        }
        match self.pidfd {
            true => writeln!(f, "pidfd      available: the exit of a bound process is seen")?,
            false => writeln!(
                f,
                "pidfd      unavailable: no handle can be bound to a process (Linux 6.5 has it)"
            )?,
        }
        match self.own_uid_allowed {
            true => writeln!(
                f,
                "boundary   none: peers with the broker's own uid are let in, and could read its memory"
            )?,
            false => writeln!(f, "boundary   uid: peers with the broker's own uid are refused")?,
        }
        if let Some(sandbox) = self.sandbox {
            writeln!(f, "sandbox    {sandbox}")?;
        }
        if let Some(keeper) = self.keeper {
            writeln!(f, "keeper     {keeper}")?;
        }
        for name in &self.plaintext {
            writeln!(f, "plaintext  {name}: what its sessions say can be read on the way")?;
        }
        for name in &self.from_environment {
            writeln!(f, "env secret {name}: whoever started the broker has it too")?;
        }
        for line in &self.unreadable {
            writeln!(f, "selector   {line}")?;
        }
        Ok(())
    }
}

/// A record has a bound, and the log names each of them anyway.
fn brief(names: &[String]) -> String {
    const SHOWN: usize = 10;
    let shown = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(" ");
    match names.len().checked_sub(SHOWN) {
        None | Some(0) => shown,
        Some(more) => format!("{shown} and {more} more"),
    }
}
