//! SCRAM-SHA-256 and SCRAM-SHA-256-PLUS (RFC 5802, RFC 7677, RFC 5929 §4), client half, from a
//! secret in the arena: here the exchange, and in [`proof`] all that computes with the secret.

#![forbid(unsafe_code)]

use std::num::NonZeroU32;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::rand::{SecureRandom as _, SystemRandom};
use subtle::ConstantTimeEq as _;

pub(super) use self::proof::Proof;
use self::proof::SHA256_LEN;
use crate::credential::{Credential, SaltedPassword};
use crate::upstream::end_point::EndPoint;

#[cfg(test)]
mod differential;
mod proof;

pub(super) const MECHANISM: &str = "SCRAM-SHA-256";
pub(super) const MECHANISM_PLUS: &str = "SCRAM-SHA-256-PLUS";
/// Fewer iterations invite offline guessing of what goes on the wire.
const MIN_ITERATIONS: u32 = 4096;
/// More are an attack on the broker's processor (CVE-2026-42198).
const MAX_ITERATIONS: u32 = 100_000;
/// Servers send 18 to 32 bytes of nonce and 16 to 64 of salt.
const MAX_SERVER_FIRST: usize = 2048;

/// What a server did that no honest one does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ScramFault {
    /// The message is not one of RFC 5802.
    Malformed,
    /// The nonce is not an extension of ours.
    Nonce,
    /// Too few iterations, or too many.
    Iterations,
    /// The server does not know the password.
    Signature,
    /// The server sees another channel than we do: somebody stands between.
    Channel,
    /// The server reports an error.
    Refused,
    /// The kernel gave no random bytes.
    NoRandomness,
    /// What was to be keys is none.
    NoKeys,
}

/// What an exchange says of the channel that it runs in (RFC 5802 §6).
#[derive(Debug)]
pub(super) enum Binding {
    /// `n`: we cannot bind, or must not.
    No,
    /// `y`: we could, and the server did not offer it. If it did, somebody took the offer away,
    /// and the server will tell.
    NotOffered,
    /// `p`: bound to the server's certificate.
    To(EndPoint),
}

/// The first message is sent; the server's is awaited.
#[derive(Debug)]
pub(super) struct ClientFirst {
    bare: String,
    nonce: String,
    binding: Binding,
}

/// The challenge, checked; the proof can be computed.
#[derive(Debug)]
pub(super) struct Challenge {
    auth_message: String,
    without_proof: String,
    salt: Vec<u8>,
    iterations: NonZeroU32,
}

/// What only a server that knows the password can send.
#[derive(Debug)]
pub(super) struct ServerSignature([u8; SHA256_LEN]);

/// Proof that the server knows the password; made by checking its signature and by nothing else.
#[derive(Debug)]
pub(super) struct ServerProven(());

impl Binding {
    /// The mechanism that goes with it.
    pub(super) fn mechanism(&self) -> &'static str {
        match self {
            Self::No | Self::NotOffered => MECHANISM,
            Self::To(_) => MECHANISM_PLUS,
        }
    }

    /// RFC 5802 §7; no authorization identity.
    fn gs2_header(&self) -> &'static str {
        match self {
            Self::No => "n,,",
            Self::NotOffered => "y,,",
            Self::To(_) => "p=tls-server-end-point,,",
        }
    }

    /// `c=` of the final message: the header, and what it binds to.
    fn channel(&self) -> String {
        let mut input = self.gs2_header().as_bytes().to_vec();
        if let Self::To(end_point) = self {
            input.extend_from_slice(end_point.as_bytes());
        }
        BASE64.encode(input)
    }
}

impl ClientFirst {
    pub(super) fn random(binding: Binding) -> Result<Self, ScramFault> {
        let mut nonce = [0; 18];
        SystemRandom::new().fill(&mut nonce).map_err(|_unspecified| ScramFault::NoRandomness)?;
        Ok(Self::with_nonce(BASE64.encode(nonce), binding))
    }

    pub(super) fn with_nonce(nonce: String, binding: Binding) -> Self {
        // PostgreSQL takes the user from the startup message and ignores this one.
        Self { bare: format!("n=,r={nonce}"), nonce, binding }
    }

    #[cfg(test)]
    pub(super) fn nonce(&self) -> &str {
        &self.nonce
    }

    pub(super) fn message(&self) -> Vec<u8> {
        format!("{}{}", self.binding.gs2_header(), self.bare).into_bytes()
    }

