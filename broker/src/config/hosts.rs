//! `host`, `port`, `peer_user` and `connect_timeout`: where a connection's server is.

#![forbid(unsafe_code)]

use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::time::Duration;

use super::ConfigError;
use super::parse::At;
use super::raw::{self, NameOrId};
use crate::connection::{DEFAULT_PORT, Hosts, TcpHost, UnixSocket};
use crate::peer::Uid;

/// Each may cost a `connect_timeout`.
const MOST_HOSTS: usize = 8;
/// RFC 1035 §2.3.4.
const LONGEST_NAME: usize = 253;
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const SHORTEST_CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const LONGEST_CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

/// `at` is the connection.
pub(super) fn hosts(
    given: Option<raw::Hosts>,
    port: Option<u16>,
    peer_user: Option<NameOrId>,
    at: &At<'_>,
) -> Result<Hosts, ConfigError> {
    let host_at = at.below("host");
    let given = given.ok_or_else(|| {
        host_at.wrong("is missing: give a name, an address, or the directory of a Unix socket")
    })?;
    let given = given.all();
    if given.is_empty() || given.len() > MOST_HOSTS {
        return Err(host_at.wrong(format!("must name from 1 to {MOST_HOSTS} hosts")));
    }
    let port = port.unwrap_or(DEFAULT_PORT);
    if given.iter().all(|host| host.starts_with('/')) {
        let socket = |host: &String| UnixSocket { directory: PathBuf::from(host), port };
        let server = peer_user.map(|user| uid(user, &at.below("peer_user"))).transpose()?;
        return Ok(Hosts::Unix { sockets: given.iter().map(socket).collect(), server });
    }
    if given.iter().any(|host| host.starts_with('/')) {
        return Err(host_at.wrong(
            "mixes Unix sockets with TCP, and what protects one is nothing to the other: make two connections",
        ));
    }
    if peer_user.is_some() {
        return Err(at.below("peer_user").wrong(
            "is for Unix sockets: over TCP the kernel does not know who the server is; tls.mode = \"verify-full\" proves it",
        ));
    }
    let hosts = given.iter().map(|text| tcp(text, port).ok_or_else(|| host_at.wrong(WRONG)));
    Ok(Hosts::Tcp(hosts.collect::<Result<_, _>>()?))
}

const WRONG: &str = "is not a host name, an address, or the directory of a Unix socket; \
    a port of its own goes behind a colon, and IPv6 then into brackets: \"db2:5433\", \"[fd00::5]:5433\"";

/// `db`, `db:5433`, `10.0.0.5`, `::1`, `[::1]`, `[::1]:5433`.
fn tcp(text: &str, port: u16) -> Option<TcpHost> {
    let (host, own) = match text.strip_prefix('[') {
        Some(bracketed) => {
            let (host, rest) = bracketed.split_once(']')?;
            let own = if rest.is_empty() { None } else { Some(rest.strip_prefix(':')?) };
            (host.contains(':').then_some(host)?, own)
        }
        None => match text.split_once(':') {
            Some((host, own)) if !own.contains(':') => (host, Some(own)),
            Some(_) | None => (text, None),
        },
    };
    let port = match own {
        None => port,
        Some(own) => own.parse().ok().filter(|port| *port != 0)?,
    };
    let is_name = |name: &str| {
        let odd = |c: char| c.is_whitespace() || c.is_control() || "/,[]".contains(c);
        !name.is_empty() && name.len() <= LONGEST_NAME && !name.contains(odd)
    };
    // A link-local address has the interface behind it (RFC 4007 §11).
    let address = host.split('%').next().unwrap_or(host);
    let good = is_name(host) && (!host.contains(':') || address.parse::<Ipv6Addr>().is_ok());
    good.then(|| TcpHost { host: host.to_owned(), port })
}

