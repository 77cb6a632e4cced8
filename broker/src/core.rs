//! The verbs. Here, and only here, stands: may this peer do this (policy), was it written down
//! (audit), then do it.
//!
//! The types carry the order. A [`Peer`] comes from accept;
//! [`decide`](crate::policy::Policy::decide) turns it into a [`Grant`]; [`Audit::before`] turns
//! that into an `Audited` grant; and the effects (a handle in the table, a session's credential)
//! take nothing less. The edges (gRPC, packets and the doors) decode, call a verb and encode; they
//! decide nothing.
//!
//! Locking: the handle table and the session registry are one state under one mutex, which is
//! held neither across an `.await` nor across a write to the audit log.

#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub(crate) use self::admin::{ConnectionView, HandleFilter, Probe, Status, SuspendedNow};
pub(crate) use self::explain::{Asked, Explained, Question, Who};
pub(crate) use self::handles::Named;
use self::limits::{Rates, Verb};
pub(crate) use self::opening::{Closing, Opening, Permit, Session};
pub(crate) use self::refusal::{Refusal, SettingName, Why};
pub(crate) use self::reload::{ReloadProblem, Reloading};
pub(crate) use self::secrets::{PutRequest, RegisterRequest};
pub(crate) use self::sessions::Admitted;
pub(crate) use self::settings::Settings;
pub(crate) use self::spares::{Dialling, Spare};
use self::state::State;
pub(crate) use self::suspension::{Scope, Suspended, SuspensionError, SuspensionFile};
pub(crate) use self::view::{HandleView, Viewed};
pub(crate) use self::watching::HandleNews;
use crate::audit::{Audit, Event, Outcome, Record};
use crate::connection::{Connection, ConnectionName};
use crate::credential::{Credential, Credentials};
use crate::handle::{Bind, Expiry, ExpiryQueue, Handle, HandleId, SHORTEST_LIFE, Standing, Token};
use crate::metrics::{self, Metrics};
use crate::peer::{Peer, Uid};
use crate::policy::{Action, Decision, Grant};

mod admin;
mod divergence;
mod ending;
mod explain;
mod handles;
mod limits;
mod opening;
mod refusal;
mod reload;
mod secrets;
mod sessions;
mod settings;
mod spares;
mod state;
mod suspension;
mod view;
mod watching;

/// Longest `subject` in bytes.
const MAX_SUBJECT: usize = 128;
/// Longest `purpose` in bytes.
const MAX_PURPOSE: usize = 64;

