//! A few connections of one handle.
//!
//! Our own, not sqlx's: that one retries a login that was refused for a limit until it times
//! out, gives connections back in the background, and waits for a running statement before
//! it lets go. Here a [`Lease`] that is dropped closes its socket at once, and only a session
//! that was reset goes back. It is reset behind the answer that its caller waits for; who comes
//! meanwhile waits for it rather than opening one more.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sqlx::postgres::{PgConnectOptions, PgConnection, PgSslMode};
use sqlx::{ConnectOptions as _, Connection as _};
use tokio::net::UnixStream;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::policy::Policy;
use super::relay::{self, Overheard, Relay};
use super::transaction::Left;
use super::{Limits, failure, roles};
use crate::error::{Code, Failure};

const APPLICATION_NAME: &str = "credbroker-sql-worker";
const DOOR_PORT: u16 = 5432;
/// A door that takes longer than this to log in is not going to.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two messages of ours in one transaction.
const IDLE_IN_TRANSACTION_TIMEOUT: Duration = Duration::from_secs(10);
const IDLE_SESSION_TIMEOUT: Duration = Duration::from_secs(600);

/// Where a pool connects to, and as whom.
#[derive(Clone)]
pub struct Target {
    options: PgConnectOptions,
    door: PathBuf,
    longest_message: usize,
    policy: Arc<Policy>,
}

impl Target {
    /// A broker's door: `directory` holds its socket, `token` is the handle's.
    ///
    /// The server gets timeouts of its own, as a backstop behind our clock and for what our
    /// clock does not see: a session that nobody ends. A wait for a lock ends sooner, so that
    /// it can be told from a slow statement.
    #[must_use]
    pub fn door(
        directory: &Path,
        database: &str,
        user: &str,
        token: &str,
        limits: &Limits,
    ) -> Self {
        let statement_timeout = limits.statement_timeout;
        let backstop = statement_timeout.saturating_add(Duration::from_secs(1));
        let options = PgConnectOptions::new_without_pgpass()
            .port(DOOR_PORT)
            .database(database)
            .username(user)
            .password(token)
            .options([
                ("statement_timeout", millis(backstop)),
                ("lock_timeout", millis(statement_timeout.min(LOCK_TIMEOUT))),
                ("idle_in_transaction_session_timeout", millis(IDLE_IN_TRANSACTION_TIMEOUT)),
                // Known since PostgreSQL 14.
                ("idle_session_timeout", millis(IDLE_SESSION_TIMEOUT)),
                // Statements are read by our lexer as well.
                ("standard_conforming_strings", "on".to_owned()),
            ])
            .ssl_mode(PgSslMode::Disable)
            .application_name(APPLICATION_NAME)
            .extra_float_digits(1)
            // A statement is described and then run under one name, so that nothing can
            // change between the two.
            .statement_cache_capacity(8)
            .disable_statement_logging();
        let door = directory.join(format!(".s.PGSQL.{DOOR_PORT}"));
        let longest_message = limits.longest_message();
        Self { options, door, longest_message, policy: Arc::default() }
    }

    /// The same target under `policy`; without it nothing can be changed there.
    #[must_use]
    pub fn with_policy(self, policy: Arc<Policy>) -> Self {
        Self { policy, ..self }
    }
}

impl Target {
    /// A session whose role the policy allows. `tasks` carry its bytes.
    async fn open(&self, tasks: &TaskTracker) -> Result<Session, Failure> {
        let silent = |_error| failure::of_silence();
        let door = UnixStream::connect(&self.door).await.map_err(silent)?;
        let relay = Relay::listen(DOOR_PORT).map_err(silent)?;
        let options = self.options.clone().socket(relay.directory());
        let (overheard, longest) = (Overheard::default(), self.longest_message);
        let hears = overheard.clone();
        tasks.spawn(async move {
            // Whoever should come may have been given up meanwhile.
            if let Ok(Ok(own)) = timeout(CONNECT_TIMEOUT, relay.accept()).await {
                // An end that was lost is seen at the other.
                let _ended = relay::pass(door, own, longest, hears).await;
            }
        });
        let connecting = PgConnection::connect_with(&options);
        let mut connection = connecting.await.map_err(|error| failure::of_connect(&error))?;
        roles::check(&mut connection, &self.policy).await?;
        Ok(Session { connection, overheard })
    }
}

