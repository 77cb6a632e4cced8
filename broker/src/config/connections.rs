//! `[connections.NAME]`, and the same from `connections.json`.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::parse::At;
use super::{ConfigError, ConfiguredConnection, raw};
use crate::connection::{Connection, ConnectionName, Host, StartupFilter, Tls};
use crate::policy::Pattern;
use crate::source::{Source, SourceKind, UsernameSource};
use crate::upstream::tls;

const DEFAULT_PORT: u16 = 5432;

pub(super) fn parse(
    given: BTreeMap<String, raw::Connection>,
    file: &Path,
) -> Result<BTreeMap<ConnectionName, ConfiguredConnection>, ConfigError> {
    let mut parsed = BTreeMap::new();
    for (name, raw) in given {
        let at = At::new(file, format!("connections.{name}"));
        let name = ConnectionName::parse(&name).ok_or_else(|| {
            at.wrong("is not a name: use letters, digits, '_', '.' and '-', at most 63, a letter or digit first")
        })?;
        parsed.insert(name.clone(), connection(name, raw, &at)?);
    }
    Ok(parsed)
}

fn connection(
    name: ConnectionName,
    raw: raw::Connection,
    at: &At<'_>,
) -> Result<ConfiguredConnection, ConfigError> {
    match raw.r#type.as_deref() {
        Some("postgresql") => {}
        Some(other) => {
            return Err(at
                .below("type")
                .wrong(format!("{other:?} is not supported: use \"postgresql\"")));
        }
        None => return Err(at.below("type").wrong("is missing: write type = \"postgresql\"")),
    }
    let host = host(raw.host, raw.port.unwrap_or(DEFAULT_PORT), &at.below("host"))?;
    let database = raw
        .database
        .ok_or_else(|| at.below("database").wrong("is missing: say which database to log in to"))?;
    // A server takes names of up to 63 bytes, and NUL would end the name early on the wire.
    if database.is_empty() || database.len() > 63 || database.contains('\0') {
        return Err(at.below("database").wrong("is not a database name of 1 to 63 bytes"));
    }
    let databases = raw.databases.iter().map(|text| {
        let wrong = || {
            at.below("databases")
                .wrong(format!("{text:?} is not a name, nor a name's beginning and \"*\""))
        };
        Pattern::parse(text).ok_or_else(wrong)
    });
    let databases = databases.collect::<Result<Vec<_>, _>>()?;
    let startup = match raw.startup {
        None => {
            StartupFilter::Only(StartupFilter::DEFAULT.iter().map(ToString::to_string).collect())
        }
        Some(names) if names.iter().any(|name| name == "*") => StartupFilter::Any,
        Some(names) => StartupFilter::Only(names),
    };
    let tls = tls(raw.tls, &host, &at.below("tls"))?;
    let source = source(raw.secret, raw.credentials_env, raw.username, at)?;
    let replication = raw.replication;
    let connection = Connection { name, host, database, databases, tls, startup, replication };
    Ok(ConfiguredConnection { connection: Arc::new(connection), source })
}

fn host(given: Option<String>, port: u16, at: &At<'_>) -> Result<Host, ConfigError> {
    let host = given.ok_or_else(|| {
        at.wrong("is missing: give a name, an address, or the directory of a Unix socket")
    })?;
    if host.starts_with('/') {
        return Ok(Host::Unix { directory: PathBuf::from(host), port });
    }
    if host.is_empty()
        || host.len() > 253
        || host.contains(|c: char| c.is_whitespace() || c.is_control() || c == '/' || c == ',')
    {
        return Err(at.wrong("is not a host name, an address, or the directory of a Unix socket"));
    }
    Ok(Host::Tcp { host, port })
}

fn tls(given: Option<raw::Tls>, host: &Host, at: &At<'_>) -> Result<Tls, ConfigError> {
    let given = given.unwrap_or_default();
    match (given.mode.as_deref(), host) {
        // On a Unix socket there is no TLS; asking for it by name is a mistake worth telling.
        (None | Some("disable"), Host::Unix { .. }) | (Some("disable"), Host::Tcp { .. }) => {
            if given.ca_file.is_some() {
                return Err(at
                    .below("ca_file")
                    .wrong("is of no use without TLS: set mode = \"verify-full\", or remove it"));
            }
            Ok(Tls::Disable)
        }
        (Some(_), Host::Unix { .. }) => {
            Err(at.below("mode").wrong("a Unix socket has no TLS: use \"disable\""))
        }
        (None | Some("verify-full"), Host::Tcp { host, .. }) => {
            let file_at = at.below("ca_file");
            let config = tls::client_config(given.ca_file.as_deref())
                .map_err(|why| file_at.wrong(why.to_string()))?;
            let name = tls::server_name(host).map_err(|why| at.wrong(why.to_string()))?;
            Ok(Tls::VerifyFull { config, name, ca_file: given.ca_file })
        }
        (Some(other), Host::Tcp { .. }) => Err(at
            .below("mode")
            .wrong(format!("{other:?} is not supported: use \"verify-full\" or \"disable\""))),
    }
}

fn source(
    secret: Option<raw::Secret>,
    credentials_env: Option<String>,
    username: Option<raw::Username>,
    at: &At<'_>,
) -> Result<Source, ConfigError> {
    let secret_at = at.below("secret");
    let kind = match (secret, credentials_env) {
        (Some(raw::Secret { file: Some(file), env: None }), None) => {
            if !file.is_absolute() {
                return Err(secret_at.below("file").wrong("must be an absolute path"));
            }
            SourceKind::File(file)
        }
        (Some(raw::Secret { file: None, env: Some(variable) }), None) | (None, Some(variable)) => {
            if variable.is_empty() || variable.contains(['=', '\0']) {
                return Err(secret_at
                    .below("env")
                    .wrong("is not the name of an environment variable"));
            }
            SourceKind::Env(variable)
        }
        (None, None) => SourceKind::Absent,
        _ => {
            return Err(
                secret_at.wrong("names more or less than one source: give one of file, env")
            );
        }
    };
    let username = match username {
        None => UsernameSource::InSecret,
        Some(raw::Username::Text(name)) if !name.is_empty() && !name.contains('\0') => {
            UsernameSource::Named(name)
        }
        Some(raw::Username::Text(_)) => return Err(at.below("username").wrong("is empty")),
        Some(raw::Username::File { file }) if file.is_absolute() => UsernameSource::File(file),
        Some(raw::Username::File { .. }) => {
            return Err(at.below("username.file").wrong("must be an absolute path"));
        }
    };
    Ok(Source { key: format!("{}.secret", at.key), config: at.file.to_owned(), kind, username })
}
