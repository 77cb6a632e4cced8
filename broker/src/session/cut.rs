//! Ending sessions: each from anywhere, and many at once.
//!
//! What a cut does, in this order. The session is *marked*, under the registry's lock: from then on
//! its relay passes nothing more to the server. Its client is told, and its socket shut down. Its
//! task is *let go*. When all clients are dead the links to the servers are *shut down*. The
//! servers' ends come last because each costs far more than all the rest: a thousand backends that
//! end take the processors for a second, and clients would wait for their turn.
//!
//! Clients end by the hand of the thread on which their sessions live, all of its own in one go and
//! before any task is woken. So nothing is written to a client beside its relay; to wake a task of
//! another thread is a system call; and a thousand tasks, all of which have been asleep, are a
//! thousand times a cold cache. Whoever wakes another may lose the processor to it, so each that
//! is woken first wakes the next.
//!
//! A socket that its client has itself is the link to the server as well: whoever shuts it down
//! wakes a backend, and soon stands behind hundreds of them. So when there are many, several
//! threads stand ready before the first is shut down.

#![forbid(unsafe_code)]

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use rustix::net::{SendFlags, Shutdown, send, shutdown};
use tokio::runtime::Handle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// How long the servers' ends wait for the clients'.
const CLIENTS_FIRST: Duration = Duration::from_millis(20);

/// For so many sockets that clients have themselves there is one thread: it wakes their backends
/// in less than the slice that it has of a processor.
const HANDFUL: usize = 64;
/// Such threads at most.
const HANDS: usize = 16;

/// Why a session was ended by the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CutReason {
    /// Its handle was revoked.
    Revoked,
    /// Its handle expired.
    Expired,
    /// Its handle was bound to a process that exited.
    HolderExited,
    /// An operator suspended the connection.
    Suspended,
    /// The policy or the destination changed, and no longer allows it.
    Reloaded,
    /// The credential that it logged in with was replaced, and its grace is over.
    Rotated,
    /// The server refuses the credential that it logged in with, and nobody replaced that here.
    Diverged,
    /// An operator closed it.
    Closed,
    /// It is older than its connection's sessions may be.
    Aged,
    /// The broker shuts down.
    Draining,
}

impl CutReason {
    /// As it stands in audit records.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Revoked => "revoked",
            Self::Expired => "expired",
            Self::HolderExited => "holder_exited",
            Self::Suspended => "suspended",
            Self::Reloaded => "reloaded",
            Self::Rotated => "rotated",
            Self::Diverged => "diverged",
            Self::Closed => "closed",
            Self::Aged => "aged",
            Self::Draining => "draining",
        }
    }
}

impl fmt::Display for CutReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a session's life hangs on once it is live.
#[derive(Debug)]
pub(crate) enum Lifeline {
    /// A duplicate of the link to the server; a relay holds it, and the client's socket. A spare
    /// has no client.
    Relayed(OwnedFd, Option<Client>),
    /// A duplicate of the link that the client has itself: its end is the client's.
    HandedOff(OwnedFd),
}

/// What a relay's client is ended by.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) socket: Arc<OwnedFd>,
    /// What it is told, in its protocol.
    pub(crate) last_words: fn(CutReason) -> &'static [u8],
}

/// Ends one session.
#[derive(Debug, Default)]
pub(crate) struct Cut {
    reason: OnceLock<CutReason>,
    let_go: CancellationToken,
    /// Whether the client has been sent whole messages, and takes one more.
    can_be_told: AtomicBool,
    client_dead: AtomicBool,
    volley: OnceLock<Arc<Volley>>,
    /// Whether the volley has been told that the client is dead.
    counted: AtomicBool,
    ended: CancellationToken,
    live: Mutex<Option<Live>>,
}

/// What there is of a session that is live.
#[derive(Debug)]
struct Live {
    lifeline: Lifeline,
    /// Where its task runs; unknown only to tests without a runtime.
    home: Option<Handle>,
}

/// Sessions that are cut together.
#[derive(Debug)]
struct Volley {
    clients_left: AtomicUsize,
    clients_dead: CancellationToken,
    servers_turn: CancellationToken,
}

impl Cut {
    /// Called under the registry's lock, so that commit sees it.
    pub(crate) fn mark(&self, reason: CutReason) {
        let _ = self.reason.set(reason);
    }

    /// What there is to shut down from now on. Called where the session's task runs.
    pub(crate) fn hold(&self, lifeline: Lifeline) {
        *self.live() = Some(Live { lifeline, home: Handle::try_current().ok() });
    }

