//! Warm spares: links that are logged in before their client comes.
//!
//! A spare is dialled with a startup message that a client of the connection has sent before, and
//! is given to one whose message is the same: nothing has to be set afterwards, and RESET and
//! DISCARD find what a fresh login would have left. It serves one client and is then closed like
//! any other link; no state is ever shared. What the server said while it waited, that client
//! reads.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::AsyncReadExt as _;
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::attempt::{conclude, dial_and_log_in};
use super::backend::{Authenticated, LoginFault, LoginRequest};
use super::codec::{Frames, Parameter};
use crate::connection::{AllowedDatabase, ConnectionName};
use crate::core::{Core, Dialling, Opening, Session, Spare};
use crate::session::Lifeline;

/// How long a spare waits for its client.
const KEPT: Duration = Duration::from_secs(60);
/// A spare is not replaced at once: the server has just begun to work for whoever took it.
const REFILL_AFTER: Duration = Duration::from_millis(15);
/// After the server refused a spare, and then twice as long each time.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// What was asked for counts half as much a minute later.
const HALF_LIFE: Duration = Duration::from_secs(60);
/// Different startup messages that are remembered for a connection.
const MOST_MESSAGES: usize = 32;
/// For what the server said meanwhile to be read.
const CATCH_UP_WITHIN: Duration = Duration::from_millis(5);
const MOST_SAID: usize = 16 * 1024;

/// The spares of all connections. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Spares {
    core: Core,
    pools: Arc<Mutex<HashMap<ConnectionName, Pool>>>,
}

/// What makes two logins the same: all that a startup message says but the user.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Message {
    database: AllowedDatabase,
    /// In the order of their names.
    parameters: Vec<Parameter>,
}

#[derive(Debug, Default)]
struct Pool {
    asked: Vec<Asked>,
    halved: Option<Instant>,
    ready: Vec<Ready>,
    dialling: Vec<Arc<Message>>,
    failures: u32,
    not_before: Option<Instant>,
    next: u64,
}

#[derive(Debug)]
struct Asked {
    message: Arc<Message>,
    times: u32,
}

#[derive(Debug)]
struct Ready {
    number: u64,
    message: Arc<Message>,
    spare: Spare,
    link: Authenticated,
    /// Where its socket is registered.
    home: ThreadId,
}

impl Message {
    /// `None` for what is not to be had ahead: replication, and what is given twice.
    pub(super) fn of(database: &AllowedDatabase, parameters: &[Parameter]) -> Option<Self> {
        let mut parameters = parameters.to_vec();
        parameters.sort();
        let twice = parameters.iter().zip(parameters.iter().skip(1)).any(|((a, _), (b, _))| a == b);
        let replication = parameters.iter().any(|(name, _)| name == "replication");
        (!twice && !replication).then(|| Self { database: database.clone(), parameters })
    }
}

impl Spares {
    pub(super) fn new(core: Core) -> Self {
        Self { core, pools: Arc::default() }
    }

    /// A spare for a session that is being opened, if there is one that is still good.
    pub(super) async fn take(
        &self,
        opening: &Opening,
        parameters: &[Parameter],
    ) -> Option<Authenticated> {
        let message = Message::of(opening.database(), parameters)?;
        loop {
            let name = &opening.connection().name;
            let Ready { spare, mut link, home, .. } = self.pools().get_mut(name)?.take(&message)?;
            if spare.is_good_for(opening) && arrives(&mut link, home).await {
                return Some(link);
            }
        }
    }

    /// Remembers how a session came in, and sees to it that the next one finds a spare.
    pub(super) fn came_in(&self, session: &Session, parameters: &[Parameter]) {
        let connection = session.connection();
        if connection.warm == 0 || session.credential().version() == 0 {
            return;
        }
        let Some(message) = Message::of(session.database(), parameters) else { return };
        self.pools().entry(connection.name.clone()).or_default().asked(message, Instant::now());
        self.refill(connection.name.clone(), REFILL_AFTER);
    }

