//! `[connections.NAME]`, and the same from `connections.json`.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::parse::At;
use super::{ConfigError, ConfiguredConnection, client_certificate, hosts, login, raw};
use crate::connection::{
    Check, Connection, ConnectionName, First, Hosts, StartupFilter, TcpHost, Tls,
};
use crate::credential::SecretForm;
use crate::policy::Pattern;
use crate::source::{ExecSource, Source, SourceKind, UsernameSource, is_systemd_name};
use crate::trusted::distrust;
use crate::upstream::tls;

const DEFAULT_REFRESH: Duration = Duration::from_secs(600);
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
const DEFAULT_GRACE: Duration = Duration::from_secs(300);
/// A start waits for its programs, and whoever starts the broker waits for the start.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(300);
/// Each is a slot of the server's.
const MOST_WARM: usize = 64;
const MOST_ARGUMENTS: usize = 64;
const LONGEST_COMMAND: usize = 16 * 1024;

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
    let hosts = hosts::hosts(raw.host, raw.port, raw.peer_user, at)?;
    let connect_timeout =
        hosts::connect_timeout(raw.connect_timeout.as_deref(), &at.below("connect_timeout"))?;
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
    let tls = tls(raw.tls, &hosts, &at.below("tls"))?;
    let source = source(raw.secret, raw.credentials_env, raw.username, raw.credential, at)?;
    let link = login::link(&hosts, &tls);
    let login = login::rules(raw.require_auth, raw.channel_binding, raw.credential, link, at)?;
    let (replication, insecure_handoff) = (raw.replication, raw.insecure_handoff);
    let rotation_grace = at
        .below("rotation_grace")
        .duration_or_zero(raw.rotation_grace.as_deref(), DEFAULT_GRACE)?;
    let max_session_age = match raw.max_session_age.as_deref() {
        None => None,
        given => Some(at.below("max_session_age").duration(given, Duration::ZERO)?),
    };
    let warm = usize::from(raw.warm);
    if warm > MOST_WARM {
        return Err(at.below("warm").wrong(format!("must be at most {MOST_WARM}")));
    }
    let connection = Connection {
        name,
        hosts,
        connect_timeout,
        database,
        databases,
        tls,
        login,
        startup,
        replication,
        insecure_handoff,
        takes_registrations: source.kind == SourceKind::Absent,
        rotation_grace,
        max_session_age,
        warm,
    };
    Ok(ConfiguredConnection { connection: Arc::new(connection), source: Arc::new(source) })
}

fn tls(given: Option<raw::Tls>, hosts: &Hosts, at: &At<'_>) -> Result<Tls, ConfigError> {
    let given = given.unwrap_or_default();
    let mode_at = at.below("mode");
    if given.insecure && !matches!(given.mode.as_deref(), Some("allow" | "prefer")) {
        return Err(at.below("insecure").wrong("goes with mode = \"allow\" and \"prefer\" only"));
    }
    match (given.mode.as_deref(), hosts) {
        // On a Unix socket there is no TLS; asking for it by name is a mistake worth telling.
        (None | Some("disable"), Hosts::Unix { .. }) | (Some("disable"), Hosts::Tcp(_)) => {
            if given.ca_file.is_some() {
                return Err(at
                    .below("ca_file")
                    .wrong("is of no use without TLS: set mode = \"verify-full\", or remove it"));
            }
            client_certificate::none_without_tls(&given, at)?;
            Ok(Tls::Disable)
        }
        (Some(_), Hosts::Unix { .. }) => {
            Err(mode_at.wrong("a Unix socket has no TLS: use \"disable\""))
        }
        (Some("allow"), Hosts::Tcp(hosts)) => optional(First::Plaintext, &given, hosts, at),
        (Some("prefer"), Hosts::Tcp(hosts)) => optional(First::Tls, &given, hosts, at),
        (mode, Hosts::Tcp(hosts)) => {
            let check = match (mode, &given.ca_file) {
                (None | Some("verify-full"), _) => Check::ChainAndName,
                // As libpq's sslrootcert=system: for another name, a public root signs for anybody.
                (Some("verify-ca"), None) => {
                    return Err(at.below("ca_file").wrong(
                        "is missing: verify-ca checks no name, and public roots sign for anybody; \
                         name your own CA's file, or use \"verify-full\"",
                    ));
                }
                // libpq: with roots at hand, require is verify-ca.
                (Some("verify-ca" | "require"), Some(_)) => Check::Chain,
                (Some("require"), None) => Check::Nothing,
                (Some(other), _) => {
                    return Err(mode_at.wrong(format!(
                        "{other:?} is not supported: use \"verify-full\", \"verify-ca\", \
                         \"require\" or \"disable\""
                    )));
                }
            };
            let file_at = at.below("ca_file");
            let negotiation = client_certificate::negotiation(given.negotiation.as_deref(), at)?;
            let client = client_certificate::read(given.cert_file, given.key, at)?;
            let (config, roots) =
                tls::client_config(check, given.ca_file.as_deref(), client.as_ref())
                    .map_err(|why| file_at.wrong(why.to_string()))?;
            certifiable(hosts, at)?;
            let ca_file = given.ca_file;
            Ok(Tls::Required { check, config, ca_file, roots, negotiation, client })
        }
    }
}

