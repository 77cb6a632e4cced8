//! Configuration files for the fuzzer, but for what has the machine look something up.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use super::file::Written;
use super::raw::{NameOrId, Raw, Selector};
use super::{Config, ConfigError, Places, file, merge, parse};

/// What is shown of a configuration is a configuration, which is shown as the same.
#[must_use]
pub fn config(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let Some(config) = parsed(text) else { return false };
    let shown = config.show();
    let again = parsed(&shown).map(|again| again.show());
    assert_eq!(again.as_deref(), Some(&*shown));
    true
}

/// `None` for what is wrong, and for what cannot be decided by the text alone.
fn parsed(text: &str) -> Option<Config> {
    let places = Places {
        config: PathBuf::from("/nonexistent/broker.toml"),
        runtime_dir: PathBuf::from("/run/credbroker"),
        state_dir: PathBuf::from("/var/lib/credbroker"),
        user_mode: false,
    };
    let mut written = file::parse_toml(text, &places.config).map_err(|error| told(&error)).ok()?;
    if looks_up(&written.raw) {
        return None;
    }
    without_tls(&mut written);
    let merged = merge::merge(&places.config, vec![written]).map_err(|error| told(&error)).ok()?;
    parse::config(merged, &places).map_err(|error| told(&error)).ok()
}

/// Faults are one line, whatever is in the file.
fn told(error: &ConfigError) {
    let said = error.to_string();
    assert!(!said.is_empty(), "{error:?}");
}

/// Whether it names users, groups, programs or other files.
fn looks_up(raw: &Raw) -> bool {
    let named = |group: &Option<NameOrId>| matches!(group, Some(NameOrId::Name(_)));
    let selector = |one: &Selector| one.user.is_some() || named(&one.group) || one.exe.is_some();
    let Raw { broker, audit, connections, grants, .. } = raw;
    named(&broker.socket_group)
        || broker.connections_file.is_some()
        || broker.operators.iter().flatten().any(selector)
        || audit.signing_key.as_ref().is_some_and(|key| key.systemd.is_some())
        || grants.iter().any(|grant| selector(&grant.peer) || grant.redeemers.iter().any(selector))
        || connections.values().any(|one| {
            one.secret.as_ref().is_some_and(|secret| secret.exec.is_some())
                || named(&one.peer_user)
                || one.tls.as_ref().is_some_and(|tls| tls.ca_file.is_some())
        })
}

/// Verification reads the machine's certificates, hundreds of them, for each connection.
fn without_tls(written: &mut Written) {
    for connection in written.raw.connections.values_mut() {
        let hosts = connection.host.iter().flat_map(|hosts| hosts.all());
        if hosts.into_iter().any(|host| Path::new(host).is_absolute()) {
            continue;
        }
        let tls = connection.tls.get_or_insert_default();
        if tls.mode.as_deref().is_none_or(|mode| mode == "verify-full") {
            tls.mode = Some("disable".to_owned());
        }
    }
}