    /// Dials what is missing, after a pause, on this core.
    fn refill(&self, name: ConnectionName, pause: Duration) {
        let this = self.clone();
        self.core.tasks().spawn(async move {
            let waited = async {
                sleep(pause).await;
                true
            };
            let go = tokio::select! {
                go = waited => go,
                () = this.core.draining() => false,
            };
            while go && this.dial_next(&name).await {}
        });
    }

    /// Whether there may be more to dial.
    async fn dial_next(&self, name: &ConnectionName) -> bool {
        let Some(most) = self.core.settings().connections.get(name).map(|now| now.warm) else {
            self.pools().remove(name);
            return false;
        };
        let picked = self.pools().get_mut(name).and_then(|pool| pool.pick(most, Instant::now()));
        let Some(message) = picked else { return false };
        let dialled = match self.core.dial_spare(name, &message.database).await {
            Some(dialling) => Some(dial(dialling, &message).await),
            None => None,
        };
        let mut pools = self.pools();
        let Some(pool) = pools.get_mut(name) else { return false };
        pool.forget_dialling(&message);
        match dialled {
            Some(Ok((spare, link))) => {
                pool.failures = 0;
                self.keep(name, pool.add(message, spare, link));
                true
            }
            Some(Err(fault)) => {
                debug!(connection = %name, %fault, "a spare could not be dialled");
                pool.failed(Instant::now());
                false
            }
            None => false,
        }
    }

    /// Ends a spare when its time, or its right, is over.
    fn keep(
        &self,
        name: &ConnectionName,
        (number, ended): (u64, impl Future<Output = ()> + Send + 'static),
    ) {
        let (this, name) = (self.clone(), name.clone());
        self.core.tasks().spawn(async move {
            let in_time = timeout(KEPT, ended).await;
            let removed = this.pools().get_mut(&name).and_then(|pool| pool.remove(number));
            // Taken, or cut: whoever did that sees to the next one.
            if removed.is_some() && in_time.is_err() {
                drop(removed);
                this.refill(name, Duration::ZERO);
            }
        });
    }

    fn pools(&self) -> MutexGuard<'_, HashMap<ConnectionName, Pool>> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    fn asked(&mut self, message: Message, now: Instant) {
        self.halve(now);
        match self.asked.iter_mut().find(|asked| *asked.message == message) {
            Some(asked) => asked.times = asked.times.saturating_add(1),
            None => {
                if self.asked.len() >= MOST_MESSAGES {
                    let rarest = self.asked.iter().enumerate().min_by_key(|(_, asked)| asked.times);
                    if let Some((index, _)) = rarest {
                        self.asked.swap_remove(index);
                    }
                }
                self.asked.push(Asked { message: Arc::new(message), times: 1 });
            }
        }
    }

    fn halve(&mut self, now: Instant) {
        let since = *self.halved.get_or_insert(now);
        let halves = now.duration_since(since).as_secs() / HALF_LIFE.as_secs();
        let Ok(halves) = u32::try_from(halves) else { return };
        if halves > 0 {
            self.halved = Some(now);
            for asked in &mut self.asked {
                asked.times = asked.times.checked_shr(halves).unwrap_or(0);
            }
            self.asked.retain(|asked| asked.times > 0);
        }
    }

    /// What to dial next, so that the places are shared out as the messages are frequent. When all
    /// are taken, one that a rarer message has too many of is given up.
    fn pick(&mut self, most: usize, now: Instant) -> Option<Arc<Message>> {
        if self.not_before.is_some_and(|then| now < then) {
            return None;
        }
        self.halve(now);
        let shares = self.shares(most);
        let have = |message: &Arc<Message>| {
            let ready = self.ready.iter().filter(|ready| Arc::ptr_eq(&ready.message, message));
            ready.count() + self.dialling.iter().filter(|other| Arc::ptr_eq(other, message)).count()
        };
        let lacking = shares.iter().find(|(message, share)| have(message) < *share);
        let message = Arc::clone(&lacking?.0);
        if self.ready.len() + self.dialling.len() >= most {
            let share = |message: &Arc<Message>| {
                let found = shares.iter().find(|(other, _)| Arc::ptr_eq(other, message));
                found.map_or(0, |(_, share)| *share)
            };
            let too_many =
                self.ready.iter().find(|ready| have(&ready.message) > share(&ready.message));
            let number = too_many?.number;
            drop(self.remove(number));
        }
        self.dialling.push(Arc::clone(&message));
        Some(message)
    }

