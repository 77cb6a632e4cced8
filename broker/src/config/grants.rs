//! `[[grants]]` and selectors.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use super::parse::{At, gid, rate};
use super::{ConfigError, ConfiguredConnection, raw};
use crate::connection::ConnectionName;
use crate::peer::{Gid, Program, Uid, Unit, pidfd_is_available};
use crate::policy::{Pattern, Rule, RuleLimits, Selector};

pub(super) fn parse(
    grants: Vec<raw::Grant>,
    file: &Path,
    label: Option<&str>,
    connections: &BTreeMap<ConnectionName, ConfiguredConnection>,
) -> Result<Vec<Rule>, ConfigError> {
    let number = |(index, grant)| {
        let at = At::new(file, format!("grants[{index}]"));
        let name = label.map_or_else(|| at.key.clone(), |label| format!("{label}:{}", at.key));
        rule(grant, name, &at, connections)
    };
    grants.into_iter().enumerate().map(number).collect()
}

fn rule(
    grant: raw::Grant,
    unnamed: String,
    at: &At<'_>,
    configured: &BTreeMap<ConnectionName, ConfiguredConnection>,
) -> Result<Rule, ConfigError> {
    let connections_at = at.below("connections");
    if grant.connections.is_empty() {
        return Err(connections_at.wrong("names no connection, so the grant grants nothing"));
    }
    let connections = grant.connections.iter().map(|text| {
        let pattern = Pattern::parse(text).ok_or_else(|| {
            connections_at
                .wrong(format!("{text:?} is not a name, nor a name's beginning and \"*\""))
        })?;
        match pattern.single() {
            Some(name) if !configured.contains_key(name) => Err(connections_at.wrong(format!(
                "there is no connection {name:?}: add [connections.{name}], or correct it"
            ))),
            _ => Ok(pattern),
        }
    });
    let connections = connections.collect::<Result<Vec<_>, _>>()?;
    if grant.may.is_empty() {
        return Err(at
            .below("may")
            .wrong("allows nothing: name some of list, issue, open, ambient"));
    }
    let max_ttl = grant.max_ttl.as_deref();
    Ok(Rule {
        name: grant.name.unwrap_or(unnamed),
        peer: selector(grant.peer, &at.below("peer"))?,
        connections,
        actions: grant.may.into_iter().collect(),
        redeemers: selectors(grant.redeemers, &at.below("redeemers"))?,
        limits: RuleLimits {
            max_ttl: match max_ttl {
                None => None,
                given => Some(at.below("max_ttl").duration(given, Duration::ZERO)?),
            },
            max_sessions: match grant.max_sessions {
                Some(0) => return Err(at.below("max_sessions").wrong("must be at least 1")),
                given => given,
            },
            rate_per_second: rate(grant.rate_per_second, &at.below("rate_per_second"))?,
        },
    })
}

pub(super) fn selectors(
    given: Vec<raw::Selector>,
    at: &At<'_>,
) -> Result<Vec<Selector>, ConfigError> {
    let number = |(index, raw)| selector(raw, &At::new(at.file, format!("{}[{index}]", at.key)));
    given.into_iter().enumerate().map(number).collect()
}

fn selector(given: raw::Selector, at: &At<'_>) -> Result<Selector, ConfigError> {
    let uid = match (given.uid, given.user) {
        (Some(_), Some(_)) => return Err(at.wrong("give uid or user, not both")),
        (Some(uid), None) => Some(Uid::from_raw(uid)),
        (None, Some(name)) => Some(user(&name, at)?),
        (None, None) => None,
    };
    if let Some(uid) = uid.filter(|uid| uid.is_overflow()) {
        return Err(at.wrong(format!("uid {uid} stands for every user that is not mapped, and is never matched: give the workload a uid of its own")));
    }
    let group = given.group.map(|group| gid(group, &at.below("group"))).transpose()?;
    let gid = given.gid.map(Gid::from_raw);
    if let Some(gid) = [gid, group].into_iter().flatten().find(|gid| gid.is_overflow()) {
        return Err(at.wrong(format!("gid {gid} stands for every group that is not mapped, and is never matched: give the workload a group of its own")));
    }
    // Whoever runs a program chooses what it loads and is told: it narrows a uid down, no more.
    let narrowed = [("exe", given.exe.is_some()), ("unit", given.unit.is_some())];
    if let Some((key, _)) = narrowed.into_iter().find(|(_, is_given)| *is_given) {
        let at = at.below(key);
        if uid.is_none() {
            return Err(
                at.wrong("narrows a uid down and is no identity: give uid or user beside it")
            );
        }
        if !pidfd_is_available() {
            return Err(at.wrong("cannot be believed on this kernel, which has no SO_PEERPIDFD (Linux 6.5 has it): select by uid, gid or group"));
        }
    }
    let exe = given.exe.map(|path| {
        let named = path.display().to_string();
        Program::at(path).map_err(|why| at.below("exe").wrong(format!("{named:?} {why}")))
    });
    let unit = given.unit.map(|text| {
        Unit::parse(&text).ok_or_else(|| {
            at.below("unit").wrong(format!(
                "{text:?} is not a system service: write it as \"app.service\", or with its slices as \"app.slice/app.service\""
            ))
        })
    });
    let selector = Selector { uid, gid, group, exe: exe.transpose()?, unit: unit.transpose()? };
    if selector == Selector::default() {
        return Err(at.wrong("selects nobody: give at least one of uid, user, gid, group"));
    }
    Ok(selector)
}

fn user(name: &str, at: &At<'_>) -> Result<Uid, ConfigError> {
    match nix::unistd::User::from_name(name) {
        Ok(Some(user)) => Ok(Uid::from_raw(user.uid.as_raw())),
        Ok(None) => Err(at.below("user").wrong(format!(
            "there is no user {name:?} on this machine: useradd it, or give its uid"
        ))),
        Err(error) => {
            Err(at.below("user").wrong(format!("cannot look up the user {name:?}: {error}")))
        }
    }
}
