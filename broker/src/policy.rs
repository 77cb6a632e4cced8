//! Who may do what: pure, deny by default. What must be read of a peer's process is read by the
//! peer, when a selector asks and never before.
//!
//! [`Policy::decide`] is the only maker of a [`Grant`], and every verb of the core takes one.
//! A denial carries a reason for the operator's eyes; the caller never learns it.
//! [`Policy::explain`] tells an operator more, by the same checks.

#![forbid(unsafe_code)]

use std::fmt;
use std::time::Duration;

pub use self::evidence::{Described, Evidence, Missing};
pub use self::explain::{Considered, Explanation};
pub use self::rule::{Action, Actions, Rule, RuleLimits};
pub use self::selector::{Pattern, Selector};
use crate::connection::ConnectionName;
use crate::peer::{Peer, Uid};

mod evidence;
mod explain;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod rule;
mod selector;

/// All grants, and who can never have one.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Policy {
    rules: Vec<Rule>,
    operators: Vec<Selector>,
    /// The broker's own uid, unless configuration allows it.
    denied_own: Option<Uid>,
}

/// Proof that a peer may do one action on one connection.
#[must_use]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    rule: String,
    action: Action,
    connection: ConnectionName,
    limits: RuleLimits,
}

/// Proof that a peer is an operator; only [`Policy::operator`] makes one.
#[must_use]
#[derive(Clone, Debug)]
pub struct Operator {
    peer: Peer,
}

impl Operator {
    /// Who it is.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }
}

/// The answer of the policy.
#[must_use]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Yes, within the grant's limits.
    Allow(Grant),
    /// No.
    Deny(Denial),
}

/// Why not, for the broker's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// The kind.
    pub reason: DenyReason,
    /// The grant that came nearest: another peer's for this connection, or this peer's own for
    /// another action.
    pub nearest: Option<String>,
}

/// Kinds of denial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenyReason {
    /// No grant matches.
    NoGrant,
    /// It is no operator.
    NoOperator,
    /// A uid that stands for nobody in particular.
    OverflowUid,
    /// The broker's own uid: between it and the broker there is no boundary.
    OwnUid,
    /// A grant matches, and none names this redeemer.
    RedeemerNotNamed,
}

impl fmt::Display for DenyReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoGrant => "no_grant",
            Self::NoOperator => "no_operator",
            Self::OverflowUid => "overflow_uid",
            Self::OwnUid => "own_uid",
            Self::RedeemerNotNamed => "redeemer_not_named",
        })
    }
}

impl Grant {
    /// The rule that granted.
    #[must_use]
    pub fn rule(&self) -> &str {
        &self.rule
    }

    /// What was granted.
    #[must_use]
    pub fn action(&self) -> Action {
        self.action
    }

    /// On what.
    #[must_use]
    pub fn connection(&self) -> &ConnectionName {
        &self.connection
    }

    /// Longest life of one issue or renewal, if the rule sets its own.
    #[must_use]
    pub fn max_ttl(&self) -> Option<Duration> {
        self.limits.max_ttl
    }

    /// Sessions at once for this peer's uid, if the rule sets its own.
    #[must_use]
    pub fn max_sessions(&self) -> Option<usize> {
        self.limits.max_sessions
    }

    /// Requests a second for this peer's uid, if the rule sets its own.
    #[must_use]
    pub fn rate_per_second(&self) -> Option<u32> {
        self.limits.rate_per_second
    }
}

impl Policy {
    /// `denied_own` is the broker's own uid, unless `broker.allow_own_uid` is set.
    #[must_use]
    pub fn new(rules: Vec<Rule>, operators: Vec<Selector>, denied_own: Option<Uid>) -> Self {
        Self { rules, operators, denied_own }
    }

    /// May `peer` do `action` on the connection?
    pub fn decide(&self, peer: &Peer, action: Action, connection: &ConnectionName) -> Decision {
        if let Some(reason) = self.never(peer) {
            return Decision::Deny(Denial { reason, nearest: None });
        }
        let found = self.rules.iter().find(|rule| {
            rule.actions.contains(action)
                && rule.covers(connection.as_str())
                && rule.peer.matches(peer)
        });
        match found {
            Some(rule) => Decision::Allow(rule.grant(action, connection)),
            None => Decision::Deny(self.no_grant(peer, Some(connection))),
        }
    }

    /// May `holder` have a handle on the connection that `redeemer` alone can redeem?
    pub fn decide_redeemer(
        &self,
        holder: &Peer,
        redeemer: Uid,
        connection: &ConnectionName,
    ) -> Decision {
        if Some(redeemer) == self.denied_own {
            return Decision::Deny(Denial { reason: DenyReason::OwnUid, nearest: None });
        }
        self.issued_for(holder, connection, |selector| selector.may_be(redeemer))
    }

