//! The verbs. Here, and only here, stands: may this peer do this (policy), was it written down
//! (audit), then do it.
//!
//! The types carry the order. A [`Peer`] comes from accept; [`Policy::decide`] turns it into a
//! [`Grant`]; [`Audit::before`] turns that into an `Audited` grant; and the effects (a handle in
//! the table, a session's credential) take nothing less. Both edges (gRPC and the doors) decode,
//! call a verb and encode; they decide nothing.
//!
//! Locking: the handle table and the session registry are one state under one mutex, which is
//! held neither across an `.await` nor across a write to the audit log.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub(crate) use self::handles::Named;
use self::limits::{Rates, Verb};
pub(crate) use self::opening::{Closing, Opening, Permit, Session};
pub(crate) use self::refusal::{Refusal, Why};
pub(crate) use self::sessions::Admitted;
pub(crate) use self::view::{HandleView, Viewed};
use crate::audit::{Audit, Event, Outcome, Record};
use crate::config::{Config, HandleLimits, Limits};
use crate::connection::{Connection, ConnectionName};
use crate::credential::Credentials;
use crate::handle::{
    Bind, Expiry, ExpiryQueue, Handle, HandleId, SHORTEST_LIFE, Standing, Table, Token,
};
use crate::peer::{Peer, Uid};
use crate::policy::{Action, Decision, Grant, Policy};
use crate::session::Registry;

mod ending;
mod handles;
mod limits;
mod opening;
mod refusal;
mod sessions;
mod view;

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
    connections: BTreeMap<ConnectionName, Arc<Connection>>,
    policy: Policy,
    credentials: Credentials,
    handle_limits: HandleLimits,
    limits: Limits,
    audit: Audit,
    state: Mutex<State>,
    rates: Mutex<Rates>,
    expiry: Expiry,
    /// Woken whenever a session ends, for those who wait for a free place.
    freed: Notify,
    draining: CancellationToken,
    stopped: CancellationToken,
    tasks: TaskTracker,
}

/// What one lock guards: spending a use and entering a session are one step.
#[derive(Debug, Default)]
struct State {
    handles: Table,
    sessions: Registry,
}

