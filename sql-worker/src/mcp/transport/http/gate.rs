//! Whether a request was meant for this server, and not sent here by a web page whose name
//! resolves to loopback (DNS rebinding; MCP 2026-07-28, "Security Warning" of the transport).

use http::header::{HOST, HeaderMap, HeaderValue, ORIGIN};
use http::uri::{Authority, Uri};

/// Why a request is turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    Host,
    Origin,
}

impl Refused {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Host => "the Host header must be localhost, 127.0.0.1 or [::1], with the port",
            Self::Origin => "a web page from elsewhere may not use this server",
        }
    }
}

/// Lets through a request for this very server, from no web page or a local one.
pub(super) fn check(target: &Uri, headers: &HeaderMap, port: u16) -> Result<(), Refused> {
    // RFC 9112 §3.2: exactly one Host; a target in absolute form overrides it.
    let host = one(headers, HOST.as_str()).ok_or(Refused::Host)?;
    let hosts = [text(host), target.authority().map(Authority::as_str)];
    let own = |host: &str| local_port(host).is_some_and(|found| found.unwrap_or(80) == port);
    if hosts[0].is_none() || !hosts.into_iter().flatten().all(own) {
        return Err(Refused::Host);
    }
    if !headers.contains_key(ORIGIN) {
        return Ok(());
    }
    // `null` is anybody's.
    let origin = one(headers, ORIGIN.as_str()).and_then(text).and_then(|origin| {
        origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"))
    });
    origin.and_then(local_port).map(|_any_port| ()).ok_or(Refused::Origin)
}

/// The only value of a header.
fn one<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a HeaderValue> {
    let mut values = headers.get_all(name).iter();
    values.next().filter(|_| values.next().is_none())
}

fn text(value: &HeaderValue) -> Option<&str> {
    value.to_str().ok()
}

/// The port, if there is one, of an authority that is this machine by a name that no DNS
/// server decides on.
fn local_port(authority: &str) -> Option<Option<u16>> {
    let local = ["localhost", "127.0.0.1", "[::1]"];
    let rest = local.into_iter().find_map(|host| {
        let (start, rest) = authority.split_at_checked(host.len())?;
        start.eq_ignore_ascii_case(host).then_some(rest)
    })?;
    if rest.is_empty() {
        return Some(None);
    }
    let digits = rest.strip_prefix(':').filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
    digits?.parse().ok().map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(target: &str, headers: &[(&str, &str)]) -> Result<(), Refused> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            let name = http::HeaderName::try_from(*name).unwrap();
            map.append(name, HeaderValue::from_str(value).unwrap());
        }
        check(&target.parse().unwrap(), &map, 8765)
    }

    #[test]
    fn the_host_must_be_this_server() {
        for host in ["localhost:8765", "127.0.0.1:8765", "[::1]:8765", "LocalHost:8765"] {
            assert_eq!(checked("/mcp", &[("host", host)]), Ok(()), "{host}");
        }
        for host in [
            "evil.example:8765",
            "localhost",
            "localhost:8766",
            "localhost:",
            "localhost:8765.evil.example",
            "localhost.evil.example:8765",
            "localhost:+8765",
            "127.0.0.1.evil.example:8765",
            "user@localhost:8765",
            "0.0.0.0:8765",
            "[::ffff:127.0.0.1]:8765",
            "",
        ] {
            assert_eq!(checked("/mcp", &[("host", host)]), Err(Refused::Host), "{host}");
        }
        assert_eq!(checked("/mcp", &[]), Err(Refused::Host));
        let two = [("host", "localhost:8765"), ("host", "localhost:8765")];
        assert_eq!(checked("/mcp", &two), Err(Refused::Host));
        let host = [("host", "localhost:8765")];
        assert_eq!(checked("http://evil.example:8765/mcp", &host), Err(Refused::Host));
        assert_eq!(checked("http://127.0.0.1:8765/mcp", &host), Ok(()));
        assert_eq!(
            check(
                &"/mcp".parse().unwrap(),
                &HeaderMap::from_iter([(HOST, HeaderValue::from_static("localhost"))]),
                80
            ),
            Ok(())
        );
    }

    #[test]
    fn an_origin_must_be_local() {
        let with = |origin| checked("/mcp", &[("host", "localhost:8765"), ("origin", origin)]);
        for origin in ["http://localhost:8765", "http://127.0.0.1:3000", "https://[::1]"] {
            assert_eq!(with(origin), Ok(()), "{origin}");
        }
        for origin in [
            "null",
            "",
            "http://evil.example",
            "http://localhost.evil.example",
            "http://localhost@evil.example",
            "file://localhost",
            "localhost:8765",
            "http://localhost:8765/path",
        ] {
            assert_eq!(with(origin), Err(Refused::Origin), "{origin}");
        }
    }
}
