//! Renewing, revoking, describing and listing handles.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Core, HandleView, Refusal, Verb, Why};
use crate::audit::{Event, Outcome, Record};
use crate::handle::{Handle, HandleFault, HandleId, SHORTEST_LIFE, Standing, TokenHash};
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
        let holder = |handle: &Handle| handle.holder.uid() == peer.uid();
        let (id, connection, before) = self.look_up(peer, token, holder, |handle| {
            (handle.id, Arc::clone(&handle.connection), handle.ttl)
        })?;
        let grant = self.grant(peer, Action::Issue, &connection.name)?;
        self.check_alive(peer, &connection.name)?;
        self.check_open_for_business(peer, &connection.name)?;
        self.check_rate(peer, &grant, Verb::Renew)?;
        if ttl.is_some_and(|ttl| ttl < SHORTEST_LIFE) {
            let why = Why::InvalidRequest { field: "ttl", must: "be at least a second" };
            return Err(self.refuse(peer, Some(&connection.name), why));
        }
        let longest =
            grant.max_ttl().unwrap_or(Duration::MAX).min(self.shared.handle_limits.max_ttl);
        let ttl = ttl.unwrap_or(before).min(longest);

        let record = Record::new(Event::HandleRenewed, Outcome::Allowed)
            .peer(peer)
            .grant(&grant)
            .handle(id)
            .detail("ttl_seconds", ttl.as_secs());
        let audited = self.shared.audit.before(&record, ttl).await;
        let ttl =
            audited.map_err(|unavailable| self.unaudited(peer, &connection.name, &unavailable))?;

        let renewed = {
            let mut state = self.state();
            let now = Instant::now();
            let found = token.ok_or(HandleFault::Invalid).and_then(|token| {
                let handle = state.handles.find(token, now, holder)?;
                handle.extend(now, ttl.into_inner());
                Ok(handle.expires)
            });
            // It may have been revoked or have expired since it was looked up.
            found.map(|expires| (expires, state.view(id)))
        };
        match renewed {
            Ok((expires, Some(view))) => {
                self.shared.expiry.wake(id, expires);
                Ok(view)
            }
            Ok((_, None)) => Err(self.refuse(peer, Some(&connection.name), Why::HandleInvalid)),
            Err(fault) => Err(self.refuse(peer, Some(&connection.name), fault.into())),
        }
    }

    /// What a handle is: its holder and its redeemer only.
    pub(crate) fn describe(
        &self,
        peer: &Peer,
        token: Option<TokenHash>,
    ) -> Result<HandleView, Refusal> {
        let id =
            self.look_up(peer, token, |handle| handle.concerns(peer.uid()), |handle| handle.id)?;
        let view = self.state().view(id);
        view.ok_or_else(|| self.refuse(peer, None, Why::HandleInvalid))
    }

    /// Ends a handle and all its sessions; returns when they are dead. Gives how many there were.
    pub(crate) async fn revoke(&self, peer: &Peer, named: Named) -> Result<usize, Refusal> {
        let operator = self.shared.policy.is_operator(peer);
        let may = |handle: &Handle| {
            handle.standing == Standing::Live && (operator || handle.concerns(peer.uid()))
        };
        let removed = {
            let mut state = self.state();
            let id = match named {
                Named::Id(id) => id,
                Named::Token(token) => token
                    .and_then(|token| state.handles.find(token, Instant::now(), may).ok())
                    .map(|handle| handle.id),
            };
            let id = id.filter(|id| state.handles.get(*id).is_some_and(may));
            id.and_then(|id| state.handles.remove(id)).map(|handle| {
                // Under the same lock: a session that is being opened now will fail to commit.
                let cuts = state
                    .sessions
                    .mark(CutReason::Revoked, |owner| owner.handle == Some(handle.id));
                (handle, cuts)
            })
        };
        let Some((handle, cuts)) = removed else {
            return Err(self.refuse(peer, None, Why::HandleInvalid));
        };
        self.shared.expiry.forget(handle.id);
        cuts.iter().for_each(|cut| cut.fire());
        let record = Record::new(Event::HandleRevoked, Outcome::Done)
            .peer(peer)
            .connection(&handle.connection.name)
            .handle(handle.id)
            .subject(&handle.subject)
            .detail("sessions_cut", cuts.len());
        self.shared.audit.always(&record);
        let count = cuts.len();
        self.wait_until_dead(cuts).await;
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
    fn look_up<R>(
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
