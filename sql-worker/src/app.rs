//! The verbs, and whose handle, pool and reference is whose.
//!
//! Invariants: whatever a call names is looked up together with the principal who calls; a
//! pool belongs to one handle and is closed with it, so nothing of a session survives into
//! another handle.

mod access;
mod connecting;
mod cursors;
mod inspect;
mod opening;
mod principal;
mod rate;
mod references;
mod room;
mod tokens;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use futures_util::future::join_all;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use self::access::Access;
use self::cursors::Cursors;
pub use self::inspect::{Described, Description, Subject};
use self::opening::Turn;
pub use self::principal::{Name, Principal};
use self::rate::Rates;
use self::references::References;
pub use self::room::{Room, Share};
use self::tokens::Tokens;
use crate::broker::{Broker, Connection, Login, Token};
use crate::config::{Config, InlineSecrets, ToolSet};
use crate::error::{Code, Failure};
use crate::sql::{
    self, Answer, Cut, Format, Lease, Limits, MAX_ROWS_CEILING, Params, Sink, Statement, Summary,
    execute, execute_into, paging,
};

/// How often idle sessions are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);

/// Under whose right a statement runs.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// The worker's own handle for a connection, on behalf of the caller.
    Own(&'a str),
    /// A credential token that the caller made for a connection.
    Token(&'a str, &'a Token),
    /// A reference that the caller got from [`App::connect`].
    Reference(&'a str),
}

/// A statement as it was asked for.
#[derive(Debug)]
pub struct Request<'a> {
    /// One statement.
    pub sql: &'a str,
    /// Its parameters.
    pub params: Params,
    /// `None`: as configured.
    pub max_rows: Option<usize>,
    /// How rows are wanted.
    pub format: Format,
    /// `Some(true)`: change nothing, whatever the connection allows.
    pub readonly: Option<bool>,
}

/// A statement that has its turn and its session.
struct Ready<'a> {
    _running: Turn<'a>,
    lease: Lease,
    statement: Statement<'a>,
    limits: Limits,
}

/// All that the worker holds.
pub struct App {
    broker: Arc<dyn Broker>,
    config: Config,
    calls: Semaphore,
    rates: Rates,
    rooms: Mutex<HashMap<Principal, Room>>,
    own: Mutex<HashMap<(Principal, String), Arc<Access>>>,
    tokens: Tokens,
    references: References,
    cursors: Cursors,
}

impl App {
    /// A worker that holds nothing yet.
    #[must_use]
    pub fn new(broker: Arc<dyn Broker>, config: Config) -> Self {
        Self {
            calls: Semaphore::new(config.concurrency),
            rates: Rates::new(config.calls_per_second),
            rooms: Mutex::default(),
            own: Mutex::default(),
            tokens: Tokens::default(),
            references: References::default(),
            cursors: Cursors::default(),
            broker,
            config,
        }
    }

    /// Whether the caller may make one more call now, whatever it is.
    ///
    /// # Errors
    /// `LIMIT_REACHED`.
    pub fn admit(&self, caller: &Principal) -> Result<(), Failure> {
        self.rates.take(caller, Instant::now())
    }

    /// What bounds the caller, on all of the caller's connections together.
    #[must_use]
    pub fn room(&self, caller: &Principal) -> Room {
        let mut rooms = self.rooms.lock().unwrap_or_else(PoisonError::into_inner);
        let all = self.config.concurrency;
        let turns = if caller.shares() { all - all / 4 } else { all };
        rooms.entry(caller.clone()).or_insert_with(|| Room::new(turns)).clone()
    }

    /// Which tools are offered.
    #[must_use]
    pub fn tools(&self) -> ToolSet {
        self.config.tools
    }

    /// Whether a statement may change anything, on any connection.
    #[must_use]
    pub fn may_write(&self) -> bool {
        self.config.may_write()
    }