    /// There is no client to wait for, or no more.
    pub(crate) fn has_no_client(&self) {
        self.client_dead.store(true, Ordering::SeqCst);
        self.count();
    }

    /// The session is over.
    pub(crate) fn end(&self) {
        // A duplicate would keep the link open.
        *self.live() = None;
        self.has_no_client();
        self.ended.cancel();
    }

    /// Why it was marked, if it was.
    pub(crate) fn reason(&self) -> Option<CutReason> {
        self.reason.get().copied()
    }

    /// Becomes one of a volley, unless it is one of another.
    fn join(&self, volley: &Arc<Volley>) -> bool {
        let joined = self.volley.set(Arc::clone(volley)).is_ok();
        self.count();
        joined
    }

    /// Tells the volley of a client's death, once: whichever of the two became known last.
    fn count(&self) {
        if let Some(volley) = self.volley.get()
            && self.client_dead.load(Ordering::SeqCst)
            && !self.counted.swap(true, Ordering::SeqCst)
        {
            volley.client_died();
        }
    }

    /// Whether what the client was sent ends with a whole message, and nothing waits to be sent.
    /// Called by the session's task.
    pub(crate) fn client_can_be_told(&self, can: bool) {
        self.can_be_told.store(can, Ordering::Relaxed);
    }

    /// Tells the client and shuts its socket down. On the session's own thread, or its task might
    /// be in the middle of a message.
    fn end_client(&self) {
        if let Some(Live { lifeline: Lifeline::Relayed(_, Some(client)), .. }) = &*self.live() {
            let reason = self.reason();
            if let (true, Some(reason)) = (self.can_be_told.load(Ordering::Relaxed), reason) {
                // Never waits: a client that does not read cannot hold up its own end.
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                let _ = send(&client.socket, (client.last_words)(reason), flags);
            }
            // What it has not read yet it can still read. Closing comes later and costs more.
            let _ = shutdown(&client.socket, Shutdown::Both);
        }
        self.end_handed_off();
        self.has_no_client();
    }

    /// Shuts down a socket that its client has itself. On any thread.
    fn end_handed_off(&self) {
        // Of such a session this is said only once it is shut down, here or by its own task: the
        // thread it lives on and those that help need not do it twice.
        if self.client_dead.load(Ordering::SeqCst) {
            return;
        }
        if let Some(Live { lifeline: Lifeline::HandedOff(link), .. }) = &*self.live() {
            let _ = shutdown(link, Shutdown::Both);
            self.has_no_client();
        }
    }

    fn shut_down(&self) {
        if let Some(Live { lifeline: Lifeline::Relayed(link, _), .. }) = &*self.live() {
            // Fails only when the server was faster.
            let _ = shutdown(link, Shutdown::Both);
        }
    }

    fn live(&self) -> MutexGuard<'_, Option<Live>> {
        locked(&self.live)
    }

    /// Returns when the session is to end.
    pub(crate) async fn fired(&self) -> CutReason {
        self.let_go.cancelled().await;
        self.reason.get().copied().unwrap_or(CutReason::Revoked)
    }

    /// Says that the client's socket is closed, and returns when it is the server's turn: at once,
    /// unless the session is one of many that are being cut.
    pub(crate) async fn client_is_dead(&self) {
        if let Some(Live { lifeline: Lifeline::Relayed(_, client), .. }) = &mut *self.live() {
            *client = None;
        }
        self.has_no_client();
        if let Some(volley) = self.volley.get() {
            volley.servers_turn.cancelled().await;
        }
    }

    /// Returns when the session has ended: its client's socket closed and the server stopped.
    pub(crate) async fn ended(&self) {
        self.ended.cancelled().await;
    }
}

impl Volley {
    fn client_died(&self) {
        if self.clients_left.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.clients_dead.cancel();
        }
    }
}

/// Lets all of these go, at once. What is returned does the rest, and must be run.
pub(crate) fn fire(cuts: &[Arc<Cut>]) -> impl Future<Output = ()> + Send + use<> {
    let volley = Arc::new(Volley {
        clients_left: AtomicUsize::new(cuts.len()),
        clients_dead: CancellationToken::new(),
        servers_turn: CancellationToken::new(),
    });
    if cuts.is_empty() {
        volley.clients_dead.cancel();
    }
    let mut fresh = Vec::with_capacity(cuts.len());
    for cut in cuts {
        if cut.join(&volley) {
            fresh.push(Arc::clone(cut));
        } else {
            // It is being ended already.
            volley.client_died();
        }
    }
    // Whatever becomes of the rest, no relay waits for it for ever.
    let servers_turn = volley.servers_turn.clone().drop_guard();
    let work = Arc::new(Work::of(&fresh));
    work.rouse();
    work.shut_handed_off();
    async move {
        let _servers_turn = servers_turn;
        // Whether they are or not: a relay that hangs does not save its session.
        let _ = timeout(CLIENTS_FIRST, volley.clients_dead.cancelled()).await;
        for cut in &fresh {
            cut.shut_down();
        }
    }
}

