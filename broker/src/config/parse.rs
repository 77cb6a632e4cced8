//! From what is written to what is meant, for the tables that are not connections or grants.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use super::merge::{Merged, Part};
use super::raw::{self, NameOrId, Sink};
use super::{
    ArenaConfig, AuditConfig, Config, ConfigError, ConfiguredConnection, HandleLimits, Limits,
    MetricsListen, Places, SigningKey, connections, file, grants,
};
use crate::connection::ConnectionName;
use crate::handle::LONGEST_SPAN;
use crate::peer::{Gid, Uid, learn_overflow_ids};
use crate::policy::{Action, Rule, Selector};
use crate::source::SourceKind;

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
/// More locked memory is a mistake, and its size could overflow.
const MAX_ARENA: usize = 1 << 30;
/// sun_path of unix(7), less the terminating NUL.
const MAX_SOCKET_PATH: usize = 107;
/// A smaller audit file would be rotated away before anybody has read it.
const MIN_AUDIT: u64 = 64 << 10;

/// Names the file and key that a value came from.
#[derive(Debug)]
pub(super) struct At<'a> {
    pub(super) file: &'a Path,
    pub(super) key: String,
}

impl<'a> At<'a> {
    pub(super) fn new(file: &'a Path, key: impl Into<String>) -> Self {
        Self { file, key: key.into() }
    }

    pub(super) fn below(&self, key: &str) -> Self {
        Self { file: self.file, key: format!("{}.{key}", self.key) }
    }

    pub(super) fn wrong(&self, message: impl Into<String>) -> ConfigError {
        ConfigError::Value {
            file: self.file.to_owned(),
            key: self.key.clone(),
            message: message.into(),
        }
    }

    pub(super) fn duration(
        &self,
        text: Option<&str>,
        default: Duration,
    ) -> Result<Duration, ConfigError> {
        let Some(text) = text else { return Ok(default) };
        let parsed = humantime::parse_duration(text)
            .ok()
            .filter(|span| !span.is_zero() && *span <= LONGEST_SPAN);
        parsed.ok_or_else(|| {
            self.wrong(
                "is not a span of time: of at most a year: write it as \"30s\", \"10m\" or \"12h\"",
            )
        })
    }

    pub(super) fn duration_or_zero(
        &self,
        text: Option<&str>,
        default: Duration,
    ) -> Result<Duration, ConfigError> {
        match text.map(humantime::parse_duration) {
            Some(Ok(Duration::ZERO)) => Ok(Duration::ZERO),
            _ => self.duration(text, default),
        }
    }

    fn size(&self, text: Option<&str>, default: usize) -> Result<usize, ConfigError> {
        let Some(text) = text else { return Ok(default) };
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (digits, unit) = text.split_at_checked(split).unwrap_or((text, ""));
        let factor = match unit.trim() {
            "" | "B" => Some(1),
            "KiB" => Some(1 << 10),
            "MiB" => Some(1 << 20),
            "GiB" => Some(1 << 30),
            _ => None,
        };
        let number = digits.parse::<usize>().ok();
        let bytes = number
            .zip(factor)
            .and_then(|(number, factor): (usize, usize)| number.checked_mul(factor));
        bytes.ok_or_else(|| self.wrong("is not a size: write it as \"64KiB\" or \"1MiB\""))
    }

    fn absolute(&self, path: Option<PathBuf>, default: &Path) -> Result<PathBuf, ConfigError> {
        let path = path.unwrap_or_else(|| default.to_owned());
        if path.is_absolute() { Ok(path) } else { Err(self.wrong("must be an absolute path")) }
    }

    fn positive(&self, number: Option<usize>, default: usize) -> Result<usize, ConfigError> {
        match number {
            Some(0) => Err(self.wrong("must be at least 1")),
            number => Ok(number.unwrap_or(default)),
        }
    }
}