    /// What statements on a connection may do.
    #[must_use]
    pub fn access_of(&self, connection: &str) -> sql::Access {
        self.config.connection(connection).policy.access
    }

    /// The connections that the worker may use, masked.
    ///
    /// # Errors
    /// The broker's.
    pub async fn connections(&self) -> Result<Vec<Connection>, Failure> {
        self.broker.connections().await
    }

    /// Runs one statement. Dropping the future stops it in the database.
    ///
    /// # Errors
    /// Those of [`Statement::parse`], [`execute`], the broker, and `POOL_TIMEOUT` when
    /// nothing became free in time.
    pub async fn run(
        &self,
        caller: &Principal,
        source: Source<'_>,
        request: Request<'_>,
    ) -> Result<Answer, Failure> {
        let Ready { _running, lease, statement, limits } =
            self.ready(caller, source, &request).await?;
        execute(lease, &statement, request.format, &limits).await
    }

    /// As [`run`](Self::run), with the rows given to `sink` as they come.
    ///
    /// # Errors
    /// Those of [`run`](Self::run), and those of `sink`.
    pub async fn run_into(
        &self,
        caller: &Principal,
        source: Source<'_>,
        request: Request<'_>,
        sink: &mut impl Sink,
    ) -> Result<Summary, Failure> {
        let Ready { _running, lease, statement, limits } =
            self.ready(caller, source, &request).await?;
        execute_into(lease, &statement, request.format, &limits, sink).await
    }