/// The broker's heart. Cheap to clone; clones are the same broker.
#[derive(Clone, Debug)]
pub(crate) struct Core {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    credentials: Credentials,
    audit: Audit,
    metrics: Metrics,
    state: Mutex<State>,
    rates: Mutex<Rates>,
    refusals: explain::Remembered,
    suspensions: SuspensionFile,
    reloading: Reloading,
    posture: Vec<(&'static str, String)>,
    started: SystemTime,
    expiry: Expiry,
    /// Woken whenever a session ends, for those who wait for a free place.
    freed: Notify,
    draining: CancellationToken,
    stopped: CancellationToken,
    tasks: TaskTracker,
}

/// What a core is made of.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) settings: Settings,
    pub(crate) credentials: Credentials,
    pub(crate) audit: Audit,
    pub(crate) metrics: Metrics,
    pub(crate) suspensions: (SuspensionFile, Suspended),
    pub(crate) reloading: Reloading,
    pub(crate) posture: Vec<(&'static str, String)>,
}

/// A request for a handle, parsed.
#[derive(Debug)]
pub(crate) struct IssueRequest {
    pub(crate) connection: String,
    pub(crate) ttl: Option<Duration>,
    pub(crate) max_uses: Option<u32>,
    pub(crate) max_sessions: Option<u32>,
    pub(crate) redeemer: Option<Uid>,
    pub(crate) bind: Bind,
    pub(crate) subject: String,
    pub(crate) purpose: String,
}

/// A new handle and its only copy of the token.
#[derive(Debug)]
pub(crate) struct Issued {
    pub(crate) handle: HandleView,
    pub(crate) token: Token,
    pub(crate) connection: Arc<Connection>,
}

impl Core {
    /// A core and the timer that it must be given to [`Core::run_expiry`].
    pub(crate) fn new(parts: Parts) -> (Self, ExpiryQueue) {
        let (expiry, queue) = Expiry::new();
        let (suspensions, suspended) = parts.suspensions;
        let shared = Shared {
            credentials: parts.credentials,
            audit: parts.audit,
            metrics: parts.metrics,
            state: Mutex::new(State::new(parts.settings, suspended)),
            rates: Mutex::default(),
            refusals: explain::Remembered::default(),
            suspensions,
            reloading: parts.reloading,
            posture: parts.posture,
            started: SystemTime::now(),
            expiry,
            freed: Notify::new(),
            draining: CancellationToken::new(),
            stopped: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        (Self { shared: Arc::new(shared) }, queue)
    }

    /// Issues a handle: identity, policy, limits, audit, and then the table.
    pub(crate) async fn issue(
        &self,
        peer: &Peer,
        request: IssueRequest,
    ) -> Result<Issued, Refusal> {
        let timed = self.shared.metrics.begin(metrics::Verb::Issue);
        let connection = self.connection(peer, Action::Issue, &request.connection)?;
        let grant = match request.redeemer {
            None => self.grant(peer, Action::Issue, &connection.name)?,
            Some(redeemer) => self.grant_for(peer, redeemer, &connection.name)?,
        };
        self.check_words(peer, &connection, &request)?;
        self.check_open_for_business(peer, &connection.name)?;
        self.check_rate(peer, &grant, Verb::Issue)?;
        let issued = self.issue_under(peer, &connection, &grant, request, None).await?;
        timed.done();
        Ok(issued)
    }

    /// What all kinds of issuing share, once policy has allowed it.
    async fn issue_under(
        &self,
        peer: &Peer,
        connection: &Arc<Connection>,
        grant: &Grant,
        request: IssueRequest,
        registered: Option<Arc<Credential>>,
    ) -> Result<Issued, Refusal> {
        let name = &connection.name;
        if request.bind != Bind::None {
            self.watch_holder(peer, name)?;
        }
        // After everything that was read of the process, and before the grant.
        self.check_alive(peer, name)?;
        let event =
            if registered.is_some() { Event::SecretRegistered } else { Event::HandleIssued };
        let (handle, token) = self.new_handle(peer, name, grant, request, registered)?;
        let record = Record::new(event, Outcome::Allowed)
            .peer(peer)
            .grant(grant)
            .handle(handle.id)
            .subject(&handle.subject)
            .purpose(&handle.purpose)
            .redeemer(handle.redeemer)
            .detail("ttl_seconds", handle.ttl.as_secs());
        let audited = self.shared.audit.before(&record, handle).await;
        let handle =
            audited.map_err(|unavailable| self.unaudited(peer, Some(name), &unavailable))?;

        let Handle { id, bind, expires, .. } = *handle.get();
        let inserted = {
            let mut state = self.state();
            let most = state.settings.limits.handles;
            // What was decided before the record was written must still hold under the lock.
            if state.suspended.covers(name) {
                Err(Why::Suspended)
            } else if !state.still_grants(peer, grant) {
                Err(Why::AccessDenied)
            } else {
                match state.handles.insert(token.hash(), handle, most) {
                    Ok(()) => state.view(id).ok_or(Why::Internal("the handle is gone")),
                    Err(_full) => Err(Why::limit("handles")),
                }
            }
        };
        // The record that allowed it stands; a refusal's says that nothing came of it.
        let view = inserted.map_err(|why| self.refuse(peer, Some(name), why))?;
        self.shared.expiry.wake(id, expires);
        if bind != Bind::None && !peer.is_alive() {
            // It exited before there was a handle for its watch to find.
            self.holder_exited(peer.id());
        }
        Ok(Issued { handle: view, token, connection: Arc::clone(connection) })
    }

    fn new_handle(
        &self,
        peer: &Peer,
        connection: &ConnectionName,
        grant: &Grant,
        request: IssueRequest,
        registered: Option<Arc<Credential>>,
    ) -> Result<(Handle, Token), Refusal> {
        let limits = self.settings().handle_limits;
        let longest = grant.max_ttl().unwrap_or(limits.max_ttl).min(limits.max_ttl);
        let ttl = request.ttl.unwrap_or(limits.default_ttl).min(longest);
        let now = Instant::now();
        let internal = |_| self.refuse(peer, Some(connection), Why::Internal("no randomness"));
        let mut handle = Handle {
            id: HandleId::random().map_err(internal)?,
            connection: connection.clone(),
            holder: match request.bind {
                Bind::None => peer.without_process(),
                Bind::Lifetime | Bind::Process => peer.clone(),
            },
            redeemer: request.redeemer,
            subject: request.subject,
            purpose: request.purpose,
            bind: request.bind,
            registered,
            revealed: false,
            issued: now,
            issued_at: SystemTime::now(),
            ttl,
            expires: now,
            never_after: match request.bind {
                // It ends with its process, whenever that is.
                Bind::Lifetime => None,
                Bind::None | Bind::Process => Some(now + limits.max_lifetime),
            },
            uses_left: request.max_uses,
            max_sessions: request.max_sessions.and_then(|sessions| usize::try_from(sessions).ok()),
            standing: Standing::Live,
        };
        handle.extend(now, ttl);
        Ok((handle, Token::random().map_err(internal)?))
    }

    /// The connection that a caller names. To whom has no grant, it does not exist.
    fn connection(
        &self,
        peer: &Peer,
        action: Action,
        name: &str,
    ) -> Result<Arc<Connection>, Refusal> {
        let settings = self.settings();
        match settings.connections.get(name) {
            Some(connection) => Ok(Arc::clone(connection)),
            None => {
                let denial = settings.policy.unknown_connection(peer);
                Err(self.deny(peer, Asked::unknown(action), &denial))
            }
        }
    }

    /// The policy's grant, or its denial, audited. An operator's suspension is told to whom the
    /// policy allows it only.
    fn grant(
        &self,
        peer: &Peer,
        action: Action,
        connection: &ConnectionName,
    ) -> Result<Grant, Refusal> {
        let settings = self.settings();
        match settings.policy.decide(peer, action, connection) {
            Decision::Allow(grant) => self.unless_suspended(peer, grant),
            Decision::Deny(denial) => {
                Err(self.deny(peer, Asked::about(action, connection), &denial))
            }
        }
    }

    /// The same, for a handle that somebody else is to redeem.
    fn grant_for(
        &self,
        peer: &Peer,
        redeemer: Uid,
        connection: &ConnectionName,
    ) -> Result<Grant, Refusal> {
        match self.settings().policy.decide_redeemer(peer, redeemer, connection) {
            Decision::Allow(grant) => self.unless_suspended(peer, grant),
            Decision::Deny(denial) => {
                Err(self.deny(peer, Asked::about(Action::Issue, connection), &denial))
            }
        }
    }

    fn unless_suspended(&self, peer: &Peer, grant: Grant) -> Result<Grant, Refusal> {
        let suspended = self.state().suspended.covers(grant.connection());
        if suspended {
            Err(self.refuse(peer, Some(grant.connection()), Why::Suspended))
        } else {
            Ok(grant)
        }
    }

    /// The process that connected must still run: a grant to a dead process could only be used
    /// by somebody else.
    fn check_alive(&self, peer: &Peer, connection: &ConnectionName) -> Result<(), Refusal> {
        if peer.is_alive() {
            Ok(())
        } else {
            Err(self.refuse(peer, Some(connection), Why::PeerExited))
        }
    }

    fn check_open_for_business(
        &self,
        peer: &Peer,
        connection: &ConnectionName,
    ) -> Result<(), Refusal> {
        if self.shared.draining.is_cancelled() {
            return Err(self.refuse(peer, Some(connection), Why::Draining));
        }
        Ok(())
    }

    fn check_rate(&self, peer: &Peer, grant: &Grant, verb: Verb) -> Result<(), Refusal> {
        let rate =
            grant.rate_per_second().unwrap_or_else(|| self.settings().limits.rate_per_second);
        let mut rates = self.shared.rates.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = rates.take(peer.uid(), grant.connection(), verb, rate, Instant::now());
        drop(rates);
        taken.map_err(|retry| {
            let why = Why::LimitReached { what: "requests per second", retry };
            self.refuse(peer, Some(grant.connection()), why)
        })
    }

    fn check_words(
        &self,
        peer: &Peer,
        connection: &Connection,
        request: &IssueRequest,
    ) -> Result<(), Refusal> {
        let wrong = |field, must| {
            Err(self.refuse(peer, Some(&connection.name), Why::InvalidRequest { field, must }))
        };
        let word = |byte: u8| byte.is_ascii_alphanumeric() || b" _.-".contains(&byte);
        if request.purpose.len() > MAX_PURPOSE || !request.purpose.bytes().all(word) {
            return wrong("purpose", "be at most 64 letters, digits, spaces, '_', '.' or '-'");
        }
        if request.subject.len() > MAX_SUBJECT
            || !request.subject.bytes().all(|byte| (0x20..0x7f).contains(&byte))
        {
            return wrong("subject", "be at most 128 printable ASCII characters");
        }
        if request.ttl.is_some_and(|ttl| ttl < SHORTEST_LIFE) {
            return wrong("ttl", "be at least a second");
        }
        if request.max_uses == Some(0) || request.max_sessions == Some(0) {
            return wrong("max_uses, max_sessions", "be at least 1 when given");
        }
        if request.bind == Bind::Process && request.redeemer.is_some() {
            return wrong("bind", "not be process for a handle that somebody else is to redeem");
        }
        if request.bind != Bind::None && !peer.can_be_watched() {
            return Err(self.refuse(
                peer,
                Some(&connection.name),
                Why::Unsupported("a bound handle (this kernel has no SO_PEERPIDFD)"),
            ));
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where tasks of this broker are spawned, so that its end can wait for them.
    pub(crate) fn tasks(&self) -> &TaskTracker {
        &self.shared.tasks
    }

    /// Returns when the broker begins to shut down.
    pub(crate) async fn draining(&self) {
        self.shared.draining.cancelled().await;
    }

    /// Returns when everything is over but the last record.
    pub(crate) async fn drained(&self) {
        self.shared.stopped.cancelled().await;
    }

    /// Whether it has begun to shut down.
    pub(crate) fn is_draining(&self) -> bool {
        self.shared.draining.is_cancelled()
    }

    /// The configuration in force.
    pub(crate) fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.state().settings)
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Whether the broker can grant anything at this moment.
    pub(crate) fn is_serving(&self) -> bool {
        self.shared.audit.is_writable() && !self.shared.draining.is_cancelled()
    }
}
