//! The cases: everything that a server does in a login and no honest one would.

use std::sync::Arc;

use data_encoding::BASE64;

use super::case::{Case, Expected, Phase, Say, Seen, Then};
use super::scram::{ITERATIONS, SALT, authentication, sasl, sasl_continue, sasl_final};
use super::{Mode, ServerTls};
use crate::frontend::message;

/// What stands in everything that a rogue says in words: no client may read it before the rogue
/// has proved itself.
pub const WORDS: &str = "words of a rogue";
/// The salt of AuthenticationMD5Password.
pub(super) const MD5_SALT: &[u8; 4] = b"salt";
/// The shortest salt there can be.
pub(super) const SHORT_SALT: &[u8] = b"s";

const MIB: usize = 1 << 20;

/// Certificates that prove nothing, or not enough.
#[derive(Debug, Clone)]
pub struct BadCertificates {
    /// Of the right authority, for another name.
    pub wrong_name: ServerTls,
    /// Of another authority, for the right name.
    pub unknown_authority: ServerTls,
    /// Of nobody.
    pub self_signed: ServerTls,
}

/// All that is tried in a mode.
#[must_use]
pub fn of(mode: &Mode, bad: &BadCertificates) -> Vec<Case> {
    let mut cases = Vec::new();
    if mode.asks_tls {
        cases.extend(before_tls());
        cases.extend(certificates(bad));
    }
    cases.extend(silence_and_ends(mode));
    cases.extend(questions());
    cases.extend(lists(mode));
    cases.extend(challenges());
    cases.extend(answers_to_the_proof());
    cases.extend(messages());
    cases.extend(errors());
    cases.extend(preludes());
    cases
}

/// The question of this kind: 3 the password, 5 an MD5, 10 SCRAM, 0 none.
#[must_use]
pub fn ask(kind: u32) -> Vec<u8> {
    match kind {
        5 => authentication(kind, MD5_SALT),
        10 => sasl(&["SCRAM-SHA-256"]),
        _ => authentication(kind, b""),
    }
}

/// An error of this SQLSTATE, in the rogue's words.
#[must_use]
pub fn say(sqlstate: &str) -> Vec<u8> {
    said(sqlstate.as_bytes())
}

fn case(name: impl Into<String>, until: Phase, bytes: Vec<u8>, expected: Expected) -> Case {
    case_of(name, until, Arc::new(move |_| bytes.clone()), expected)
}

fn case_of(name: impl Into<String>, until: Phase, say: Say, expected: Expected) -> Case {
    Case { name: name.into(), until, say, then: Then::Hold, expected, tls: None, nothing_in: &[] }
}

fn and(case: Case, then: Then) -> Case {
    Case { then, ..case }
}

fn error(fields: &[(u8, &[u8])]) -> Vec<u8> {
    let mut body: Vec<u8> =
        fields.iter().flat_map(|(field, text)| [&[*field], *text, b"\0"].concat()).collect();
    body.push(0);
    message(b'E', &body)
}

/// An error with the rogue's words.
pub(super) fn said(sqlstate: &[u8]) -> Vec<u8> {
    error(&[(b'S', b"FATAL"), (b'C', sqlstate), (b'M', WORDS.as_bytes())])
}

fn notice() -> Vec<u8> {
    message(b'N', &error(&[(b'S', b"NOTICE"), (b'C', b"00000"), (b'M', WORDS.as_bytes())])[5..])
}

fn before_tls() -> Vec<Case> {
    use Expected::Untrusted;
    let asked = |name, bytes: &[u8], expected| case(name, Phase::TlsAsked, bytes.into(), expected);
    let stuffed = [b"S".as_slice(), &authentication(3, b"")].concat();
    vec![
        asked("no TLS", b"N", Untrusted),
        asked("E for TLS", &said(b"08P01"), Untrusted),
        asked("garbage for TLS", b"X", Untrusted),
        asked("a zero for TLS", b"\0", Untrusted),
        asked("S and stuffed bytes", &stuffed, Untrusted),
        asked("S twice", b"SS", Untrusted),
        asked("HTTP in the handshake", b"SHTTP/1.1 400 Bad Request\r\n\r\n", Untrusted),
        asked(
            "a handshake of 64 KiB of zeros",
            &[b"S".as_slice(), &[0; 65_536]].concat(),
            Untrusted,
        ),
    ]
}

fn certificates(bad: &BadCertificates) -> Vec<Case> {
    let with = |name, tls: &ServerTls, nothing_in| Case {
        tls: Some(tls.clone()),
        nothing_in,
        ..case(name, Phase::Started, authentication(3, b""), Expected::Untrusted)
    };
    let chain: &[&str] = &["verify-ca", "verify-full"];
    vec![
        with("a certificate for another name", &bad.wrong_name, &["verify-full"]),
        with("a certificate of an unknown authority", &bad.unknown_authority, chain),
        with("a certificate of its own", &bad.self_signed, chain),
    ]
}

