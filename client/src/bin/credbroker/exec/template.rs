//! `--env KEY=TEXT`, where the text has places for parts of a login.
//!
//! Invariant: a template that was parsed can be rendered; a misspelt place is a usage error
//! and not a variable that is subtly wrong.

use std::ffi::{OsStr, OsString};

use super::environment::View;
use crate::failure::Failure;

/// One variable for the command.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Template {
    key: String,
    parts: Vec<Part>,
}

#[derive(Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    /// A field of the login with this place in the list of names.
    Field(usize, Field),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Url,
    User,
    Token,
    Host,
    Port,
    Database,
}

impl Template {
    /// Parses `KEY=TEXT`, whose places may name the connections `names`.
    pub(crate) fn parse(argument: &str, names: &[String]) -> Result<Self, Failure> {
        let (key, text) = argument
            .split_once('=')
            .filter(|(key, _)| !key.is_empty())
            .ok_or_else(|| Failure::usage("--env takes KEY=TEXT"))?;
        let parts = parse_text(text, names)
            .map_err(|problem| Failure::usage(format!("--env {key}: {problem}")))?;
        Ok(Self { key: key.to_owned(), parts })
    }

    pub(crate) fn key(&self) -> &OsStr {
        OsStr::new(&self.key)
    }

    /// The variable's value; `logins` are in the order of the names.
    pub(crate) fn render(&self, logins: &[View<'_>]) -> OsString {
        let mut value = OsString::new();
        for part in &self.parts {
            match part {
                Part::Text(text) => value.push(text),
                Part::Field(index, field) => {
                    value.push(logins.get(*index).map_or(OsStr::new(""), |login| field.of(login)));
                }
            }
        }
        value
    }
}

impl Field {
    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "url" => Self::Url,
            "user" => Self::User,
            "token" => Self::Token,
            "host" => Self::Host,
            "port" => Self::Port,
            "database" => Self::Database,
            _ => return None,
        })
    }

    fn of<'a>(self, login: &'a View<'_>) -> &'a OsStr {
        match self {
            Self::Url => OsStr::new(&login.url),
            Self::User => OsStr::new(login.user),
            Self::Token => OsStr::new(login.token),
            Self::Host => login.host,
            Self::Port => OsStr::new(View::PORT),
            Self::Database => OsStr::new(login.database),
        }
    }
}

fn parse_text(text: &str, names: &[String]) -> Result<Vec<Part>, String> {
    let mut parts = Vec::new();
    let mut literal = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(['{', '}']) {
        literal.push_str(before);
        let opens = rest.as_bytes().get(before.len()) == Some(&b'{');
        if let Some(doubled) = after.strip_prefix(if opens { '{' } else { '}' }) {
            literal.push(if opens { '{' } else { '}' });
            rest = doubled;
            continue;
        }
        let (place, after) = after
            .split_once('}')
            .filter(|_| opens)
            .ok_or_else(|| "a brace stands alone; write {{ or }} for a brace itself".to_owned())?;
        parts.extend([Part::Text(std::mem::take(&mut literal)), parse_place(place, names)?]);
        rest = after;
    }
    literal.push_str(rest);
    parts.push(Part::Text(literal));
    parts.retain(|part| *part != Part::Text(String::new()));
    Ok(parts)
}

/// `url`, or `main_db.url`; a name may itself have dots.
fn parse_place(place: &str, names: &[String]) -> Result<Part, String> {
    let (index, field) = match place.rsplit_once('.') {
        None => (Some(0), place),
        Some((name, field)) => (names.iter().position(|given| given == name), field),
    };
    let index = index.ok_or_else(|| format!("{{{place}}} names a connection that is not given"))?;
    let field = Field::parse(field).ok_or_else(|| {
        format!(
            "{{{place}}} is unknown; there are url, user, token, host, port and database, \
             and {{{{ and }}}} for braces"
        )
    })?;
    Ok(Part::Field(index, field))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(text: &str) -> Result<OsString, Failure> {
        let names = ["main_db".to_owned(), "audit.v2".to_owned()];
        let view = |name, url: &str| View {
            name,
            host: OsStr::new("/run/credbroker/postgres"),
            user: name,
            database: "mydb",
            token: "cbh_x",
            url: url.to_owned(),
        };
        let views = [view("main_db", "url-1"), view("audit.v2", "url-2")];
        Template::parse(&format!("KEY={text}"), &names).map(|template| template.render(&views))
    }

    #[test]
    fn places_are_replaced() {
        for (text, value) in [
            ("", ""),
            ("plain", "plain"),
            ("{url}", "url-1"),
            ("{main_db.url} {audit.v2.url}", "url-1 url-2"),
            (
                "{user}:{token}@{host}:{port}/{database}",
                "main_db:cbh_x@/run/credbroker/postgres:5432/mydb",
            ),
            ("a=b={audit.v2.user}", "a=b=audit.v2"),
            (r#"{{"dsn":"{url}","o":{{}}}}"#, r#"{"dsn":"url-1","o":{}}"#),
            ("é{port}é", "é5432é"),
        ] {
            assert_eq!(render(text).unwrap(), value, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for text in
            ["{ulr}", "{other.url}", "{main_db.ulr}", "{url", "}", "{}", "{", "{url}}", "{.url}"]
        {
            assert!(render(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_variable_needs_a_name() {
        for argument in ["", "KEY", "=value"] {
            assert!(Template::parse(argument, &["main_db".into()]).is_err(), "{argument}");
        }
    }
}
