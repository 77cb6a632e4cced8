//! What the configuration says at this moment. A reload replaces the whole, under the lock of the
//! state, so that whoever decides under that lock decides by one configuration.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::config::{Config, HandleLimits, Limits};
use crate::connection::{Connection, ConnectionName};
use crate::policy::Policy;

/// The reloadable part of the configuration, but for the credentials.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) connections: BTreeMap<ConnectionName, Arc<Connection>>,
    pub(crate) policy: Policy,
    pub(crate) handle_limits: HandleLimits,
    pub(crate) limits: Limits,
}

impl Settings {
    /// Takes the grants out of `config`.
    pub(crate) fn of(config: &mut Config) -> Self {
        let connections = config.connections.iter();
        let connections = connections
            .map(|(name, configured)| (name.clone(), Arc::clone(&configured.connection)));
        Self {
            connections: connections.collect(),
            policy: config.take_policy(),
            handle_limits: config.handles,
            limits: config.limits,
        }
    }
}

impl Settings {
    /// What is different in `new`, one line each, for people.
    pub(super) fn changes(&self, new: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        for name in self.connections.keys().filter(|name| !new.connections.contains_key(*name)) {
            lines.push(format!("connection {name} is gone"));
        }
        for (name, connection) in &new.connections {
            match self.connections.get(name) {
                None => lines.push(format!("connection {name} is new")),
                Some(old) if !old.leads_to_same(connection) => {
                    lines
                        .push(format!("connection {name} leads to {}", connection.masked_target()));
                }
                Some(_same) => {}
            }
        }
        if self.policy != new.policy {
            lines.push("the grants have changed".to_owned());
        }
        if self.limits != new.limits || self.handle_limits != new.handle_limits {
            lines.push("the limits have changed".to_owned());
        }
        lines
    }
}