/// Each step of a login, and then nothing, the end, or a reset.
fn silence_and_ends(mode: &Mode) -> Vec<Case> {
    let phases = Phase::ALL.into_iter().filter(|phase| mode.asks_tls || phase.is_plain());
    let mut cases = Vec::new();
    for phase in phases {
        let ends = [("silence", Then::Silence), ("the end", Then::Close), ("a reset", Then::Reset)];
        for (name, then) in ends {
            let name = format!("{name} at {phase:?}");
            cases.push(and(case(name, phase, Vec::new(), Expected::Unreachable), then));
        }
    }
    cases
}

/// Everything but SCRAM that a server may ask for.
fn questions() -> Vec<Case> {
    let kinds: [(&str, u32, &[u8]); 10] = [
        ("it asks for the password", 3, b""),
        ("it asks for an MD5", 5, MD5_SALT),
        ("it asks for Kerberos V5", 2, b""),
        ("it asks for crypt", 4, b"sa"),
        ("it asks for SCM credentials", 6, b""),
        ("it asks for GSSAPI", 7, b""),
        ("it goes on with GSSAPI", 8, b"token"),
        ("it asks for SSPI", 9, b""),
        ("it asks for kind 99", 99, b""),
        ("it lets us in at once", 0, b""),
    ];
    let mut cases: Vec<Case> = Vec::new();
    for (phase, when) in [(Phase::Started, ""), (Phase::Asked, " after SASL has begun")] {
        for (name, kind, rest) in kinds {
            let bytes = authentication(kind, rest);
            cases.push(case(format!("{name}{when}"), phase, bytes, Expected::Untrusted));
        }
    }
    let half = message(b'R', &[0, 0]);
    cases.push(case("half a kind of authentication", Phase::Started, half, Expected::Untrusted));
    cases
}

fn lists(mode: &Mode) -> Vec<Case> {
    let untrusted = |name: &str, bytes| case(name, Phase::Started, bytes, Expected::Untrusted);
    let many: Vec<String> = (0..1000).map(|number| format!("MECHANISM-{number}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let mut cases = vec![
        untrusted("an empty list of mechanisms", authentication(10, b"\0")),
        untrusted("no list of mechanisms", authentication(10, b"")),
        untrusted("a list without an end", authentication(10, b"SCRAM-SHA-256")),
        untrusted("a thousand unknown mechanisms", sasl(&many)),
        untrusted("only unknown mechanisms", sasl(&["SCRAM-SHA-1", "OAUTHBEARER", "PLAIN"])),
        untrusted("a mechanism in small letters", sasl(&["scram-sha-256"])),
        untrusted("SASL goes on before it began", sasl_continue(b"r=x,s=c2FsdA==,i=4096")),
        untrusted("SASL ends before it began", sasl_final("v=AAAA")),
    ];
    if !mode.asks_tls {
        cases.push(untrusted("only PLUS, over plain", sasl(&["SCRAM-SHA-256-PLUS"])));
    }
    cases
}

fn challenges() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut untrusted = |name: &str, text: fn(&str) -> Vec<u8>| {
        let say: Say = Arc::new(move |seen: &Seen| sasl_continue(&text(&seen.nonce)));
        cases.push(case_of(name, Phase::Asked, say, Expected::Untrusted));
    };
    fn first(nonce: &str, salt: &[u8], iterations: &str) -> Vec<u8> {
        format!("r={nonce},s={},i={iterations}", BASE64.encode(salt)).into_bytes()
    }
    fn counted(nonce: &str, iterations: &str) -> Vec<u8> {
        first(&format!("{nonce}Ours"), SALT, iterations)
    }
    untrusted("another nonce", |_| first("SomebodyElses", SALT, "4096"));
    untrusted("our nonce and nothing added", |nonce| first(nonce, SALT, "4096"));
    untrusted("our nonce behind its own", |nonce| first(&format!("Ours{nonce}"), SALT, "4096"));
    untrusted("an empty nonce", |_| first("", SALT, "4096"));
    untrusted("a nonce that cannot be printed", |n| first(&format!("{n}\u{7f}"), SALT, "4096"));
    untrusted("1 iteration", |nonce| counted(nonce, "1"));
    untrusted("0 iterations", |nonce| counted(nonce, "0"));
    untrusted("4095 iterations", |nonce| counted(nonce, "4095"));
    untrusted("100001 iterations", |nonce| counted(nonce, "100001"));
    untrusted("10^9 iterations", |nonce| counted(nonce, "1000000000"));
    untrusted("2^32 + 4096 iterations", |nonce| counted(nonce, "4294971392"));
    untrusted("10^20 iterations", |nonce| counted(nonce, "100000000000000000000"));
    untrusted("-1 iterations", |nonce| counted(nonce, "-1"));
    untrusted("+4096 iterations", |nonce| counted(nonce, "+4096"));
    untrusted("no count of iterations", |nonce| counted(nonce, ""));
    untrusted("no iterations", |n| format!("r={n}Ours,s={}", BASE64.encode(SALT)).into_bytes());
    untrusted("an empty salt", |nonce| first(&format!("{nonce}Ours"), b"", "4096"));
    untrusted("a salt of 64 KiB", |nonce| first(&format!("{nonce}Ours"), &[7; 23_000], "4096"));
    untrusted("a salt that is not base64", |n| format!("r={n}Ours,s=!!!!,i=4096").into_bytes());
    untrusted("an extension that must be known", |n| {
        [b"m=must-know,".as_slice(), &counted(n, "4096")].concat()
    });
    untrusted("another order", |n| format!("s=c2FsdA==,r={n}Ours,i=4096").into_bytes());
    untrusted("a nonce twice", |n| format!("r={n}Ours,r={n}Ours,s=c2FsdA==,i=4096").into_bytes());
    untrusted("an error at once", |_| b"e=other-error".to_vec());
    untrusted("nothing for a challenge", |_| Vec::new());
    untrusted("a challenge that is no text", |_| vec![0xff; 64]);
    untrusted("a challenge of 1 MiB", |nonce| {
        first(&format!("{nonce}{}", "x".repeat(MIB)), SALT, "4096")
    });
    let list = sasl(&["SCRAM-SHA-256"]);
    cases.push(case("a second list of mechanisms", Phase::Asked, list, Expected::Untrusted));
    // It may choose a salt of one byte, and then still does not know the password.
    let short: Say = Arc::new(|seen: &Seen| {
        let challenge = first(&format!("{}Ours", seen.nonce), SHORT_SALT, &ITERATIONS.to_string());
        [sasl_continue(&challenge), sasl_final(&format!("v={}", BASE64.encode(&[7; 32])))].concat()
    });
    cases.push(case_of("a salt of one byte", Phase::Asked, short, Expected::Untrusted));
    let ahead: Say = Arc::new(|seen: &Seen| {
        let challenge = counted(&seen.nonce, "4096");
        [sasl_continue(&challenge), authentication(0, b"")].concat()
    });
    cases.push(case_of("it lets us in before the proof", Phase::Asked, ahead, Expected::Untrusted));
    cases
}