pub(super) fn config(merged: Merged, places: &Places) -> Result<Config, ConfigError> {
    learn_overflow_ids();
    let Merged { raw, files, parts } = merged;
    let path = places.config.as_path();
    let at = |key: &str| files.at(key);
    let beside = at("broker.connections_file").file.parent().unwrap_or(Path::new("/")).to_owned();
    let connections_file = raw.broker.connections_file.map(|named| beside.join(named));

    let state_dir = at("broker.state_dir").absolute(raw.broker.state_dir, &places.state_dir)?;
    let own = Uid::own();
    let operators = match raw.broker.operators {
        None => [Uid::from_raw(0), own]
            .map(|uid| Selector { uid: Some(uid), ..Selector::default() })
            .into(),
        Some(given) => grants::selectors(given, &at("broker.operators"))?,
    };
    let audit = audit(raw.audit, &at("audit"), &state_dir)?;

    let handles = HandleLimits {
        default_ttl: at("handles.default_ttl")
            .duration(raw.handles.default_ttl.as_deref(), 30 * MINUTE)?,
        max_ttl: at("handles.max_ttl").duration(raw.handles.max_ttl.as_deref(), 12 * HOUR)?,
        max_lifetime: at("handles.max_lifetime")
            .duration(raw.handles.max_lifetime.as_deref(), 12 * HOUR)?,
    };
    if handles.default_ttl > handles.max_ttl {
        return Err(at("handles.default_ttl").wrong("is longer than handles.max_ttl"));
    }

    let (configured, rules) = connections_and_grants(parts, connections_file.as_deref())?;

    let runtime_dir =
        at("broker.runtime_dir").absolute(raw.broker.runtime_dir, &places.runtime_dir)?;
    let mut admin_dir = runtime_dir.clone().into_os_string();
    admin_dir.push(credbroker_proto::ADMIN_DIR_SUFFIX);
    let admin_dir = at("broker.admin_dir").absolute(raw.broker.admin_dir, Path::new(&admin_dir))?;
    if admin_dir.starts_with(&runtime_dir) {
        return Err(at("broker.admin_dir").wrong(
            "lies in broker.runtime_dir, which workloads can see: give it a directory of its own",
        ));
    }

    need_secrets(&configured, &rules)?;

    Ok(Config {
        file: path.to_owned(),
        metrics: raw
            .metrics
            .listen
            .map(|text| metrics_listen(&text, &runtime_dir, &at("metrics.listen")))
            .transpose()?,
        runtime_dir,
        admin_dir,
        state_dir,
        socket_group: raw
            .broker
            .socket_group
            .map(|group| gid(group, &at("broker.socket_group")))
            .transpose()?,
        drain: at("broker.drain").duration(raw.broker.drain.as_deref(), Duration::from_secs(10))?,
        allow_own_uid: raw.broker.allow_own_uid.unwrap_or(places.user_mode),
        arena: ArenaConfig {
            backend: raw.arena.backend,
            capacity: {
                let at = at("arena.capacity");
                let bytes = at.size(raw.arena.capacity.as_deref(), 1 << 20)?;
                if bytes > MAX_ARENA {
                    return Err(at.wrong("is more than 1GiB, and secrets are small"));
                }
                bytes
            },
        },
        audit,
        handles,
        limits: Limits {
            sessions: at("limits.sessions").positive(raw.limits.sessions, 100)?,
            rate_per_second: rate(raw.limits.rate_per_second, &at("limits.rate_per_second"))?
                .unwrap_or(200),
            queue_timeout: at("limits.queue_timeout")
                .duration_or_zero(raw.limits.queue_timeout.as_deref(), Duration::from_secs(1))?,
            handles: at("limits.handles").positive(raw.limits.handles, 10_000)?,
        },
        rules,
        operators,
        connections: configured,
        connections_file,
    })
}

/// The sum of all files. A grant may be for a connection of any of them.
fn connections_and_grants(
    parts: Vec<Part>,
    connections_file: Option<&Path>,
) -> Result<(BTreeMap<ConnectionName, ConfiguredConnection>, Vec<Rule>), ConfigError> {
    let mut configured = BTreeMap::new();
    let mut came_from: BTreeMap<ConnectionName, PathBuf> = BTreeMap::new();
    let mut add = |given, file: &Path| {
        for (name, more) in connections::parse(given, file)? {
            if let Some(first) = came_from.insert(name.clone(), file.to_owned()) {
                return Err(At::new(file, format!("connections.{name}"))
                    .wrong(format!("is also in {}: keep one of them", first.display())));
            }
            configured.insert(name, more);
        }
        Ok(())
    };
    let mut given = Vec::new();
    for Part { file, label, connections, grants } in parts {
        add(connections, &file)?;
        given.push((file, label, grants));
    }
    if let Some(json) = connections_file {
        add(file::read_connections(json)?.connections, json)?;
    }
    let mut rules = Vec::new();
    for (file, label, grants) in given {
        rules.extend(grants::parse(grants, &file, label.as_deref(), &configured)?);
    }
    Ok((configured, rules))
}

/// A connection without a secret is one for peers that bring their own, if any may.
fn need_secrets(
    connections: &BTreeMap<ConnectionName, ConfiguredConnection>,
    rules: &[Rule],
) -> Result<(), ConfigError> {
    let registers = |name: &ConnectionName| {
        let mut those = rules.iter().filter(|rule| rule.actions.contains(Action::Register));
        those.any(|rule| rule.connections.iter().any(|pattern| pattern.matches(name.as_str())))
    };
    for (name, configured) in connections {
        let source = &configured.source;
        if source.kind == SourceKind::Absent && !registers(name) {
            return Err(At::new(&source.config, source.key.clone()).wrong(
                "is missing: write secret = { file = \"…\" } or { store = true }, or let a grant register",
            ));
        }
    }
    Ok(())
}