    /// How many of `most` places each message has: the highest averages method of D'Hondt.
    fn shares(&self, most: usize) -> Vec<(Arc<Message>, usize)> {
        let mut shares: Vec<_> = self
            .asked
            .iter()
            .map(|asked| (Arc::clone(&asked.message), 0_usize, asked.times))
            .collect();
        for _ in 0..most {
            // times / (share + 1), compared without division.
            let next = shares.iter_mut().reduce(|best, other| {
                let claim = |times: u32, against: usize| u64::from(times) * (against as u64 + 1);
                if claim(other.2, best.1) > claim(best.2, other.1) { other } else { best }
            });
            let Some((_, share, _)) = next else { break };
            *share += 1;
        }
        shares.into_iter().map(|(message, share, _)| (message, share)).collect()
    }

    fn forget_dialling(&mut self, message: &Arc<Message>) {
        if let Some(index) = self.dialling.iter().position(|other| Arc::ptr_eq(other, message)) {
            self.dialling.swap_remove(index);
        }
    }

    fn failed(&mut self, now: Instant) {
        let pause = PAUSE.saturating_mul(1 << self.failures.min(6)).min(LONGEST_PAUSE);
        self.failures = self.failures.saturating_add(1);
        self.not_before = Some(now + pause);
    }

    /// Its number, and what returns when its right is gone.
    fn add(
        &mut self,
        message: Arc<Message>,
        spare: Spare,
        link: Authenticated,
    ) -> (u64, impl Future<Output = ()> + Send + use<>) {
        self.next += 1;
        let (number, ended, home) = (self.next, spare.end(), thread::current().id());
        self.ready.push(Ready { number, message, spare, link, home });
        (number, ended)
    }

    fn take(&mut self, message: &Message) -> Option<Ready> {
        let index = self.ready.iter().position(|ready| *ready.message == *message)?;
        Some(self.ready.swap_remove(index))
    }

    fn remove(&mut self, number: u64) -> Option<Ready> {
        let index = self.ready.iter().position(|ready| ready.number == number)?;
        Some(self.ready.swap_remove(index))
    }
}

/// Logs in as a client with this message would be. Ends when the right to it does.
async fn dial(dialling: Dialling, message: &Message) -> Result<(Spare, Authenticated), LoginFault> {
    let gone = || LoginFault::Link(std::io::ErrorKind::ConnectionAborted.into());
    let (connection, credential) = (dialling.connection(), dialling.credential());
    let login = async {
        let attempt = credential.breaker().enter().await?;
        let request = LoginRequest {
            connection,
            credential,
            attempt: &attempt,
            database: dialling.database().as_str(),
            parameters: &message.parameters,
        };
        let answer = dial_and_log_in(request).await;
        if let Some(meaning) = conclude(attempt, &answer) {
            dialling.refused(meaning);
        }
        answer
    };
    let link = tokio::select! {
        biased;
        _reason = dialling.cut() => return Err(gone()),
        link = login => link?,
    };
    let link_too = link.stream.duplicate().map_err(LoginFault::Link)?;
    let lifeline = Lifeline::Relayed(link_too, None);
    let spare = dialling.commit(lifeline).ok_or_else(gone)?;
    Ok((spare, link))
}

/// Brings a spare to this core, and whatever its server said while it waited. `false` when it is
/// of no use: its end may be among that.
async fn arrives(link: &mut Authenticated, home: ThreadId) -> bool {
    if home != thread::current().id() && link.stream.move_here().is_err() {
        return false;
    }
    let mut said = Vec::new();
    while has_something(link) {
        let mut chunk = [0; 4096];
        match timeout(CATCH_UP_WITHIN, link.stream.read(&mut chunk)).await {
            Ok(Ok(count @ 1..)) => said.extend_from_slice(chunk.get(..count).unwrap_or_default()),
            Ok(Ok(0) | Err(_)) => return false,
            // Something of TLS itself.
            Err(_nothing) => break,
        }
        if said.len() > MOST_SAID {
            return false;
        }
    }
    let (mut frames, mut harmless) = (Frames::default(), true);
    // NoticeResponse, ParameterStatus; an error is its end.
    frames.advance(&said, |tag| harmless &= matches!(tag, b'N' | b'S'));
    let good = harmless && frames.at_boundary();
    if good {
        link.prelude.said_meanwhile(&said);
    }
    good
}