/// What is to be done of a volley at once, and who is still to be woken for it.
#[derive(Debug)]
struct Work {
    /// Sessions by the thread that they live on.
    homes: Mutex<Vec<(Handle, Vec<Arc<Cut>>)>>,
    /// Those whose sockets the clients have themselves, which any thread can shut down.
    handed_off: Mutex<Vec<Arc<Cut>>>,
    /// How many threads may be asked to help with them.
    hands: AtomicUsize,
}

impl Work {
    /// Lets go what lives nowhere.
    fn of(cuts: &[Arc<Cut>]) -> Self {
        let mut homes: Vec<(Handle, Vec<Arc<Cut>>)> = Vec::new();
        let mut handed_off = Vec::new();
        for cut in cuts {
            let live = cut.live();
            let Some(Live { lifeline, home: Some(home) }) = &*live else {
                drop(live);
                cut.let_go.cancel();
                continue;
            };
            if matches!(lifeline, Lifeline::HandedOff(_)) {
                handed_off.push(Arc::clone(cut));
            }
            // There are as many as processors: a few.
            match homes.iter_mut().find(|(other, _)| other.id() == home.id()) {
                Some((_, cuts)) => cuts.push(Arc::clone(cut)),
                None => homes.push((home.clone(), vec![Arc::clone(cut)])),
            }
        }
        let hands = handed_off.len().div_ceil(HANDFUL).min(HANDS).saturating_sub(1);
        Self {
            homes: Mutex::new(homes),
            handed_off: Mutex::new(handed_off),
            hands: AtomicUsize::new(hands),
        }
    }

    /// Wakes every thread that has work here and is not awake yet; each does the same first.
    fn rouse(self: &Arc<Self>) {
        while let Some((home, cuts)) = self.next_home() {
            let work = Arc::clone(self);
            home.spawn(async move {
                work.rouse();
                cuts.iter().for_each(|cut| cut.end_client());
                cuts.iter().for_each(|cut| cut.let_go.cancel());
            });
        }
        while let Ok(here) = Handle::try_current()
            && self.takes_a_hand()
        {
            let work = Arc::clone(self);
            here.spawn_blocking(move || {
                work.rouse();
                work.shut_handed_off();
            });
        }
    }

    fn next_home(&self) -> Option<(Handle, Vec<Arc<Cut>>)> {
        locked(&self.homes).pop()
    }