fn answers_to_the_proof() -> Vec<Case> {
    use Expected::{Refused, Untrusted};
    let proof = |name: &str, bytes, expected| case(name, Phase::Proof, bytes, expected);
    let signed = |name: &str, bytes| case(name, Phase::Signed, bytes, Untrusted);
    let wrong = format!("v={}", BASE64.encode(&[7; 32]));
    let mut cases = vec![
        proof("no signature", authentication(0, b""), Untrusted),
        proof("a wrong signature", sasl_final(&wrong), Untrusted),
        proof("an empty signature", sasl_final("v="), Untrusted),
        proof("nothing for a signature", sasl_final(""), Untrusted),
        proof("a signature that is not base64", sasl_final("v=!!!!"), Untrusted),
        proof("a signature of 16 KiB", sasl_final(&format!("v={}", "A".repeat(16_384))), Untrusted),
        proof("e=invalid-proof", sasl_final("e=invalid-proof"), Refused),
        proof("e=other-error and its words", sasl_final(&format!("e={WORDS}")), Refused),
        proof("the password after the proof", authentication(3, b""), Untrusted),
        proof("an MD5 after the proof", authentication(5, MD5_SALT), Untrusted),
        proof("a second challenge", sasl_continue(b"r=x,s=c2FsdA==,i=4096"), Untrusted),
        proof("SASL from the beginning", sasl(&["SCRAM-SHA-256"]), Untrusted),
        proof("ready without a signature", message(b'Z', b"I"), Untrusted),
        signed("the password after the signature", authentication(3, b"")),
        signed("SASL again after the signature", sasl(&["SCRAM-SHA-256"])),
        signed("ready without AuthenticationOk", message(b'Z', b"I")),
        signed("parameters before AuthenticationOk", message(b'S', b"a\0b\0")),
    ];
    let twice: Say = Arc::new(|seen: &Seen| sasl_final(&seen.signature));
    cases.push(case_of("a signature twice", Phase::Signed, twice, Untrusted));
    let tail: Say = Arc::new(|seen: &Seen| sasl_final(&format!("{}AAAA", seen.signature)));
    cases.push(case_of("a signature and more of it", Phase::Proof, tail, Untrusted));
    cases
}

