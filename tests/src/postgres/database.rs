//! A role and a database for one test, and what is equal to the role's password.

use postgres::Client;
use postgres_protocol::password::{md5, scram_sha_256};
use ring::{digest, hmac, pbkdf2};
use sha2::block_api::compress256;

use super::Server;
use crate::canary::{Canary, Pattern, random_word};

/// The state of SHA-256 before the first block (FIPS 180-4 §5.3.3).
const SHA256_INITIAL: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];

/// What the server asks a role for, over TLS, in the words of `pg_hba.conf`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// A hash of the password.
    Md5,
    /// The password itself.
    Password,
    /// Nothing.
    Trust,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Md5, Self::Password, Self::Trust];

    /// As `pg_hba.conf` has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Password => "password",
            Self::Trust => "trust",
        }
    }

    /// The role whose members are asked so.
    pub(super) fn group(self) -> String {
        format!("cb_group_{}", self.name())
    }
}

/// A role and a database of the same name on a server, gone on drop.
#[derive(Debug)]
pub struct Database {
    server: Server,
    name: String,
    canary: Canary,
}

impl Database {
    pub(super) fn create(server: &Server) -> Self {
        let name = format!("cb_{}", random_word(12));
        let canary = Canary::random();
        let database = Self { server: server.clone(), name, canary };
        database.set_server_password(&database.canary);
        let create = format!("CREATE DATABASE {0} OWNER {0}", database.name);
        server.admin("postgres").batch_execute(&create).expect("a database can be made");
        database
    }

    /// The name of the role and of the database.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The role's password.
    #[must_use]
    pub fn canary(&self) -> &Canary {
        &self.canary
    }

    /// Where it lives.
    #[must_use]
    pub fn server(&self) -> &Server {
        &self.server
    }

    /// The secret as the broker reads it: `user:password`.
    #[must_use]
    pub fn secret(&self) -> String {
        format!("{}:{}", self.name, self.canary.reveal())
    }

    /// A superuser's connection to this database.
    #[must_use]
    pub fn admin(&self) -> Client {
        self.server.admin(&self.name)
    }

    /// Makes the role expect another password; only its SCRAM verifier reaches the server, so
    /// that no log of the server can hold the password.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn set_server_password(&self, password: &Canary) {
        let verifier = scram_sha_256(password.reveal().as_bytes());
        let name = &self.name;
        let statement = format!(
            "DO $$ BEGIN IF to_regrole('{name}') IS NULL THEN CREATE ROLE {name} LOGIN; END IF; \
             END $$; ALTER ROLE {name} PASSWORD '{verifier}'"
        );
        self.server.admin("postgres").batch_execute(&statement).expect("a role can be made");
    }

    /// Has the server ask this role for something else than SCRAM.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn ask_for(&self, method: Method) {
        let name = &self.name;
        let mut admin = self.server.admin("postgres");
        let join = format!("GRANT {} TO {name}", method.group());
        admin.batch_execute(&join).expect("a role can be granted");
        if method == Method::Md5 {
            let hash = md5(self.canary.reveal().as_bytes(), name);
            let set = format!("ALTER ROLE {name} PASSWORD '{hash}'");
            admin.batch_execute(&set).expect("a password can be set");
        }
    }

    /// How often the server has refused this role for a wrong password.
    ///
    /// # Panics
    /// When its log cannot be read.
    #[must_use]
    pub fn wrong_passwords(&self) -> usize {
        let log = std::fs::read_to_string(&self.server.log).expect("the server's log");
        let line = format!("password authentication failed for user \"{}\"", self.name);
        log.lines().filter(|text| text.contains(&line)).count()
    }

    /// ClientKey and ServerKey in base64 (RFC 5802 §3), as the role's salt makes them.
    ///
    /// # Panics
    /// When the server's verifier cannot be read.
    #[must_use]
    pub fn scram_keys(&self) -> String {
        let salted = self.salted(&self.canary);
        let key = hmac::Key::new(hmac::HMAC_SHA256, &salted);
        let encoded = |name: &[u8]| data_encoding::BASE64.encode(hmac::sign(&key, name).as_ref());
        format!("{}:{}", encoded(b"Client Key"), encoded(b"Server Key"))
    }

    /// What is equal to the password where a role is asked for an MD5 of it: the inner hash, which
    /// the server keeps, raw and in hex.
    #[must_use]
    pub fn md5_patterns(&self) -> Vec<Pattern> {
        let hex = md5(self.canary.reveal().as_bytes(), &self.name).split_off("md5".len());
        let raw = data_encoding::HEXLOWER.decode(hex.as_bytes()).expect("hexadecimal");
        vec![Pattern::new("md5 in hex", hex.as_bytes()), Pattern::new("md5", &raw)]
    }

    /// How many backends of this role there are now.
    ///
    /// # Panics
    /// When the server does not answer.
    #[must_use]
    pub fn backends(&self) -> i64 {
        self.count("true")
    }

    /// How many backends of this role run a statement that has `fragment` in it.
    ///
    /// # Panics
    /// When the server does not answer.
    #[must_use]
    pub fn running(&self, fragment: &str) -> i64 {
        self.count(&format!("state = 'active' AND strpos(query, '{fragment}') > 0"))
    }

    fn count(&self, condition: &str) -> i64 {
        let query =
            format!("SELECT count(*) FROM pg_stat_activity WHERE usename = $1 AND {condition}");
        let mut admin = self.server.admin("postgres");
        admin.query_one(&query, &[&self.name]).expect("pg_stat_activity is readable").get(0)
    }

    /// What is equal to the password for a login, as patterns: with any of these at hand,
    /// somebody could log in without the password (RFC 5802 §3).
    ///
    /// # Panics
    /// When the server's verifier cannot be read.
    #[must_use]
    pub fn derived_patterns(&self) -> Vec<Pattern> {
        self.derived_patterns_of(&self.canary)
    }

    /// The same for another password that was tried on this role.
    ///
    /// # Panics
    /// When the server's verifier cannot be read.
    #[must_use]
    pub fn derived_patterns_of(&self, password: &Canary) -> Vec<Pattern> {
        let salted = self.salted(password);
        let password = password.reveal().as_bytes();
        let key = hmac::Key::new(hmac::HMAC_SHA256, &salted);
        let client_key = hmac::sign(&key, b"Client Key");

        let mut patterns = vec![
            Pattern::new("SaltedPassword", &salted),
            Pattern::new("ClientKey", client_key.as_ref()),
        ];
        patterns.extend(hmac_patterns("SaltedPassword", &salted));
        patterns.extend(hmac_patterns("password", password));
        patterns
    }

    /// SaltedPassword, with the salt that the server has for the role.
    fn salted(&self, password: &Canary) -> [u8; digest::SHA256_OUTPUT_LEN] {
        let query = "SELECT rolpassword FROM pg_authid WHERE rolname = $1";
        let row = self.server.admin("postgres").query_one(query, &[&self.name]);
        let verifier: String = row.expect("the superuser reads pg_authid").get(0);
        // SCRAM-SHA-256$4096:salt$StoredKey:ServerKey
        let mut parts = verifier.split(['$', ':']).skip(1);
        let iterations = parts.next().and_then(|count| count.parse().ok());
        let salt = parts.next().and_then(|salt| data_encoding::BASE64.decode(salt.as_bytes()).ok());
        let (iterations, salt) = iterations.zip(salt).expect("a SCRAM verifier");

        let mut salted = [0; digest::SHA256_OUTPUT_LEN];
        let password = password.reveal().as_bytes();
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, iterations, &salt, password, &mut salted);
        salted
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let Ok(mut admin) = self.server.try_admin("postgres") else { return };
        let name = &self.name;
        let _best_effort = admin.batch_execute(&format!("DROP DATABASE {name} WITH (FORCE)"));
        let _best_effort = admin.batch_execute(&format!("DROP ROLE {name}"));
    }
}

