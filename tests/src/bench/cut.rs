//! P8.

use std::net::Shutdown;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use super::group::Group;
use super::open::{self, Opener};
use super::rig::{HANDLE_UNIX, Rig};
use super::stats::{Sample, millis};
use super::{Goal, Outcome, Unit, progress};
use crate::crowd::{Crowd, Deaths};
use crate::frontend::{Frontend, Session};
use crate::identity::Identity;

const SESSIONS: usize = 1000;
/// Longer than idle backends take to go.
const LIMIT: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Ends {
    p50: Vec<f64>,
    p99: Vec<f64>,
    server: Vec<f64>,
}

pub(super) fn measure(outcome: &mut Outcome) {
    let rig = Rig::start();
    let table =
        format!("CREATE TABLE marks (n int); ALTER TABLE marks OWNER TO {}", rig.database.name());
    rig.database.admin().batch_execute(&table).expect("a table can be made");
    let group = Group::of(rig.server());
    let [mut door, mut handoff, mut terminated, mut closed] = [(); 4].map(|()| Ends::default());
    let rounds = if outcome.mode.quick { 1 } else { 3 };
    for round in 0..rounds {
        progress(&format!("round {round}"));
        door.push(&by_door(&rig));
        match by_handoff(&rig) {
            Some(deaths) => handoff.push(&deaths),
            None => outcome.note("Handoff is not available yet."),
        }
        rig.trust(true);
        terminated.push(&by_terminating(&rig));
        closed.push(&by_closing(&rig));
        rig.trust(false);
    }
    for (row, ends) in [
        ("revoked, through the door", &door),
        ("revoked, handed off", &handoff),
        ("floor: direct, pg_terminate_backend", &terminated),
        ("floor: direct, idle, sockets shut down", &closed),
    ] {
        ends.tell(outcome, row);
    }
    let shut = "sockets shut down";
    for (what, ends) in [("door", &door), ("handoff", &handoff)] {
        if ends.p99.is_empty() {
            continue;
        }
        let (p99, server) = (Sample::of(ends.p99.clone()), Sample::of(ends.server.clone()));
        let (clients, stopped) = (Goal::AtMost(5.0), Goal::AtMost(1000.0));
        outcome
            .check(format!("{what}: client sockets dead, p99"), p99, Unit::Millis, clients)
            .under(shut, Sample::of(closed.p99.clone()));
        outcome
            .check(format!("{what}: last backend gone"), server, Unit::Millis, stopped)
            .under("pg_terminate_backend", Sample::of(terminated.server.clone()));
    }
    outcome.note(format!(
        "{SESSIONS} sessions, of which half are idle and the others asleep, asleep with an INSERT \
         pipelined behind, or (one in fifty) in a block that traps query_canceled. From before the \
         revoke is sent; the last backend is looked for every 10 ms. The floors are as many \
         direct sessions of the same kinds, ended by one superuser's statement, and as many idle \
         ones whose sockets one thread of this program shuts down, which does nothing else: each \
         call wakes a backend, and they take the processors."
    ));
    let placed = match group {
        Some(_) => "PostgreSQL is in a control group of its own, as in a container.",
        None => {
            "No control group could be made for PostgreSQL, so that each of its backends has as \
             much of a processor as the whole broker."
        }
    };
    outcome.note(format!(
        "{placed} Whoever watches the clients' sockets runs before all others, and looks every \
         0.2 ms."
    ));
}

const SERVER: &str = "last backend gone";

impl Ends {
    fn push(&mut self, deaths: &Deaths) {
        self.p50.push(millis(deaths.percentile(50)));
        self.p99.push(millis(deaths.percentile(99)));
        self.server.push(millis(deaths.server));
    }

    fn tell(&self, outcome: &mut Outcome, row: &str) {
        for (column, values) in
            [("clients dead p50", &self.p50), ("p99", &self.p99), (SERVER, &self.server)]
        {
            if !values.is_empty() {
                outcome.text(row, column, Sample::of(values.clone()).range(Unit::Millis));
            }
        }
    }
}

fn by_door(rig: &Rig) -> Deaths {
    let broker = rig.setup().start();
    let client = Identity::client();
    let service = broker.handles(&client);
    let token = service.issue(HANDLE_UNIX).expect("a grant").token;
    let login = || broker.session(&client, HANDLE_UNIX, &token);
    let crowd = Crowd::gather(&rig.database, SESSIONS, login);
    crowd.see_die(&rig.database, true, || {
        assert_eq!(service.revoke(&token).map(|cut| cut as usize), Ok(SESSIONS));
    })
}

/// `None` when this broker hands nothing over.
fn by_handoff(rig: &Rig) -> Option<Deaths> {
    let broker = open::broker(rig, None)?;
    let opener = Mutex::new(Opener::over(&broker)?);
    let token = opener.lock().expect("nobody panicked").token().to_owned();
    let login = || {
        let (_prelude, socket) = opener.lock().expect("nobody panicked").open();
        socket.set_nonblocking(false).expect("a socket");
        let frontend = Frontend::over(socket).expect("a socket");
        Session { frontend, parameters: Default::default(), cancel_key: Vec::new() }
    };
    let crowd = Crowd::gather(&rig.database, SESSIONS, login);
    let service = broker.handles(&Identity::client());
    Some(crowd.see_die(&rig.database, true, || {
        service.revoke(&token).expect("its holder");
    }))
}

/// A session that the broker has nothing to do with.
fn direct(rig: &Rig) -> Session {
    let server = rig.server();
    let socket = server.socket_dir.join(format!(".s.PGSQL.{}", server.port));
    let frontend = Frontend::connect(&Identity::client(), &socket).expect("the server listens");
    let name = rig.database.name();
    frontend.login(name, Some(name), "").expect("it is trusted")
}

fn by_terminating(rig: &Rig) -> Deaths {
    let crowd = Crowd::gather(&rig.database, SESSIONS, || direct(rig));
    let mut admin = rig.server().admin("postgres");
    crowd.see_die(&rig.database, false, || {
        let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1";
        admin.query(sql, &[&rig.database.name()]).expect("a superuser may");
    })
}

fn by_closing(rig: &Rig) -> Deaths {
    let sessions: Vec<Session> = (0..SESSIONS).map(|_| direct(rig)).collect();
    let mut admin = rig.server().admin("postgres");
    let count = "SELECT count(*) FROM pg_stat_activity WHERE usename = $1";
    let count = admin.prepare(count).expect("pg_stat_activity is readable");
    let started = Instant::now();
    let shut = |session: &Session| {
        session.frontend.stream().shutdown(Shutdown::Both).expect("it is open");
        started.elapsed()
    };
    let clients: Vec<Duration> = sessions.iter().map(shut).collect();
    loop {
        let row = admin.query_one(&count, &[&rig.database.name()]);
        let server = started.elapsed();
        if row.expect("pg_stat_activity is readable").get::<_, i64>(0) == 0 {
            return Deaths { clients, server, answer: server };
        }
        assert!(server < LIMIT, "backends live on");
        thread::sleep(Duration::from_millis(10));
    }
}
