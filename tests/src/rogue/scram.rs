//! The server's half of SCRAM-SHA-256 (RFC 5802, RFC 7677), for servers that know the password
//! and for those that only pretend to.

use std::io;
use std::num::NonZeroU32;

use data_encoding::BASE64;
use ring::{digest, hmac, pbkdf2};

use super::Wire;
use crate::frontend::message;

/// What equals a password, for one salt and count.
#[derive(Clone)]
pub struct Secrets {
    /// Hi(password, salt, i).
    pub salted: [u8; 32],
    /// HMAC(SaltedPassword, "Client Key").
    pub client_key: [u8; 32],
    /// HMAC(SaltedPassword, "Server Key").
    pub server_key: [u8; 32],
}

/// A server's half of an exchange.
#[derive(Clone)]
pub struct Verifier {
    salt: Vec<u8>,
    iterations: u32,
    secrets: Secrets,
}

/// The client's first message.
#[derive(Debug, Clone)]
pub struct ClientFirst {
    /// Its nonce.
    pub nonce: String,
    /// What it binds itself to (RFC 5802 §7, gs2-header): `p=tls-server-end-point,,`, `y,,`, `n,,`.
    pub gs2: String,
    bare: String,
}

/// An exchange, up to the client's proof.
#[derive(Debug, Clone)]
pub struct Proven {
    /// The client's last message.
    pub client_final: String,
    auth_message: String,
}

impl Secrets {
    /// Derives them.
    ///
    /// # Panics
    /// When there are no iterations.
    #[must_use]
    pub fn derive(password: &str, salt: &[u8], iterations: u32) -> Self {
        let mut salted = [0; 32];
        let iterations = NonZeroU32::new(iterations).expect("at least one iteration");
        let algorithm = pbkdf2::PBKDF2_HMAC_SHA256;
        pbkdf2::derive(algorithm, iterations, salt, password.as_bytes(), &mut salted);
        let derived = |name: &[u8]| mac(&salted, name);
        Self { salted, client_key: derived(b"Client Key"), server_key: derived(b"Server Key") }
    }
}

impl Verifier {
    /// A server that knows this password, with the salt and the count of the scripts.
    #[must_use]
    pub fn of(password: &str) -> Self {
        let (salt, iterations) = (SALT.to_vec(), ITERATIONS);
        Self { secrets: Secrets::derive(password, &salt, iterations), salt, iterations }
    }

    /// Asks for SASL by these mechanisms, and reads the client's first message.
    ///
    /// # Errors
    /// When the broker hangs up, or answers something else.
    pub fn ask(&self, wire: &mut Wire, mechanisms: &[&str]) -> io::Result<ClientFirst> {
        wire.send(&sasl(mechanisms))?;
        let (_tag, body) = wire.receive()?;
        let text = String::from_utf8_lossy(&body).into_owned();
        // The mechanism, a length of four bytes, and the message.
        let (before, bare) = text.split_at(text.find("n=").unwrap_or(text.len()));
        let gs2 = ["p=", "y,", "n,"].iter().find_map(|flag| before.rfind(flag));
        let gs2 = gs2.and_then(|at| before.get(at..)).unwrap_or_default().to_owned();
        let nonce = bare.split_once("r=").map(|(_, nonce)| nonce.to_owned());
        nonce
            .map(|nonce| ClientFirst { nonce, gs2, bare: bare.to_owned() })
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a SASLInitialResponse"))
    }

    /// An honest challenge for a client's nonce.
    #[must_use]
    pub fn server_first(&self, nonce: &str) -> String {
        format!("r={nonce}AndOurs,s={},i={}", BASE64.encode(&self.salt), self.iterations)
    }

    /// Sends a challenge, and reads the client's proof.
    ///
    /// # Errors
    /// When the broker hangs up.
    pub fn challenge(
        &self,
        wire: &mut Wire,
        first: &ClientFirst,
        server_first: &str,
    ) -> io::Result<Proven> {
        wire.send(&sasl_continue(server_first.as_bytes()))?;
        let (_tag, body) = wire.receive()?;
        let client_final = String::from_utf8_lossy(&body).into_owned();
        let without_proof = client_final.rsplit_once(",p=").map_or("", |(before, _)| before);
        let auth_message = format!("{},{server_first},{without_proof}", first.bare);
        Ok(Proven { client_final, auth_message })
    }

