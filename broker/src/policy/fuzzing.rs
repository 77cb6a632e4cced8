//! Policies and peers for the fuzzer, made of its bytes.

#![forbid(unsafe_code)]

use super::{Action, Decision, DenyReason, Described, Pattern, Policy, Rule, RuleLimits, Selector};
use crate::connection::ConnectionName;
use crate::peer::{Gid, Peer, Uid, Unit};

const NAMES: [&str; 4] = ["main_db", "main", "analytics-eu", "a"];
const PATTERNS: [&str; 8] = ["main_db", "main", "main*", "analytics-*", "a", "a*", "*", "m"];
/// Few, so that they meet; the last but one stands for nobody.
const IDS: [u32; 8] = [0, 1, 10, 11, 1000, 65533, 65534, u32::MAX];

/// Reads bytes, and zeros when there are none left.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn one_of<T: Copy, const N: usize>(&mut self, all: [T; N]) -> T {
        const { assert!(N > 0) };
        let [first, ..] = all.as_slice() else { unreachable!("asserted above") };
        let index = usize::from(self.byte()) % N;
        *all.get(index).unwrap_or(first)
    }

    fn list<T>(&mut self, most: u8, mut item: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.byte() % (most + 1)).map(|_| item(self)).collect()
    }

    fn id(&mut self) -> u32 {
        self.one_of(IDS)
    }

    fn maybe<T>(&mut self, bits: u8, bit: u8, item: impl FnOnce(&mut Self) -> T) -> Option<T> {
        (bits & bit != 0).then(|| item(self))
    }

    fn selector(&mut self) -> Selector {
        let bits = self.byte();
        Selector {
            uid: self.maybe(bits, 1, |bytes| Uid::from_raw(bytes.id())),
            gid: self.maybe(bits, 2, |bytes| Gid::from_raw(bytes.id())),
            group: self.maybe(bits, 4, |bytes| Gid::from_raw(bytes.id())),
            exe: None,
            unit: self.maybe(bits, 8, |bytes| bytes.unit()).flatten(),
        }
    }

    fn unit(&mut self) -> Option<Unit> {
        Unit::parse(self.one_of(["app.service", "a.slice/app.service"]))
    }

    fn rule(&mut self, number: usize) -> Rule {
        let bits = self.byte();
        Rule {
            name: format!("grant {number}"),
            peer: self.selector(),
            connections: self
                .list(3, |bytes| Pattern::parse(bytes.one_of(PATTERNS)))
                .into_iter()
                .flatten()
                .collect(),
            actions: Action::ALL
                .into_iter()
                .enumerate()
                .filter(|(bit, _)| bits >> bit & 1 == 1)
                .map(|(_, action)| action)
                .collect(),
            redeemers: self.list(2, Self::selector),
            limits: RuleLimits::default(),
        }
    }

    fn described(&mut self) -> Described {
        let bits = self.byte();
        Described {
            uid: Uid::from_raw(self.id()),
            gid: Some(Gid::from_raw(self.id())),
            groups: self.list(3, |bytes| Gid::from_raw(bytes.id())),
            exe: None,
            unit: self.maybe(bits, 1, |bytes| bytes.unit()).flatten(),
        }
    }
}

/// Every question about a peer has the answer that the text of the grants gives, and all answers
/// agree: what is explained is what is decided, and nobody who stands for nobody gets anything.
#[must_use]
pub fn policy(bytes: &[u8]) -> bool {
    let mut bytes = Bytes(bytes);
    let bits = bytes.byte();
    let mut number = 0;
    let rules = bytes.list(6, |bytes| {
        number += 1;
        bytes.rule(number)
    });
    let operators = bytes.list(2, Bytes::selector);
    let own = bytes.maybe(bits, 1, |bytes| Uid::from_raw(bytes.id()));
    let policy = Policy::new(rules, operators, own);
    let mut granted = false;
    for _ in 0..2 {
        let (seen, other) = (bytes.described(), bytes.described());
        if let Some(connection) = ConnectionName::parse(bytes.one_of(NAMES)) {
            for action in Action::ALL {
                granted |= agrees(&policy, &seen, action, &connection);
            }
            redeems(&policy, &seen, &other, &connection);
        }
    }
    granted
}