fn millis(span: Duration) -> String {
    format!("{}ms", span.as_millis())
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Target([REDACTED])")
    }
}

/// Bounds of a pool.
#[derive(Debug, Clone, Copy)]
pub struct PoolSettings {
    /// Connections at once.
    pub size: usize,
    /// How long a call waits for one.
    pub wait: Duration,
    /// After how long an unused one is closed.
    pub idle: Duration,
}

/// The connections of one handle; clones share them.
#[derive(Clone)]
pub struct Pool(Arc<Shared>);

struct Shared {
    target: Target,
    settings: PoolSettings,
    permits: Arc<Semaphore>,
    sessions: Mutex<Sessions>,
    /// One of [`Sessions::coming`] has come, or never will.
    came: Notify,
    /// Resets, and what carries the bytes of sessions.
    tasks: TaskTracker,
    closed: CancellationToken,
}

/// A link to the database.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) connection: PgConnection,
    pub(super) overheard: Overheard,
}

/// Those that nobody uses.
#[derive(Default)]
struct Sessions {
    idle: Vec<(Session, Instant)>,
    /// How many are being reset.
    coming: usize,
}

/// What there is for who wants a session.
enum Found {
    Idle(Session),
    /// Sooner than a new one could be opened.
    Coming,
    None,
}

/// The use of one connection. Dropped, it closes the connection hard, which makes the door
/// cancel what still runs; `reset` is the only way back into the pool.
pub struct Lease {
    session: Session,
    origin: Origin,
    pool: Arc<Shared>,
    permit: OwnedSemaphorePermit,
}

/// Where a leased connection comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// It was opened for this lease.
    New,
    /// It was idle, and may have been cut while nobody looked.
    Idle,
}

impl Pool {
    /// An empty pool; connections are made when they are needed.
    #[must_use]
    pub fn new(target: Target, settings: PoolSettings) -> Self {
        Self(Arc::new(Shared {
            target,
            settings,
            permits: Arc::new(Semaphore::new(settings.size)),
            sessions: Mutex::default(),
            came: Notify::new(),
            tasks: TaskTracker::new(),
            closed: CancellationToken::new(),
        }))
    }

    /// Waits for a connection, and makes one if none is idle.
    ///
    /// # Errors
    /// `POOL_TIMEOUT` when all stay in use; `HANDLE_INVALID` and the broker's other reasons
    /// when the door refuses the handle; `CANCELLED` when the pool was closed.
    pub async fn lease(&self) -> Result<Lease, Failure> {
        let permit = timeout(self.0.settings.wait, Arc::clone(&self.0.permits).acquire_owned())
            .await
            .map_err(|_elapsed| {
                Failure::new(Code::PoolTimeout, "all sessions are in use; nothing was run")
                    .with_hint("try again when another call has ended")
            })?
            .map_err(|_closed| Failure::cancelled())?;
        let (session, origin) = match self.0.idle_session().await {
            Some(session) => (session, Origin::Idle),
            None => (self.0.open().await?, Origin::New),
        };
        Ok(Lease { session, origin, pool: Arc::clone(&self.0), permit })
    }

    /// Closes everything at once; statements that run are stopped.
    pub fn close(&self) {
        self.0.closed.cancel();
        self.0.permits.close();
        self.0.sessions().idle.clear();
    }

    /// Closes what nobody uses; gives how many there were.
    #[must_use]
    pub fn release_idle(&self) -> usize {
        std::mem::take(&mut self.0.sessions().idle).len()
    }

    /// Closes what was not used for a while.
    pub fn sweep(&self) {
        let limit = self.0.settings.idle;
        self.0.sessions().idle.retain(|(_, since)| since.elapsed() < limit);
    }
}

