//! The broker proves itself by a certificate, to a server of its own that demands one.

use std::fs;
use std::path::Path;

use credbroker_e2e::broker::{Broker, Setup, Via};
use credbroker_e2e::canary::Pattern;
use credbroker_e2e::frontend::Session;
use credbroker_e2e::identity::Identity;
use credbroker_e2e::memory;
use credbroker_e2e::postgres::{ClientAuthority, Cluster, Database, Method};
use rcgen::{KeyPair, PKCS_ECDSA_P384_SHA384, PKCS_ED25519};

/// Members of the group for which others are trusted need a certificate of their name and nothing
/// else; everybody else needs one and a password.
const HBA: &str = "local all all scram-sha-256\n\
    hostssl all +cb_group_trust 127.0.0.0/8 cert\n\
    hostssl all all 127.0.0.0/8 scram-sha-256 clientcert=verify-full\n";

/// A server that knows this authority's clients, below the directories of a setup that is there
/// for them only.
fn cluster(authority: &ClientAuthority) -> (Setup, Cluster) {
    let home = Setup::new();
    let ca = home.path("clients.pem");
    fs::write(&ca, authority.pem()).expect("the authority's certificate");
    let more = [("ssl_ca_file", ca.to_str().expect("an ASCII path"))];
    let cluster = Cluster::start_with(&home.path(""), HBA, &more);
    (home, cluster)
}

/// A broker with this certificate and key.
fn with_certificate(setup: Setup, certificate: &str, key: &str) -> Setup {
    let certificate = setup.broker_file("etc/client.pem", certificate);
    let key = setup.broker_file("etc/client.key", key);
    let text = |path: &Path| path.to_str().expect("an ASCII path").to_owned();
    setup
        .set("connections.main_db.tls.cert_file", text(&certificate).as_str())
        .set("connections.main_db.tls.key.file", text(&key).as_str())
}

/// A database whose role is let in by its certificate alone, and a broker that allows that.
fn by_certificate_alone(cluster: &Cluster) -> (Database, Setup) {
    let database = cluster.server().database();
    database.ask_for(Method::Trust);
    let methods = vec![toml::Value::from("none")];
    let setup = Broker::usual_setup(&database, Via::Tls)
        .set("connections.main_db.require_auth", toml::Value::from(methods));
    (database, setup)
}

fn session(broker: &Broker) -> Session {
    let client = Identity::client();
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    broker.session(&client, "main_db", &token)
}

/// The common name of the certificate that the server has seen.
fn seen(session: &mut Session) -> String {
    let query = "SELECT client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    session.query(query).expect("a query")[0][0].clone()
}

fn refusal(broker: &Broker) -> String {
    let client = Identity::client();
    let token = broker.handles(&client).issue("main_db").expect("a grant").token;
    let refusal = broker.login(&client, "main_db", &token).expect_err("no session").refusal();
    format!("{} {}", refusal.sqlstate(), refusal.reason())
}

/// Parts of a key as it stands in its file, and turned round, as arithmetic holds it.
fn patterns(key: &KeyPair) -> Vec<Pattern> {
    let der = key.serialize_der();
    // What is before it is the same for all keys, or public.
    let from = if der.len() > 1000 { 320 } else { 36.min(der.len() - 32) };
    let windows = (from..der.len()).step_by(64).filter_map(|at| der.get(at..at + 24));
    let both = windows.flat_map(|part| {
        let turned: Vec<u8> = part.iter().rev().copied().collect();
        [Pattern::new("key", part), Pattern::new("key, turned round", &turned)]
    });
    // Of the others everything but the private scalar is public.
    let most = if der.len() > 1000 { usize::MAX } else { 2 };
    both.take(most).collect()
}

