//! `[[grants]]` and selectors.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use super::parse::{At, gid, rate};
use super::{ConfigError, ConfiguredConnection, raw};
use crate::connection::ConnectionName;
use crate::peer::{Gid, Uid};
use crate::policy::{Pattern, Rule, RuleLimits, Selector};

pub(super) fn parse(
    grants: Vec<raw::Grant>,
    file: &Path,
    connections: &BTreeMap<ConnectionName, ConfiguredConnection>,
) -> Result<Vec<Rule>, ConfigError> {
    let number = |(index, grant)| {
        rule(grant, index, &At::new(file, format!("grants[{index}]")), connections)
    };
    grants.into_iter().enumerate().map(number).collect()
}

fn rule(
    grant: raw::Grant,
    index: usize,
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
        name: grant.name.unwrap_or_else(|| format!("grants[{index}]")),
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
    if uid == Some(Uid::OVERFLOW) {
        return Err(at.wrong("uid 65534 stands for every user that is not mapped, and is never matched: give the workload a uid of its own"));
    }
    let selector = Selector {
        uid,
        gid: given.gid.map(Gid::from_raw),
        group: given.group.map(|group| gid(group, &at.below("group"))).transpose()?,
    };
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