fn uid(user: NameOrId, at: &At<'_>) -> Result<Uid, ConfigError> {
    let uid = match user {
        NameOrId::Id(uid) => Uid::from_raw(uid),
        NameOrId::Name(name) => match nix::unistd::User::from_name(&name) {
            Ok(Some(user)) => Uid::from_raw(user.uid.as_raw()),
            Ok(None) => {
                return Err(at.wrong(format!(
                    "there is no user {name:?} on this machine: give the name or the uid that the server runs as"
                )));
            }
            Err(error) => {
                return Err(at.wrong(format!("cannot look up the user {name:?}: {error}")));
            }
        },
    };
    if uid.is_overflow() {
        return Err(at.wrong(format!(
            "uid {uid} stands for every user that is not mapped, and proves nothing"
        )));
    }
    Ok(uid)
}

/// For one address.
pub(super) fn connect_timeout(given: Option<&str>, at: &At<'_>) -> Result<Duration, ConfigError> {
    let timeout = at.duration(given, DEFAULT_CONNECT_TIMEOUT)?;
    if (SHORTEST_CONNECT_TIMEOUT..=LONGEST_CONNECT_TIMEOUT).contains(&timeout) {
        Ok(timeout)
    } else {
        Err(at.wrong("must be from 1s to 60s"))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn parsed(given: &[&str], peer_user: Option<u32>) -> Result<Hosts, String> {
        let at = At::new(Path::new("broker.toml"), "connections.x");
        let given = raw::Hosts::Several(given.iter().map(ToString::to_string).collect());
        let peer_user = peer_user.map(NameOrId::Id);
        hosts(Some(given), Some(6000), peer_user, &at).map_err(|error| error.to_string())
    }

    #[test]
    fn each_host_may_have_a_port_of_its_own() {
        let cases = [
            ("db.internal", "db.internal:6000"),
            ("db.internal:5433", "db.internal:5433"),
            ("10.0.0.5", "10.0.0.5:6000"),
            ("10.0.0.5:5433", "10.0.0.5:5433"),
            ("::1", "[::1]:6000"),
            ("[::1]", "[::1]:6000"),
            ("[fd00::5]:5433", "[fd00::5]:5433"),
            ("fe80::1%eth0", "[fe80::1%eth0]:6000"),
        ];
        for (text, expected) in cases {
            let Ok(Hosts::Tcp(hosts)) = parsed(&["first", text], None) else { panic!("{text}") };
            assert_eq!(hosts[1].to_string(), expected, "{text}");
        }
        for bad in [
            "", ":5432", "db:", "db:0", "db:65536", "db:x", "a b", "a,b", "db/x", "a:b:c", "[db]",
            "[::1", "[::1]x", "[::1]:", "::1]", "db\n",
        ] {
            assert!(parsed(&[bad], None).is_err(), "{bad:?}");
        }
        assert!(parsed(&[], None).is_err());
        assert!(parsed(&["db"; MOST_HOSTS + 1], None).is_err());
    }

    #[test]
    fn sockets_and_tcp_do_not_mix_and_only_a_socket_has_a_peer() {
        assert!(parsed(&["/run/a", "db"], None).unwrap_err().contains("two connections"));
        assert!(parsed(&["db"], Some(26)).unwrap_err().contains("connections.x.peer_user"));
        assert!(parsed(&["/run/a"], Some(u32::from(u16::MAX) - 1)).unwrap_err().contains("mapped"));
        let Ok(Hosts::Unix { sockets, server }) = parsed(&["/run/a", "/run/b"], Some(26)) else {
            panic!("not sockets")
        };
        assert_eq!(sockets[1].path(), Path::new("/run/b/.s.PGSQL.6000"));
        assert_eq!(server, Some(Uid::from_raw(26)));
    }

    #[test]
    fn a_connect_timeout_has_bounds() {
        let at = At::new(Path::new("broker.toml"), "connections.x.connect_timeout");
        assert_eq!(connect_timeout(None, &at).unwrap(), Duration::from_secs(10));
        assert_eq!(connect_timeout(Some("60s"), &at).unwrap(), Duration::from_secs(60));
        for bad in ["0s", "999ms", "61s", "soon"] {
            assert!(connect_timeout(Some(bad), &at).is_err(), "{bad}");
        }
    }
}