/// What HMAC-SHA-256 makes of a key before any message is in it (RFC 2104 §2): the padded keys,
/// and the two states of the hash after them. Either pair is as good as the key.
fn hmac_patterns(name: &str, key: &[u8]) -> Vec<Pattern> {
    let mut patterns = Vec::new();
    for (pad_name, pad) in [("ipad", 0x36), ("opad", 0x5c)] {
        let mut block = [pad; 64];
        for (byte, key) in block.iter_mut().zip(key) {
            *byte ^= key;
        }
        let mut state = SHA256_INITIAL;
        compress256(&mut state, &[block]);
        let in_memory: Vec<u8> = state.iter().flat_map(|word| word.to_le_bytes()).collect();
        let on_the_wire: Vec<u8> = state.iter().flat_map(|word| word.to_be_bytes()).collect();
        let padded = &block[..key.len().min(block.len())];
        patterns.push(Pattern::new(&format!("{name} ^ {pad_name}"), padded));
        patterns.push(Pattern::new(&format!("H({name} ^ {pad_name})"), &in_memory));
        patterns.push(Pattern::new(&format!("H({name} ^ {pad_name})"), &on_the_wire));
    }
    patterns
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 4231, test case 2: finishing by hand what the patterns hold gives the known MAC.
    #[test]
    fn the_states_are_those_of_hmac() {
        let key = b"Jefe";
        let block = |pad: u8| {
            let mut block = [pad; 64];
            block.iter_mut().zip(key).for_each(|(byte, key)| *byte ^= key);
            block
        };
        let message = b"what do ya want for nothing?";
        let inner =
            digest::digest(&digest::SHA256, &[block(0x36).as_slice(), message.as_slice()].concat());
        let mut state = SHA256_INITIAL;
        let mut last = [0_u8; 64];
        last[..32].copy_from_slice(inner.as_ref());
        last[32] = 0x80;
        last[56..].copy_from_slice(&(96_u64 * 8).to_be_bytes());
        compress256(&mut state, &[block(0x5c)]);
        let outer: Vec<u8> = state.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert!(hmac_patterns("key", key).iter().any(|pattern| pattern.is_in(&outer)));
        compress256(&mut state, &[last]);
        let mac: Vec<u8> = state.iter().flat_map(|word| word.to_be_bytes()).collect();
        let known = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), message);
        assert_eq!(mac, known.as_ref());
    }
}