fn has_something(link: &Authenticated) -> bool {
    let mut fds = [PollFd::new(link.stream.socket(), PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    !matches!(poll(&mut fds, Some(&now)), Ok(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::tests::connection;

    fn message(application: &str) -> Message {
        let database = connection("main_db").database(None).unwrap();
        let parameters = [("application_name".to_owned(), application.into())];
        Message::of(&database, &parameters).unwrap()
    }

    fn asked(times: &[(&str, u32)], now: Instant) -> Pool {
        let mut pool = Pool::default();
        for (application, times) in times {
            for _ in 0..*times {
                pool.asked(message(application), now);
            }
        }
        pool
    }

    fn picked(pool: &mut Pool, most: usize, now: Instant) -> Vec<String> {
        let picked = std::iter::from_fn(|| pool.pick(most, now));
        let mut names: Vec<_> = picked
            .map(|message| String::from_utf8(message.parameters[0].1.clone()).unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_order_of_parameters_does_not_matter_and_doubles_are_no_message() {
        let database = connection("main_db").database(None).unwrap();
        let pair = |name: &str, value: &str| (name.to_owned(), value.into());
        let one = Message::of(&database, &[pair("a", "1"), pair("b", "2")]);
        assert_eq!(one, Message::of(&database, &[pair("b", "2"), pair("a", "1")]));
        assert_ne!(one, Message::of(&database, &[pair("b", "1"), pair("a", "2")]));
        assert_eq!(Message::of(&database, &[pair("a", "1"), pair("a", "2")]), None);
        assert_eq!(Message::of(&database, &[pair("replication", "database")]), None);
    }

    #[test]
    fn places_go_to_the_frequent() {
        let now = Instant::now();
        assert_eq!(picked(&mut asked(&[("a", 5)], now), 2, now), ["a", "a"]);
        assert_eq!(picked(&mut asked(&[("a", 5), ("b", 4)], now), 2, now), ["a", "b"]);
        assert_eq!(picked(&mut asked(&[("a", 9), ("b", 2)], now), 3, now), ["a", "a", "a"]);
        assert_eq!(picked(&mut asked(&[("a", 9), ("b", 4)], now), 3, now), ["a", "a", "b"]);
        assert_eq!(picked(&mut asked(&[], now), 3, now), [""; 0]);
        assert_eq!(picked(&mut asked(&[("a", 5)], now), 0, now), [""; 0]);
    }

    #[test]
    fn what_nobody_asks_for_any_more_is_forgotten() {
        let now = Instant::now();
        let mut pool = asked(&[("a", 4), ("b", 1)], now);
        let later = now + HALF_LIFE;
        assert_eq!(picked(&mut pool, 2, later), ["a", "a"]);
        let mut pool = asked(&[("a", 4)], now);
        assert_eq!(picked(&mut pool, 1, now + 4 * HALF_LIFE), [""; 0]);
        assert!(pool.asked.is_empty());
    }

    #[test]
    fn messages_are_bounded_and_the_rarest_goes() {
        let now = Instant::now();
        let mut pool = asked(&[("often", 3)], now);
        for number in 0..2 * MOST_MESSAGES {
            pool.asked(message(&number.to_string()), now);
        }
        assert_eq!(pool.asked.len(), MOST_MESSAGES);
        assert_eq!(picked(&mut pool, 1, now), ["often"]);
    }

    #[test]
    fn after_a_failure_there_is_a_pause_that_grows() {
        let now = Instant::now();
        let mut pool = asked(&[("a", 1)], now);
        pool.failed(now);
        assert!(pool.pick(1, now).is_none());
        let first = now + PAUSE;
        pool.failed(first);
        assert!(pool.pick(1, first + PAUSE).is_none());
        assert!(pool.pick(1, first + 2 * PAUSE).is_some());
    }
}
