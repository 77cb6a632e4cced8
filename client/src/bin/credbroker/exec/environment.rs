//! What the command finds in its environment, and what it must not find.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};

use super::template::Template;
use crate::failure::Failure;

/// What would change where this login goes, or make it fail at the door.
///
/// Left alone is what matters only to other logins that the command asks for by name, or is
/// sent to the database as it is: PGPASSFILE (PGPASSWORD comes before it), PGSERVICEFILE
/// (without PGSERVICE nobody reads it), PGOPTIONS, PGAPPNAME, PGTZ and the like.
const CLEARED: &[&str] = &[
    // Comes before PGHOST, and would lead past the broker.
    "PGHOSTADDR",
    // A service may set anything, the host included.
    "PGSERVICE",
    // The door is a Unix socket and has no TLS: several drivers fail when it is required, and
    // the broker verifies the database's TLS itself.
    "PGSSLMODE",
    "PGREQUIRESSL",
    "PGSSLNEGOTIATION",
    "PGCHANNELBINDING",
    "PGGSSENCMODE",
    // Some drivers read these files at once, and fail when they cannot. libpq takes
    // PGSSLROOTCERT=system to mean verify-full, and PGSSLCERTMODE=require to need TLS.
    "PGSSLROOTCERT",
    "PGSSLCRL",
    "PGSSLCRLDIR",
    "PGSSLCERT",
    "PGSSLKEY",
    "PGSSLCERTMODE",
    // The door asks for the token as a plain password, which this may forbid.
    "PGREQUIREAUTH",
    // Meant for the database's own socket: the door is served by the broker's user.
    "PGREQUIREPEER",
];

/// One login, as the command is told of it.
pub(crate) struct View<'a> {
    pub(crate) name: &'a str,
    pub(crate) host: &'a OsStr,
    pub(crate) user: &'a str,
    pub(crate) database: &'a str,
    pub(crate) token: &'a str,
    pub(crate) url: String,
}

impl View<'_> {
    /// The door's socket is `.s.PGSQL.5432`.
    pub(crate) const PORT: &'static str = "5432";
}

/// The variables that the command is started with, before their values are known.
#[derive(Debug)]
pub(crate) struct Plan {
    names: Vec<String>,
    templates: Vec<Template>,
}

impl Plan {
    /// Parses the names and the `--env` arguments.
    pub(crate) fn parse(names: &[String], env: &[String]) -> Result<Self, Failure> {
        let mut taken = BTreeMap::from([("DATABASE_URL".to_owned(), names.first())]);
        for name in names {
            let key = url_key(name);
            match taken.insert(key.clone(), Some(name)) {
                Some(Some(other)) if other != name => {
                    return Err(Failure::usage(format!("{other} and {name} would both set {key}")));
                }
                _ => {}
            }
        }
        let unique = names
            .iter()
            .enumerate()
            .filter(|(place, name)| names.iter().position(|other| other == *name) == Some(*place));
        let names: Vec<String> = unique.map(|(_, name)| name.clone()).collect();
        let templates = env.iter().map(|argument| Template::parse(argument, &names));
        Ok(Self { templates: templates.collect::<Result<_, _>>()?, names })
    }

    /// The connections to log in to, each once, the plain variables' first.
    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    /// Variables to set, and with `None` to remove; later ones win.
    pub(crate) fn variables(&self, logins: &[View<'_>]) -> Vec<(OsString, Option<OsString>)> {
        let mut variables: Vec<(OsString, Option<OsString>)> =
            CLEARED.iter().map(|key| (key.into(), None)).collect();
        let mut set = |key: &OsStr, value: &OsStr| {
            variables.push((key.to_owned(), Some(value.to_owned())));
        };
        for login in logins {
            set(url_key(login.name).as_ref(), login.url.as_ref());
        }
        if let Some(first) = logins.first() {
            for (key, value) in [
                ("PGHOST", first.host),
                ("PGPORT", View::PORT.as_ref()),
                ("PGUSER", first.user.as_ref()),
                ("PGPASSWORD", first.token.as_ref()),
                ("PGDATABASE", first.database.as_ref()),
                ("DATABASE_URL", first.url.as_ref()),
                ("DATABASE_URI", first.url.as_ref()),
            ] {
                set(key.as_ref(), value);
            }
        }
        for template in &self.templates {
            set(template.key(), &template.render(logins));
        }
        variables
    }
}

/// `main-db` → `MAIN_DB_URL`.
fn url_key(name: &str) -> String {
    let upper = name.to_ascii_uppercase();
    format!("{}_URL", upper.replace(|c: char| !c.is_ascii_alphanumeric(), "_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(names: &[&str], env: &[&str]) -> Result<Plan, Failure> {
        let own = |texts: &[&str]| texts.iter().map(|text| text.to_string()).collect::<Vec<_>>();
        Plan::parse(&own(names), &own(env))
    }

    /// The environment as the command sees it, if it was empty before.
    fn environment(names: &[&str], env: &[&str]) -> BTreeMap<String, String> {
        let plan = plan(names, env).unwrap();
        let views: Vec<_> = plan
            .names()
            .iter()
            .map(|name| View {
                name,
                host: OsStr::new("/run/credbroker/postgres"),
                user: name,
                database: "mydb",
                token: "cbh_x",
                url: format!("url of {name}"),
            })
            .collect();
        let text = |text: OsString| text.into_string().unwrap();
        plan.variables(&views)
            .into_iter()
            .filter_map(|(key, value)| Some((text(key), text(value?))))
            .collect()
    }

    #[test]
    fn the_first_name_has_the_plain_variables() {
        let found = environment(&["main_db", "audit-log"], &[]);
        for (key, value) in [
            ("PGHOST", "/run/credbroker/postgres"),
            ("PGPORT", "5432"),
            ("PGUSER", "main_db"),
            ("PGPASSWORD", "cbh_x"),
            ("PGDATABASE", "mydb"),
            ("DATABASE_URL", "url of main_db"),
            ("DATABASE_URI", "url of main_db"),
            ("MAIN_DB_URL", "url of main_db"),
            ("AUDIT_LOG_URL", "url of audit-log"),
        ] {
            assert_eq!(found.get(key).map(String::as_str), Some(value), "{key}");
        }
        assert_eq!(found.len(), 9);
    }

    #[test]
    fn templates_come_last_and_may_replace_the_plain_variables() {
        let found = environment(&["main_db"], &["PGDATABASE=other", "DSN={url}?x"]);
        assert_eq!(found["PGDATABASE"], "other");
        assert_eq!(found["DSN"], "url of main_db?x");
    }

    #[test]
    fn what_would_lead_elsewhere_is_removed() {
        let variables = plan(&["main_db"], &[]).unwrap().variables(&[]);
        for key in ["PGHOSTADDR", "PGSERVICE", "PGSSLMODE", "PGCHANNELBINDING", "PGREQUIREAUTH"] {
            assert!(variables.contains(&(key.into(), None)), "{key}");
        }
    }

    #[test]
    fn names_that_would_share_a_variable_are_refused() {
        assert!(plan(&["main-db", "main_db"], &[]).is_err());
        assert!(plan(&["main_db", "database"], &[]).is_err(), "DATABASE_URL is the first one's");
        assert_eq!(environment(&["database"], &[])["DATABASE_URL"], "url of database");
    }

    #[test]
    fn a_name_given_twice_is_one_login() {
        assert_eq!(plan(&["a", "b", "a"], &[]).unwrap().names(), ["a", "b"]);
    }
}
