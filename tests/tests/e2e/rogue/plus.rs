//! SCRAM-SHA-256-PLUS: what the broker binds a login to, and servers that lie about it.

use std::sync::{Arc, Mutex};

use credbroker_e2e::frontend::{LoginError, message};
use credbroker_e2e::identity::Identity;
use credbroker_e2e::postgres::Server;
use credbroker_e2e::rogue::{
    Authority, Evidence, Place, Proven, Rogue, Script, ServerTls, Verifier, prelude, say,
};

use super::{Mode, PLUS, connect, mode, setup};

const PLAIN: &str = "SCRAM-SHA-256";
/// The client binds itself to the certificate.
const BOUND: &str = "p=tls-server-end-point,,";
/// It could, and the server does not offer it.
const NOT_OFFERED: &str = "y,,";
/// It does not.
const UNBOUND: &str = "n,,";

/// What a server says to the client's proof.
#[derive(Debug, Clone, Copy)]
enum Act {
    /// Its signature, as one that sees the same channel.
    Signs,
    /// Its signature, as one that has seen this certificate.
    SignsFor(Seen),
    /// SCRAM's own word for a fault.
    Says(&'static str),
    /// PostgreSQL's words for a binding to another certificate.
    Errs,
}

#[derive(Debug, Clone, Copy)]
enum Seen {
    AnotherCertificate,
    NoBinding,
}

/// What comes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comes {
    Session,
    Untrusted,
}

#[derive(Debug)]
struct Exchange {
    name: &'static str,
    tls_mode: &'static str,
    binding: &'static str,
    offers: &'static [&'static str],
    act: Act,
    /// The gs2-header; `None` when the broker must not begin.
    says: Option<&'static str>,
    comes: Comes,
}

#[rustfmt::skip]
fn exchanges() -> Vec<Exchange> {
    use Act::{Errs, Says, Signs, SignsFor};
    use Comes::{Session, Untrusted};
    use Seen::{AnotherCertificate, NoBinding};
    const ONLY_PLUS: &[&str] = &[PLUS];
    const EITHER: &[&str] = &[PLAIN, PLUS];
    const STRIPPED: &[&str] = &[PLAIN];
    let row = |name, tls_mode, binding, offers, act, says, comes| Exchange {
        name, tls_mode, binding, offers, act, says, comes,
    };
    vec![
        row("only PLUS", "require", "prefer", ONLY_PLUS, Signs, Some(BOUND), Session),
        row("only PLUS, required", "require", "require", ONLY_PLUS, Signs, Some(BOUND), Session),
        row("only PLUS, disabled", "require", "disable", ONLY_PLUS, Signs, None, Untrusted),
        row("either", "require", "prefer", EITHER, Signs, Some(BOUND), Session),
        row("either, required", "require", "require", EITHER, Signs, Some(BOUND), Session),
        row("either, disabled", "require", "disable", EITHER, Signs, Some(UNBOUND), Session),
        row("stripped", "require", "prefer", STRIPPED, Signs, Some(NOT_OFFERED), Session),
        row("stripped, required", "require", "require", STRIPPED, Signs, None, Untrusted),
        row("stripped, by who relays to one that has it", "require", "prefer", STRIPPED,
            Says("e=server-does-support-channel-binding"), Some(NOT_OFFERED), Untrusted),
        row("stripped, and signed as if nobody could", "require", "prefer", STRIPPED,
            SignsFor(NoBinding), Some(NOT_OFFERED), Untrusted),
        row("bound to another certificate", "require", "prefer", ONLY_PLUS,
            SignsFor(AnotherCertificate), Some(BOUND), Untrusted),
        row("bound, and signed as if it were not", "require", "prefer", ONLY_PLUS,
            SignsFor(NoBinding), Some(BOUND), Untrusted),
        row("e=channel-bindings-dont-match", "require", "prefer", ONLY_PLUS,
            Says("e=channel-bindings-dont-match"), Some(BOUND), Untrusted),
        row("PostgreSQL's own words for that", "require", "prefer", ONLY_PLUS, Errs, Some(BOUND), Untrusted),
        row("nothing to bind to", "unbindable", "prefer", EITHER, Signs, Some(UNBOUND), Session),
        row("nothing to bind to, required", "unbindable", "require", EITHER, Signs, None, Untrusted),
        row("nothing to bind to, only PLUS", "unbindable", "prefer", ONLY_PLUS, Signs, None, Untrusted),
        row("in the open, stripped", "prefer", "prefer", STRIPPED, Signs, Some(UNBOUND), Session),
        row("in the open, either", "prefer", "prefer", EITHER, Signs, Some(UNBOUND), Session),
        row("in the open, only PLUS", "prefer", "prefer", ONLY_PLUS, Signs, None, Untrusted),
    ]
}

/// What a rogue was told, in SCRAM's words.
#[derive(Debug, Default)]
struct Told {
    gs2: Option<String>,
    channel: Option<Vec<u8>>,
}

