//! A man in the middle, who logs the broker in to the real server and listens.

use credbroker_e2e::broker::Broker;
use credbroker_e2e::identity::Identity;
use credbroker_e2e::postgres::{Database, Server};
use credbroker_e2e::rogue::{
    Authority, Evidence, Heard, Middle, Place, Record, Rogue, ServerTls, replay,
};

use super::{connect, mode, setup};

/// What the door says, or `Ok` with what the server behind it answers to a question.
fn log_in(broker: &Broker, connection: &str) -> Result<Vec<Vec<String>>, String> {
    let mut session =
        broker.login(&Identity::client(), connection, "").map_err(|e| e.refusal().to_string())?;
    Ok(session.query("SELECT current_user").expect("the man in the middle passes it on"))
}

/// All that passed, as what a rogue was sent.
fn record(middle: &Middle, rogue: &Rogue) -> Record {
    let mut record = rogue.record();
    record.opened.extend(middle.heard().iter().flat_map(|heard| heard.body.clone()));
    record
}

fn authentication(heard: &[Heard], kind: u8) -> Option<&Heard> {
    let of_kind = |heard: &&Heard| {
        heard.from_server && heard.tag == b'R' && heard.body.starts_with(&[0, 0, 0, kind])
    };
    heard.iter().find(of_kind)
}

#[test]
fn g6_who_relays_a_login_learns_one_proof_and_cannot_use_it() {
    let database = Server::shared().database();
    let evidence = Evidence::of(&database);
    let middle = Middle::new();
    let rogue = Rogue::start(&Place::Tcp, None, middle.script(database.server()));
    let setup = setup(&database, &Authority::generate());
    let broker = connect(setup, "rogue-0", &database, &rogue, &mode("disable", None)).start();

    // Without TLS nothing tells him from the server: the session is his to read. The credential
    // is not.
    let rows = log_in(&broker, "rogue-0").expect("a relayed session");
    assert_eq!(rows, [[database.name()]]);
    let heard = middle.heard();
    let said: Vec<&Heard> = heard.iter().filter(|heard| heard.tag == b'p').collect();
    assert_eq!(said.len(), 2, "the first message and the proof: {said:?}");
    assert!(String::from_utf8_lossy(&said[1].body).contains(",p="), "{said:?}");
    assert_eq!(evidence.found_in(&record(&middle, &rogue)), [""; 0]);

    // The same words are worth nothing at the next login: the server has another nonce.
    let login = heard.iter().filter(|heard| heard.tag == 0 || heard.tag == b'p').cloned();
    let answers =
        replay(database.server(), &login.collect::<Vec<_>>()).expect("the server is there");
    assert!(authentication(&answers, 11).is_some(), "it came to the proof: {answers:?}");
    assert!(authentication(&answers, 0).is_none(), "it was let in: {answers:?}");
    let refusal = answers.iter().find(|answer| answer.tag == b'E').expect("a refusal");
    println!("replayed: {}", String::from_utf8_lossy(&refusal.body).replace('\0', " "));
}

/// A server's own key and a man's in the middle, with what the broker is told of either.
struct Attempt {
    name: &'static str,
    tls: ServerTls,
    binding: &'static str,
    let_in: bool,
    /// The most that the broker may have sent.
    heard: usize,
}

fn attempts(authority: &Authority) -> Vec<Attempt> {
    let attempt = |name, tls, binding, let_in, heard| Attempt { name, tls, binding, let_in, heard };
    let other = Authority::generate();
    vec![
        attempt("another authority", other.sign("localhost"), "prefer", false, 0),
        attempt("another name", authority.sign("elsewhere.example"), "prefer", false, 0),
        attempt("nobody's certificate", ServerTls::self_signed("localhost"), "prefer", false, 0),
        // The startup message, and no word of SCRAM: the list has no PLUS in it.
        attempt("the name, no binding", authority.sign("localhost"), "require", false, 1),
        // Who holds a certificate of the name is the server, as for every client of it.
        attempt("the name", authority.sign("localhost"), "prefer", true, usize::MAX),
    ]
}

#[test]
fn g6_over_tls_a_relay_needs_the_name_and_with_binding_the_key() {
    let database: Database = Server::shared().database();
    let evidence = Evidence::of(&database);
    let authority = Authority::generate();
    let mut setup = setup(&database, &authority);
    let mut stage = Vec::new();
    for (number, attempt) in attempts(&authority).into_iter().enumerate() {
        let middle = Middle::new();
        let script = middle.script(database.server());
        let rogue = Rogue::start(&Place::Tcp, Some(attempt.tls.clone()), script);
        let name = format!("rogue-{number}");
        let mode = mode("verify-full", Some(attempt.tls.clone()));
        setup = connect(setup, &name, &database, &rogue, &mode)
            .set(&format!("connections.{name}.channel_binding"), attempt.binding);
        stage.push((name, attempt, middle, rogue));
    }
    let broker = setup.start();
    for (name, attempt, middle, rogue) in &stage {
        let answer = log_in(&broker, name);
        assert_eq!(answer.is_ok(), attempt.let_in, "{}: {answer:?}", attempt.name);
        if let Err(refusal) = &answer {
            assert!(refusal.contains("[R]UPSTREAM_UNTRUSTED"), "{}: {refusal}", attempt.name);
        }
        let said = middle.heard().iter().filter(|heard| !heard.from_server).count();
        assert!(said <= attempt.heard, "{}: {:?}", attempt.name, middle.heard());
        assert_eq!(evidence.found_in(&record(middle, rogue)), [""; 0], "{}", attempt.name);
        println!("{}: {}", attempt.name, answer.map_or_else(|r| r, |_| "a session".into()));
    }
}
