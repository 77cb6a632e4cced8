//! Connection strings, read for the destination alone; pure.
//!
//! Both forms of PostgreSQL 15, 34.1.1: URLs, and `key = value` pairs. A parameter that says how
//! the server is talked to is passed over, because that is the broker's to decide; one that is
//! not known, or would change a session, is an error. A secret is noticed and not kept.

use std::iter::Peekable;
use std::str::Chars;

use crate::broker::Destination;
use crate::error::Failure;

const MAX_BYTES: usize = 2048;

/// Said of a secret: it is there.
const SECRETS: [&str; 3] = ["password", "passfile", "sslpassword"];
/// The broker's business.
const PASSED_OVER: [&str; 23] = [
    "user",
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "sslcrl",
    "sslcrldir",
    "sslsni",
    "sslcompression",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
    "sslnegotiation",
    "channel_binding",
    "gssencmode",
    "krbsrvname",
    "require_auth",
    "application_name",
    "connect_timeout",
    "client_encoding",
    "target_session_attrs",
    "keepalives",
    "keepalives_idle",
    "tcp_user_timeout",
];

/// What a connection string says of where it leads.
#[derive(PartialEq, Eq)]
pub(super) struct ConnectionString {
    pub(super) destination: Destination,
    /// Whether a password, or the way to one, was in it.
    pub(super) has_secret: bool,
}

impl ConnectionString {
    /// Reads either form.
    ///
    /// # Errors
    /// `INVALID_REQUEST`, in words that repeat nothing of the text.
    pub(super) fn parse(text: &str) -> Result<Self, Failure> {
        if text.len() > MAX_BYTES {
            return Err(wrong("is longer than 2048 bytes"));
        }
        let schemes = ["postgresql://", "postgres://"];
        let url = schemes.iter().find_map(|scheme| text.strip_prefix(scheme));
        let parts = match url {
            Some(rest) => Parts::of_url(rest)?,
            None => Parts::of_pairs(text)?,
        };
        parts.finish()
    }
}

#[derive(Default)]
struct Parts {
    host: Option<String>,
    address: Option<String>,
    port: Option<String>,
    database: Option<String>,
    has_secret: bool,
}

impl Parts {
    fn of_url(rest: &str) -> Result<Self, Failure> {
        let mut parts = Self::default();
        if rest.contains('#') {
            return Err(wrong("has a #, which must be written %23"));
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
        let (user, host) = match authority.rsplit_once('@') {
            Some((user, host)) => (user, host),
            None => ("", authority),
        };
        parts.has_secret = user.contains(':');
        let (host, port) = match host.strip_prefix('[') {
            Some(rest) => {
                let (address, after) = rest.split_once(']').ok_or_else(malformed)?;
                match (after, after.strip_prefix(':')) {
                    ("", _) => (address, ""),
                    (_, Some(port)) => (address, port),
                    (_, None) => return Err(malformed()),
                }
            }
            None => host.split_once(':').unwrap_or((host, "")),
        };
        for (key, value) in [("host", host), ("port", port), ("dbname", database)] {
            if !value.is_empty() {
                parts.take(key, decoded(value)?)?;
            }
        }
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or_else(malformed)?;
            parts.take(&decoded(key)?, decoded(value)?)?;
        }
        Ok(parts)
    }

    fn of_pairs(text: &str) -> Result<Self, Failure> {
        let mut parts = Self::default();
        let mut rest = text.chars().peekable();
        loop {
            while rest.next_if(char::is_ascii_whitespace).is_some() {}
            if rest.peek().is_none() {
                return Ok(parts);
            }
            let mut key = String::new();
            while let Some(character) = rest.next_if(|next| *next != '=' && !next.is_whitespace()) {
                key.push(character);
            }
            while rest.next_if(char::is_ascii_whitespace).is_some() {}
            if key.is_empty() || rest.next() != Some('=') {
                return Err(malformed());
            }
            while rest.next_if(char::is_ascii_whitespace).is_some() {}
            parts.take(&key, value(&mut rest)?)?;
        }
    }

    fn take(&mut self, key: &str, value: String) -> Result<(), Failure> {
        if value.contains('\0') {
            return Err(malformed());
        }
        let place = match key {
            "host" => &mut self.host,
            "hostaddr" => &mut self.address,
            "port" => &mut self.port,
            "dbname" => &mut self.database,
            key if SECRETS.contains(&key) => {
                self.has_secret = true;
                return Ok(());
            }
            key if PASSED_OVER.contains(&key) => return Ok(()),
            _ => return Err(wrong("has a parameter that is not taken here")),
        };
        if place.replace(value).is_some() {
            return Err(wrong("names host, port or database twice"));
        }
        Ok(())
    }