    /// All that a statement needs to be run.
    async fn ready<'a>(
        &'a self,
        caller: &Principal,
        source: Source<'_>,
        request: &'a Request<'_>,
    ) -> Result<Ready<'a>, Failure> {
        let connection = self.name(caller, &source)?;
        let connection = self.config.connection(&connection);
        let limits = with_max_rows(connection.limits, request.max_rows)?;
        let access = connection.policy.access.narrowed(request.readonly)?;
        let statement = Statement::parse(request.sql, &request.params)?.with_access(access);
        let _running = self.turn(caller).await?;
        let lease = self.lease(caller, source).await?;
        Ok(Ready { _running, lease, statement, limits })
    }

    /// As [`run`](Self::run), a page at a time: begins where `cursor` stands, and gives a cursor
    /// when a query has more rows than were returned.
    ///
    /// Nothing is held in the database between two pages: the query is run again, see
    /// [`paging`], and read-only, whatever the connection allows.
    ///
    /// # Errors
    /// Those of [`run`](Self::run), and `INVALID_REQUEST` for a cursor that is not the
    /// caller's, has expired, or was made for something else.
    pub async fn page(
        &self,
        caller: &Principal,
        source: Source<'_>,
        request: Request<'_>,
        cursor: Option<&str>,
    ) -> Result<(Answer, Option<String>), Failure> {
        let sql = request.sql;
        let print = self.cursors.print(&source, sql, &request.params);
        let find = |cursor| self.cursors.find(caller, cursor, print, Instant::now());
        let offset = cursor.map(find).transpose()?;
        let rest = offset.map(|offset| paging::from_offset(sql, offset));
        // What is run again must not do again what it did.
        let readonly = if offset.is_some() { Some(true) } else { request.readonly };
        let request = Request { sql: rest.as_deref().unwrap_or(sql), readonly, ..request };
        let answer = self.run(caller, source, request).await?;
        let next = match &answer {
            // A first row that is too large for a page would be so again.
            Answer::Rows(set)
                if matches!(set.cut, Some(Cut::Rows | Cut::Bytes))
                    && set.row_count > 0
                    && paging::is_pageable(sql) =>
            {
                let read = u64::try_from(set.row_count).unwrap_or(u64::MAX);
                let end = offset.unwrap_or(0).saturating_add(read);
                Some(self.cursors.insert(caller, print, end, Instant::now())?)
            }
            Answer::Rows(_) | Answer::Done { .. } => None,
        };
        Ok((answer, next))
    }

    /// Issues a handle on a connection's own credential, for the caller alone. Returns the
    /// token, when it expires, and the connection, masked.
    ///
    /// # Errors
    /// The broker's, and `LIMIT_REACHED` when the caller has too many.
    pub async fn create_token(
        &self,
        caller: &Principal,
        connection: &str,
        ttl: Duration,
    ) -> Result<(Token, SystemTime, Connection), Failure> {
        let masked = self.connection(connection).await?;
        if !masked.has_credential {
            return Err(Failure::credential_missing(&masked.name));
        }
        let slot = self.tokens.slot(caller)?;
        let (token, info) = self.broker.issue_token(connection, caller.subject(), ttl).await?;
        slot.fill(&info);
        Ok((token, info.expires, masked))
    }

    /// Whether callers may bring passwords.
    #[must_use]
    pub fn inline_secrets(&self) -> InlineSecrets {
        self.config.inline_secrets
    }

    /// As [`create_token`](Self::create_token), on a login that the caller brings to a
    /// connection that has none.
    ///
    /// # Errors
    /// The broker's.
    pub async fn register_token(
        &self,
        caller: &Principal,
        connection: &str,
        login: Login,
        ttl: Duration,
    ) -> Result<(Token, SystemTime, Connection), Failure> {
        let masked = self.connection(connection).await?;
        let subject = caller.subject();
        let slot = self.tokens.slot(caller)?;
        let (token, info) = self.broker.register_token(connection, login, subject, ttl).await?;
        slot.fill(&info);
        Ok((token, info.expires, masked))
    }

    /// Ends a handle of the caller, with its sessions.
    ///
    /// # Errors
    /// `HANDLE_INVALID`, with the same text for every token that is not the caller's to end.
    pub async fn revoke_token(&self, caller: &Principal, token: &Token) -> Result<(), Failure> {
        let checked = self.tokens.check(self, caller, token).await?;
        self.broker.revoke(token).await?;
        self.tokens.forget(&checked);
        Ok(())
    }

    /// Closes idle sessions until `stop` fires.
    pub async fn keep(&self, stop: &CancellationToken) {
        let mut interval = tokio::time::interval(SWEEP_INTERVAL);
        while stop.run_until_cancelled(interval.tick()).await.is_some() {
            for access in self.accesses() {
                access.sweep();
            }
            self.tokens.sweep(SystemTime::now());
            self.rates.sweep(Instant::now());
            self.cursors.sweep(Instant::now());
        }
    }

    /// Stops every statement and revokes every handle that the worker holds itself. When it
    /// is done, their sessions are dead; credential tokens live on, without sessions of ours.
    pub async fn close(&self) {
        self.calls.close();
        self.tokens.close();
        let accesses = self.accesses();
        join_all(accesses.iter().map(|access| access.end())).await;
    }

    /// One connection, masked.
    async fn connection(&self, name: &str) -> Result<Connection, Failure> {
        let known = self.broker.connections().await?;
        known.into_iter().find(|connection| connection.name == name).ok_or_else(|| {
            Failure::new(Code::AccessDenied, "access denied, or no such connection")
                .with_hint("list_connections shows what may be used")
        })
    }

    fn accesses(&self) -> Vec<Arc<Access>> {
        let mut accesses: Vec<_> = self.own().values().map(Arc::clone).collect();
        accesses.extend(self.references.all());
        accesses
    }

    fn own(&self) -> MutexGuard<'_, HashMap<(Principal, String), Arc<Access>>> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn with_max_rows(limits: Limits, max_rows: Option<usize>) -> Result<Limits, Failure> {
    match max_rows {
        None => Ok(limits),
        Some(max_rows @ 1..=MAX_ROWS_CEILING) => Ok(Limits { max_rows, ..limits }),
        Some(_) => Err(Failure::invalid("max_rows must be between 1 and 50000")),
    }
}

impl fmt::Debug for App {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("App").field("config", &self.config).finish_non_exhaustive()
    }
}
