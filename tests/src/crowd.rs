//! Many sessions at once: idle, asleep, stubborn, with more to do behind what they do; and when
//! each of them dies.

use std::fmt;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use postgres::Client;
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::thread::gettid;

use crate::assert_eventually;
use crate::frontend::Session;
use crate::postgres::Database;

/// Logins at once: less than a door lets one uid have unfinished.
const DOORS: usize = 8;
/// Longer than any end takes that a test waits for.
const LIMIT: Duration = Duration::from_secs(20);
/// How often clients are looked at: what tells too late by at most this. To be woken for each
/// would take as much of the processors as it takes to end them.
const LOOK_AGAIN: Duration = Duration::from_micros(200);
/// The broker's own logins name themselves so.
const BROKERS_OWN: &str = "credbroker";

/// What one of the crowd does; they take turns.
const DEEDS: [Deed; 10] = {
    use Deed::{Asleep, Idle, Pipelined, Stubborn};
    [Idle, Asleep, Idle, Pipelined, Asleep, Idle, Asleep, Pipelined, Idle, Stubborn]
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deed {
    Idle,
    /// In a sleep of five minutes.
    Asleep,
    /// In a block that does not let itself be cancelled. One in fifty.
    Stubborn,
    /// The server has an INSERT behind the sleep already.
    Pipelined,
}

/// Live sessions of one database, whose role has a table `marks (n int)`.
#[derive(Debug)]
pub struct Crowd {
    sessions: Vec<Session>,
}

/// When they died, from the moment before the deed was asked for.
#[derive(Debug)]
pub struct Deaths {
    /// Of each client's socket, sorted.
    pub clients: Vec<Duration>,
    /// Of the last backend.
    pub server: Duration,
    /// When the answer came.
    pub answer: Duration,
}

impl Crowd {
    /// Opens `size` sessions with `login`, and gives each its work.
    ///
    /// # Panics
    /// When a session does not take its work, or the server does not begin it.
    pub fn gather(database: &Database, size: usize, login: impl Fn() -> Session + Sync) -> Self {
        let sessions = Mutex::new(Vec::with_capacity(size));
        let (next, login) = (AtomicUsize::new(0), &login);
        thread::scope(|scope| {
            for _door in 0..DOORS.min(size) {
                scope.spawn(|| {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= size {
                            return;
                        }
                        let mut session = login();
                        deed(number).start(&mut session);
                        sessions.lock().expect("no door panics").push(session);
                    }
                });
            }
        });
        let busy = (0..size).filter(|number| deed(*number) != Deed::Idle).count();
        let busy = i64::try_from(busy).expect("a small number");
        assert_eventually!(database.running("pg_sleep") == busy, "not all of them are at work");
        Self { sessions: sessions.into_inner().expect("no door panics") }
    }

    /// How many there are.
    #[must_use]
    pub fn size(&self) -> usize {
        self.sessions.len()
    }

    /// Does what is to end them all, and sees them die. `at_once`: they must all be dead when
    /// `deed` returns, or soon.
    ///
    /// # Panics
    /// When one lives on, is told of another end than 57P01, or a pipelined INSERT was carried
    /// out.
    pub fn see_die(self, database: &Database, at_once: bool, deed: impl FnOnce()) -> Deaths {
        let before = marks(database);
        let mut observer = database.server().admin("postgres");
        let watch = self.watch();
        let (ready, is_ready) = mpsc::channel();
        let (started, ends, answer) = thread::scope(|scope| {
            let clients = scope.spawn(|| self.ends(&watch, &ready));
            is_ready.recv().expect("it watches");
            let started = Instant::now();
            deed();
            let answer = started.elapsed();
            if at_once {
                assert_eq!(self.alive(), 0, "of {} clients when the call returned", self.size());
            }
            (started, clients.join().expect("the clients are watched to their end"), answer)
        });
        let clients = ends.into_iter().map(|end| end - started).collect();
        // To list a thousand backends takes a processor for ten milliseconds, which are the
        // clients'.
        let server = server_is_free(&mut observer, database, started);
        for mut session in self.sessions {
            let told = session.finish_query();
            let fine = match &told {
                None => true,
                Some(Err(error)) => error.sqlstate() == "57P01",
                Some(Ok(_)) => false,
            };
            assert!(fine, "a session ended otherwise: {told:?}");
        }
        assert_eq!(marks(database), before, "a pipelined INSERT was carried out after the cut");
        Deaths { clients, server, answer }
    }

    /// How many clients' sockets have not been closed by the other end.
    fn alive(&self) -> usize {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let sockets = self.sessions.iter().map(|session| session.frontend.stream());
        let mut sockets: Vec<PollFd<'_>> =
            sockets.map(|socket| PollFd::new(socket, PollFlags::RDHUP)).collect();
        let _ended = poll(&mut sockets, Some(&now)).expect("sockets can be polled");
        let closed = PollFlags::HUP | PollFlags::RDHUP;
        sockets.iter().filter(|socket| !socket.revents().intersects(closed)).count()
    }

    /// Tells of the end of each client's socket.
    fn watch(&self) -> OwnedFd {
        let watch = epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll instance");
        let flags = epoll::EventFlags::RDHUP | epoll::EventFlags::ONESHOT;
        for (number, session) in (0..).zip(&self.sessions) {
            let data = epoll::EventData::new_u64(number);
            epoll::add(&watch, session.frontend.stream(), data, flags).expect("it can be watched");
        }
        watch
    }

    /// When each client's socket ended, sorted. Says when it is `ready`.
    fn ends(&self, watch: &OwnedFd, ready: &Sender<()>) -> Vec<Instant> {
        run_before_others();
        let mut ends = Vec::with_capacity(self.size());
        let mut events = Vec::with_capacity(self.size());
        let step = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        ready.send(()).expect("somebody waits for it");
        let until = Instant::now() + LIMIT;
        while ends.len() < self.size() {
            let spare = rustix::buffer::spare_capacity(&mut events);
            let _count = epoll::wait(watch, spare, Some(&step)).expect("epoll works");
            let now = Instant::now();
            assert!(now < until, "{} of {} clients are dead", ends.len(), self.size());
            ends.extend(events.drain(..).map(|_event| now));
            thread::sleep(LOOK_AGAIN);
        }
        ends
    }
}