impl Shared {
    fn sessions(&self) -> std::sync::MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self) -> Found {
        let mut sessions = self.sessions();
        match sessions.idle.pop() {
            Some((session, _)) => Found::Idle(session),
            None if sessions.coming > 0 => Found::Coming,
            None => Found::None,
        }
    }

    /// One that is idle, or will be in a moment.
    async fn idle_session(&self) -> Option<Session> {
        loop {
            // Made before the look: what comes in between is not missed.
            let came = self.came.notified();
            match self.find() {
                Found::Idle(session) => return Some(session),
                Found::Coming => came.await,
                Found::None => return None,
            }
        }
    }

    async fn open(&self) -> Result<Session, Failure> {
        timeout(CONNECT_TIMEOUT, self.target.open(&self.tasks)).await.map_err(|_elapsed| {
            Failure::new(Code::UpstreamUnreachable, "no session was opened in time")
        })?
    }
}

impl Lease {
    pub(super) fn connection(&mut self) -> &mut PgConnection {
        &mut self.session.connection
    }

    pub(super) fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    /// What may be done with it.
    pub(super) fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.pool.target.policy)
    }

    /// Fires when the pool is closed.
    pub(super) fn closed(&self) -> CancellationToken {
        self.pool.closed.clone()
    }

    /// Whether the session was idle before, so that it may be dead without anybody's fault.
    pub(super) fn was_idle(&self) -> bool {
        self.origin == Origin::Idle
    }

    /// Why the session was lost, where it is known better than `failure` says.
    pub(super) fn loss(&self, failure: Failure) -> Failure {
        if !self.session.overheard.overlong() {
            return failure;
        }
        let most = self.pool.target.longest_message >> 20;
        // Not LIMIT_REACHED: to try again is no use.
        Failure::new(
            Code::Unsupported,
            format!(
                "a row or message of the database has more than {most} MiB, or there are far more \
                 than were asked for; it was stopped"
            ),
        )
        .with_hint("select less of it: left(x, 1000), substring(x from 1 for 1000), length(x)")
    }

    /// Takes a session that lives in place of one that was idle. To be called before anything
    /// of a statement was sent on it: a statement is never sent twice.
    ///
    /// # Errors
    /// Those of opening one.
    pub(super) async fn replace(&mut self) -> Result<(), Failure> {
        while let Found::Idle(mut session) = self.pool.find() {
            if is_alive(&mut session.connection).await {
                self.session = session;
                return Ok(());
            }
        }
        self.session = self.pool.open().await?;
        self.origin = Origin::New;
        Ok(())
    }

    /// Does what is left to do, makes the session as good as new, and returns it to its pool;
    /// nobody needs to wait for that. A session with which it fails is closed.
    pub(crate) fn give_back(self, left: Left) {
        let Self { mut session, origin: _, pool, permit } = self;
        pool.sessions().coming += 1;
        let coming = Coming { pool: Arc::clone(&pool), permit: Some(permit) };
        pool.tasks.spawn(async move {
            let reset = timeout(CONNECT_TIMEOUT, reset(&mut session.connection, left));
            let reset = coming.pool.closed.run_until_cancelled(reset).await;
            if let Some(Ok(Ok(()))) = reset {
                coming.arrived(session);
            }
        });
    }
}

/// A session that is being reset. However that ends, who waits for it is told.
struct Coming {
    pool: Arc<Shared>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Coming {
    fn arrived(self, session: Session) {
        let mut sessions = self.pool.sessions();
        // Closing takes the lock to clear what is idle, after it has said so.
        if !self.pool.closed.is_cancelled() {
            sessions.idle.push((session, Instant::now()));
        }
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        self.pool.sessions().coming -= 1;
        // Whoever gets the permit finds the session.
        drop(self.permit.take());
        self.pool.came.notify_waiters();
    }
}

async fn is_alive(connection: &mut PgConnection) -> bool {
    matches!(timeout(CONNECT_TIMEOUT, connection.ping()).await, Ok(Ok(())))
}

/// DISCARD ALL closes the statements too, but sqlx must know it.
async fn reset(connection: &mut PgConnection, left: Left) -> Result<(), sqlx::Error> {
    if left == Left::RollBack {
        sqlx::raw_sql("rollback").execute(&mut *connection).await?;
    }
    connection.clear_cached_statements().await?;
    sqlx::raw_sql("DISCARD ALL").execute(connection).await.map(|_done| ())
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("settings", &self.0.settings).finish_non_exhaustive()
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").finish_non_exhaustive()
    }
}
