//! Why a peer may or may not do something, for operators: the decision's own checks, told.

#![forbid(unsafe_code)]

use super::{Action, DenyReason, Evidence, Policy, Rule, Selector};
use crate::connection::ConnectionName;
use crate::peer::Uid;

/// Grants that one explanation shows.
const MAX_CONSIDERED: usize = 16;

/// The answer to "may this peer do that?", with its reasons.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Explanation {
    /// The name of the grant that allows it. It is a name and no [`super::Grant`]: who is
    /// described has not connected.
    pub allowed: Option<String>,
    /// Why nothing can be granted to this peer, whatever the grants say.
    pub never: Option<DenyReason>,
    /// The grants that do not allow it, nearest first, at most 16.
    pub considered: Vec<Considered>,
    /// What to change, one sentence each; none when it is allowed.
    pub advice: Vec<String>,
}

/// A grant and what keeps it from allowing something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Considered {
    /// Its name.
    pub grant: String,
    /// What is missing, at least one thing.
    pub missing: Vec<String>,
}

impl Policy {
    /// Whether the peer may do `action` on the connection, and why. Agrees with
    /// [`Policy::decide`].
    #[must_use]
    pub fn explain(
        &self,
        seen: &dyn Evidence,
        action: Action,
        connection: &ConnectionName,
    ) -> Explanation {
        let never = self.never(seen);
        let mut allowed = None;
        let mut short: Vec<(usize, bool, Considered)> = Vec::new();
        for rule in &self.rules {
            let missing = missing(rule, seen, action, connection);
            if missing.is_empty() {
                allowed = allowed.or(Some(rule));
            } else {
                // Of grants that lack as much, those for this connection come first.
                let elsewhere = !rule.covers(connection.as_str());
                let grant = rule.name.clone();
                short.push((missing.len(), elsewhere, Considered { grant, missing }));
            }
        }
        short.sort_by_key(|(count, elsewhere, _)| (*count, *elsewhere));
        let considered: Vec<_> =
            short.into_iter().take(MAX_CONSIDERED).map(|(_, _, considered)| considered).collect();
        let allowed = allowed.filter(|_| never.is_none()).map(|rule| rule.name.clone());
        let advice = match (&allowed, never) {
            (Some(_), _) => Vec::new(),
            (None, Some(reason)) => vec![against(reason, seen.uid())],
            (None, None) => self.advice(seen, action, connection),
        };
        Explanation { allowed, never, considered, advice }
    }

    fn advice(
        &self,
        seen: &dyn Evidence,
        action: Action,
        connection: &ConnectionName,
    ) -> Vec<String> {
        let uid = seen.uid();
        let mut advice = Vec::new();
        let covering = || self.rules.iter().filter(|rule| rule.covers(connection.as_str()));
        let own = covering().find(|rule| rule.peer.matches(seen));
        let elsewhere =
            self.rules.iter().find(|rule| rule.actions.contains(action) && rule.peer.matches(seen));
        match (own, elsewhere) {
            (Some(own), _) => {
                advice.push(format!("add \"{action}\" to `may` of the grant {}", own.name));
            }
            (None, Some(elsewhere)) => advice.push(format!(
                "add \"{connection}\" to `connections` of the grant {}",
                elsewhere.name
            )),
            (None, None) => advice.push(format!(
                "add a grant: peer = {{ uid = {uid} }}, connections = [\"{connection}\"], may = [\"{action}\"]"
            )),
        }
        let unreadable = covering().find(|rule| {
            let ids_alone = Selector { exe: None, unit: None, ..rule.peer.clone() };
            rule.actions.contains(action) && ids_alone.matches(seen)
        });
        if let Some(rule) = unreadable {
            advice.push(format!(
                "the grant {} lacks only what its `exe` or `unit` asks for: see `credbrokerd check-config` for what this sandbox can read, or select by uid and group alone",
                rule.name
            ));
        }
        let redeems =
            covering().find(|rule| rule.redeemers.iter().any(|selector| selector.matches(seen)));
        if let (Action::Open, Some(rule)) = (action, redeems) {
            advice.push(format!(
                "it is a redeemer of the grant {}: with a handle that was issued for uid {uid} it needs no grant of its own",
                rule.name
            ));
        }
        advice
    }
}

