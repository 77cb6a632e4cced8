//! How the broker proves itself to a database, and what it does when it is refused.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use credbroker_e2e::assert_eventually;
use credbroker_e2e::broker::{Broker, Setup, Via};
use credbroker_e2e::canary::Canary;
use credbroker_e2e::frontend::{ServerError, Session};
use credbroker_e2e::identity::Identity;
use credbroker_e2e::middleman::Middleman;
use credbroker_e2e::postgres::{Method, Server};
use credbroker_e2e::proxy::LoginProxy;
use credbroker_proto::v1::ValidateConnectionRequest;

fn token(broker: &Broker) -> String {
    broker.handles(&Identity::client()).issue("main_db").expect("a grant").token
}

fn session(broker: &Broker) -> Session {
    broker.session(&Identity::client(), "main_db", &token(broker))
}

/// The reason of the refusal that a client reads.
fn refused(broker: &Broker, token: &str) -> String {
    let error = broker.login(&Identity::client(), "main_db", token).expect_err("no session");
    error.refusal().reason().to_owned()
}

fn methods(setup: Setup, methods: &[&str]) -> Setup {
    setup.set("connections.main_db.require_auth", methods)
}

/// How the server lets the broker in, as `validate` says.
fn method(broker: &Broker) -> String {
    let request = ValidateConnectionRequest { connection: "main_db".into() };
    let answer =
        broker.operator().call(async |mut client| client.validate_connection(request).await);
    answer.expect("it logs in").method
}

fn set_secret(setup: &Setup, secret: &str) {
    let fresh = setup.broker_file("etc/.fresh", secret);
    fs::rename(fresh, setup.path("etc/main_db.secret")).expect("the file can be replaced");
}

#[test]
fn a_login_is_bound_to_the_tls_channel() {
    let database = Server::shared().database();
    for (binding, expected) in [
        ("prefer", "scram-sha-256-plus"),
        ("require", "scram-sha-256-plus"),
        ("disable", "scram-sha-256"),
    ] {
        let setup = Broker::usual_setup(&database, Via::Tls);
        let broker = setup.set("connections.main_db.channel_binding", binding).start();
        assert_eq!(session(&broker).query("SELECT 1").expect("a query"), [["1"]]);
        assert_eq!(method(&broker), expected, "{binding}");
    }
}

#[test]
fn who_stands_between_with_a_trusted_certificate_is_found_out() {
    let database = Server::shared().database();
    let middleman = Middleman::start(database.server());
    for (binding, expected) in [
        ("prefer", Some("UPSTREAM_UNTRUSTED")),
        ("require", Some("UPSTREAM_UNTRUSTED")),
        // The control: without binding nobody notices.
        ("disable", None),
    ] {
        let setup = Broker::usual_setup(&database, Via::Tls)
            .set("connections.main_db.port", i64::from(middleman.port))
            .set("connections.main_db.channel_binding", binding);
        let roots = setup.broker_file("etc/roots.pem", &middleman.roots);
        let roots = roots.to_str().expect("an ASCII path").to_owned();
        let broker = setup.set("connections.main_db.tls.ca_file", roots.as_str()).start();
        match expected {
            Some(reason) => assert_eq!(refused(&broker, &token(&broker)), reason, "{binding}"),
            None => drop(session(&broker)),
        }
    }
}

#[test]
fn a_server_gets_what_is_named_and_nothing_else() {
    for (asked, named) in
        [(Method::Md5, "md5"), (Method::Password, "password"), (Method::Trust, "none")]
    {
        let database = Server::shared().database();
        database.ask_for(asked);
        let usual = || Broker::usual_setup(&database, Via::Tls);
        let broker = usual().start();
        assert_eq!(refused(&broker, &token(&broker)), "UPSTREAM_UNTRUSTED", "{named}");
        drop(broker);
        let broker = methods(usual(), &["scram-sha-256", named]).start();
        assert_eq!(session(&broker).query("SELECT 1").expect("a query"), [["1"]]);
        assert_eq!(method(&broker), named);
    }
}

#[test]
fn keys_log_in_without_a_password() {
    let database = Server::shared().database();
    let keys = format!("{}:{}", database.name(), database.scram_keys());
    let setup = Broker::usual_setup(&database, Via::Tls)
        .set("connections.main_db.credential", "scram-keys");
    set_secret(&setup, &keys);
    let broker = setup.start();
    assert_eq!(session(&broker).query("SELECT 1").expect("a query"), [["1"]]);
    assert_eq!(method(&broker), "scram-sha-256-plus");
    let leaked = database.canary().patterns();
    let log = broker.log();
    assert!(leaked.iter().all(|pattern| !pattern.is_in(log.as_bytes())));

    // Another salt makes other keys of the same password.
    database.set_server_password(database.canary());
    assert_eq!(refused(&broker, &token(&broker)), "UPSTREAM_REFUSED");
    set_secret(broker.setup(), &format!("{}:{}", database.name(), database.scram_keys()));
    assert_eventually!(
        broker.login(&Identity::client(), "main_db", &token(&broker)).is_ok(),
        "{}",
        broker.log()
    );
}

