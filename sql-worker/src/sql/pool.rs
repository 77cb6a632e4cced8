//! A few connections of one handle.
//!
//! Our own, not sqlx's: that one retries a login that was refused for a limit until it times
//! out, gives connections back in the background, and waits for a running statement before
//! it lets go. Here a [`Lease`] that is dropped closes its socket at once, and only a session
//! that was reset goes back.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sqlx::postgres::{PgConnectOptions, PgConnection, PgSslMode};
use sqlx::{ConnectOptions as _, Connection as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::policy::Policy;
use super::{failure, roles};
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
        statement_timeout: Duration,
    ) -> Self {
        let backstop = statement_timeout.saturating_add(Duration::from_secs(1));
        let options = PgConnectOptions::new_without_pgpass()
            .port(DOOR_PORT)
            .socket(directory)
            .database(database)
            .username(user)
            .password(token)
            .options([
                ("statement_timeout", millis(backstop)),
                ("lock_timeout", millis(statement_timeout.min(LOCK_TIMEOUT))),
                ("idle_in_transaction_session_timeout", millis(IDLE_IN_TRANSACTION_TIMEOUT)),
                // Known since PostgreSQL 14.
                ("idle_session_timeout", millis(IDLE_SESSION_TIMEOUT)),
            ]);
        Self::new(options)
    }

    /// Any server; what matters to the results is set here.
    #[must_use]
    pub fn new(options: PgConnectOptions) -> Self {
        let options = options
            .ssl_mode(PgSslMode::Disable)
            .application_name(APPLICATION_NAME)
            .extra_float_digits(1)
            // A statement is described and then run under one name, so that nothing can
            // change between the two.
            .statement_cache_capacity(8)
            .disable_statement_logging();
        Self { options, policy: Arc::default() }
    }

    /// The same target under `policy`; without it nothing can be changed there.
    #[must_use]
    pub fn with_policy(self, policy: Arc<Policy>) -> Self {
        Self { policy, ..self }
    }
}

impl Target {
    /// A session whose role the policy allows.
    async fn open(&self) -> Result<PgConnection, Failure> {
        let connecting = PgConnection::connect_with(&self.options);
        let mut connection = connecting.await.map_err(|error| failure::of_connect(&error))?;
        roles::check(&mut connection, &self.policy).await?;
        Ok(connection)
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
    idle: Mutex<Vec<(PgConnection, Instant)>>,
    closed: CancellationToken,
}

/// The use of one connection. Dropped, it closes the connection hard, which makes the door
/// cancel what still runs; `reset` is the only way back into the pool.
pub struct Lease {
    connection: PgConnection,
    pool: Arc<Shared>,
    _permit: OwnedSemaphorePermit,
}

impl Pool {
    /// An empty pool; connections are made when they are needed.
    #[must_use]
    pub fn new(target: Target, settings: PoolSettings) -> Self {
        Self(Arc::new(Shared {
            target,
            settings,
            permits: Arc::new(Semaphore::new(settings.size)),
            idle: Mutex::new(Vec::new()),
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
        while let Some(mut connection) = self.0.pop() {
            // The broker may have cut it while nobody looked.
            if matches!(timeout(CONNECT_TIMEOUT, connection.ping()).await, Ok(Ok(()))) {
                return Ok(Lease { connection, pool: Arc::clone(&self.0), _permit: permit });
            }
        }
        let connection =
            timeout(CONNECT_TIMEOUT, self.0.target.open()).await.map_err(|_elapsed| {
                Failure::new(Code::UpstreamUnreachable, "no session was opened in time")
            })??;
        Ok(Lease { connection, pool: Arc::clone(&self.0), _permit: permit })
    }

    /// Closes everything at once; statements that run are stopped.
    pub fn close(&self) {
        self.0.closed.cancel();
        self.0.permits.close();
        self.0.idle().clear();
    }

    /// Closes what was not used for a while.
    pub fn sweep(&self) {
        let limit = self.0.settings.idle;
        self.0.idle().retain(|(_, since)| since.elapsed() < limit);
    }
}

impl Shared {
    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<(PgConnection, Instant)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pop(&self) -> Option<PgConnection> {
        self.idle().pop().map(|(connection, _)| connection)
    }
}

impl Lease {
    pub(super) fn connection(&mut self) -> &mut PgConnection {
        &mut self.connection
    }

    /// What may be done with it.
    pub(super) fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.pool.target.policy)
    }

    /// Fires when the pool is closed.
    pub(super) fn closed(&self) -> CancellationToken {
        self.pool.closed.clone()
    }

    /// Makes the session as good as new, and gives it back.
    ///
    /// # Errors
    /// `INVALID_REQUEST` when the statement left a transaction open; it is rolled back. Any
    /// other trouble only costs the connection.
    pub(crate) async fn reset(mut self) -> Result<(), Failure> {
        let cleared = self.connection.clear_cached_statements().await;
        let discarded = match cleared {
            Ok(()) => sqlx::raw_sql("DISCARD ALL").execute(&mut self.connection).await,
            Err(error) => Err(error),
        };
        match discarded {
            Ok(_) if self.pool.closed.is_cancelled() => Ok(()),
            Ok(_) => {
                let Self { connection, pool, _permit } = self;
                pool.idle().push((connection, Instant::now()));
                Ok(())
            }
            Err(error) if failure::is_open_transaction(&error) => {
                Err(Failure::invalid("the statement left a transaction open; it was rolled back")
                    .with_hint(
                        "every call is a transaction of its own: leave BEGIN and COMMIT out",
                    ))
            }
            Err(_lost) => Ok(()),
        }
    }
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