/// `ADDRESS:PORT`, or `unix:` and a path.
fn metrics_listen(
    text: &str,
    runtime_dir: &Path,
    at: &At<'_>,
) -> Result<MetricsListen, ConfigError> {
    let Some(path) = text.strip_prefix("unix:") else {
        let address = text.parse().map(MetricsListen::Tcp);
        return address.map_err(|_not_an_address| {
            at.wrong("is no address: write it as \"127.0.0.1:9464\" or \"unix:/run/credbroker-metrics/metrics.sock\"")
        });
    };
    let path = at.absolute(Some(path.into()), Path::new("/"))?;
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(at.wrong("must not go up with \"..\""));
    }
    // Who may enter there may not know which connections there are; metrics name them all.
    if path.starts_with(runtime_dir) {
        return Err(at.wrong(
            "lies in broker.runtime_dir, which workloads enter: choose a directory of its own",
        ));
    }
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(at.wrong("is longer than the 107 bytes that a socket's path may have"));
    }
    Ok(MetricsListen::Unix(path))
}

fn audit(raw: raw::Audit, at: &At<'_>, state_dir: &Path) -> Result<AuditConfig, ConfigError> {
    let sinks = raw.sinks.unwrap_or_else(|| vec![Sink::File]);
    if sinks.is_empty() {
        return Err(at
            .below("sinks")
            .wrong("must name \"file\" or \"stdout\": without an audit log nothing is granted"));
    }
    let path = at.below("path").absolute(raw.path, &state_dir.join("audit.jsonl"))?;
    if path.file_name().is_none() || [Some("pub"), Some("new")].contains(&extension(&path)) {
        return Err(at
            .below("path")
            .wrong("must name a file, and not one that ends with .pub or .new"));
    }
    let size_at = at.below("max_size");
    let max_size = size_at.size(raw.max_size.as_deref(), 256 << 20)? as u64;
    if max_size < MIN_AUDIT {
        return Err(size_at.wrong("is less than 64KiB, which a few hours fill"));
    }
    let keep = raw.keep.unwrap_or(8);
    if !(1..=1000).contains(&keep) {
        return Err(at.below("keep").wrong("must be from 1 to 1000"));
    }
    Ok(AuditConfig {
        file: sinks.contains(&Sink::File).then_some(path),
        stdout: sinks.contains(&Sink::Stdout),
        durability: raw.durability,
        max_size,
        keep,
        signing_key: raw
            .signing_key
            .map(|key| signing_key(key, &at.below("signing_key")))
            .transpose()?,
    })
}

fn extension(path: &Path) -> Option<&str> {
    path.extension().and_then(|extension| extension.to_str())
}

pub(super) fn signing_key(raw: raw::SigningKey, at: &At<'_>) -> Result<SigningKey, ConfigError> {
    match (raw.file, raw.systemd) {
        (Some(file), None) if file.is_absolute() => Ok(SigningKey::File(file)),
        (Some(_), None) => Err(at.below("file").wrong("must be an absolute path")),
        (None, Some(name)) => {
            let at = at.below("systemd");
            if name.is_empty() || name.contains(['/', '\0']) || name.starts_with('.') {
                return Err(at.wrong("is not the name of a credential"));
            }
            let directory = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
            let directory = directory.filter(|directory| directory.is_absolute()).ok_or_else(|| {
                at.wrong(format!(
                    "needs a credential of the service manager: add LoadCredential={name}:PATH to the unit"
                ))
            })?;
            Ok(SigningKey::Systemd { path: directory.join(&name), name })
        }
        _ => Err(at.wrong("names more or less than one source: give one of file, systemd")),
    }
}

pub(super) fn rate(number: Option<u32>, at: &At<'_>) -> Result<Option<u32>, ConfigError> {
    if number == Some(0) { Err(at.wrong("must be at least 1")) } else { Ok(number) }
}

pub(super) fn gid(group: NameOrId, at: &At<'_>) -> Result<Gid, ConfigError> {
    match group {
        NameOrId::Id(gid) => Ok(Gid::from_raw(gid)),
        NameOrId::Name(name) => match nix::unistd::Group::from_name(&name) {
            Ok(Some(group)) => Ok(Gid::from_raw(group.gid.as_raw())),
            Ok(None) => Err(at.wrong(format!(
                "there is no group {name:?} on this machine: groupadd it, or give its number"
            ))),
            Err(error) => Err(at.wrong(format!("cannot look up the group {name:?}: {error}"))),
        },
    }
}