#[test]
fn a_new_salt_of_the_same_password_works_at_once() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let token = token(&broker);
    for _salt in 0..4 {
        for _login in 0..2 {
            let mut session = broker.session(&Identity::client(), "main_db", &token);
            assert_eq!(session.query("SELECT 1").expect("a query"), [["1"]]);
        }
        database.set_server_password(database.canary());
    }
    assert_eq!(database.wrong_passwords(), 0);
}

#[test]
fn what_was_derived_once_is_used_again() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let token = token(&broker);
    let login = || {
        let since = Instant::now();
        let _session = broker.session(&Identity::client(), "main_db", &token);
        since.elapsed()
    };
    let median = |mut times: Vec<Duration>| {
        times.sort();
        times[times.len() / 2]
    };
    let mut fresh = Vec::new();
    for _round in 0..9 {
        // Another salt: nothing that was derived before is of use.
        database.set_server_password(database.canary());
        fresh.push(login());
    }
    let kept = median((0..9).map(|_round| login()).collect());
    let fresh = median(fresh);
    println!(
        "a login that derives: {fresh:?}; one that need not: {kept:?}; ratio {:.2}",
        fresh.as_secs_f64() / kept.as_secs_f64()
    );
}

#[test]
fn a_source_that_has_changed_is_read_before_the_client_is_refused() {
    let database = Server::shared().database();
    let setup =
        Broker::usual_setup(&database, Via::Tls).set("connections.main_db.rotation_grace", "0s");
    let broker = setup.start();
    let token = token(&broker);
    let mut before = broker.session(&Identity::client(), "main_db", &token);
    before.query("SELECT 1").expect("a query");
    for _rotation in 0..3 {
        let password = Canary::random();
        database.set_server_password(&password);
        set_secret(broker.setup(), &format!("{}:{}", database.name(), password.reveal()));
        let mut session = broker.session(&Identity::client(), "main_db", &token);
        assert_eq!(session.query("SELECT 1").expect("a query"), [["1"]]);
        // It holds the new version, and the rotation that its own login found does not end it.
        thread::sleep(Duration::from_millis(1500));
        assert_eq!(session.query("SELECT 2").expect("it lives on"), [["2"]]);
    }
    assert!(broker.audit().of("credential.diverged").is_empty());
    assert!(database.wrong_passwords() <= 3, "{}", database.wrong_passwords());
}

#[test]
fn over_a_link_that_proves_nothing_a_refused_password_cuts_nothing() {
    let database = Server::shared().database();
    let proxy = LoginProxy::start(database.server());
    let broker = Broker::usual_setup(&database, Via::Plain(proxy.port())).start();
    let token = token(&broker);
    let mut session = broker.session(&Identity::client(), "main_db", &token);
    session.query("SELECT 1").expect("a query");
    database.set_server_password(&Canary::random());
    assert_eq!(refused(&broker, &token), "UPSTREAM_REFUSED");
    let told = "cannot be told from a changed password";
    assert_eventually!(broker.log().contains(told), "{}", broker.log());
    session.query("SELECT 1").expect("an impostor could have said so");
    assert!(broker.audit().of("credential.diverged").is_empty());
    let warnings = broker.operator().status().expect("a status").warnings;
    assert!(warnings.iter().any(|line| line.contains("refuses its credential")), "{warnings:?}");
}

#[test]
fn a_password_that_was_changed_elsewhere_is_told_and_cuts_the_connection() {
    let database = Server::shared().database();
    let broker = Broker::usual(&database);
    let token = token(&broker);
    let mut session = broker.session(&Identity::client(), "main_db", &token);
    session.query("SELECT 1").expect("a query");
    database.set_server_password(&Canary::random());
    assert_eq!(refused(&broker, &token), "UPSTREAM_REFUSED");
    let said = session.frontend.receive_rest().expect("the session is cut");
    let cut = ServerError::from_message(said.last().expect("and told why"));
    assert_eq!((cut.sqlstate(), cut.reason()), ("57P01", "UPSTREAM_REFUSED"), "{cut}");
    assert_eventually!(broker.audit().of("credential.diverged").len() == 1, "{}", broker.log());
    let record = broker.audit().of("credential.diverged").remove(0);
    assert_eq!(record.text("connection"), Some("main_db"));
    assert_eq!(record.number("detail.sessions_cut"), Some(1));
    let warnings = broker.operator().status().expect("a status").warnings;
    assert!(warnings.iter().any(|line| line.contains("refuses its credential")), "{warnings:?}");
    assert!(broker.log().contains("took before"), "{}", broker.log());

    // The operator puts it right at the server, and says so.
    database.set_server_password(database.canary());
    assert_eq!(method(&broker), "scram-sha-256-plus", "validate tries regardless");
    let mut session = broker.session(&Identity::client(), "main_db", &token);
    assert_eq!(session.query("SELECT 1").expect("the breaker is closed"), [["1"]]);
}