    fn takes_a_hand(&self) -> bool {
        let fewer = |hands: usize| hands.checked_sub(1);
        self.hands.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fewer).is_ok()
    }

    /// Shuts down the sockets that clients have themselves, until none is left. One at a time: a
    /// thread that loses its processor takes none with it.
    fn shut_handed_off(&self) {
        while let Some(cut) = self.next_handed_off() {
            cut.end_handed_off();
        }
    }

    fn next_handed_off(&self) -> Option<Arc<Cut>> {
        locked(&self.handed_off).pop()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;
    use std::task::{Context, Wake, Waker};
    use std::thread;

    use tokio::runtime::Builder;

    use super::*;

    fn live() -> (Arc<Cut>, UnixStream) {
        let (ours, server) = UnixStream::pair().unwrap();
        let cut = Arc::new(Cut::default());
        cut.hold(Lifeline::Relayed(ours.into(), None));
        cut.mark(CutReason::Revoked);
        server.set_nonblocking(true).unwrap();
        (cut, server)
    }

    fn has_ended(server: &mut UnixStream) -> bool {
        matches!(server.read(&mut [0]), Ok(0))
    }

    #[tokio::test(start_paused = true)]
    async fn servers_are_shut_down_when_every_client_is_dead() {
        let (one, mut first) = live();
        // The other one's thread has not had its turn yet.
        let elsewhere = Builder::new_current_thread().build().unwrap();
        let (two, mut second) = {
            let _there = elsewhere.enter();
            live()
        };
        let rest = fire(&[Arc::clone(&one), Arc::clone(&two)]);
        assert_eq!(one.fired().await, CutReason::Revoked);
        tokio::pin!(rest);
        let early = timeout(CLIENTS_FIRST / 2, &mut rest).await;
        assert!(early.is_err() && !has_ended(&mut first), "the other one lives");
        tokio::join!(rest, one.client_is_dead(), two.client_is_dead());
        assert!(has_ended(&mut first) && has_ended(&mut second));
        elsewhere.shutdown_background();
    }

    #[tokio::test(start_paused = true)]
    async fn a_relay_that_hangs_saves_no_session() {
        let (cut, mut server) = live();
        fire(&[Arc::clone(&cut)]).await;
        assert!(has_ended(&mut server));
    }

    fn with_client(can_be_told: bool) -> (Arc<Cut>, UnixStream) {
        let (cut, _server) = live();
        let (ours, client) = UnixStream::pair().unwrap();
        let last_words = |reason: CutReason| reason.name().as_bytes();
        let client_too = Client { socket: Arc::new(ours.into()), last_words };
        let link = UnixStream::pair().unwrap().0.into();
        cut.hold(Lifeline::Relayed(link, Some(client_too)));
        cut.client_can_be_told(can_be_told);
        (cut, client)
    }

    #[tokio::test]
    async fn clients_are_told_what_they_can_be_and_ended_before_their_tasks_are_woken() {
        let ((told, mut hears), (untold, mut torn)) = (with_client(true), with_client(false));
        let rest = fire(&[Arc::clone(&told), Arc::clone(&untold)]);
        assert_eq!(told.fired().await, CutReason::Revoked);
        let mut words = String::new();
        hears.read_to_string(&mut words).unwrap();
        assert_eq!(words, "revoked");
        assert_eq!(torn.read(&mut [0; 16]).unwrap(), 0, "it was in the middle of a message");
        // Both have been counted as dead.
        rest.await;
    }

    #[tokio::test]
    async fn sockets_that_were_handed_over_wait_for_no_thread() {
        // Where they live, nobody has a turn.
        let elsewhere = Builder::new_current_thread().build().unwrap();
        let handed_off = || {
            let (link, client) = UnixStream::pair().unwrap();
            let _there = elsewhere.enter();
            let cut = Arc::new(Cut::default());
            cut.hold(Lifeline::HandedOff(link.into()));
            cut.mark(CutReason::Suspended);
            (cut, client)
        };
        let (cuts, clients): (Vec<_>, Vec<_>) = (0..3 * HANDFUL + 1).map(|_| handed_off()).unzip();
        // It ends when it knows all of them dead.
        fire(&cuts).await;
        for (cut, mut client) in cuts.iter().zip(clients) {
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
            assert!(!cut.let_go.is_cancelled(), "its task hears of it at home");
        }
        elsewhere.shutdown_background();
    }

    /// Notes which thread wakes.
    #[derive(Debug, Default)]
    struct Woken(Mutex<Option<thread::ThreadId>>);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            *self.0.lock().unwrap() = Some(thread::current().id());
        }
    }

    #[test]
    fn sessions_are_let_go_by_the_thread_they_live_on() {
        let woken = Arc::new(Woken::default());
        let (told, cuts) = mpsc::channel();
        let home = thread::spawn({
            let woken = Arc::clone(&woken);
            move || {
                let runtime = Builder::new_current_thread().build().unwrap();
                runtime.block_on(async {
                    let (cut, _server) = live();
                    let waker = Waker::from(Arc::clone(&woken));
                    let mut fired = Box::pin(cut.fired());
                    let polled = fired.as_mut().poll(&mut Context::from_waker(&waker));
                    assert!(polled.is_pending());
                    told.send(Arc::clone(&cut)).unwrap();
                    while woken.0.lock().unwrap().is_none() {
                        tokio::task::yield_now().await;
                    }
                });
                thread::current().id()
            }
        });
        let rest = fire(&[cuts.recv().unwrap()]);
        let home = home.join().unwrap();
        assert_eq!(*woken.0.lock().unwrap(), Some(home));
        drop(rest);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_fired_twice_is_of_the_first_volley() {
        let ((cut, mut server), (other, mut others)) = (live(), live());
        let first = fire(&[Arc::clone(&cut)]);
        let second = fire(&[Arc::clone(&cut), Arc::clone(&other)]);
        other.has_no_client();
        second.await;
        assert!(has_ended(&mut others), "it waits for its own alone");
        assert!(!has_ended(&mut server));
        cut.end();
        first.await;
    }

    #[tokio::test]
    async fn what_is_never_run_holds_up_no_relay() {
        let (cut, _server) = live();
        drop(fire(&[Arc::clone(&cut)]));
        cut.client_is_dead().await;
    }

    #[tokio::test]
    async fn a_client_that_leaves_by_itself_waits_for_nothing() {
        let (cut, mut server) = live();
        cut.client_is_dead().await;
        assert!(!has_ended(&mut server));
    }
}
