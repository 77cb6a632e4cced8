//! Renewing, revoking, describing and listing handles.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use super::{Core, HandleView, Refusal, Verb, Why};
use crate::audit::{Event, Outcome, Record};
use crate::handle::{Handle, HandleFault, HandleId, SHORTEST_LIFE, Standing, TokenHash};
use crate::metrics;
use crate::peer::Peer;
use crate::policy::Action;
use crate::session::CutReason;

/// Most handles that one list shows.
const MAX_LISTED: usize = 100;

/// Names a handle to be revoked.
#[derive(Debug)]
pub(crate) enum Named {
    Token(Option<TokenHash>),
    Id(Option<HandleId>),
}

impl Core {
    /// Moves a handle's expiry: the holder only, under a grant that still holds.
    pub(crate) async fn renew(
        &self,
        peer: &Peer,
        token: Option<TokenHash>,
        ttl: Option<Duration>,
    ) -> Result<HandleView, Refusal> {
        let timed = self.shared.metrics.begin(metrics::Verb::Renew);
        let holder = |handle: &Handle| handle.holder.uid() == peer.uid();
        let (id, connection, before, action) = self.look_up(peer, token, holder, |handle| {
            let action = match handle.registered {
                Some(_) => Action::Register,
                None => Action::Issue,
            };
            (handle.id, handle.connection.clone(), handle.ttl, action)
        })?;
        let grant = self.grant(peer, action, &connection)?;
        self.check_open_for_business(peer, &connection)?;
        self.check_rate(peer, &grant, Verb::Renew)?;
        self.check_alive(peer, &connection)?;
        if ttl.is_some_and(|ttl| ttl < SHORTEST_LIFE) {
            let why = Why::InvalidRequest { field: "ttl", must: "be at least a second" };
            return Err(self.refuse(peer, Some(&connection), why));
        }
        let longest =
            grant.max_ttl().unwrap_or(Duration::MAX).min(self.settings().handle_limits.max_ttl);
        let ttl = ttl.unwrap_or(before).min(longest);

        let record = Record::new(Event::HandleRenewed, Outcome::Allowed)
            .peer(peer)
            .grant(&grant)
            .handle(id)
            .detail("ttl_seconds", ttl.as_secs());
        let audited = self.shared.audit.before(&record, ttl).await;
        let ttl =
            audited.map_err(|unavailable| self.unaudited(peer, Some(&connection), &unavailable))?;

        let renewed = {
            let mut state = self.state();
            let now = Instant::now();
            let found = token.ok_or(HandleFault::Invalid).and_then(|token| {
                let handle = state.handles.find(token, now, holder)?;
                handle.extend(now, ttl.into_inner());
                Ok(handle.expires)
            });
            // It may have been revoked or have expired since it was looked up.
            found.map(|expires| {
                state.watchers.renewed(id);
                (expires, state.view(id))
            })
        };
        match renewed {
            Ok((expires, Some(view))) => {
                self.shared.expiry.wake(id, expires);
                timed.done();
                Ok(view)
            }
            Ok((_, None)) => Err(self.refuse(peer, Some(&connection), Why::HandleInvalid)),
            Err(fault) => Err(self.refuse(peer, Some(&connection), fault.into())),
        }
    }

    /// What a handle is: its holder and its redeemer only.
    pub(crate) fn describe(
        &self,
        peer: &Peer,
        token: Option<TokenHash>,
    ) -> Result<HandleView, Refusal> {
        let timed = self.shared.metrics.begin(metrics::Verb::Describe);
        let id =
            self.look_up(peer, token, |handle| handle.concerns(peer.uid()), |handle| handle.id)?;
        let view = self.state().view(id);
        let view = view.ok_or_else(|| self.refuse(peer, None, Why::HandleInvalid))?;
        timed.done();
        Ok(view)
    }

    /// Ends a handle and all its sessions; returns when they are dead. Gives how many there were.
    pub(crate) async fn revoke(&self, peer: &Peer, named: Named) -> Result<usize, Refusal> {
        let timed = self.shared.metrics.begin(metrics::Verb::Revoke);
        let operator = self.settings().policy.is_operator(peer);
        let may = |handle: &Handle| {
            handle.standing == Standing::Live && (operator || handle.concerns(peer.uid()))
        };
        let taken = {
            let mut state = self.state();
            let id = match named {
                Named::Id(id) => id,
                Named::Token(token) => token
                    .and_then(|token| state.handles.find(token, Instant::now(), may).ok())
                    .map(|handle| handle.id),
            };
            let id = id.filter(|id| state.handles.get(*id).is_some_and(may));
            id.map(|id| state.revoke_each(CutReason::Revoked, &[id]))
        };
        let Some(taken) = taken else {
            return Err(self.refuse(peer, None, Why::HandleInvalid));
        };
        let count = taken.cuts.len();
        self.carry_out(Some(peer), CutReason::Revoked, taken).await;
        timed.done();
        Ok(count)
    }

    /// The live handles that concern a peer, oldest first, and whether there are more.
    pub(crate) fn list(&self, peer: &Peer) -> (Vec<HandleView>, bool) {
        let state = self.state();
        let now = Instant::now();
        let mut found: Vec<&Handle> = state
            .handles
            .live()
            .filter(|handle| handle.concerns(peer.uid()) && handle.expires > now)
            .collect();
        found.sort_by_key(|handle| handle.issued);
        let truncated = found.len() > MAX_LISTED;
        (
            found.into_iter().take(MAX_LISTED).map(|handle| state.view_of(handle)).collect(),
            truncated,
        )
    }

    /// Picks something from the live handle of a token, for who may know of it.
    pub(super) fn look_up<R>(
        &self,
        peer: &Peer,
        token: Option<TokenHash>,
        may: impl FnOnce(&Handle) -> bool,
        pick: impl FnOnce(&Handle) -> R,
    ) -> Result<R, Refusal> {
        let found = match token {
            Some(token) => {
                self.state().handles.find(token, Instant::now(), may).map(|handle| pick(handle))
            }
            None => Err(HandleFault::Invalid),
        };
        found.map_err(|fault| self.refuse(peer, None, fault.into()))
    }
}

impl From<HandleFault> for Why {
    fn from(fault: HandleFault) -> Self {
        match fault {
            HandleFault::Invalid => Self::HandleInvalid,
            HandleFault::Expired => Self::HandleExpired,
        }
    }
}