    /// Reads `r=…,s=…,i=…`.
    pub(super) fn challenged(self, server_first: &[u8]) -> Result<Challenge, ScramFault> {
        if server_first.len() > MAX_SERVER_FIRST {
            return Err(ScramFault::Malformed);
        }
        let server_first =
            std::str::from_utf8(server_first).map_err(|_not_text| ScramFault::Malformed)?;
        let mut attributes = server_first.split(',');
        let mut attribute = |name: &str| {
            attributes.next().and_then(|text| text.strip_prefix(name)).ok_or(ScramFault::Malformed)
        };
        let (nonce, salt, iterations) = (attribute("r=")?, attribute("s=")?, attribute("i=")?);

        let added = nonce.strip_prefix(&*self.nonce).ok_or(ScramFault::Nonce)?;
        if added.is_empty() || !added.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(ScramFault::Nonce);
        }
        let salt = BASE64.decode(salt).map_err(|_not_base64| ScramFault::Malformed)?;
        if salt.is_empty()
            || iterations.is_empty()
            || !iterations.bytes().all(|byte| byte.is_ascii_digit())
        {
            return Err(ScramFault::Malformed);
        }
        let iterations = iterations.parse().map_err(|_too_many| ScramFault::Iterations)?;
        if !(MIN_ITERATIONS..=MAX_ITERATIONS).contains(&iterations) {
            return Err(ScramFault::Iterations);
        }
        let iterations = NonZeroU32::new(iterations).ok_or(ScramFault::Iterations)?;
        let without_proof = format!("c={},r={nonce}", self.binding.channel());
        let auth_message = format!("{},{server_first},{without_proof}", self.bare);
        Ok(Challenge { auth_message, without_proof, salt, iterations })
    }
}

impl Challenge {
    /// Whether the proof takes microseconds: nothing has to be derived from the password.
    pub(super) fn is_cheap(&self, credential: &Credential) -> bool {
        proof::is_cheap(credential, &self.salt, self.iterations)
    }

    /// Computes the proof from the secret in the arena. Takes milliseconds of processor time
    /// unless it [`is_cheap`](Self::is_cheap): call it where it holds nobody up.
    pub(super) fn prove(self, credential: &Credential) -> Result<Proof, ScramFault> {
        proof::prove(self, credential).ok_or(ScramFault::NoKeys)
    }
}

/// Keeps what was derived from the password, now that the server has shown that it is right.
pub(super) fn keep(credential: &Credential, derived: SaltedPassword, _: &ServerProven) {
    credential.salted().keep(derived);
}