#[test]
fn a_certificate_lets_in_alone_or_beside_a_password_and_its_key_stays_in_the_arena() {
    let authority = ClientAuthority::generate("clients");
    let (_home, cluster) = cluster(&authority);
    let rsa = Path::new(env!("CARGO_MANIFEST_DIR")).join("../broker/testdata/client-keys");
    let rsa = fs::read_to_string(rsa.join("rsa-pkcs8.pem")).expect("a key");
    let keys = [
        KeyPair::generate().expect("a key"),
        KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).expect("a key"),
        KeyPair::generate_for(&PKCS_ED25519).expect("a key"),
        KeyPair::from_pem(&rsa).expect("a key"),
    ];
    for key in &keys {
        let (alone, alone_setup) = by_certificate_alone(&cluster);
        let beside = cluster.server().database();
        let beside_setup = Broker::usual_setup(&beside, Via::Tls);
        for (database, setup) in [(&alone, alone_setup), (&beside, beside_setup)] {
            let certificate = authority.issue(database.name(), key);
            let broker = with_certificate(setup, &certificate, &key.serialize_pem()).start();
            for _round in 0..5 {
                let dn = seen(&mut session(&broker));
                assert_eq!(dn, format!("/CN={}", database.name()), "{:?}", key.algorithm());
            }
            let scan = memory::scan(broker.pid(), &patterns(key)).expect("its memory is readable");
            assert!(scan.outside_arena().is_empty(), "{:?}: {scan:?}", key.algorithm());
        }
    }
}

#[test]
fn a_wrong_certificate_or_none_is_refused_and_a_reload_reads_another() {
    let authority = ClientAuthority::generate("clients");
    let (_home, cluster) = cluster(&authority);
    let key = KeyPair::generate().expect("a key");
    let pem = key.serialize_pem();

    let (database, setup) = by_certificate_alone(&cluster);
    assert_eq!(refusal(&setup.start()), "08006 UPSTREAM_REFUSED", "none");
    // The server breaks the handshake off, in TLS 1.3 behind our end of it.
    for (other, alert) in [("others", "unknown_ca"), ("clients", "decrypt_error")] {
        let other = ClientAuthority::generate(other);
        let (_second, setup) = by_certificate_alone(&cluster);
        let broker = with_certificate(setup, &other.issue(database.name(), &key), &pem).start();
        let told = refusal(&broker);
        assert_eq!(told, "08006 UPSTREAM_REFUSED", "of another authority: {}", broker.log());
        assert!(broker.log().contains(alert), "{}", broker.log());
    }

    for ask in [None, Some(Method::Trust)] {
        let (database, setup) = match ask {
            None => {
                let database = cluster.server().database();
                let setup = Broker::usual_setup(&database, Via::Tls);
                (database, setup)
            }
            Some(_) => by_certificate_alone(&cluster),
        };
        let wrong = authority.issue("somebody_else", &key);
        let broker = with_certificate(setup, &wrong, &pem).start();
        assert_eq!(refusal(&broker), "08006 UPSTREAM_REFUSED", "of another name, {ask:?}");

        let right = authority.issue(database.name(), &key);
        let new = KeyPair::generate().expect("a key");
        let _unfit = broker.setup().broker_file("etc/client.key", &new.serialize_pem());
        let refused = broker.operator().reload().expect_err("the key is not the certificate's");
        let said = format!("{refused:?}");
        assert!(said.contains("connections.main_db.tls.key"), "{said}");
        assert!(said.contains("does not fit the certificate"), "{said}");

        let _fit = broker.setup().broker_file("etc/client.key", &pem);
        let _right = broker.setup().broker_file("etc/client.pem", &right);
        broker.operator().reload().expect("they fit");
        let mut first = session(&broker);
        assert_eq!(seen(&mut first), format!("/CN={}", database.name()), "{ask:?}");
        // Another certificate is another proof: what was opened by the old one ends.
        let _new = broker.setup().broker_file("etc/client.key", &new.serialize_pem());
        let renewed = authority.issue(database.name(), &new);
        let _new = broker.setup().broker_file("etc/client.pem", &renewed);
        let reloaded = broker.operator().reload().expect("they fit");
        assert_eq!(reloaded.sessions_cut, 1, "{reloaded:?}");
        session(&broker);
    }
}