fn script(exchange: &Exchange, verifier: &Verifier, told: &Arc<Mutex<Told>>) -> Script {
    let (offers, act) = (exchange.offers, exchange.act);
    let (verifier, told) = (verifier.clone(), Arc::clone(told));
    Arc::new(move |wire| {
        wire.greet()?;
        let first = verifier.ask(wire, offers)?;
        told.lock().expect("no panic").gs2 = Some(first.gs2.clone());
        let proven = verifier.challenge(wire, &first, &verifier.server_first(&first.nonce))?;
        told.lock().expect("no panic").channel = Some(proven.channel());
        let answer = match act {
            Act::Errs => say("28000"),
            Act::Says(text) => last(text),
            Act::Signs => last(&verifier.signature(&proven)),
            Act::SignsFor(seen) => last(&verifier.signature(&as_seen(&proven, seen))),
        };
        wire.send(&answer)?;
        if matches!(act, Act::Signs) {
            wire.send(&prelude())?;
        }
        wire.hold()
    })
}

/// AuthenticationSASLFinal.
fn last(text: &str) -> Vec<u8> {
    message(b'R', &[&12_u32.to_be_bytes(), text.as_bytes()].concat())
}

fn as_seen(proven: &Proven, seen: Seen) -> Proven {
    match seen {
        Seen::AnotherCertificate => {
            let other = ServerTls::self_signed("localhost");
            proven.through(&[BOUND.as_bytes(), other.end_point()].concat())
        }
        Seen::NoBinding => proven.through(UNBOUND.as_bytes()),
    }
}

fn certificate(exchange: &Exchange) -> Option<ServerTls> {
    match exchange.tls_mode {
        "prefer" => None,
        "unbindable" => Some(ServerTls::unbindable("localhost")),
        _ => Some(ServerTls::self_signed("localhost")),
    }
}

fn terms(exchange: &Exchange, tls: Option<ServerTls>) -> Mode {
    let tls_mode = if exchange.tls_mode == "prefer" { "prefer" } else { "require" };
    let mut keys =
        vec![("tls.mode", tls_mode.into()), ("channel_binding", exchange.binding.into())];
    if tls_mode == "prefer" {
        keys.push(("tls.insecure", true.into()));
    }
    Mode { keys, ..mode("require", tls) }
}

#[test]
fn g6_a_login_is_bound_to_the_certificate_that_was_seen() {
    let database = Server::shared().database();
    let evidence = Evidence::of(&database);
    let verifier = Verifier::of(database.canary().reveal());
    let mut setup = setup(&database, &Authority::generate());
    let mut stage = Vec::new();
    for (number, exchange) in exchanges().into_iter().enumerate() {
        let told = Arc::<Mutex<Told>>::default();
        let tls = certificate(&exchange);
        let rogue = Rogue::start(&Place::Tcp, tls.clone(), script(&exchange, &verifier, &told));
        let name = format!("rogue-{number}");
        setup = connect(setup, &name, &database, &rogue, &terms(&exchange, tls.clone()));
        stage.push((name, exchange, tls, rogue, told));
    }
    let broker = setup.start();
    let mut faults = Vec::new();
    for (name, exchange, tls, rogue, told) in &stage {
        let (answer, comes) = match broker.login(&Identity::client(), name, "") {
            Ok(_session) => ("a session".to_owned(), Some(Comes::Session)),
            Err(LoginError::Refused(error)) => {
                let untrusted = error.to_string().contains("[R]UPSTREAM_UNTRUSTED");
                (error.to_string(), untrusted.then_some(Comes::Untrusted))
            }
            Err(LoginError::Broken(error)) => (format!("broken: {error}"), None),
        };
        let told = told.lock().expect("no panic");
        if comes != Some(exchange.comes) || told.gs2.as_deref() != exchange.says {
            faults.push(format!("{}: {:?}, {answer}", exchange.name, told.gs2));
        }
        // What is bound to is the certificate of this connection, and nothing else.
        let seen = tls.as_ref().filter(|_| exchange.says == Some(BOUND));
        let seen = seen.map_or(&[][..], ServerTls::end_point);
        let channel = exchange.says.map(|gs2| [gs2.as_bytes(), seen].concat());
        if told.channel != channel {
            faults.push(format!("{}: it sees {:?}", exchange.name, told.channel));
        }
        let found = evidence.found_in(&rogue.record());
        if !found.is_empty() {
            faults.push(format!("{}: the rogue was sent {found:?}", exchange.name));
        }
        let came = rogue.accepted();
        let connections = if exchange.tls_mode == "prefer" { 2 } else { 1 };
        if came != connections {
            faults.push(format!("{}: the broker came {came} times", exchange.name));
        }
        println!("{:<45} {:?} {answer}", exchange.name, told.gs2.as_deref().unwrap_or("nothing"));
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
