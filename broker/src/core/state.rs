//! What one lock guards: rights, what is open under them, and the configuration that both are
//! judged by. Every step that must not be divided is one function here: plain data, no clock, no
//! I/O, so that it can be tested against a model and in every order of threads.

#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use super::Why;
use super::settings::Settings;
use super::suspension::Suspended;
use super::watching::{HandleEnd, Watchers};
use crate::connection::{AllowedDatabase, Connection, ConnectionName};
use crate::credential::Credential;
use crate::handle::{Handle, HandleFault, HandleId, Standing, Table, TokenHash};
use crate::peer::{Peer, PeerId};
use crate::policy::{Action, Decision, Denial, Grant, Policy};
use crate::session::{Cut, CutReason, Mode, Owner, Registry, Right, SessionId};

pub(crate) use self::spares::{SpareId, Spares};

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod interleavings;
#[cfg(test)]
mod model;
#[cfg(test)]
mod rights;
mod spares;

#[derive(Debug)]
pub(crate) struct State {
    pub(super) settings: Arc<Settings>,
    pub(super) suspended: Suspended,
    pub(super) handles: Table,
    pub(super) sessions: Registry,
    pub(super) spares: Spares,
    pub(super) watchers: Watchers,
}

/// What somebody who wants to open a session shows.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    pub(super) peer: &'a Peer,
    /// As it was when the peer was admitted.
    pub(super) connection: &'a Arc<Connection>,
    /// As the client typed it.
    pub(super) database: Option<&'a str>,
    pub(super) by: By,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum By {
    Ambient,
    /// `None`: what was shown has not the form of a token.
    Token(Option<TokenHash>),
    /// The same, by somebody who wants the socket itself.
    TokenForHandoff(Option<TokenHash>),
}

impl By {
    pub(super) const fn mode(self) -> Mode {
        match self {
            Self::Ambient | Self::Token(_) => Mode::Door,
            Self::TokenForHandoff(_) => Mode::Handoff,
        }
    }
}

/// A session in the registry as `opening`, its use spent.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) id: SessionId,
    pub(super) cut: Arc<Cut>,
    pub(super) grant: Grant,
    pub(super) database: AllowedDatabase,
    pub(super) credential: Arc<Credential>,
    pub(super) handle: Option<HandleId>,
    pub(super) subject: String,
    pub(super) purpose: String,
}

/// Why there is no place.
#[derive(Debug)]
pub(super) enum NoPlace {
    /// There may be one in a moment.
    Full(&'static str),
    Handle(HandleFault),
    Policy(Denial),
    Suspended,
    /// Not one that this connection allows.
    Database,
    /// Nothing to log in with.
    NoCredential,
    /// A reload gave the name another destination meanwhile.
    Moved,
}

/// What a step took away: to be fired, told and recorded outside the lock.
#[must_use]
#[derive(Debug, Default)]
pub(super) struct Taken {
    pub(super) handles: Vec<Handle>,
    pub(super) cuts: Vec<Arc<Cut>>,
}

impl Taken {
    /// Adds cuts, each session once: its handle's end may have marked it already.
    fn add(&mut self, cuts: Vec<Arc<Cut>>) {
        let known: HashSet<*const Cut> = self.cuts.iter().map(Arc::as_ptr).collect();
        self.cuts.extend(cuts.into_iter().filter(|cut| !known.contains(&Arc::as_ptr(cut))));
    }
}

impl State {
    pub(super) fn new(settings: Settings, suspended: Suspended) -> Self {
        Self {
            settings: Arc::new(settings),
            suspended,
            handles: Table::default(),
            sessions: Registry::default(),
            spares: Spares::default(),
            watchers: Watchers::default(),
        }
    }

