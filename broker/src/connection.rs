//! A connection: the named destination that a credential is bound to by configuration. A caller
//! names it and chooses nothing of where it leads.

#![forbid(unsafe_code)]

use std::borrow::Borrow;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use serde::Serialize;

pub(crate) use self::hosts::{Hosts, TcpHost, UnixSocket};
use crate::credential::LoginRules;
use crate::policy::Pattern;
use crate::upstream::tls::{ClientCertificate, RootsId};

mod hosts;

/// What PostgreSQL listens on when nobody says otherwise.
pub(crate) const DEFAULT_PORT: u16 = 5432;

/// The name of a connection, as configuration gives it: `[A-Za-z0-9][A-Za-z0-9_.-]{0,62}`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct ConnectionName(Arc<str>);

impl ConnectionName {
    /// Longest name in bytes: what PostgreSQL keeps of a user name.
    pub const MAX_LEN: usize = 63;

    /// `None` when `text` is not a name.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut bytes = text.bytes();
        let good = text.len() <= Self::MAX_LEN
            && bytes.next().is_some_and(|first| first.is_ascii_alphanumeric())
            && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
        good.then(|| Self(text.into()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ConnectionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Borrow<str> for ConnectionName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// A destination: everything about it but the credential.
#[derive(Debug)]
pub struct Connection {
    pub(crate) name: ConnectionName,
    pub(crate) hosts: Hosts,
    /// For one address of one host: its socket, and TLS.
    pub(crate) connect_timeout: Duration,
    /// What an absent database means.
    pub(crate) database: String,
    /// Other databases that a client may ask for.
    pub(crate) databases: Vec<Pattern>,
    pub(crate) tls: Tls,
    /// How to log in there, and how not.
    pub(crate) login: LoginRules,
    pub(crate) startup: StartupFilter,
    pub(crate) replication: bool,
    /// Whether plaintext sockets to other machines may be handed over.
    pub(crate) insecure_handoff: bool,
    /// Whether peers bring credentials of their own: it has none.
    pub(crate) takes_registrations: bool,
    /// How long sessions may go on after their credential was replaced.
    pub(crate) rotation_grace: Duration,
    /// How old a session may become.
    pub(crate) max_session_age: Option<Duration>,
    /// How many links are kept logged in for clients to come.
    pub(crate) warm: usize,
}

/// Why a socket cannot be handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoHandoff {
    /// Its bytes need the state of TLS, which is the broker's.
    Tls,
    /// Modes `allow` and `prefer`: the same, if the server likes.
    PerhapsTls,
    /// What passes could be read on the network, and nobody said that it may.
    Plaintext,
}

impl NoHandoff {
    /// What is told after "cannot be handed over".
    pub(crate) const fn because(self) -> &'static str {
        match self {
            Self::Tls => "it is protected by TLS",
            Self::PerhapsTls => "its tls.mode is allow or prefer, and it may be protected by TLS",
            Self::Plaintext => {
                "it leads to another machine in plaintext, without insecure_handoff = true"
            }
        }
    }
}

/// How the link is protected; libpq's names.
pub(crate) enum Tls {
    /// Plaintext.
    Disable,
    /// TLS or nothing.
    Required {
        check: Check,
        config: Arc<ClientConfig>,
        ca_file: Option<PathBuf>,
        /// Tells sets of roots apart.
        roots: RootsId,
        negotiation: Negotiation,
        /// What we prove ourselves by to a server that asks.
        client: Option<Arc<ClientCertificate>>,
    },
    /// TLS or not, as whoever answers likes; nothing of its certificate is checked.
    Optional { first: First, config: Arc<ClientConfig> },
}

/// What is tried first where both are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum First {
    /// Mode `prefer`.
    Tls,
    /// Mode `allow`.
    Plaintext,
}

impl First {
    /// libpq's name of the mode.
    pub(crate) fn mode(self) -> &'static str {
        match self {
            Self::Tls => "prefer",
            Self::Plaintext => "allow",
        }
    }
}

