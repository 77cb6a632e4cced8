//! The operators' verbs. Each takes an [`Operator`], which only the policy makes.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::SystemTime;

use futures_util::stream::{self, Stream, StreamExt as _};

use super::{Core, HandleView, Refusal, Scope, Suspended, Why};
use crate::arena::Usage;
use crate::audit::{Event, Followed, Head, Outcome, Record};
use crate::connection::{Connection, ConnectionName};
use crate::credential::{Credential, CredentialView};
use crate::handle::{Handle, HandleId};
use crate::metrics;
use crate::peer::{Peer, Uid};
use crate::policy::Operator;
use crate::session::{CutReason, SessionId, SessionView};

const SHUTTING_DOWN: &str = "the broker is shutting down";

/// A connection as an operator sees it: nothing secret.
#[derive(Debug)]
pub(crate) struct ConnectionView {
    pub(crate) connection: Arc<Connection>,
    /// Where its credential comes from.
    pub(crate) source: String,
    pub(crate) credential: Option<CredentialView>,
    pub(crate) suspended: bool,
    pub(crate) sessions: usize,
    pub(crate) handles: usize,
}

/// Picks handles: all that is given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct HandleFilter {
    pub(crate) connection: Option<String>,
    pub(crate) holder: Option<Uid>,
    pub(crate) subject: Option<String>,
    pub(crate) id: Option<HandleId>,
}

/// The first of what was picked, and how many there are.
#[derive(Debug)]
pub(crate) struct Selected<T> {
    pub(crate) first: Vec<T>,
    pub(crate) total: usize,
}

/// What was taken away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TakenAway {
    pub(crate) handles: usize,
    pub(crate) sessions: usize,
}

/// What came of suspending.
#[derive(Debug)]
pub(crate) struct SuspendedNow {
    pub(crate) taken: TakenAway,
    /// Why it will not hold after a restart, if so.
    pub(crate) problem: Option<String>,
}

/// The state of the broker.
#[derive(Debug)]
pub(crate) struct Status {
    pub(crate) started: SystemTime,
    pub(crate) posture: Vec<(&'static str, String)>,
    pub(crate) warnings: Vec<String>,
    pub(crate) connections: usize,
    pub(crate) handles: usize,
    pub(crate) sessions: usize,
    pub(crate) suspended: Vec<String>,
    pub(crate) audit_head: Head,
    pub(crate) audit_writable: bool,
    pub(crate) arena: Usage,
    pub(crate) configured: SystemTime,
    pub(crate) last_reload_problem: Option<String>,
}

impl HandleFilter {
    fn picks(&self, handle: &Handle) -> bool {
        let Self { connection, holder, subject, id } = self;
        connection.as_deref().is_none_or(|name| handle.connection.as_str() == name)
            && holder.is_none_or(|uid| handle.holder.uid() == uid)
            && subject.as_deref().is_none_or(|subject| handle.subject == subject)
            && id.is_none_or(|id| handle.id == id)
    }
}

impl Core {
    /// Cuts everything in `scope` and opens nothing new there until it is resumed. It is in force
    /// before it is written down: what takes rights away waits for no disk.
    pub(crate) async fn suspend(&self, operator: &Operator, scope: Scope) -> SuspendedNow {
        let timed = self.shared.metrics.begin(metrics::Verb::Suspend);
        let suspended = Suspended::of(&scope);
        let taken = self.state().suspend(&suspended);
        self.drop_spares(CutReason::Suspended, u64::MAX, |name| suspended.covers(name));
        let record = scoped(Event::ConnectionSuspended, Outcome::Done, operator.peer(), &scope)
            .detail("handles_revoked", taken.handles.len())
            .detail("sessions_cut", taken.cuts.len());
        let counts = TakenAway { handles: taken.handles.len(), sessions: taken.cuts.len() };
        let core = self.clone();
        // It is in force; the record tells whether it will be after a restart too, even if whoever
        // asked for it has gone.
        let saved = self.shared.tasks.spawn(async move {
            let problem = core.save_suspended().await;
            core.shared.audit.always(&record.detail("persistent", problem.is_none()));
            problem
        });
        let (saved, ()) =
            tokio::join!(saved, self.carry_out(Some(operator.peer()), CutReason::Suspended, taken));
        timed.done();
        let problem = saved.unwrap_or_else(|_cancelled| Some(SHUTTING_DOWN.to_owned()));
        SuspendedNow { taken: counts, problem }
    }