    /// Everything that must be one step when a session is opened: the handle's state, its
    /// holder's grant, suspension, the limits, the credential's version, the spent use and the
    /// entry. `credential` is the connection's own.
    pub(super) fn place(
        &mut self,
        claim: &Claim<'_>,
        now: Instant,
        credential: impl FnOnce(&ConnectionName) -> Option<Arc<Credential>>,
    ) -> Result<Placed, NoPlace> {
        let (peer, name) = (claim.peer, &claim.connection.name);
        let settings = Arc::clone(&self.settings);
        let (policy, limits) = (&settings.policy, &settings.limits);
        let (grant, handle) = match claim.by {
            By::Ambient => (allowed(policy.decide(peer, Action::Ambient, name))?, None),
            By::Token(token) | By::TokenForHandoff(token) => {
                let token = token.ok_or(NoPlace::Handle(HandleFault::Invalid))?;
                let here =
                    |handle: &Handle| handle.is_redeemable_by(peer) && handle.connection == *name;
                let handle = self.handles.find(token, now, here).map_err(NoPlace::Handle)?;
                // The right is the holder's: it must still have it now.
                let redeemed = handle.redeemer.is_some();
                let mode = claim.by.mode();
                let decision = still_allowed(policy, mode, &handle.holder, peer, redeemed, name);
                (allowed(decision)?, Some(handle))
            }
        };
        if self.suspended.covers(name) {
            return Err(NoPlace::Suspended);
        }
        let same = settings.connections.get(name).filter(|now| now.leads_to_same(claim.connection));
        let connection = Arc::clone(same.ok_or(NoPlace::Moved)?);
        let database = connection.database(claim.database).ok_or(NoPlace::Database)?;
        let registered = handle.as_ref().and_then(|handle| handle.registered.clone());
        let credential = registered.or_else(|| credential(name)).ok_or(NoPlace::NoCredential)?;

        let most = grant.max_sessions().unwrap_or(limits.sessions);
        if self.sessions.count(peer.uid(), name) >= most {
            return Err(NoPlace::Full("sessions"));
        }
        let (mut subject, mut purpose) = (String::new(), String::new());
        let right = match handle {
            None => Right::Ambient,
            Some(handle) => {
                let open = self.sessions.count_of_handle(handle.id);
                if handle.max_sessions.is_some_and(|most| open >= most) {
                    return Err(NoPlace::Full("sessions of the handle"));
                }
                match &mut handle.uses_left {
                    None => {}
                    // Spent handles are like unknown ones.
                    Some(0) => return Err(NoPlace::Handle(HandleFault::Invalid)),
                    // The decrement is what grants.
                    Some(left) => *left -= 1,
                }
                (subject, purpose) = (handle.subject.clone(), handle.purpose.clone());
                Right::Handle {
                    id: handle.id,
                    holder: handle.holder.without_process(),
                    redeemed: handle.redeemer.is_some(),
                    subject: subject.clone(),
                }
            }
        };
        let handle = right.handle();
        let credential_version = credential.version();
        let owner = Owner {
            peer: peer.without_process(),
            connection,
            database: database.clone(),
            mode: claim.by.mode(),
            right,
            credential_version,
        };
        let (id, cut) = self.sessions.enter(owner);
        Ok(Placed { id, cut, grant, database, credential, handle, subject, purpose })
    }

    /// Ends the handles that `which` picks and marks what is open under them. Under this lock: a
    /// session that is just being opened will fail to commit.
    pub(super) fn revoke(&mut self, reason: CutReason, which: impl Fn(&Handle) -> bool) -> Taken {
        let ids: Vec<HandleId> =
            self.handles.live().filter(|handle| which(handle)).map(|handle| handle.id).collect();
        self.revoke_each(reason, &ids)
    }

    /// The same for handles by name.
    pub(super) fn revoke_each(&mut self, reason: CutReason, ids: &[HandleId]) -> Taken {
        let handles: Vec<Handle> = ids.iter().filter_map(|id| self.handles.remove(*id)).collect();
        for handle in &handles {
            self.watchers.end(handle.id, HandleEnd(reason));
        }
        let gone: HashSet<HandleId> = handles.iter().map(|handle| handle.id).collect();
        let cuts = self
            .sessions
            .mark(reason, |owner| owner.right.handle().is_some_and(|id| gone.contains(&id)));
        Taken { handles, cuts }
    }

    /// The exit of a process: ends what was bound to it.
    pub(super) fn process_exited(&mut self, peer: PeerId) -> Taken {
        let ids = self.handles.bound_to(peer);
        self.revoke_each(CutReason::HolderExited, &ids)
    }

    /// The end of a handle's time, if it has come: its connection, its holder, and what to cut.
    pub(super) fn expire(&mut self, id: HandleId) -> Option<(ConnectionName, Peer, Vec<Arc<Cut>>)> {
        let handle = self.handles.expire(id)?;
        let (connection, holder) = (handle.connection.clone(), handle.holder.clone());
        self.watchers.end(id, HandleEnd(CutReason::Expired));
        let cuts = self.sessions.mark(CutReason::Expired, |owner| owner.right.handle() == Some(id));
        Some((connection, holder, cuts))
    }