/// How a link comes to TLS; libpq's sslnegotiation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Negotiation {
    /// The server is asked first whether it has TLS.
    #[default]
    Postgres,
    /// With the first byte, as PostgreSQL 17 and proxies of TLS take it.
    Direct,
}

impl Negotiation {
    /// libpq's name of it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::Direct => "direct",
        }
    }
}

/// What is checked of a server's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Check {
    /// Mode `require`: any certificate. Whoever is on the way can be the server.
    Nothing,
    /// Mode `verify-ca`: a root has signed it, for whatever name.
    Chain,
    /// Mode `verify-full`: a root has signed it, for the host's name.
    ChainAndName,
}

impl Check {
    /// libpq's name of the mode.
    pub(crate) fn mode(self) -> &'static str {
        match self {
            Self::Nothing => "require",
            Self::Chain => "verify-ca",
            Self::ChainAndName => "verify-full",
        }
    }
}

/// What a client may set in its startup message.
#[derive(Debug)]
pub(crate) enum StartupFilter {
    Any,
    Only(Vec<String>),
}

/// A destination as a caller describes it; which connection that is, configuration decides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Destination<'a> {
    /// Empty: any.
    pub(crate) kind: &'a str,
    pub(crate) host: &'a str,
    pub(crate) port: Option<u16>,
    /// Empty: the connection's own.
    pub(crate) database: &'a str,
}

/// A database that this connection's configuration allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AllowedDatabase(String);

impl AllowedDatabase {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl Connection {
    /// The value of the key `type`.
    pub(crate) const KIND: &str = "postgresql";

    /// Width and text of the mask never depend on what they hide.
    const MASK: &str = "****:****";

    /// The destination for people, user and password masked.
    #[must_use]
    pub fn masked_target(&self) -> String {
        self.hosts.url(Self::MASK, &self.database)
    }

    /// Whether this is the connection to `destination`.
    pub(crate) fn is_at(&self, destination: &Destination<'_>) -> bool {
        let Destination { kind, host, port, database } = *destination;
        let database = (!database.is_empty()).then_some(database);
        self.hosts.are_at(host, port)
            && (kind.is_empty() || kind == Self::KIND)
            && self.database(database).is_some()
    }

    /// Whether both names lead to the same place, proved in the same way: what decides whether a
    /// session that was opened by one may go on under the other.
    pub(crate) fn leads_to_same(&self, other: &Self) -> bool {
        self.hosts == other.hosts && self.tls.proves_as(&other.tls)
    }

    /// Whether a database that was allowed once is allowed now.
    pub(crate) fn allows(&self, database: &AllowedDatabase) -> bool {
        self.database(Some(database.as_str())).is_some_and(|now| now == *database)
    }

    /// Whether what passes could be read on the network.
    pub(crate) fn is_plaintext_tcp(&self) -> bool {
        matches!((&self.hosts, &self.tls), (Hosts::Tcp(_), Tls::Disable))
    }

    /// Whether an authenticated socket to it can be handed over.
    ///
    /// # Errors
    /// Why not, for a caller that may know of the connection.
    pub(crate) fn handoff(&self) -> Result<(), NoHandoff> {
        match (&self.hosts, &self.tls) {
            (Hosts::Unix { .. }, _) => Ok(()),
            (Hosts::Tcp(_), Tls::Required { .. }) => Err(NoHandoff::Tls),
            (Hosts::Tcp(_), Tls::Optional { .. }) => Err(NoHandoff::PerhapsTls),
            (Hosts::Tcp(_), Tls::Disable) if self.insecure_handoff => Ok(()),
            (Hosts::Tcp(hosts), Tls::Disable) if hosts.iter().all(TcpHost::is_here) => Ok(()),
            (Hosts::Tcp(_), Tls::Disable) => Err(NoHandoff::Plaintext),
        }
    }