    /// Ends a suspension. What grants again is audited first and takes effect last: if it cannot be
    /// saved in between, a second record says that nothing came of the first.
    pub(crate) async fn resume(
        &self,
        operator: &Operator,
        scope: Scope,
    ) -> Result<Vec<String>, Refusal> {
        let timed = self.shared.metrics.begin(metrics::Verb::Resume);
        let record = scoped(Event::ConnectionResumed, Outcome::Allowed, operator.peer(), &scope);
        let audited = self.shared.audit.before(&record, scope).await;
        let scope =
            audited.map_err(|unavailable| self.unaudited(operator.peer(), None, &unavailable))?;
        let failed =
            scoped(Event::ConnectionResumed, Outcome::Failed, operator.peer(), scope.get())
                .reason("not_saved");
        let core = self.clone();
        // Done to the end, even if whoever asked for it has gone.
        let resumed = self.shared.tasks.spawn(async move {
            let _alone = core.shared.suspensions.one_at_a_time.lock().await;
            let mut rest = core.state().suspended.clone();
            rest.remove(scope.get());
            if let Some(problem) = core.save(rest).await {
                core.shared.audit.always(&failed);
                return Err(problem);
            }
            let mut state = core.state();
            state.suspended.remove(scope.get());
            Ok(state.suspended.names())
        });
        let resumed = resumed.await.unwrap_or_else(|_cancelled| Err(SHUTTING_DOWN.to_owned()));
        timed.done();
        resumed.map_err(|problem| self.refuse(operator.peer(), None, Why::NotSaved(problem)))
    }

    async fn save_suspended(&self) -> Option<String> {
        let _alone = self.shared.suspensions.one_at_a_time.lock().await;
        let suspended = self.state().suspended.clone();
        let problem = self.save(suspended).await?;
        Some(format!("it will not hold after a restart: {problem}"))
    }

    /// Brings what is suspended to the disk. `None` when it is there, else why it is not.
    async fn save(&self, suspended: Suspended) -> Option<String> {
        let core = self.clone();
        let saved =
            tokio::task::spawn_blocking(move || core.shared.suspensions.write(&suspended)).await;
        match saved {
            Ok(Ok(())) => None,
            Ok(Err(problem)) => Some(problem.to_string()),
            Err(_cancelled) => Some(SHUTTING_DOWN.to_owned()),
        }
    }

    /// The scope that an operator names.
    pub(crate) fn scope(&self, operator: &Operator, name: &str) -> Result<Scope, Refusal> {
        // What was suspended may be gone from the configuration; it can be resumed all the same.
        let suspended = self.state().suspended.names().iter().any(|known| known == name);
        match ConnectionName::parse(name).filter(|_| suspended) {
            Some(name) => Ok(Scope::Connection(name)),
            None => {
                self.configured(operator, name).map(|found| Scope::Connection(found.name.clone()))
            }
        }
    }

    /// All connections.
    pub(crate) fn all_connections(&self, _: &Operator) -> Vec<ConnectionView> {
        let settings = self.settings();
        settings.connections.values().map(|connection| self.connection_view(connection)).collect()
    }

    /// One connection.
    pub(crate) fn one_connection(
        &self,
        operator: &Operator,
        name: &str,
    ) -> Result<ConnectionView, Refusal> {
        self.configured(operator, name).map(|connection| self.connection_view(&connection))
    }

    fn connection_view(&self, connection: &Arc<Connection>) -> ConnectionView {
        let name = &connection.name;
        let credentials = &self.shared.credentials;
        let state = self.state();
        ConnectionView {
            connection: Arc::clone(connection),
            source: credentials.source_of(name),
            credential: credentials.describe(name),
            suspended: state.suspended.covers(name),
            sessions: state.sessions.count_of_connection(name),
            handles: state.handles.live().filter(|handle| handle.connection == *name).count(),
        }
    }

    /// Live handles that a filter picks, oldest first.
    pub(crate) fn select_handles(
        &self,
        _: &Operator,
        filter: &HandleFilter,
        limit: usize,
    ) -> Selected<HandleView> {
        let state = self.state();
        let mut picked: Vec<&Handle> =
            state.handles.live().filter(|handle| filter.picks(handle)).collect();
        let total = picked.len();
        picked.sort_by_key(|handle| handle.issued);
        let first = picked.into_iter().take(limit).map(|handle| state.view_of(handle)).collect();
        Selected { first, total }
    }

    /// Ends the handles that a filter picks, and returns when their sessions are dead.
    pub(crate) async fn revoke_selected(
        &self,
        operator: &Operator,
        filter: &HandleFilter,
    ) -> TakenAway {
        let taken = self.state().revoke(CutReason::Revoked, |handle| filter.picks(handle));
        let counts = TakenAway { handles: taken.handles.len(), sessions: taken.cuts.len() };
        self.carry_out(Some(operator.peer()), CutReason::Revoked, taken).await;
        counts
    }

    /// Sessions, those being opened included, oldest first.
    pub(crate) fn select_sessions(
        &self,
        _: &Operator,
        connection: Option<&str>,
        limit: usize,
    ) -> Selected<SessionView> {
        let mut picked = self
            .state()
            .sessions
            .views(|owner| connection.is_none_or(|name| owner.connection.name.as_str() == name));
        let total = picked.len();
        picked.sort_by_key(|session| session.id);
        picked.truncate(limit);
        Selected { first: picked, total }
    }

