//! `require_auth`: a server gets what its connection names, and from a server that asks for
//! anything else it is withheld.

use std::sync::Arc;

use credbroker_e2e::postgres::Server;
use credbroker_e2e::rogue::{
    Authority, Case, Evidence, Expected, Mode, Phase, Place, Rogue, Then, Verifier, ask,
};

use super::{Bout, connect, fault, fight, modes, setup};

/// The methods that a connection names, and whether it may without a server that proves its name.
const NAMED: [(&[&str], bool); 6] = [
    (&["scram-sha-256"], true),
    (&["md5"], true),
    (&["scram-sha-256", "md5"], true),
    (&["password"], false),
    (&["scram-sha-256", "none"], false),
    (&["scram-sha-256", "md5", "password", "none"], false),
];

/// What a server asks for: the method, the question, and what it gets that looks like a secret.
const QUESTIONS: [(&str, u32, &[&str]); 4] = [
    ("password", 3, &["raw"]),
    ("md5", 5, &["md5(md5, salt)"]),
    ("none", 0, &[]),
    ("scram-sha-256", 10, &[]),
];

/// A server that asks one thing, takes the answer and is gone.
fn question(mode: &Mode, method: &str, kind: u32, named: &[&str]) -> Case {
    let expected =
        if named.contains(&method) { Expected::Unreachable } else { Expected::Untrusted };
    let bytes = ask(kind);
    Case {
        name: format!("{method} of {named:?} in {}", mode.name),
        until: Phase::Started,
        say: Arc::new(move |_| bytes.clone()),
        then: match (named.contains(&method), kind) {
            (true, 0) => Then::Close,
            (true, _) => Then::Answer,
            (false, _) => Then::Hold,
        },
        expected,
        tls: None,
        nothing_in: &[],
    }
}

#[test]
fn g6_a_server_gets_what_require_auth_names_and_nothing_else() {
    let database = Server::shared().database();
    let evidence = Evidence::of(&database);
    let authority = Authority::generate();
    let mut setup = setup(&database, &authority);
    let verifier = Verifier::of(database.canary().reveal());
    let mut bouts = Vec::new();
    for mode in modes(&authority) {
        for (named, anywhere) in NAMED {
            if !anywhere && !mode.verified {
                continue;
            }
            for (method, kind, secrets) in QUESTIONS {
                let case = question(&mode, method, kind, named);
                let connection = format!("rogue-{}", bouts.len());
                let port = u16::try_from(bouts.len()).expect("a port") + 1;
                let place =
                    if mode.unix { Place::Unix(setup.path("rogues"), port) } else { Place::Tcp };
                let script = case.script(&verifier, &mode);
                let rogue = Rogue::start(&place, mode.tls.clone(), script);
                setup = connect(setup, &connection, &database, &rogue, &mode)
                    .set(&format!("connections.{connection}.require_auth"), named);
                let given: &[&str] = if named.contains(&method) { secrets } else { &[] };
                let mode = mode.clone();
                bouts.push((Bout { connection, mode, case, rogue }, given));
            }
        }
    }
    let broker = setup.start();
    let mut faults = Vec::new();
    for (bout, given) in &bouts {
        let outcome = fight(&broker, bout);
        let found = evidence.found_in(&bout.rogue.record());
        // What is named is given, in no other form; and so the instrument is seen to find it.
        if !given.iter().all(|form| found.iter().any(|found| found == form)) {
            faults.push(format!("{}: it got {found:?}", bout.case.name));
        }
        if found.iter().any(|found| !given.contains(&found.as_str())) {
            faults.push(format!("{}: it got {found:?}", bout.case.name));
        }
        if given.is_empty() {
            let fault = fault(bout, &outcome, &evidence);
            faults.extend(fault.map(|fault| format!("{}: {fault}", bout.case.name)));
        }
        println!("{:<70} {found:?} {:.0?}", bout.case.name, outcome.took);
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
