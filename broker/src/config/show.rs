//! The effective configuration as text: defaults filled in, names resolved, nothing secret.

#![forbid(unsafe_code)]

use std::time::Duration;

use toml::{Table, Value};

use super::{Config, SigningKey};
use crate::connection::{Connection, Hosts, StartupFilter, Tls, UnixSocket};
use crate::policy::{Rule, Selector};
use crate::source::{SourceKind, UsernameSource};

pub(super) fn toml(config: &Config) -> String {
    let mut root = Table::new();
    root.insert("config_version".into(), 1.into());
    root.insert("broker".into(), broker(config).into());
    root.insert("arena".into(), arena(config).into());
    root.insert("audit".into(), audit(config).into());
    root.insert("handles".into(), handles(config).into());
    root.insert("limits".into(), limits(config).into());
    if let Some(listen) = &config.metrics {
        root.insert("metrics".into(), one("listen", listen.to_string()));
    }
    let connections = config
        .connections
        .iter()
        .map(|(name, configured)| (name.to_string(), connection(configured).into()));
    root.insert("connections".into(), Value::Table(connections.collect()));
    root.insert(
        "grants".into(),
        config.rules.iter().map(|rule| Value::Table(grant(rule))).collect::<Vec<_>>().into(),
    );
    // Every value above is one that TOML has.
    let text = ::toml::to_string(&root).unwrap_or_default();
    let warnings = config.unreadable().into_iter().map(|line| format!("# warning: {line}\n"));
    warnings.chain([text]).collect()
}

fn broker(config: &Config) -> Table {
    let mut table = Table::new();
    table.insert("runtime_dir".into(), config.runtime_dir.display().to_string().into());
    table.insert("admin_dir".into(), config.admin_dir.display().to_string().into());
    table.insert("state_dir".into(), config.state_dir.display().to_string().into());
    if let Some(gid) = config.socket_group {
        table.insert("socket_group".into(), number(gid.as_raw()));
    }
    table.insert(
        "operators".into(),
        config.operators.iter().map(|one| Value::Table(selector(one))).collect::<Vec<_>>().into(),
    );
    table.insert("drain".into(), span(config.drain));
    table.insert("allow_own_uid".into(), config.allow_own_uid.into());
    table
}

fn arena(config: &Config) -> Table {
    let mut table = Table::new();
    let backend = format!("{:?}", config.arena.backend);
    let backend = match backend.as_str() {
        "MemfdSecret" => "memfd_secret",
        "Memfd" => "memfd",
        _ => "auto",
    };
    table.insert("backend".into(), backend.into());
    table.insert("capacity".into(), format!("{}B", config.arena.capacity).into());
    table
}

fn audit(config: &Config) -> Table {
    let mut table = Table::new();
    let mut sinks: Vec<Value> = Vec::new();
    if let Some(file) = &config.audit.file {
        table.insert("path".into(), file.display().to_string().into());
        sinks.push("file".into());
    }
    if config.audit.stdout {
        sinks.push("stdout".into());
    }
    table.insert("sinks".into(), sinks.into());
    table.insert("durability".into(), config.audit.durability.to_string().into());
    table.insert("max_size".into(), format!("{}B", config.audit.max_size).into());
    table.insert("keep".into(), number(config.audit.keep));
    if let Some(key) = &config.audit.signing_key {
        table.insert("signing_key".into(), signing_key(key));
    }
    table
}

fn handles(config: &Config) -> Table {
    let mut table = Table::new();
    table.insert("default_ttl".into(), span(config.handles.default_ttl));
    table.insert("max_ttl".into(), span(config.handles.max_ttl));
    table.insert("max_lifetime".into(), span(config.handles.max_lifetime));
    table
}

fn limits(config: &Config) -> Table {
    let mut table = Table::new();
    table.insert("sessions".into(), number(config.limits.sessions));
    table.insert("rate_per_second".into(), number(config.limits.rate_per_second));
    table.insert("queue_timeout".into(), span(config.limits.queue_timeout));
    table.insert("handles".into(), number(config.limits.handles));
    table
}

fn connection(configured: &super::ConfiguredConnection) -> Table {
    let connection = &configured.connection;
    let mut table = Table::new();
    table.insert("type".into(), "postgresql".into());
    hosts(connection, &mut table);
    table.insert("database".into(), connection.database.clone().into());
    let databases: Vec<Value> =
        connection.databases.iter().map(|pattern| pattern.to_string().into()).collect();
    table.insert("databases".into(), databases.into());
    match &configured.source.username {
        UsernameSource::InSecret => {}
        UsernameSource::Named(name) => drop(table.insert("username".into(), name.clone().into())),
        UsernameSource::File(file) => {
            drop(table.insert("username".into(), one("file", file.display().to_string())))
        }
    }
    if let Some(secret) = secret(&configured.source.kind) {
        table.insert("secret".into(), secret);
    }
    table.insert("rotation_grace".into(), span(connection.rotation_grace));
    table.insert("warm".into(), i64::try_from(connection.warm).unwrap_or(i64::MAX).into());
    if let Some(age) = connection.max_session_age {
        table.insert("max_session_age".into(), span(age));
    }
    let mut tls = Table::new();
    match &connection.tls {
        Tls::Disable => drop(tls.insert("mode".into(), "disable".into())),
        Tls::Optional { first, .. } => {
            tls.insert("mode".into(), first.mode().into());
            tls.insert("insecure".into(), true.into());
        }
        Tls::Required { check, ca_file, negotiation, client, .. } => {
            tls.insert("mode".into(), check.mode().into());
            if let Some(file) = ca_file {
                tls.insert("ca_file".into(), file.display().to_string().into());
            }
            tls.insert("negotiation".into(), negotiation.name().into());
            if let Some(client) = client {
                tls.insert("cert_file".into(), client.cert_file.display().to_string().into());
                tls.insert("key".into(), signing_key(&client.key));
            }
        }
    }
    table.insert("tls".into(), tls.into());
    table.insert("credential".into(), configured.source.form.to_string().into());
    let methods: Vec<Value> =
        connection.login.methods().iter().map(|method| method.to_string().into()).collect();
    table.insert("require_auth".into(), methods.into());
    table.insert("channel_binding".into(), connection.login.binding.to_string().into());
    let startup: Vec<Value> = match &connection.startup {
        StartupFilter::Any => vec!["*".into()],
        StartupFilter::Only(names) => names.iter().map(|name| name.clone().into()).collect(),
    };
    table.insert("startup".into(), startup.into());
    table.insert("replication".into(), connection.replication.into());
    table.insert("insecure_handoff".into(), connection.insecure_handoff.into());
    table
}