    /// Puts other settings in force and takes away what they no longer allow.
    pub(super) fn reload(&mut self, settings: Settings) -> Taken {
        let before = std::mem::replace(&mut self.settings, Arc::new(settings));
        let settings = Arc::clone(&self.settings);
        let policy = &settings.policy;
        let gone = |name: &ConnectionName| !settings.connections.contains_key(name);
        // What a peer brought was meant for the destination that the name had then.
        let misled = |handle: &Handle| {
            let (then, now) = (&before.connections, &settings.connections);
            let both = then.get(&handle.connection).zip(now.get(&handle.connection));
            handle.registered.is_some() && both.is_some_and(|(then, now)| !then.leads_to_same(now))
        };
        let mut taken = self.revoke(CutReason::Reloaded, |handle| {
            gone(&handle.connection) || misled(handle) || !may_hold(policy, handle)
        });
        taken.add(self.sessions.mark(CutReason::Reloaded, |owner| !may_go_on(&settings, owner)));
        taken
    }

    /// Suspends, and takes away what is there.
    pub(super) fn suspend(&mut self, which: &Suspended) -> Taken {
        self.suspended.add(which);
        let mut taken =
            self.revoke(CutReason::Suspended, |handle| which.covers(&handle.connection));
        let covered = |owner: &Owner| which.covers(&owner.connection.name);
        taken.add(self.sessions.mark(CutReason::Suspended, covered));
        taken
    }

    /// Marks the sessions of a connection that logged in with an older credential than `version`.
    pub(super) fn rotate(&mut self, name: &ConnectionName, version: u64) -> Vec<Arc<Cut>> {
        self.sessions.mark(CutReason::Rotated, |owner| is_older(owner, name, version))
    }

    /// Whether a handle that was found before this lock was taken still shows its secret.
    pub(super) fn may_reveal(
        &self,
        peer: &Peer,
        id: HandleId,
        grant: &Grant,
        now: Instant,
    ) -> Result<(), Why> {
        let handle = self.handles.get(id).ok_or(Why::HandleInvalid)?;
        if handle.standing == Standing::Expired || handle.expires <= now {
            Err(Why::HandleExpired)
        } else if self.suspended.covers(&handle.connection) {
            Err(Why::Suspended)
        } else if !self.still_grants(peer, grant) {
            Err(Why::AccessDenied)
        } else {
            Ok(())
        }
    }

    /// Whether a grant that was given before this lock was taken would be given now.
    pub(super) fn still_grants(&self, peer: &Peer, grant: &Grant) -> bool {
        let decision = self.settings.policy.decide(peer, grant.action(), grant.connection());
        matches!(decision, Decision::Allow(_))
    }

    /// How many those are.
    pub(super) fn count_older(&self, name: &ConnectionName, version: u64) -> usize {
        self.sessions.views(|owner| is_older(owner, name, version)).len()
    }
}

/// Sessions on a registered credential have version 0: no rotation of the connection's own is
/// theirs.
fn is_older(owner: &Owner, name: &ConnectionName, version: u64) -> bool {
    owner.connection.name == *name && (1..version).contains(&owner.credential_version)
}

fn allowed(decision: Decision) -> Result<Grant, NoPlace> {
    match decision {
        Decision::Allow(grant) => Ok(grant),
        Decision::Deny(denial) => Err(NoPlace::Policy(denial)),
    }
}

/// The holder's right to what is opened with its handle, the redeemer's to open it, and that of
/// whoever takes a socket to take it.
fn still_allowed(
    policy: &Policy,
    mode: Mode,
    holder: &Peer,
    peer: &Peer,
    redeemed: bool,
    name: &ConnectionName,
) -> Decision {
    let redemption = redeemed.then(|| policy.decide_redemption(holder, peer, name));
    match (mode, redemption) {
        (_, Some(denied @ Decision::Deny(_))) | (Mode::Door, Some(denied)) => denied,
        (Mode::Door, None) => policy.decide(holder, Action::Open, name),
        // The holder of a handle of one's own is oneself.
        (Mode::Handoff, Some(Decision::Allow(_)) | None) => {
            policy.decide(peer, Action::Handoff, name)
        }
    }
}

fn may_hold(policy: &Policy, handle: &Handle) -> bool {
    let actions = policy.actions(&handle.holder, &handle.connection);
    let brought = handle.registered.is_some();
    actions.contains(if brought { Action::Register } else { Action::Issue })
}

fn may_go_on(settings: &Settings, owner: &Owner) -> bool {
    let name = &owner.connection.name;
    let Some(connection) = settings.connections.get(name) else { return false };
    let decision = match &owner.right {
        Right::Ambient => settings.policy.decide(&owner.peer, Action::Ambient, name),
        Right::Handle { holder, redeemed, .. } => {
            still_allowed(&settings.policy, owner.mode, holder, &owner.peer, *redeemed, name)
        }
    };
    let way = match owner.mode {
        Mode::Door => Ok(()),
        Mode::Handoff => connection.handoff(),
    };
    matches!(decision, Decision::Allow(_))
        && way.is_ok()
        && connection.leads_to_same(&owner.connection)
        && connection.allows(&owner.database)
}