    /// Whether TLS is spoken with whoever answers, because nothing of the certificate is checked;
    /// or not even TLS, if that is how it answers.
    pub(crate) fn is_unverified_tls(&self) -> bool {
        matches!(self.tls, Tls::Required { check: Check::Nothing, .. } | Tls::Optional { .. })
    }

    /// The database that a client gets for what it asked: absent, or the connection's own name,
    /// mean the configured one.
    pub(crate) fn database(&self, asked: Option<&str>) -> Option<AllowedDatabase> {
        // It goes into the audit record: no longer than the server keeps, and nothing unprintable.
        if asked.is_some_and(|asked| asked.len() > 63 || asked.contains(char::is_control)) {
            return None;
        }
        let name = match asked {
            None => &self.database,
            Some(asked) if asked == self.database => asked,
            Some(asked) if self.databases.iter().any(|pattern| pattern.matches(asked)) => asked,
            Some(asked) if asked == self.name.as_str() => &self.database,
            Some(_) => return None,
        };
        Some(AllowedDatabase(name.to_owned()))
    }
}

impl Tls {
    fn proves_as(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Disable, Self::Disable) => true,
            (
                Self::Required { check, roots, negotiation, client, .. },
                Self::Required {
                    check: other_check,
                    roots: other_roots,
                    negotiation: other_negotiation,
                    client: other_client,
                    ..
                },
            ) => {
                let id = |client: &Option<Arc<ClientCertificate>>| {
                    client.as_ref().map(|client| client.id())
                };
                check == other_check
                    && roots == other_roots
                    && negotiation == other_negotiation
                    && id(client) == id(other_client)
            }
            (Self::Optional { first, .. }, Self::Optional { first: other, .. }) => first == other,
            (Self::Disable | Self::Required { .. } | Self::Optional { .. }, _) => false,
        }
    }
}

impl StartupFilter {
    /// What libpq and common drivers send, and nothing that changes who a session is.
    pub(crate) const DEFAULT: &[&str] = &[
        "application_name",
        "client_encoding",
        "DateStyle",
        "TimeZone",
        "extra_float_digits",
        "options",
        "search_path",
        "statement_timeout",
    ];