    fn finish(self) -> Result<ConnectionString, Failure> {
        // hostaddr is where libpq would connect to, host what it would check.
        let host = self.host.or(self.address).unwrap_or_default();
        if host.is_empty() {
            return Err(wrong("names no host"));
        }
        if host.contains(',') || self.port.as_ref().is_some_and(|port| port.contains(',')) {
            return Err(wrong("names several hosts: give one"));
        }
        let port = self.port.filter(|port| !port.is_empty());
        let port = port.map(|port| port.parse::<u16>().ok().filter(|port| *port != 0));
        let port = match port {
            Some(None) => return Err(wrong("has a port that is no number from 1 to 65535")),
            Some(port) => port,
            None => None,
        };
        let database = self.database.unwrap_or_default();
        let destination = Destination { host, port, database };
        Ok(ConnectionString { destination, has_secret: self.has_secret })
    }
}

/// A value of the second form: up to a blank, or quoted; a backslash takes what follows as it is.
fn value(rest: &mut Peekable<Chars<'_>>) -> Result<String, Failure> {
    let quoted = rest.next_if_eq(&'\'').is_some();
    let mut value = String::new();
    loop {
        match rest.next_if(|next| quoted || !next.is_whitespace()) {
            None if quoted => return Err(malformed()),
            None => return Ok(value),
            Some('\'') if quoted => return Ok(value),
            Some('\\') => value.push(rest.next().ok_or_else(malformed)?),
            Some(character) => value.push(character),
        }
    }
}

/// RFC 3986, 2.1.
pub(super) fn decoded(text: &str) -> Result<String, Failure> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
        let (high, low) = (digit(rest.next()), digit(rest.next()));
        let code = high.zip(low).and_then(|(high, low)| u8::try_from(high * 16 + low).ok());
        bytes.push(code.ok_or_else(malformed)?);
    }
    String::from_utf8(bytes).map_err(|_repeats_the_text| malformed())
}

fn malformed() -> Failure {
    wrong("is neither a PostgreSQL URL nor key=value pairs")
}

fn wrong(how: &str) -> Failure {
    Failure::invalid(format!("connection_string {how}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> Option<(String, Option<u16>, String, bool)> {
        let ConnectionString { destination, has_secret } = ConnectionString::parse(text).ok()?;
        let Destination { host, port, database } = destination;
        Some((host, port, database, has_secret))
    }

    #[test]
    fn both_forms_lead_to_the_same_place() {
        let is = |host: &str, port, database: &str, secret| {
            Some((host.to_owned(), port, database.to_owned(), secret))
        };
        let cases = [
            ("postgresql://db", is("db", None, "", false)),
            ("postgres://db:6432/app", is("db", Some(6432), "app", false)),
            ("postgresql://user@db/app?sslmode=require", is("db", None, "app", false)),
            ("postgresql://user:pw@db/app", is("db", None, "app", true)),
            ("postgresql://us%40er:p%40w@db/a%2Fb", is("db", None, "a/b", true)),
            ("postgresql://user:p@w@db/app", is("db", None, "app", true)),
            ("postgresql://[::1]:5433/app", is("::1", Some(5433), "app", false)),
            ("postgresql:///app?host=/run/pg&port=1", is("/run/pg", Some(1), "app", false)),
            ("postgresql://%2Frun%2Fpg/app", is("/run/pg", None, "app", false)),
            ("postgresql://db/app?password=pw", is("db", None, "app", true)),
            ("postgresql://db/app?user=u&passfile=x", is("db", None, "app", true)),
            ("host=db port=6432 dbname=app user=u", is("db", Some(6432), "app", false)),
            (" host = 'my db' dbname='a\\'b'  ", is("my db", None, "a'b", false)),
            ("host=db password='p w'", is("db", None, "", true)),
            ("hostaddr=10.0.0.1 dbname=app", is("10.0.0.1", None, "app", false)),
            ("host=db port=", is("db", None, "", false)),
        ];
        for (text, expected) in cases {
            assert_eq!(read(text), expected, "{text}");
        }
    }

    #[test]
    fn what_is_not_plain_is_refused() {
        for text in [
            "",
            "canary",
            "mysql://canary/x",
            "postgresql://",
            "postgresql:///canary",
            "postgresql://a,b/canary",
            "postgresql://db:0/canary",
            "postgresql://db:canary/x",
            "postgresql://db:65536/x",
            "postgresql://[::1/canary",
            "postgresql://[::1]canary",
            "postgresql://db/x?options=-canary",
            "postgresql://db/x?canary",
            "postgresql://db/x?host=canary",
            "postgresql://db/%zz",
            "postgresql://db/%ff",
            "postgresql://db/%00",
            "postgresql://db/x#canary",
            "host=db host=canary",
            "host='canary",
            "host=canary\\",
            "host=db service=canary",
            "=canary",
        ] {
            let Err(failure) = ConnectionString::parse(text) else { panic!("{text}") };
            assert!(!failure.to_json().to_string().contains("canary"), "{text}: {failure}");
        }
        assert!(ConnectionString::parse(&format!("host={}", "x".repeat(2048))).is_err());
    }

    proptest! {
        #[test]
        fn it_always_ends(text in "(postgres(ql)?://)?[a-z:/@?&=%\\[\\]'\\\\ ,0-9é]{0,40}") {
            let _ = ConnectionString::parse(&text);
        }
    }
}