/// What the text of a selector says, in other words than the policy's.
fn means(selector: &Selector, seen: &Described) -> bool {
    let nobody = |id: u32| id == 65534;
    let Selector { uid, gid, group, exe, unit } = selector;
    let given = uid.is_some() || gid.is_some() || group.is_some() || unit.is_some();
    let in_group = |wanted: Gid| seen.gid == Some(wanted) || seen.groups.contains(&wanted);
    given
        && exe.is_none()
        && !uid.is_some_and(|uid| nobody(uid.as_raw()) || uid != seen.uid)
        && !gid.is_some_and(|gid| nobody(gid.as_raw()) || Some(gid) != seen.gid)
        && !group.is_some_and(|group| nobody(group.as_raw()) || !in_group(group))
        && (unit.is_none() || *unit == seen.unit)
}

fn never(policy: &Policy, uid: Uid) -> bool {
    uid.as_raw() == 65534 || Some(uid) == policy.denied_own
}

fn agrees(policy: &Policy, seen: &Described, action: Action, on: &ConnectionName) -> bool {
    let expected = policy.rules.iter().find(|rule| {
        !never(policy, seen.uid)
            && means(&rule.peer, seen)
            && rule.connections.iter().any(|pattern| pattern.matches(on.as_str()))
            && (rule.actions.contains(action))
    });
    let explained = policy.explain(seen, action, on);
    assert_eq!(explained.allowed.as_ref(), expected.map(|rule| &rule.name), "{seen:?}");
    assert_eq!(explained.never.is_some(), never(policy, seen.uid));
    assert_eq!(explained.allowed.is_some(), explained.advice.is_empty());
    assert!(explained.considered.iter().all(|considered| !considered.missing.is_empty()));

    // A peer that no process stands behind has no unit.
    let peer = here(seen);
    let without = Described { unit: None, ..seen.clone() };
    let explained = policy.explain(&peer, action, on);
    assert_eq!(explained.allowed, policy.explain(&without, action, on).allowed);
    assert_eq!(policy.actions(&peer, on).contains(action), explained.allowed.is_some());
    match policy.decide(&peer, action, on) {
        Decision::Allow(grant) => {
            assert_eq!(Some(grant.rule()), explained.allowed.as_deref());
            assert_eq!((grant.action(), grant.connection()), (action, on));
            true
        }
        Decision::Deny(denial) => {
            assert_eq!(explained.allowed, None);
            assert_eq!(
                explained.never,
                Some(denial.reason).filter(|why| *why != DenyReason::NoGrant)
            );
            false
        }
    }
}

fn redeems(policy: &Policy, holder: &Described, redeemer: &Described, on: &ConnectionName) {
    let (holder, redeemer) = (here(holder), here(redeemer));
    let allowed = |decision| matches!(decision, Decision::Allow(_));
    let issues = allowed(policy.decide(&holder, Action::Issue, on));
    if allowed(policy.decide_redemption(&holder, &redeemer, on)) {
        assert!(issues && !never(policy, redeemer.uid()));
        assert!(policy.is_redeemer(&redeemer, on));
        assert!(allowed(policy.decide_redeemer(&holder, redeemer.uid(), on)));
    }
    if allowed(policy.decide_redeemer(&holder, redeemer.uid(), on)) {
        assert!(issues && !never(policy, redeemer.uid()));
    }
    let operator = policy.operator(&redeemer).is_some();
    assert_eq!(operator, policy.is_operator(&redeemer));
    assert!(!(operator && redeemer.uid().is_overflow()));
    if never(policy, redeemer.uid()) {
        assert!(policy.grants_of(&redeemer).is_empty());
        assert_ne!(policy.unknown_connection(&redeemer).reason, DenyReason::NoGrant);
    }
}

fn here(described: &Described) -> Peer {
    let groups: Vec<u32> = described.groups.iter().map(|gid| gid.as_raw()).collect();
    let gid = described.gid.map_or(0, Gid::as_raw);
    Peer::dangerous_for_test(described.uid.as_raw(), gid, &groups)
}