/// A request for a handle, parsed.
#[derive(Debug)]
pub(crate) struct IssueRequest {
    pub(crate) connection: String,
    pub(crate) ttl: Option<std::time::Duration>,
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
    pub(crate) fn new(
        config: &mut Config,
        credentials: Credentials,
        audit: Audit,
    ) -> (Self, ExpiryQueue) {
        let (expiry, queue) = Expiry::new();
        let connections = config.connections.iter();
        let connections = connections
            .map(|(name, configured)| (name.clone(), Arc::clone(&configured.connection)));
        let shared = Shared {
            connections: connections.collect(),
            policy: config.take_policy(),
            credentials,
            handle_limits: config.handles,
            limits: config.limits,
            audit,
            state: Mutex::default(),
            rates: Mutex::default(),
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
        let connection = self.connection(peer, &request.connection)?;
        let grant = match request.redeemer {
            None => self.grant(peer, Action::Issue, &connection.name)?,
            Some(redeemer) => self.grant_for(peer, redeemer, &connection.name)?,
        };
        self.check_words(peer, &connection, &request)?;
        self.check_alive(peer, &connection.name)?;
        self.check_open_for_business(peer, &connection.name)?;
        self.check_rate(peer, &grant, Verb::Issue)?;
        if request.bind == Bind::Lifetime {
            self.watch_holder(peer, &connection.name)?;
        }

        let (handle, token) = self.new_handle(peer, &connection, &grant, request)?;
        let record = Record::new(Event::HandleIssued, Outcome::Allowed)
            .peer(peer)
            .grant(&grant)
            .handle(handle.id)
            .subject(&handle.subject)
            .purpose(&handle.purpose)
            .redeemer(handle.redeemer)
            .detail("ttl_seconds", handle.ttl.as_secs());
        let audited = self.shared.audit.before(&record, handle).await;
        let handle =
            audited.map_err(|unavailable| self.unaudited(peer, &connection.name, &unavailable))?;

        let Handle { id, bind, expires, .. } = *handle.get();
        let inserted = {
            let mut state = self.state();
            state
                .handles
                .insert(token.hash(), handle, self.shared.limits.handles)
                .map(|()| state.view(id))
        };
        let Ok(Some(view)) = inserted else {
            // The record that allowed it stands; this one says that nothing came of it.
            return Err(self.refuse(peer, Some(&connection.name), Why::LimitReached("handles")));
        };
        self.shared.expiry.wake(id, expires);
        if bind == Bind::Lifetime && !peer.is_alive() {
            // It exited before there was a handle for its watch to find.
            self.holder_exited(peer.id());
        }
        Ok(Issued { handle: view, token, connection })
    }

    fn new_handle(
        &self,
        peer: &Peer,
        connection: &Arc<Connection>,
        grant: &Grant,
        request: IssueRequest,
    ) -> Result<(Handle, Token), Refusal> {
        let limits = &self.shared.handle_limits;
        let longest = grant.max_ttl().unwrap_or(limits.max_ttl).min(limits.max_ttl);
        let ttl = request.ttl.unwrap_or(limits.default_ttl).min(longest);
        let now = Instant::now();
        let internal =
            |_| self.refuse(peer, Some(&connection.name), Why::Internal("no randomness"));
        let mut handle = Handle {
            id: HandleId::random().map_err(internal)?,
            connection: Arc::clone(connection),
            holder: match request.bind {
                Bind::None => peer.without_process(),
                Bind::Lifetime => peer.clone(),
            },
            redeemer: request.redeemer,
            subject: request.subject,
            purpose: request.purpose,
            bind: request.bind,
            issued: now,
            issued_at: SystemTime::now(),
            ttl,
            expires: now,
            never_after: match request.bind {
                Bind::None => Some(now + limits.max_lifetime),
                // It ends with its process, whenever that is.
                Bind::Lifetime => None,
            },
            uses_left: request.max_uses,
            max_sessions: request.max_sessions.and_then(|sessions| usize::try_from(sessions).ok()),
            standing: Standing::Live,
        };
        handle.extend(now, ttl);
        Ok((handle, Token::random().map_err(internal)?))
    }

    /// The connection that a caller names. To whom has no grant, it does not exist.
    fn connection(&self, peer: &Peer, name: &str) -> Result<Arc<Connection>, Refusal> {
        match self.shared.connections.get(name) {
            Some(connection) => Ok(Arc::clone(connection)),
            None => Err(self.deny(peer, None, &self.shared.policy.unknown_connection(peer))),
        }
    }

    /// The policy's grant, or its denial, audited.
    fn grant(
        &self,
        peer: &Peer,
        action: Action,
        connection: &ConnectionName,
    ) -> Result<Grant, Refusal> {
        match self.shared.policy.decide(peer, action, connection) {
            Decision::Allow(grant) => Ok(grant),
            Decision::Deny(denial) => Err(self.deny(peer, Some(connection), &denial)),
        }
    }

    /// The same, for a handle that somebody else is to redeem.
    fn grant_for(
        &self,
        peer: &Peer,
        redeemer: Uid,
        connection: &ConnectionName,
    ) -> Result<Grant, Refusal> {
        match self.shared.policy.decide_redeemer(peer, redeemer, connection) {
            Decision::Allow(grant) => Ok(grant),
            Decision::Deny(denial) => Err(self.deny(peer, Some(connection), &denial)),
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
        let rate = grant.rate_per_second().unwrap_or(self.shared.limits.rate_per_second);
        let mut rates = self.shared.rates.lock().unwrap_or_else(PoisonError::into_inner);
        if rates.take(peer.uid(), grant.connection(), verb, rate, Instant::now()) {
            return Ok(());
        }
        drop(rates);
        Err(self.refuse(peer, Some(grant.connection()), Why::LimitReached("requests per second")))
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
        if request.bind == Bind::Lifetime && !peer.can_be_watched() {
            return Err(self.refuse(
                peer,
                Some(&connection.name),
                Why::Unsupported("bind = lifetime (this kernel has no SO_PEERPIDFD)"),
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

    /// Whether it has begun to shut down.
    pub(crate) fn is_draining(&self) -> bool {
        self.shared.draining.is_cancelled()
    }

    pub(crate) fn policy(&self) -> &Policy {
        &self.shared.policy
    }

    /// Whether the broker can grant anything at this moment.
    pub(crate) fn is_serving(&self) -> bool {
        self.shared.audit.is_writable() && !self.shared.draining.is_cancelled()
    }
}