    /// The signature of a server that knows the password.
    #[must_use]
    pub fn signature(&self, proven: &Proven) -> String {
        let signature = mac(&self.secrets.server_key, proven.auth_message.as_bytes());
        format!("v={}", BASE64.encode(&signature))
    }

    /// The proof that a client with this password gives (RFC 5802 §3).
    #[must_use]
    pub fn proof(&self, proven: &Proven) -> [u8; 32] {
        let stored = digest::digest(&digest::SHA256, &self.secrets.client_key);
        let mut proof = mac(stored.as_ref(), proven.auth_message.as_bytes());
        proof.iter_mut().zip(self.secrets.client_key).for_each(|(byte, key)| *byte ^= key);
        proof
    }
}

impl Proven {
    /// What the client says it sees of the channel: the gs2-header, and a hash of the certificate.
    ///
    /// # Panics
    /// When it says nothing of it.
    #[must_use]
    pub fn channel(&self) -> Vec<u8> {
        let (channel, _) = self.encoded_channel();
        BASE64.decode(channel.as_bytes()).expect("base64")
    }

    /// The same exchange, as a server has it that sees another channel.
    #[must_use]
    pub fn through(&self, channel: &[u8]) -> Self {
        let (told, _) = self.encoded_channel();
        let other = format!("c={}", BASE64.encode(channel));
        let auth_message = self.auth_message.replace(&format!("c={told}"), &other);
        Self { auth_message, ..self.clone() }
    }

    fn encoded_channel(&self) -> (&str, &str) {
        let rest = self.client_final.strip_prefix("c=");
        rest.and_then(|rest| rest.split_once(',')).expect("a client-final-message")
    }
}

/// The salt of the scripts.
pub(super) const SALT: &[u8] = b"rogue salt bytes";
/// PostgreSQL's count, and the least that the broker takes.
pub(super) const ITERATIONS: u32 = 4096;

fn mac(key: &[u8], text: &[u8]) -> [u8; 32] {
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text);
    tag.as_ref().try_into().expect("SHA-256 is 32 bytes")
}

/// AuthenticationSASL.
pub(super) fn sasl(mechanisms: &[&str]) -> Vec<u8> {
    let names: Vec<u8> =
        mechanisms.iter().flat_map(|name| [name.as_bytes(), b"\0"].concat()).collect();
    authentication(10, &[&names[..], b"\0"].concat())
}

/// AuthenticationSASLContinue.
pub(super) fn sasl_continue(text: &[u8]) -> Vec<u8> {
    authentication(11, text)
}

/// AuthenticationSASLFinal.
pub(super) fn sasl_final(text: &str) -> Vec<u8> {
    authentication(12, text.as_bytes())
}

/// Any Authentication message.
pub(super) fn authentication(kind: u32, rest: &[u8]) -> Vec<u8> {
    message(b'R', &[&kind.to_be_bytes(), rest].concat())
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secrets([REDACTED])")
    }
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Verifier([REDACTED])")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The exchange of RFC 7677 §3.
    #[test]
    fn the_signature_is_that_of_the_rfc() {
        let salt = BASE64.decode(b"W22ZaJ0SNY7soEsUEjb6gQ==").unwrap();
        let secrets = Secrets::derive("pencil", &salt, 4096);
        let verifier = Verifier { salt, iterations: 4096, secrets };
        let nonce = "rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";
        let auth_message = format!(
            "n=user,r=rOprNGfwEbeRWgbNEkqO,r={nonce},s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,c=biws,r={nonce}"
        );
        let proven = Proven { client_final: String::new(), auth_message };
        assert_eq!(verifier.signature(&proven), "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=");
        let proof = BASE64.encode(&verifier.proof(&proven));
        assert_eq!(proof, "dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=");
    }
}