fn against(reason: DenyReason, uid: Uid) -> String {
    match reason {
        DenyReason::OverflowUid => format!(
            "uid {uid} stands for every user that the broker's user namespace does not map, and is never matched: give the workload a uid that is mapped there"
        ),
        DenyReason::OwnUid => format!(
            "uid {uid} is the broker's own, between which and the broker there is no boundary: run the workload under another uid, or set broker.allow_own_uid = true and do without"
        ),
        DenyReason::NoOperator => {
            format!("add {{ uid = {uid} }} to broker.operators, if it is to be one")
        }
        DenyReason::NoGrant | DenyReason::RedeemerNotNamed => "add a grant".to_owned(),
    }
}

fn missing(
    rule: &Rule,
    seen: &dyn Evidence,
    action: Action,
    connection: &ConnectionName,
) -> Vec<String> {
    let mut missing = Vec::new();
    if !rule.covers(connection.as_str()) {
        let patterns: Vec<_> = rule.connections.iter().map(ToString::to_string).collect();
        missing.push(format!("is for {}, not for {connection}", patterns.join(", ")));
    }
    if !rule.actions.contains(action) {
        let actions: Vec<_> = rule.actions.iter().map(|action| action.to_string()).collect();
        missing.push(format!("allows {}, not {action}", actions.join(", ")));
    }
    if let Err(lacks) = rule.peer.check(seen) {
        missing.extend(lacks.iter().map(ToString::to_string));
    }
    missing
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::peer::{Gid, Peer, Program, Unit};
    use crate::policy::{Decision, Described, Pattern, RuleLimits};

    fn name(text: &str) -> ConnectionName {
        ConnectionName::parse(text).unwrap()
    }

    fn rule(name: &str, peer: Selector, connections: &[&str], actions: &[Action]) -> Rule {
        Rule {
            name: name.into(),
            peer,
            connections: connections.iter().map(|text| Pattern::parse(text).unwrap()).collect(),
            actions: actions.iter().copied().collect(),
            redeemers: Vec::new(),
            limits: RuleLimits::default(),
        }
    }

    fn uid(uid: u32) -> Selector {
        Selector { uid: Some(Uid::from_raw(uid)), ..Selector::default() }
    }

    fn described(uid: u32) -> Described {
        let uid = Uid::from_raw(uid);
        Described { uid, gid: None, groups: Vec::new(), exe: None, unit: None }
    }

    fn policy() -> Policy {
        let shell = Program::at("/bin/sh".into()).unwrap();
        let mut mcp = rule("mcp", uid(11), &["main_db"], &[Action::Issue]);
        mcp.redeemers = vec![uid(20)];
        Policy::new(
            vec![
                rule("elsewhere", uid(30), &["analytics-*"], &[Action::Open]),
                rule("worker", uid(10), &["main_db"], &[Action::Issue]),
                mcp,
                rule(
                    "shell",
                    Selector { exe: Some(shell), ..uid(40) },
                    &["main_db"],
                    &[Action::Ambient],
                ),
            ],
            Vec::new(),
            Some(Uid::from_raw(99)),
        )
    }

    #[test]
    fn an_operator_reads_what_to_change() {
        let (policy, main_db) = (policy(), name("main_db"));
        let explain = |uid, action| policy.explain(&described(uid), action, &main_db);

        let allowed = explain(10, Action::Issue);
        assert_eq!(allowed.allowed.as_deref(), Some("worker"));
        assert!(allowed.advice.is_empty());

        let action = explain(10, Action::Open);
        assert_eq!(action.considered[0].grant, "worker");
        assert_eq!(action.considered[0].missing, ["allows list, issue, not open"]);
        assert_eq!(action.advice, ["add \"open\" to `may` of the grant worker"]);

        let elsewhere = explain(30, Action::Open);
        assert_eq!(elsewhere.considered[0].missing, ["is for analytics-*, not for main_db"]);
        assert_eq!(elsewhere.advice, ["add \"main_db\" to `connections` of the grant elsewhere"]);

        let stranger = explain(1000, Action::Issue);
        assert_eq!(stranger.considered[0].grant, "worker");
        assert_eq!(stranger.considered[0].missing, ["uid is 1000, the grant wants 10"]);
        assert_eq!(
            stranger.advice,
            ["add a grant: peer = { uid = 1000 }, connections = [\"main_db\"], may = [\"issue\"]"]
        );

        let redeemer = explain(20, Action::Open);
        assert_eq!(redeemer.allowed, None);
        assert!(redeemer.advice[1].starts_with("it is a redeemer of the grant mcp"));

        let shell = explain(40, Action::Ambient);
        assert_eq!(
            shell.considered[0].missing,
            ["exe is not known: it was not given; the grant wants /bin/sh"]
        );
        assert!(shell.advice[1].contains("the grant shell lacks only"), "{:?}", shell.advice);
        let given = Described { exe: Some("/bin/sh".into()), ..described(40) };
        let given = policy.explain(&given, Action::Ambient, &main_db);
        assert_eq!(given.allowed.as_deref(), Some("shell"));

        let own = explain(99, Action::Issue);
        assert_eq!(own.never, Some(DenyReason::OwnUid));
        assert!(own.advice[0].contains("broker.allow_own_uid"), "{:?}", own.advice);
        let unmapped = explain(65534, Action::Issue);
        assert_eq!(unmapped.never, Some(DenyReason::OverflowUid));
        assert!(unmapped.advice[0].contains("not map"), "{:?}", unmapped.advice);
    }

    #[test]
    fn an_explanation_has_a_bound() {
        let rules = (0..1000).map(|n| rule(&format!("g{n}"), uid(n + 1), &["*"], &[Action::Open]));
        let policy = Policy::new(rules.collect(), Vec::new(), None);
        let explained = policy.explain(&described(5000), Action::Open, &name("main_db"));
        assert_eq!(explained.considered.len(), MAX_CONSIDERED);
    }

    fn any_id() -> impl Strategy<Value = u32> {
        prop_oneof![0..4_u32, Just(65534)]
    }

    prop_compose! {
        fn any_selector()(
            uid in proptest::option::of(any_id()),
            gid in proptest::option::of(any_id()),
            group in proptest::option::of(any_id()),
            unit in proptest::option::weighted(0.2, Just("app.service")),
            exe in proptest::option::weighted(0.2, Just("/bin/sh")),
        ) -> Selector {
            Selector {
                uid: uid.map(Uid::from_raw),
                gid: gid.map(Gid::from_raw),
                group: group.map(Gid::from_raw),
                unit: unit.and_then(Unit::parse),
                exe: exe.map(|path| Program::at(path.into()).unwrap()),
            }
        }
    }

    prop_compose! {
        fn any_rule()(
            peer in any_selector(),
            connection in prop_oneof![Just("main_db"), Just("main*"), Just("other"), Just("*")],
            actions in proptest::sample::subsequence(Action::ALL.to_vec(), 0..7),
        ) -> Rule {
            rule("r", peer, &[connection], &actions)
        }
    }

    proptest! {
        #[test]
        fn explain_and_decide_and_matches_agree(
            mut rules in proptest::collection::vec(any_rule(), 0..6),
            own in proptest::option::of(any_id()),
            (uid, gid, groups) in (any_id(), any_id(), proptest::collection::vec(any_id(), 0..3)),
            action in proptest::sample::select(Action::ALL.to_vec()),
        ) {
            for (number, rule) in rules.iter_mut().enumerate() {
                rule.name = format!("r{number}");
            }
            let peer = Peer::dangerous_for_test(uid, gid, &groups);
            let described = Described {
                gid: Some(Gid::from_raw(gid)),
                groups: groups.iter().copied().map(Gid::from_raw).collect(),
                ..described(uid)
            };
            for rule in &rules {
                prop_assert_eq!(rule.peer.matches(&peer), rule.peer.check(&peer).is_ok());
                prop_assert_eq!(rule.peer.matches(&peer), rule.peer.matches(&described));
            }
            let count = rules.len();
            let policy = Policy::new(rules, Vec::new(), own.map(Uid::from_raw));
            let explained = policy.explain(&peer, action, &name("main_db"));
            match policy.decide(&peer, action, &name("main_db")) {
                Decision::Allow(grant) => {
                    prop_assert_eq!(explained.allowed.as_deref(), Some(grant.rule()));
                    prop_assert!(explained.never.is_none() && explained.advice.is_empty());
                }
                Decision::Deny(denial) => {
                    prop_assert_eq!(&explained.allowed, &None);
                    prop_assert!(!explained.advice.is_empty());
                    prop_assert_eq!(explained.never.is_some(), denial.reason != DenyReason::NoGrant);
                    prop_assert!(explained.never.is_some() || explained.considered.len() == count);
                }
            }
            prop_assert!(explained.considered.iter().all(|grant| !grant.missing.is_empty()));
            let told = policy.explain(&described, action, &name("main_db"));
            prop_assert_eq!(told.allowed, explained.allowed);
        }
    }
}
