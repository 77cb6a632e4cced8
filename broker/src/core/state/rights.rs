//! What a right is worth when it is judged again, and what a change of the configuration takes
//! from those who brought a password of their own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::fixture::{MAIN, issue, name, peer, registered, settings_with};
use super::{State, Taken};
use crate::connection::{ConnectionName, Hosts, TcpHost, UnixSocket};
use crate::core::Why;
use crate::core::settings::Settings;
use crate::core::suspension::{Scope, Suspended};
use crate::handle::HandleId;
use crate::policy::{Action, Decision, Grant};
use crate::session::CutReason;

const UID: u32 = 10;
const HOUR: Duration = Duration::from_secs(3600);
const HOLDS: [Action; 2] = [Action::Issue, Action::Reveal];

/// A holder's handle, and the grant that was found for it before the lock was let go.
struct Found {
    state: State,
    id: HandleId,
    grant: Grant,
    now: Instant,
}

impl Found {
    fn new() -> Self {
        let now = Instant::now();
        let mut state = State::new(settings_with(&[UID], &HOLDS, 100), Suspended::default());
        let (id, _token) = issue(&mut state, &peer(UID), now, HOUR, None, None);
        let decision = state.settings.policy.decide(&peer(UID), Action::Reveal, &name());
        let Decision::Allow(grant) = decision else { panic!("{decision:?}") };
        Self { state, id, grant, now }
    }

    fn judged_at(&self, now: Instant) -> Result<(), Why> {
        self.state.may_reveal(&peer(UID), self.id, &self.grant, now)
    }

    fn judged(&self) -> Result<(), Why> {
        self.judged_at(self.now)
    }
}

#[test]
fn a_secret_is_shown_as_long_as_nothing_takes_the_right_away() {
    let mut found = Found::new();
    assert_eq!(found.judged(), Ok(()));
    let _taken = found.state.reload(settings_with(&[UID], &HOLDS, 100));
    let other = Suspended::of(&Scope::Connection(ConnectionName::parse("other_db").unwrap()));
    let _taken = found.state.suspend(&other);
    assert_eq!(found.judged(), Ok(()), "what concerns others takes nothing away");
}

#[test]
fn no_secret_is_shown_after_a_revoke() {
    let mut found = Found::new();
    let _taken = found.state.revoke_each(CutReason::Revoked, &[found.id]);
    assert_eq!(found.judged(), Err(Why::HandleInvalid));
}

#[test]
fn no_secret_is_shown_after_the_handles_time() {
    let mut found = Found::new();
    assert_eq!(found.judged_at(found.now + HOUR - Duration::from_millis(1)), Ok(()));
    assert_eq!(found.judged_at(found.now + HOUR), Err(Why::HandleExpired), "by the clock");
    assert!(found.state.expire(found.id).is_some());
    assert_eq!(found.judged(), Err(Why::HandleExpired), "by the timer");
}

#[test]
fn no_secret_is_shown_of_what_is_suspended() {
    for scope in [Scope::All, Scope::Connection(name())] {
        let mut found = Found::new();
        // As if the handle had outlived the suspension, which ends it as well.
        found.state.suspended.add(&Suspended::of(&scope));
        assert_eq!(found.judged(), Err(Why::Suspended), "{scope:?}");
        let _taken = found.state.suspend(&Suspended::of(&scope));
        assert_eq!(found.judged(), Err(Why::HandleInvalid), "{scope:?}");
    }
}

#[test]
fn no_secret_is_shown_after_a_reload_that_takes_the_grant_away() {
    let mut found = Found::new();
    let taken = found.state.reload(settings_with(&[UID], &[Action::Issue], 100));
    assert!(taken.handles.is_empty(), "the handle itself may be held on");
    assert_eq!(found.judged(), Err(Why::AccessDenied));
    let taken = found.state.reload(settings_with(&[], &[], 100));
    assert_eq!(taken.handles.len(), 1);
    assert_eq!(found.judged(), Err(Why::HandleInvalid));
}

/// Settings in which peers may bring passwords for a connection that leads to `host`.
fn leading_to(hosts: Hosts) -> Settings {
    let mut settings = settings_with(&[UID], &[Action::Register, Action::Issue], 100);
    let connection = settings.connections.get_mut(MAIN).unwrap();
    Arc::get_mut(connection).unwrap().hosts = hosts;
    settings
}

fn tcp(host: &str, port: u16) -> Hosts {
    Hosts::Tcp(vec![TcpHost { host: host.into(), port }])
}

#[test]
fn what_a_peer_brought_does_not_follow_a_connection_elsewhere() {
    let socket = UnixSocket { directory: "/run/postgresql".into(), port: 5432 };
    let unix = Hosts::Unix { sockets: vec![socket], server: None };
    for (what, elsewhere) in [
        ("another host", tcp("other.internal", 5432)),
        ("another port", tcp("db.internal", 5433)),
        ("a socket", unix),
    ] {
        let now = Instant::now();
        let mut state = State::new(leading_to(tcp("db.internal", 5432)), Suspended::default());
        let (issued, _) = issue(&mut state, &peer(UID), now, HOUR, None, None);
        let (brought, _) = issue(&mut state, &peer(UID), now, HOUR, None, None);
        state.handles.get_mut(brought).unwrap().registered = Some(registered());
        let ended = |taken: Taken| taken.handles.iter().map(|handle| handle.id).collect::<Vec<_>>();
        let same = state.reload(leading_to(tcp("db.internal", 5432)));
        assert_eq!(ended(same), [], "it leads where it led");
        let moved = state.reload(leading_to(elsewhere));
        assert_eq!(ended(moved), [brought], "{what}");
        assert!(state.handles.get(issued).is_some(), "the broker's own credential is configured");
    }
}