/// `allow` and `prefer`, for those who say that they know what these are.
fn optional(
    first: First,
    given: &raw::Tls,
    hosts: &[TcpHost],
    at: &At<'_>,
) -> Result<Tls, ConfigError> {
    let mode = first.mode();
    if !given.insecure {
        return Err(at.below("mode").wrong(format!(
            "{mode:?} lets whoever is on the way turn TLS off: use \"verify-full\", or \"disable\" if \
             plaintext is meant; if it must be, write insecure = true beside it"
        )));
    }
    if given.ca_file.is_some() {
        return Err(at.below("ca_file").wrong(format!(
            "is of no use with mode = {mode:?}, in which no certificate is asked for: use \"verify-full\""
        )));
    }
    client_certificate::none_without_tls(given, at)?;
    certifiable(hosts, at)?;
    let (config, _no_roots) = tls::client_config(Check::Nothing, None, None)
        .map_err(|why| at.below("mode").wrong(why.to_string()))?;
    Ok(Tls::Optional { first, config })
}

/// Whether TLS can name each of the hosts.
fn certifiable(hosts: &[TcpHost], at: &At<'_>) -> Result<(), ConfigError> {
    for TcpHost { host, .. } in hosts {
        tls::server_name(host).map_err(|why| at.wrong(why.to_string()))?;
    }
    Ok(())
}

fn source(
    secret: Option<raw::Secret>,
    credentials_env: Option<String>,
    username: Option<raw::Username>,
    form: SecretForm,
    at: &At<'_>,
) -> Result<Source, ConfigError> {
    let secret_at = at.below("secret");
    let kind = match (secret, credentials_env) {
        (None, None) => SourceKind::Absent,
        (Some(secret), None) => source_kind(secret, &secret_at)?,
        (None, Some(variable)) => SourceKind::Env(self::variable(variable, &secret_at)?),
        (Some(_), Some(_)) => return Err(secret_at.wrong(ONE_SOURCE)),
    };
    if kind == SourceKind::Absent && username.is_some() {
        return Err(at.below("username").wrong("is of no use without a secret"));
    }
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
    let (key, config) = (format!("{}.secret", at.key), at.file.to_owned());
    Ok(Source { key, config, kind, username, form })
}

const ONE_SOURCE: &str =
    "names more or less than one source: give one of file, dir, env, systemd, exec, store";

fn source_kind(secret: raw::Secret, at: &At<'_>) -> Result<SourceKind, ConfigError> {
    let raw::Secret { file, dir, env, systemd, exec, store, refresh, timeout } = secret;
    if exec.is_none() {
        for (key, given) in [("refresh", &refresh), ("timeout", &timeout)] {
            if given.is_some() {
                return Err(at.below(key).wrong("goes with exec only"));
            }
        }
    }
    match (file, dir, env, systemd, exec, store) {
        (Some(file), None, None, None, None, None) => {
            Ok(SourceKind::File(absolute(file, &at.below("file"))?))
        }
        (None, Some(dir), None, None, None, None) => {
            Ok(SourceKind::Dir(absolute(dir, &at.below("dir"))?))
        }
        (None, None, Some(variable), None, None, None) => {
            Ok(SourceKind::Env(self::variable(variable, at)?))
        }
        (None, None, None, Some(name), None, None) => match is_systemd_name(&name) {
            true => Ok(SourceKind::Systemd(name)),
            false => Err(at.below("systemd").wrong(
                "is not the name of a systemd credential: give what LoadCredential= calls it",
            )),
        },
        (None, None, None, None, Some(argv), None) => Ok(SourceKind::Exec {
            command: command(argv, timeout.as_deref(), at)?,
            refresh: at.below("refresh").duration(refresh.as_deref(), DEFAULT_REFRESH)?,
        }),
        (None, None, None, None, None, Some(true)) => Ok(SourceKind::Store),
        (None, None, None, None, None, Some(false)) => {
            Err(at.below("store").wrong("can only be true: without it, remove the key"))
        }
        _ => Err(at.wrong(ONE_SOURCE)),
    }
}

fn absolute(path: PathBuf, at: &At<'_>) -> Result<PathBuf, ConfigError> {
    if path.is_absolute() { Ok(path) } else { Err(at.wrong("must be an absolute path")) }
}

fn variable(name: String, at: &At<'_>) -> Result<String, ConfigError> {
    if name.is_empty() || name.contains(['=', '\0']) {
        return Err(at.below("env").wrong("is not the name of an environment variable"));
    }
    Ok(name)
}

/// A command that can be run, by a program that nobody else can have written: it runs with the
/// broker's uid.
fn command(
    argv: Vec<String>,
    timeout: Option<&str>,
    at: &At<'_>,
) -> Result<ExecSource, ConfigError> {
    let timeout_at = at.below("timeout");
    let timeout = timeout_at.duration(timeout, DEFAULT_TIMEOUT)?;
    if timeout > LONGEST_TIMEOUT {
        return Err(timeout_at.wrong("is more than 5m, and the start waits for it"));
    }
    let at = at.below("exec");
    let command = ExecSource { argv, timeout };
    let program = command.program();
    if program.is_empty() {
        return Err(at.wrong("names no program"));
    }
    let length: usize = command.argv.iter().map(String::len).sum();
    if command.argv.len() > MOST_ARGUMENTS || length > LONGEST_COMMAND {
        return Err(at.wrong("is longer than 64 arguments or 16384 bytes: put it into a script"));
    }
    if command.argv.iter().any(|argument| argument.contains('\0')) {
        return Err(at.wrong("holds a NUL byte"));
    }
    if !Path::new(program).is_absolute() {
        return Err(at.wrong(format!("{program:?} must be an absolute path")));
    }
    let metadata = std::fs::metadata(program)
        .map_err(|error| at.wrong(format!("cannot find {program}: {error}")))?;
    if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
        return Err(at.wrong(format!("{program} is not a program: chmod a+x it")));
    }
    match distrust(&metadata) {
        Some(why) => Err(at.wrong(format!("{program} {why}"))),
        None => Ok(command),
    }
}