    /// Ends one session, and returns when it is dead.
    pub(crate) async fn close_session(
        &self,
        operator: &Operator,
        id: Option<SessionId>,
    ) -> Result<(), Refusal> {
        let marked = id.and_then(|id| {
            let (_owner, cut) = self.state().sessions.mark_one(id, CutReason::Closed)?;
            Some(cut)
        });
        let Some(cut) = marked else {
            let why = Why::InvalidRequest { field: "session", must: "name a session that is open" };
            return Err(self.refuse(operator.peer(), None, why));
        };
        // Its own record says that it was closed; by whom stands nowhere else.
        info_closed(operator.peer(), id);
        let cuts = vec![cut];
        self.fire(&cuts);
        self.wait_until_dead(cuts).await;
        Ok(())
    }

    /// Audit records: the last ones, and then each as it is written.
    pub(crate) fn tail_audit(
        &self,
        _: &Operator,
        last: usize,
    ) -> impl Stream<Item = Followed> + Send + use<> {
        let (last, following) = self.shared.audit.tail(last);
        let last = last.into_iter().map(|line| Followed { line: line.into(), skipped: 0 });
        let then = stream::unfold(following, async |mut following| {
            following.next().await.map(|record| (record, following))
        });
        stream::iter(last).chain(then)
    }

    /// Posture, versions, counts, audit head.
    pub(crate) fn status(&self, _: &Operator) -> Status {
        self.shared.metrics.begin(metrics::Verb::Status).done();
        let (configured, last_reload_problem) = self.shared.reloading.last();
        let audit_writable = self.shared.audit.is_writable();
        let credentials = &self.shared.credentials;
        let mut warnings = credentials.warnings();
        if !audit_writable {
            warnings.push("the audit log cannot be written: nothing is granted".to_owned());
        }
        if let Some(problem) = &last_reload_problem {
            warnings.push(format!("the last reload was refused: {problem}"));
        }
        let state = self.state();
        Status {
            started: self.shared.started,
            posture: self.shared.posture.clone(),
            warnings,
            connections: state.settings.connections.len(),
            handles: state.handles.live_count(),
            sessions: state.sessions.len(),
            suspended: state.suspended.names(),
            audit_head: self.shared.audit.head(),
            audit_writable,
            arena: credentials.arena_usage(),
            configured,
            last_reload_problem,
        }
    }
}

/// A login that an operator asked for, audited.
#[must_use]
#[derive(Debug)]
pub(crate) struct Probe {
    operator: Operator,
    connection: Arc<Connection>,
    credential: Arc<Credential>,
}

impl Probe {
    pub(crate) fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    /// To log in with, once.
    pub(crate) fn credential(&self) -> &Arc<Credential> {
        &self.credential
    }
}

impl Core {
    /// Lends a connection's credential for a login by which an operator tries it.
    pub(crate) async fn probe(&self, operator: &Operator, name: &str) -> Result<Probe, Refusal> {
        let timed = self.shared.metrics.begin(metrics::Verb::Validate);
        let connection = self.configured(operator, name)?;
        let refused = |why| self.refuse(operator.peer(), Some(&connection.name), why);
        let credential = self.shared.credentials.of(&connection.name);
        let credential =
            credential.ok_or_else(|| refused(Why::NoCredential(connection.name.clone())))?;
        let record = Record::new(Event::UpstreamDialled, Outcome::Allowed)
            .peer(operator.peer())
            .connection(&connection.name)
            .db_user(credential.username());
        let probe =
            Probe { operator: operator.clone(), connection: Arc::clone(&connection), credential };
        match self.shared.audit.before(&record, probe).await {
            Ok(probe) => {
                timed.done();
                Ok(probe.into_inner())
            }
            Err(unavailable) => {
                Err(self.unaudited(operator.peer(), Some(&connection.name), &unavailable))
            }
        }
    }

    /// What came of it was not good.
    pub(crate) fn probe_failed(&self, probe: &Probe, why: Why) -> Refusal {
        self.refuse(probe.operator.peer(), Some(&probe.connection.name), why)
    }
}

fn info_closed(by: &Peer, id: Option<SessionId>) {
    let session = id.map(|id| id.to_string()).unwrap_or_default();
    tracing::info!(uid = %by.uid(), session, "an operator closes a session");
}

fn scoped(event: Event, outcome: Outcome, by: &Peer, scope: &Scope) -> Record {
    let record = Record::new(event, outcome).peer(by);
    match scope {
        Scope::Connection(name) => record.connection(name),
        Scope::All => record.detail("all", true),
    }
}