    /// PostgreSQL compares the names of settings without regard to case.
    pub(crate) fn allows(&self, parameter: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Only(names) => names.iter().any(|name| name.eq_ignore_ascii_case(parameter)),
        }
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disable => f.write_str("Disable"),
            Self::Required { check, .. } => f.debug_tuple("Required").field(check).finish(),
            Self::Optional { first, .. } => f.debug_tuple("Optional").field(first).finish(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn at<const N: usize>(hosts: [&str; N]) -> Hosts {
        let host = |host: &str| TcpHost { host: host.to_owned(), port: 5432 };
        Hosts::Tcp(hosts.map(host).into())
    }

    /// The socket of a server in this directory.
    pub(crate) fn unix(directory: &std::path::Path) -> Hosts {
        let socket = UnixSocket { directory: directory.to_owned(), port: 5432 };
        Hosts::Unix { sockets: vec![socket], server: None }
    }

    pub(crate) fn connection(name: &str) -> Connection {
        Connection {
            name: ConnectionName::parse(name).unwrap(),
            hosts: at(["db.internal"]),
            connect_timeout: Duration::from_secs(10),
            database: "mydb".into(),
            databases: vec![Pattern::parse("reporting_*").unwrap()],
            tls: Tls::Disable,
            login: LoginRules::default(),
            startup: StartupFilter::Only(
                StartupFilter::DEFAULT.iter().map(ToString::to_string).collect(),
            ),
            replication: false,
            insecure_handoff: false,
            takes_registrations: false,
            rotation_grace: Duration::from_secs(300),
            max_session_age: None,
            warm: 0,
        }
    }

    #[test]
    fn names() {
        for good in ["main_db", "a", "0", "analytics-eu.1", &"x".repeat(63)] {
            assert!(ConnectionName::parse(good).is_some(), "{good}");
        }
        for bad in ["", "_x", "a b", "a/b", "ä", "a\0", "*", &"x".repeat(64)] {
            assert!(ConnectionName::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn databases() {
        let connection = connection("main_db");
        let database =
            |asked| connection.database(asked).map(|allowed| allowed.as_str().to_owned());
        assert_eq!(database(None).as_deref(), Some("mydb"));
        assert_eq!(database(Some("mydb")).as_deref(), Some("mydb"));
        assert_eq!(database(Some("main_db")).as_deref(), Some("mydb"));
        assert_eq!(database(Some("reporting_2026")).as_deref(), Some("reporting_2026"));
        assert_eq!(database(Some("postgres")), None);
        assert_eq!(database(Some("")), None);
        assert_eq!(database(Some("reporting_\n")), None);
        assert_eq!(database(Some(&format!("reporting_{}", "x".repeat(64)))), None);
    }

    #[test]
    fn only_sockets_without_tls_that_stay_on_this_machine_are_handed_over() {
        let mut connection = connection("main_db");
        assert_eq!(connection.handoff(), Err(NoHandoff::Plaintext));
        let hosts = [
            ("127.0.0.1", Ok(())),
            ("::1", Ok(())),
            ("LOCALHOST", Ok(())),
            ("localhost.example", Err(NoHandoff::Plaintext)),
            ("10.0.0.1", Err(NoHandoff::Plaintext)),
            ("0.0.0.0", Err(NoHandoff::Plaintext)),
        ];
        for (host, expected) in hosts {
            connection.hosts = at([host]);
            assert_eq!(connection.handoff(), expected, "{host}");
            connection.hosts = at(["127.0.0.1", host]);
            assert_eq!(connection.handoff(), expected, "{host} is one of them");
        }
        connection.insecure_handoff = true;
        assert_eq!(connection.handoff(), Ok(()));
        connection.insecure_handoff = false;
        connection.hosts = unix("/run/postgresql".as_ref());
        assert_eq!(connection.handoff(), Ok(()));
    }

    #[test]
    fn the_target_shows_neither_user_nor_password() {
        let mut connection = connection("x");
        assert_eq!(connection.masked_target(), "postgresql://****:****@db.internal:5432/mydb");
        connection.hosts = at(["db1", "::1"]);
        assert_eq!(connection.masked_target(), "postgresql://****:****@db1:5432,[::1]:5432/mydb");
        connection.hosts = unix("/run/postgresql".as_ref());
        assert_eq!(
            connection.masked_target(),
            "postgresql://****:****@/mydb?host=/run/postgresql&port=5432"
        );
    }

    #[test]
    fn each_host_is_the_connection() {
        let mut connection = connection("x");
        connection.hosts = at(["db1", "db2"]);
        let is_at =
            |host, port| connection.is_at(&Destination { kind: "", host, port, database: "" });
        assert!(is_at("db1", None) && is_at("DB2", Some(5432)));
        assert!(!is_at("db3", None) && !is_at("db2", Some(5433)));
    }

    #[test]
    fn other_hosts_or_another_order_lead_elsewhere() {
        let (mut one, mut other) = (connection("x"), connection("x"));
        one.hosts = at(["db1", "db2"]);
        for hosts in [at(["db1"]), at(["db2", "db1"]), at(["db1", "db3"])] {
            other.hosts = hosts;
            assert!(!one.leads_to_same(&other), "{other:?}");
        }
        other.hosts = at(["db1", "db2"]);
        assert!(one.leads_to_same(&other));
        let socket = || UnixSocket { directory: "/run".into(), port: 5432 };
        one.hosts = Hosts::Unix { sockets: vec![socket()], server: None };
        let server = Some(crate::peer::Uid::from_raw(26));
        other.hosts = Hosts::Unix { sockets: vec![socket()], server };
        assert!(!one.leads_to_same(&other), "who must be there is another");
    }

    #[test]
    fn startup_parameters_are_compared_without_case() {
        let connection = connection("x");
        assert!(connection.startup.allows("timezone"));
        assert!(!connection.startup.allows("role"));
        assert!(!connection.startup.allows("session_authorization"));
    }
}