    /// May `redeemer`, now that it is here, use what was issued to `holder` for its uid?
    pub fn decide_redemption(
        &self,
        holder: &Peer,
        redeemer: &Peer,
        connection: &ConnectionName,
    ) -> Decision {
        match self.never(redeemer) {
            Some(reason) => Decision::Deny(Denial { reason, nearest: None }),
            None => self.issued_for(holder, connection, |selector| selector.matches(redeemer)),
        }
    }

    fn issued_for(
        &self,
        holder: &Peer,
        connection: &ConnectionName,
        is_redeemer: impl Fn(&Selector) -> bool,
    ) -> Decision {
        if let Some(reason) = self.never(holder) {
            return Decision::Deny(Denial { reason, nearest: None });
        }
        let mut issues = self.rules.iter().filter(|rule| {
            rule.actions.contains(Action::Issue)
                && rule.covers(connection.as_str())
                && rule.peer.matches(holder)
        });
        match issues.find(|rule| rule.redeemers.iter().any(&is_redeemer)) {
            Some(rule) => Decision::Allow(rule.grant(Action::Issue, connection)),
            None => Decision::Deny(Denial { reason: DenyReason::RedeemerNotNamed, nearest: None }),
        }
    }

    /// Whether handles of others may have been issued for `peer` to redeem on the connection.
    #[must_use]
    pub fn is_redeemer(&self, peer: &Peer, connection: &ConnectionName) -> bool {
        self.never(peer).is_none()
            && self.rules.iter().any(|rule| {
                rule.covers(connection.as_str())
                    && rule.redeemers.iter().any(|selector| selector.matches(peer))
            })
    }

    /// The denial for a peer that named a connection which does not exist.
    #[must_use]
    pub fn unknown_connection(&self, peer: &Peer) -> Denial {
        match self.never(peer) {
            Some(reason) => Denial { reason, nearest: None },
            None => self.no_grant(peer, None),
        }
    }

    /// Everything that `peer` may do on the connection.
    #[must_use]
    pub fn actions(&self, peer: &Peer, connection: &ConnectionName) -> Actions {
        if self.never(peer).is_some() {
            return Actions::default();
        }
        let matching = self
            .rules
            .iter()
            .filter(|rule| rule.covers(connection.as_str()) && rule.peer.matches(peer));
        matching.fold(Actions::default(), |all, rule| all | rule.actions)
    }

    /// Names of the grants whose peer selector matches.
    #[must_use]
    pub fn grants_of(&self, peer: &Peer) -> Vec<String> {
        if self.never(peer).is_some() {
            return Vec::new();
        }
        self.rules
            .iter()
            .filter(|rule| rule.peer.matches(peer))
            .map(|rule| rule.name.clone())
            .collect()
    }

    /// Whether `peer` is an operator, for telling and not for acting: see [`Policy::operator`].
    #[must_use]
    pub fn is_operator(&self, peer: &Peer) -> bool {
        self.operates(peer)
    }

    /// Proof that `peer` is an operator, if it is one.
    #[must_use]
    pub fn operator(&self, peer: &Peer) -> Option<Operator> {
        self.operates(peer).then(|| Operator { peer: peer.clone() })
    }

    /// The denial for a peer that is no operator.
    pub(crate) fn no_operator(&self, peer: &Peer) -> Denial {
        Denial { reason: self.never(peer).unwrap_or(DenyReason::NoOperator), nearest: None }
    }

    /// The broker's own uid must be meant by itself, as it is by default: with it goes nothing
    /// that it could not take. That it happens to be in a group of operators is not enough.
    fn operates(&self, seen: &dyn Evidence) -> bool {
        let uid = seen.uid();
        let own = Some(uid) == self.denied_own;
        let meant = |selector: &Selector| !own || selector.uid == Some(uid);
        !uid.is_overflow()
            && self.operators.iter().any(|selector| meant(selector) && selector.matches(seen))
    }

    fn never(&self, seen: &dyn Evidence) -> Option<DenyReason> {
        if seen.uid().is_overflow() {
            return Some(DenyReason::OverflowUid);
        }
        (Some(seen.uid()) == self.denied_own).then_some(DenyReason::OwnUid)
    }