impl Deaths {
    /// The time by which this part of the clients was dead, in percent.
    ///
    /// # Panics
    /// When there are no clients.
    #[must_use]
    pub fn percentile(&self, percent: usize) -> Duration {
        let last = self.clients.len() - 1;
        self.clients[(self.clients.len() * percent / 100).min(last)]
    }
}

impl fmt::Display for Deaths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [p50, p99, max] = [50, 99, 100].map(|percent| self.percentile(percent));
        let Self { clients, server, answer } = self;
        write!(
            f,
            "{} sessions: clients dead after p50 {p50:.1?}, p99 {p99:.1?}, max {max:.1?}; \
             last backend gone after {server:.1?}; answer after {answer:.1?}",
            clients.len()
        )
    }
}

/// Gives this thread a processor whenever it is ready. It would stand behind a thousand backends
/// otherwise, and would tell when it had its turn, not when a socket ended. Without the right to
/// do so it stays as it is.
fn run_before_others() {
    let thread = gettid().as_raw_nonzero().to_string();
    let _ = Command::new("chrt").args(["--fifo", "--pid", "1", &thread]).output();
}

fn deed(number: usize) -> Deed {
    let deed = DEEDS[number % DEEDS.len()];
    // Few of these: each keeps a processor of the server busy while it is being ended.
    if deed == Deed::Stubborn && number % 50 != 49 { Deed::Idle } else { deed }
}

impl Deed {
    fn start(self, session: &mut Session) {
        match self {
            Self::Idle => {}
            Self::Asleep => session.start_query("SELECT pg_sleep(300)"),
            Self::Stubborn => session.start_query(
                "DO $$ BEGIN LOOP BEGIN PERFORM pg_sleep(300); \
                 EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP; END $$",
            ),
            Self::Pipelined => {
                session.start_query("SELECT pg_sleep(300)");
                session.start_query("INSERT INTO marks VALUES (1)");
            }
        }
    }
}

fn marks(database: &Database) -> i64 {
    let mut admin = database.admin();
    admin.query_one("SELECT count(*) FROM marks", &[]).expect("there is a table of marks").get(0)
}

fn server_is_free(observer: &mut Client, database: &Database, started: Instant) -> Duration {
    let query = "SELECT count(*) FROM pg_stat_activity WHERE usename = $1 AND \
                 application_name <> $2";
    let query = observer.prepare(query).expect("pg_stat_activity is readable");
    loop {
        let row = observer.query_one(&query, &[&database.name(), &BROKERS_OWN]);
        let left: i64 = row.expect("pg_stat_activity is readable").get(0);
        let now = started.elapsed();
        if left == 0 {
            return now;
        }
        assert!(now < LIMIT, "{left} backends live on");
        // Looking is not to be what keeps the server busy.
        thread::sleep(Duration::from_millis(10));
    }
}