fn messages() -> Vec<Case> {
    use Expected::{Unreachable, Untrusted};
    let header = |length: u32| [b"R".as_slice(), &length.to_be_bytes()].concat();
    let mut cases = Vec::new();
    for phase in [Phase::Started, Phase::Proof, Phase::Ok] {
        for length in [0, 3, 40_000, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
            let name = format!("length {length:#x} at {phase:?}");
            cases.push(case(name, phase, header(length), Untrusted));
        }
        for tag in [b'T', b'D', b'X', b'v', b'G', b'A', 0, 0xff] {
            let name = format!("message {tag:#04x} at {phase:?}");
            cases.push(case(name, phase, message(tag, b""), Untrusted));
        }
    }
    let unasked = message(b'v', &[0, 3, 0, 2, 0, 0, 0, 0]);
    cases.push(case("a version nobody asked for", Phase::Started, unasked, Untrusted));
    let ready = message(b'Z', b"I");
    cases.push(case("ready at once", Phase::Started, ready, Untrusted));
    for phase in [Phase::Started, Phase::Ok] {
        let name = format!("a header and silence at {phase:?}");
        cases.push(and(case(name, phase, header(500), Unreachable), Then::Silence));
        let drip = message(b'N', &[b'x'; 600]);
        let name = format!("a byte every 100 ms at {phase:?}");
        cases.push(and(case(name, phase, Vec::new(), Unreachable), Then::Drip(drip)));
    }
    for phase in [Phase::Started, Phase::Asked, Phase::Proof, Phase::Signed, Phase::Ok] {
        let name = format!("notices without end at {phase:?}");
        let flood = notice().repeat(64);
        cases.push(and(case(name, phase, Vec::new(), Untrusted), Then::Flood(flood)));
    }
    cases
}

fn errors() -> Vec<Case> {
    use Expected::{ItsWordsIfNamed, NoEntry, Refused};
    let started = |name: &str, bytes, expected| case(name, Phase::Started, bytes, expected);
    let of_four = error(&[(b'S', b"FATAL"), (b'C', b"3D00"), (b'M', WORDS.as_bytes())]);
    let no_text = error(&[(b'C', b"3D000"), (b'M', &[WORDS.as_bytes(), b"\xff\xfe"].concat())]);
    let mut cases = vec![
        started("an error", said(b"3D000"), ItsWordsIfNamed),
        started("an error that blames the credential", said(b"28P01"), Refused),
        started("an error that has no entry for us", said(b"28000"), NoEntry),
        started("an error without a body", message(b'E', b""), ItsWordsIfNamed),
        started("an error without fields", message(b'E', b"\0"), ItsWordsIfNamed),
        started("an error that is not UTF-8", no_text, ItsWordsIfNamed),
        started("an error with a code of four", of_four, ItsWordsIfNamed),
        started("an error whose code is odd", said(b"\n[31m"), ItsWordsIfNamed),
        started("an error of 30 KiB", error(&[(b'M', &[b'x'; 30_000])]), ItsWordsIfNamed),
        started("an error without an end", message(b'E', b"SFATAL\0C3D000"), ItsWordsIfNamed),
    ];
    for phase in [Phase::Asked, Phase::Proof] {
        let name = format!("an error at {phase:?}");
        cases.push(case(name, phase, said(b"53300"), ItsWordsIfNamed));
    }
    cases.push(case(
        "an error of a proven server",
        Phase::Signed,
        said(b"53300"),
        Expected::ItsWords,
    ));
    cases.push(case(
        "an error after AuthenticationOk",
        Phase::Ok,
        said(b"3D000"),
        Expected::ItsWords,
    ));
    cases
}

/// After AuthenticationOk: it is the server that knows the password, and has gone bad.
fn preludes() -> Vec<Case> {
    let ok = |name: &str, bytes| case(name, Phase::Ok, bytes, Expected::Untrusted);
    let key = message(b'K', b"\0\0\0\x07key!");
    let long = message(b'K', &[7; 300]);
    let ready = message(b'Z', b"I");
    let parameter = message(b'S', &[b"p\0".as_slice(), &[b'x'; 1000], b"\0"].concat());
    vec![
        ok("a key of three bytes", message(b'K', &[7; 3])),
        ok("a key without a secret", message(b'K', &[7; 4])),
        ok("a key of 300 bytes", long),
        ok("two keys", [key.clone(), key].concat()),
        ok("AuthenticationOk twice", authentication(0, b"")),
        ok("the password after AuthenticationOk", authentication(3, b"")),
        ok("SASL again after AuthenticationOk", sasl(&["SCRAM-SHA-256"])),
        ok("bytes after it is ready", [ready.clone(), b"\x15\x03\x03".to_vec()].concat()),
        ok("a question after it is ready", [ready, authentication(3, b"")].concat()),
        and(ok("parameters without end", Vec::new()), Then::Flood(parameter.repeat(8))),
    ]
}