    fn no_grant(&self, peer: &Peer, connection: Option<&ConnectionName>) -> Denial {
        let covers = |rule: &&Rule| connection.is_some_and(|name| rule.covers(name.as_str()));
        let own = self.rules.iter().filter(covers).find(|rule| rule.peer.matches(peer));
        let nearest = own.or_else(|| self.rules.iter().find(covers));
        let nearest = nearest.map(|rule| format!("{} ({})", rule.name, rule.peer));
        Denial { reason: DenyReason::NoGrant, nearest }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::Gid;

    fn name(text: &str) -> ConnectionName {
        ConnectionName::parse(text).unwrap()
    }

    fn policy() -> Policy {
        let uid = |uid| Selector { uid: Some(Uid::from_raw(uid)), ..Selector::default() };
        let rule = |name: &str, peer, connections: &[&str], actions: &[Action], redeemers| Rule {
            name: name.into(),
            peer,
            connections: connections.iter().map(|text| Pattern::parse(text).unwrap()).collect(),
            actions: actions.iter().copied().collect(),
            redeemers,
            limits: RuleLimits::default(),
        };
        Policy::new(
            vec![
                rule("worker", uid(10), &["main_db"], &[Action::Issue, Action::Open], vec![]),
                rule("mcp", uid(11), &["main_db"], &[Action::Issue], vec![uid(10)]),
                rule("legacy", uid(12), &["analytics-*"], &[Action::Ambient], vec![]),
                rule("nobody", uid(65534), &["*"], &[Action::Open], vec![]),
                rule("self", uid(99), &["*"], &[Action::Open], vec![]),
            ],
            vec![uid(0)],
            Some(Uid::from_raw(99)),
        )
    }

    #[test]
    fn the_decision_table() {
        let policy = policy();
        let table = [
            (10, Action::Issue, "main_db", Ok("worker")),
            (10, Action::Open, "main_db", Ok("worker")),
            (10, Action::List, "main_db", Ok("worker")),
            (10, Action::Ambient, "main_db", Err(DenyReason::NoGrant)),
            (10, Action::Open, "other", Err(DenyReason::NoGrant)),
            (11, Action::Open, "main_db", Err(DenyReason::NoGrant)),
            (12, Action::Ambient, "analytics-eu", Ok("legacy")),
            (12, Action::Ambient, "analytics", Err(DenyReason::NoGrant)),
            (13, Action::List, "main_db", Err(DenyReason::NoGrant)),
            (0, Action::Open, "main_db", Err(DenyReason::NoGrant)),
            (65534, Action::Open, "main_db", Err(DenyReason::OverflowUid)),
            (99, Action::Open, "main_db", Err(DenyReason::OwnUid)),
        ];
        for (uid, action, connection, expected) in table {
            let peer = Peer::dangerous_for_test(uid, uid, &[]);
            let got = match policy.decide(&peer, action, &name(connection)) {
                Decision::Allow(grant) => {
                    assert_eq!(grant.action(), action);
                    assert_eq!(grant.connection(), &name(connection));
                    Ok(grant.rule().to_owned())
                }
                Decision::Deny(denial) => Err(denial.reason),
            };
            assert_eq!(got.as_deref(), expected.as_ref().copied(), "{uid} {action} {connection}");
        }
    }

    #[test]
    fn a_redeemer_must_be_named_by_the_holders_grant() {
        let policy = policy();
        let redeem = |holder, redeemer| {
            let holder = Peer::dangerous_for_test(holder, holder, &[]);
            matches!(
                policy.decide_redeemer(&holder, Uid::from_raw(redeemer), &name("main_db")),
                Decision::Allow(_)
            )
        };
        assert!(redeem(11, 10));
        assert!(!redeem(11, 12));
        assert!(!redeem(10, 11));
        assert!(!redeem(11, 99), "the broker's own uid");
        assert!(policy.is_redeemer(&Peer::dangerous_for_test(10, 10, &[]), &name("main_db")));
        assert!(!policy.is_redeemer(&Peer::dangerous_for_test(12, 12, &[]), &name("main_db")));
    }

    #[test]
    fn the_nearest_grant_is_named() {
        let policy = policy();
        let peer = Peer::dangerous_for_test(1000, 1000, &[]);
        let Decision::Deny(denial) = policy.decide(&peer, Action::Open, &name("main_db")) else {
            panic!("uid 1000 has no grant")
        };
        assert_eq!(denial.nearest.as_deref(), Some("worker (uid 10)"));
    }

    #[test]
    fn operators() {
        let policy = policy();
        assert!(policy.is_operator(&Peer::dangerous_for_test(0, 0, &[])));
        assert!(!policy.is_operator(&Peer::dangerous_for_test(10, 0, &[0])));
    }

    #[test]
    fn the_own_uid_operates_only_where_it_is_meant() {
        let (own, group) = (Uid::from_raw(99), Gid::from_raw(50));
        let by_group = Selector { group: Some(group), ..Selector::default() };
        let by_uid = Selector { uid: Some(own), ..Selector::default() };
        let own_peer = Peer::dangerous_for_test(99, 99, &[50]);
        let other = Peer::dangerous_for_test(7, 7, &[50]);
        let policy = |operators| Policy::new(vec![], operators, Some(own));
        assert!(policy(vec![by_group.clone()]).operator(&own_peer).is_none());
        assert_eq!(
            policy(vec![by_group.clone()]).operator(&other).unwrap().peer().uid(),
            other.uid()
        );
        assert!(policy(vec![by_uid]).operator(&own_peer).is_some());
        let unmapped = Peer::dangerous_for_test(65534, 7, &[50]);
        assert!(policy(vec![by_group]).operator(&unmapped).is_none());
    }
}
