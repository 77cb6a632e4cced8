//! What a rogue must not have been sent: the password, and all that is as good as it.

use data_encoding::{BASE64_NOPAD, HEXLOWER, HEXUPPER};
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::password::md5;

use super::cases::MD5_SALT;
use super::scram::{ITERATIONS, SALT, Secrets};
use super::{Record, cases};
use crate::canary::{Pattern, Search};
use crate::postgres::Database;

/// The patterns of one role's password, for the salts of the scripts.
#[derive(Debug, Clone)]
pub struct Evidence(Vec<Pattern>);

impl Evidence {
    /// For a role's password.
    #[must_use]
    pub fn of(database: &Database) -> Self {
        let (user, password) = (database.name(), database.canary().reveal());
        let mut patterns = database.canary().patterns();
        // PostgreSQL protocol 55.2.1: what is stored, and what is asked for.
        let inner = md5(password.as_bytes(), user);
        let outer = md5_hash(user.as_bytes(), password.as_bytes(), *MD5_SALT);
        for (name, text) in [("md5(password, user)", inner), ("md5(md5, salt)", outer)] {
            let digest = text.trim_start_matches("md5");
            patterns.push(Pattern::new(name, digest.as_bytes()));
            let bytes = HEXLOWER.decode(digest.as_bytes()).unwrap_or_default();
            patterns.extend(forms(name, &bytes));
        }
        for salt in [SALT, cases::SHORT_SALT] {
            let secrets = Secrets::derive(password, salt, ITERATIONS);
            patterns.extend(forms("SaltedPassword", &secrets.salted));
            patterns.extend(forms("ClientKey", &secrets.client_key));
            patterns.extend(forms("ServerKey", &secrets.server_key));
        }
        patterns.extend(database.derived_patterns());
        Self(patterns)
    }

    /// The names of the forms that stand in what was sent.
    #[must_use]
    pub fn found_in(&self, record: &Record) -> Vec<String> {
        let mut found = Vec::new();
        for bytes in [&record.raw, &record.opened] {
            Search::new(&self.0).each(bytes, |pattern, _place| found.push(pattern.form().into()));
        }
        found
    }

    /// How many patterns there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

fn forms(name: &str, bytes: &[u8]) -> Vec<Pattern> {
    let mut patterns = vec![
        Pattern::new(name, bytes),
        Pattern::new(name, HEXLOWER.encode(bytes).as_bytes()),
        Pattern::new(name, HEXUPPER.encode(bytes).as_bytes()),
    ];
    for shift in 0..3 {
        let whole = bytes.len() - (bytes.len() - shift) % 3;
        let aligned = bytes.get(shift..whole).unwrap_or_default();
        patterns.push(Pattern::new(name, BASE64_NOPAD.encode(aligned).as_bytes()));
    }
    patterns
}