/// A hundred clients at once, twice in a row.
fn storm(broker: &Broker, token: &str) {
    thread::scope(|scope| {
        for _client in 0..100 {
            scope.spawn(|| {
                for _try in 0..2 {
                    assert_eq!(refused(broker, token), "UPSTREAM_REFUSED");
                }
            });
        }
    });
}

fn rate(setup: Setup) -> Setup {
    setup.set("limits.rate_per_second", 10_000_i64).set("limits.sessions", 1000_i64)
}

#[test]
fn a_storm_costs_the_server_a_handful_of_attempts() {
    for logged_in_before in [false, true] {
        let database = Server::shared().database();
        let broker = rate(Broker::usual_setup(&database, Via::Tls)).start();
        let token = token(&broker);
        if logged_in_before {
            drop(broker.session(&Identity::client(), "main_db", &token));
        }
        database.set_server_password(&Canary::random());
        let since = Instant::now();
        storm(&broker, &token);
        let (took, attempts) = (since.elapsed(), database.wrong_passwords());
        println!(
            "200 logins of 100 clients in {took:?}, logged in before: {logged_in_before}: {attempts} reached the server"
        );
        // One for each time that it opened, and what was on its way the first time.
        let half_open = usize::try_from(took.as_secs()).expect("a short time");
        assert!((1..=20 + half_open).contains(&attempts), "{attempts}");
    }
}

#[test]
fn nothing_is_dialled_while_the_breaker_is_open() {
    let database = Server::shared().database();
    database.set_server_password(&Canary::random());
    let proxy = LoginProxy::start(database.server());
    let broker = rate(Broker::usual_setup(&database, Via::Plain(proxy.port()))).start();
    let token = token(&broker);
    // Twice, so that it stays open for two seconds.
    assert_eventually!(
        {
            assert_eq!(refused(&broker, &token), "UPSTREAM_REFUSED");
            proxy.accepted() == 2
        },
        "{}",
        broker.log()
    );
    let (since, before) = (Instant::now(), proxy.accepted());
    while since.elapsed() < Duration::from_secs(1) {
        assert_eq!(refused(&broker, &token), "UPSTREAM_REFUSED");
    }
    assert_eq!(proxy.accepted(), before);
    let breaker = || {
        let shown = broker.operator().connection("main_db").expect("an operator");
        shown.credential.expect("it has one").breaker
    };
    let open = breaker().expect("it is open");
    assert_eq!(open.refusals, 2);
    assert!(open.open_until.is_some());
    let shown = broker.cli(&Identity::own()).args(["show", "main_db"]).output().expect("it runs");
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("open: the server has refused it 2 times; "), "{shown}");

    // Another version is tried at once.
    let password = Canary::random();
    database.set_server_password(&password);
    set_secret(broker.setup(), &format!("{}:{}", database.name(), password.reveal()));
    assert_eventually!(
        broker.login(&Identity::client(), "main_db", &token).is_ok(),
        "{}",
        broker.log()
    );
    assert_eq!(breaker(), None);
}

#[test]
fn what_can_be_known_before_is_an_error_of_the_configuration() {
    let database = Server::shared().database();
    let plain = || Broker::usual_setup(&database, Via::Plain(1));
    let tls = || Broker::usual_setup(&database, Via::Tls);
    let key = |key: &str| format!("connections.main_db.{key}");
    let wrong: [(Setup, &str); 5] = [
        (methods(plain(), &["password"]), "verify-full"),
        (methods(plain(), &["none"]), "verify-full"),
        (plain().set(&key("channel_binding"), "require"), "needs TLS"),
        (methods(tls(), &["md5"]).set(&key("credential"), "scram-keys"), "scram-keys"),
        (tls().set(&key("credential"), "scram-keys"), "CLIENT_KEY:SERVER_KEY"),
    ];
    for (setup, says) in wrong {
        let _written = setup.write();
        let done = setup.command("run").output().expect("the daemon can be run");
        let told = String::from_utf8_lossy(&done.stderr);
        assert!(!done.status.success() && told.contains(says), "{says}: {told}");
        assert!(!told.contains(database.canary().reveal()), "{told}");
    }
}