impl ServerSignature {
    /// Reads `v=…` and compares. Until this has succeeded nothing that the server says is believed.
    pub(super) fn check(&self, server_final: &[u8]) -> Result<ServerProven, ScramFault> {
        if let Some(error) = server_final.strip_prefix(b"e=") {
            let channel =
                [&b"channel-bindings-dont-match"[..], b"server-does-support-channel-binding"];
            return Err(if channel.contains(&error) {
                ScramFault::Channel
            } else {
                ScramFault::Refused
            });
        }
        let encoded = server_final.strip_prefix(b"v=").ok_or(ScramFault::Malformed)?;
        let encoded = encoded.split(|byte| *byte == b',').next().unwrap_or_default();
        let shown = BASE64.decode(encoded).map_err(|_not_base64| ScramFault::Malformed)?;
        let same = bool::from(shown.as_slice().ct_eq(&self.0));
        if same { Ok(ServerProven(())) } else { Err(ScramFault::Signature) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};

    use data_encoding::HEXLOWER;
    use ring::{hmac, pbkdf2};
    use sha2::block_api::compress256;
    use tokio::signal::unix::{SignalKind, signal};

    use zeroize::Zeroizing;

    use super::proof::sasl_prepared;
    use super::*;
    use crate::arena::{Arena, BackendChoice};
    use crate::{isolated, sys};

    fn credential(password: &str) -> Credential {
        let arena = Arena::map(BackendChoice::Auto, 64 * 1024).unwrap();
        let mut slot = arena.allocate(password.len()).unwrap();
        slot.fill(|bytes| bytes.copy_from_slice(password.as_bytes()));
        Credential::new("user".into(), slot)
    }

    /// RFC 7677 §3, with its user name in place of the empty one that PostgreSQL wants.
    #[test]
    fn a_known_exchange() {
        let first = ClientFirst {
            bare: "n=user,r=rOprNGfwEbeRWgbNEkqO".into(),
            nonce: "rOprNGfwEbeRWgbNEkqO".into(),
            binding: Binding::No,
        };
        assert_eq!(first.message(), b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO");
        let challenge = first
            .challenged(b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096")
            .unwrap();
        let proof = challenge.prove(&credential("pencil")).unwrap();
        assert_eq!(
            proof.message,
            b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
        );
        let expected = proof.expected;
        assert!(expected.check(b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=").is_ok());
        assert_eq!(
            expected.check(b"v=7rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=").unwrap_err(),
            ScramFault::Signature
        );
        assert_eq!(expected.check(b"v=").unwrap_err(), ScramFault::Signature);
        assert_eq!(expected.check(b"e=invalid-proof").unwrap_err(), ScramFault::Refused);
        assert_eq!(expected.check(b"").unwrap_err(), ScramFault::Malformed);
    }

    #[test]
    fn challenges_that_no_honest_server_sends() {
        let challenge = |text: &str| {
            ClientFirst::with_nonce("abc".into(), Binding::No)
                .challenged(text.as_bytes())
                .unwrap_err()
        };
        assert_eq!(challenge("r=abc,s=c2FsdA==,i=4096"), ScramFault::Nonce);
        assert_eq!(challenge("r=xbcd,s=c2FsdA==,i=4096"), ScramFault::Nonce);
        assert_eq!(challenge("r=abcd,s=c2FsdA==,i=4095"), ScramFault::Iterations);
        assert_eq!(challenge("r=abcd,s=c2FsdA==,i=1000000000"), ScramFault::Iterations);
        assert_eq!(challenge("r=abcd,s=c2FsdA==,i=99999999999999999999"), ScramFault::Iterations);
        assert_eq!(challenge("r=abcd,s=c2FsdA==,i=+4096"), ScramFault::Malformed);
        assert_eq!(challenge("r=abcd,s=,i=4096"), ScramFault::Malformed);
        assert_eq!(challenge("r=abcd,s=!!!,i=4096"), ScramFault::Malformed);
        assert_eq!(challenge("m=ext,r=abcd,s=c2FsdA==,i=4096"), ScramFault::Malformed);
        assert_eq!(challenge(""), ScramFault::Malformed);
        assert_eq!(
            challenge(&format!("r=abc{},s=c2FsdA==,i=4096", "x".repeat(3000))),
            ScramFault::Malformed
        );
    }

    #[test]
    fn passwords_are_prepared_as_the_server_does() {
        assert!(sasl_prepared(b"plain ascii").is_none());
        assert_eq!(sasl_prepared("I\u{00AD}X".as_bytes()).unwrap().as_str(), "IX");
        assert_eq!(sasl_prepared("\u{00AA}".as_bytes()).unwrap().as_str(), "a");
        assert!(sasl_prepared(b"\xff\xfe").is_none(), "not text: taken as it is");
        assert!(sasl_prepared(b"tab\t").is_none(), "a prohibited character: taken as it is");
    }

    const SALT: &[u8] = b"a salt of the test";

    /// FIPS 180-4 §5.3.3.
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

    /// The password and all that one could log in with in its place.
    fn equals_of(password: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
        let iterations = NonZeroU32::new(MIN_ITERATIONS).unwrap();
        let mut salted = [0; SHA256_LEN];
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, iterations, SALT, password, &mut salted);
        let key = hmac::Key::new(hmac::HMAC_SHA256, &salted);
        let client_key = hmac::sign(&key, b"Client Key").as_ref().to_vec();
        let mut all = vec![
            ("password", password.to_vec()),
            ("SaltedPassword", salted.to_vec()),
            ("ClientKey", client_key),
        ];
        for (name, key) in [("of password", password), ("of SaltedPassword", &salted)] {
            for pad in [0x36, 0x5c] {
                let mut block = [pad; 64];
                block.iter_mut().zip(key).for_each(|(byte, key)| *byte ^= key);
                let mut state = SHA256_INITIAL;
                compress256(&mut state, &[block]);
                all.push((name, block[..key.len()].to_vec()));
                all.push((name, state.iter().flat_map(|word| word.to_le_bytes()).collect()));
                all.push((name, state.iter().flat_map(|word| word.to_be_bytes()).collect()));
            }
        }
        all
    }

    fn turned(bytes: &[u8]) -> Vec<u8> {
        bytes.iter().map(|byte| !byte).collect()
    }

    /// Runs `work` far down the stack, where nothing that is called afterwards gets to.
    #[inline(never)]
    fn deep_down(work: impl FnOnce()) {
        let space = std::hint::black_box([0_u8; 64 * 1024]);
        work();
        std::hint::black_box(space);
    }

    /// Proofs on a worker of tokio's, in its blocking pool, on another thread and on the main
    /// one, and then a search of the process's own memory while all of these threads live. What
    /// to search for is computed in another process, whose stack does not matter. After the last
    /// proof comes a signal, for which the kernel lays all registers on the stack, so that they
    /// are searched too.
    #[test]
    fn a_proof_leaves_nothing_that_is_equal_to_the_password() {
        let name =
            "door::postgres::scram::tests::a_proof_leaves_nothing_that_is_equal_to_the_password";
        let password = b"canary of the residue test";
        let Some(role) = isolated::role() else {
            let all = equals_of(password);
            let patterns: Vec<String> =
                all.iter().map(|(_, bytes)| HEXLOWER.encode(&turned(bytes))).collect();
            let search = |way| isolated::again(name, &format!("{way} {}", patterns.join(" ")));
            let forms = |done: &isolated::Done, kind: &str| {
                assert!(done.success, "{}", done.said);
                let lines = done.said.lines().filter_map(|line| line.strip_prefix(kind));
                let form = |line: &str| all[line.trim().parse::<usize>().unwrap()].0;
                lines.map(form).collect::<Vec<_>>()
            };
            let clean = search("wiped");
            assert_eq!(forms(&clean, "outside"), [""; 0], "{}", clean.said);
            // Controls: the search sees a live copy, and what an unwiped proof leaves.
            assert_eq!(forms(&clean, "arena"), ["password"], "{}", clean.said);
            let left = search("unwiped");
            assert!(forms(&left, "outside").contains(&"of SaltedPassword"), "{}", left.said);
            return;
        };
        let mut words = role.split(' ');
        let way = words.next().unwrap().to_owned();
        let patterns: Vec<Vec<u8>> =
            words.map(|word| HEXLOWER.decode(word.as_bytes()).unwrap()).collect();

        let arena = Arena::map(BackendChoice::Memfd, 64 * 1024).unwrap();
        let mut slot = arena.allocate(patterns[0].len()).unwrap();
        slot.fill(|place| place.iter_mut().zip(&patterns[0]).for_each(|(to, from)| *to = !from));
        let credential = Arc::new(Credential::new("user".into(), slot));
        let prove = move || {
            let server_first = format!("r=abcd,s={},i={MIN_ITERATIONS}", BASE64.encode(SALT));
            let first = ClientFirst::with_nonce("abc".into(), Binding::No);
            let challenge = first.challenged(server_first.as_bytes()).unwrap();
            if way == "wiped" {
                drop(challenge.prove(&credential));
            } else {
                let mut key = Zeroizing::new([0; SHA256_LEN]);
                credential.secret().expose(|password| {
                    proof::salted(password, &challenge.salt, challenge.iterations, &mut *key);
                });
                proof::from_salted(&*key, challenge.auth_message.as_bytes());
            }
        };
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let (done, is_done) = mpsc::channel();
        let (keep, is_kept) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let on_a_thread = prove.clone();
            scope.spawn(move || {
                on_a_thread();
                done.send(()).unwrap();
                let _ = is_kept.recv();
            });
            runtime.block_on(async {
                #[expect(clippy::disallowed_methods, reason = "a worker of the test's own")]
                tokio::spawn({
                    let prove = prove.clone();
                    async move { prove() }
                })
                .await
                .unwrap();
                tokio::task::spawn_blocking(prove.clone()).await.unwrap();
            });
            is_done.recv().unwrap();
            let _entered = runtime.enter();
            let _handled = signal(SignalKind::user_defined1()).unwrap();
            deep_down(|| {
                prove();
                sys::interrupt_this_thread();
            });
            // The test runner's own line is still open.
            println!();
            for (index, mapping) in isolated::copies(&patterns) {
                let place = if mapping.starts_with("/memfd:") { "arena" } else { "outside" };
                println!("{place} {index}");
            }
            drop(keep);
        });
    }
}