fn signing_key(key: &SigningKey) -> Value {
    match key {
        SigningKey::File(file) => one("file", file.display().to_string()),
        SigningKey::Systemd { name, .. } => one("systemd", name.clone()),
    }
}

fn list(values: impl Iterator<Item = Value>) -> Value {
    Value::Array(values.collect())
}

/// One host with its port beside it; each of several with its own.
fn hosts(connection: &Connection, table: &mut Table) {
    let directory = |socket: &UnixSocket| Value::from(socket.directory.display().to_string());
    let (host, port): (Value, Option<u16>) = match &connection.hosts {
        Hosts::Tcp(hosts) => match hosts.as_slice() {
            [one] => (one.host.clone().into(), Some(one.port)),
            several => (list(several.iter().map(|one| one.to_string().into())), None),
        },
        Hosts::Unix { sockets, server } => {
            if let Some(uid) = server {
                table.insert("peer_user".into(), number(uid.as_raw()));
            }
            let port = sockets.first().map(|socket| socket.port);
            match sockets.as_slice() {
                [one] => (directory(one), port),
                several => (list(several.iter().map(directory)), port),
            }
        }
    };
    table.insert("host".into(), host);
    if let Some(port) = port {
        table.insert("port".into(), number(port));
    }
    table.insert("connect_timeout".into(), span(connection.connect_timeout));
}

fn secret(kind: &SourceKind) -> Option<Value> {
    Some(match kind {
        SourceKind::File(file) => one("file", file.display().to_string()),
        SourceKind::Dir(dir) => one("dir", dir.display().to_string()),
        SourceKind::Env(variable) => one("env", variable.clone()),
        SourceKind::Systemd(name) => one("systemd", name.clone()),
        SourceKind::Exec { command, refresh } => {
            let mut table = Table::new();
            let argv: Vec<Value> = command.argv.iter().cloned().map(Value::from).collect();
            table.insert("exec".into(), argv.into());
            table.insert("refresh".into(), span(*refresh));
            table.insert("timeout".into(), span(command.timeout));
            table.into()
        }
        SourceKind::Store => Value::Table(Table::from_iter([("store".to_owned(), true.into())])),
        SourceKind::Absent => return None,
    })
}

fn grant(rule: &Rule) -> Table {
    let mut table = Table::new();
    table.insert("name".into(), rule.name.clone().into());
    table.insert("peer".into(), selector(&rule.peer).into());
    let connections: Vec<Value> =
        rule.connections.iter().map(|pattern| pattern.to_string().into()).collect();
    table.insert("connections".into(), connections.into());
    table.insert(
        "may".into(),
        rule.actions
            .iter()
            .map(|action| Value::from(action.to_string()))
            .collect::<Vec<_>>()
            .into(),
    );
    if !rule.redeemers.is_empty() {
        table.insert(
            "redeemers".into(),
            rule.redeemers.iter().map(|one| Value::Table(selector(one))).collect::<Vec<_>>().into(),
        );
    }
    if let Some(ttl) = rule.limits.max_ttl {
        table.insert("max_ttl".into(), span(ttl));
    }
    if let Some(sessions) = rule.limits.max_sessions {
        table.insert("max_sessions".into(), number(sessions));
    }
    if let Some(rate) = rule.limits.rate_per_second {
        table.insert("rate_per_second".into(), number(rate));
    }
    table
}

fn selector(selector: &Selector) -> Table {
    let parts = [
        ("uid", selector.uid.map(|uid| uid.as_raw())),
        ("gid", selector.gid.map(|gid| gid.as_raw())),
        ("group", selector.group.map(|gid| gid.as_raw())),
    ];
    let ids = parts.into_iter().filter_map(|(key, id)| Some((key.to_owned(), number(id?))));
    let mut table: Table = ids.collect();
    if let Some(exe) = &selector.exe {
        table.insert("exe".into(), exe.to_string().into());
    }
    if let Some(unit) = &selector.unit {
        table.insert("unit".into(), unit.to_string().into());
    }
    table
}

fn one(key: &str, value: String) -> Value {
    Value::Table(Table::from_iter([(key.to_owned(), value.into())]))
}

fn span(span: Duration) -> Value {
    humantime::format_duration(span).to_string().into()
}

fn number(number: impl TryInto<i64>) -> Value {
    Value::Integer(number.try_into().unwrap_or(i64::MAX))
}
