//! Our SCRAM beside that of postgres-protocol: the same bytes, and the same verdicts.

use std::num::NonZeroU32;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use proptest::prelude::*;

use super::{Binding, ClientFirst, ScramFault, keep};
use crate::arena::{Arena, BackendChoice};
use crate::credential::Credential;
use crate::upstream::end_point::EndPoint;

/// Theirs derives anew for each case, without optimisation.
const CASES: u32 = 150;

#[derive(Clone, Debug)]
struct Case {
    password: String,
    salt: Vec<u8>,
    iterations: u32,
    added: String,
    /// What the server's signature is spoilt with; nothing when 0.
    spoilt: u8,
    binding: u8,
}

fn cases() -> impl Strategy<Value = Case> {
    let password =
        prop_oneof!["[ -~]{1,40}", "\\PC{1,20}", "[\u{a0}-\u{2ff}]{1,10}", "[\u{1}-\u{ff}]{1,12}"];
    let salt = prop::collection::vec(any::<u8>(), 1..=64);
    let added = "[!-+\\--~]{1,40}";
    (password, salt, 4096_u32..4200, added, prop_oneof![Just(0), 1_u8..], 0_u8..3).prop_map(
        |(password, salt, iterations, added, spoilt, binding)| Case {
            password,
            salt,
            iterations,
            added,
            spoilt,
            binding,
        },
    )
}

fn credential(password: &str) -> Credential {
    let arena = Arena::map(BackendChoice::Auto, 64 * 1024).unwrap();
    let mut slot = arena.allocate(password.len()).unwrap();
    slot.fill(|place| place.copy_from_slice(password.as_bytes()));
    Credential::new("app".into(), slot)
}

fn agree(case: &Case) {
    let Case { password, salt, iterations, added, spoilt, binding } = case;
    let end_point = [0x5a; 32];
    let (binding, their_binding) = match binding {
        0 => (Binding::No, ChannelBinding::unsupported()),
        1 => (Binding::NotOffered, ChannelBinding::unrequested()),
        _ => (
            Binding::To(EndPoint::dangerous_for_test(&end_point)),
            ChannelBinding::tls_server_end_point(end_point.to_vec()),
        ),
    };
    let mut theirs = ScramSha256::new(password.as_bytes(), their_binding);
    let nonce = String::from_utf8_lossy(theirs.message());
    let nonce = nonce.split_once("r=").unwrap().1.to_owned();
    let ours = ClientFirst::with_nonce(nonce.clone(), binding);
    assert_eq!(ours.message(), theirs.message());

    let server_first = format!("r={nonce}{added},s={},i={iterations}", BASE64.encode(salt));
    let credential = credential(password);
    theirs.update(server_first.as_bytes()).unwrap();
    let challenge = ours.challenged(server_first.as_bytes()).unwrap();
    assert!(!challenge.is_cheap(&credential));
    let proof = challenge.prove(&credential).unwrap();
    assert_eq!(proof.message, theirs.message(), "{case:?}");

    let mut signature = proof.expected.0;
    signature[usize::from(*spoilt) % 32] ^= spoilt;
    let server_final = format!("v={}", BASE64.encode(signature));
    let their_verdict = theirs.finish(server_final.as_bytes()).is_ok();
    let our_verdict = proof.expected.check(server_final.as_bytes());
    assert_eq!(our_verdict.is_ok(), their_verdict, "{case:?}");
    assert_eq!(our_verdict.is_ok(), *spoilt == 0);

    // What was proven is kept, and gives the same proof.
    let Ok(proven) = our_verdict else { return };
    keep(&credential, proof.derived.unwrap(), &proven);
    let iterations = NonZeroU32::new(*iterations).unwrap();
    assert!(credential.salted().has(salt, iterations));
    let again = ClientFirst::with_nonce(nonce, Binding::No);
    let again = again.challenged(server_first.as_bytes()).unwrap();
    assert!(again.is_cheap(&credential));
    let first = again.prove(&credential).unwrap();
    assert!(first.derived.is_none());
    if case.binding == 0 {
        assert_eq!(first.message, proof.message, "{case:?}");
    }
}

#[test]
fn ours_is_theirs() {
    let mut runner = proptest::test_runner::TestRunner::new_with_rng(
        ProptestConfig { cases: CASES, failure_persistence: None, ..ProptestConfig::default() },
        proptest::test_runner::TestRng::deterministic_rng(
            proptest::test_runner::RngAlgorithm::ChaCha,
        ),
    );
    runner
        .run(&cases(), |case| {
            agree(&case);
            Ok(())
        })
        .unwrap();
}

/// Where we refuse on purpose what they take.
#[test]
fn where_ours_is_stricter() {
    let both = |server_first: &str| {
        let mut theirs = ScramSha256::new(b"pencil", ChannelBinding::unsupported());
        let nonce =
            String::from_utf8_lossy(theirs.message()).split_once("r=").unwrap().1.to_owned();
        let server_first = server_first.replace("NONCE", &nonce);
        let ours = ClientFirst::with_nonce(nonce, Binding::No);
        let ours = ours.challenged(server_first.as_bytes()).map(drop);
        (ours, theirs.update(server_first.as_bytes()).is_ok())
    };
    let cases = [
        ("r=NONCE,s=c2FsdA==,i=4096", ScramFault::Nonce, "a nonce that adds nothing"),
        ("r=NONCEx,s=c2FsdA==,i=1", ScramFault::Iterations, "an invitation to guess"),
        ("r=NONCEx,s=,i=4096", ScramFault::Malformed, "no salt"),
    ];
    for (server_first, fault, why) in cases {
        assert_eq!(both(server_first), (Err(fault), true), "{why}");
    }
    for refused_by_both in ["", "r=", "r=x,s=c2FsdA==,i=4096", "r=NONCEx,s=c2FsdA==,i=100001"] {
        let (ours, theirs) = both(refused_by_both);
        assert!(ours.is_err() && !theirs, "{refused_by_both}");
    }
}
