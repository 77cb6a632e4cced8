//! What the tests of the state are made of.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::arena::{Arena, BackendChoice};
use crate::audit::Audited;
use crate::config::{HandleLimits, Limits};
use crate::connection::tests::connection;
use crate::connection::{Connection, ConnectionName};
use crate::core::settings::Settings;
use crate::core::suspension::Suspended;
use crate::credential::{Credential, SecretForm};
use crate::handle::{Bind, Handle, HandleId, Standing, Token, TokenHash};
use crate::peer::{Peer, Uid};
use crate::policy::{Action, Pattern, Policy, Rule, RuleLimits, Selector};
use crate::source::Material;

use super::State;

pub(super) const MAIN: &str = "main_db";

pub(super) fn name() -> ConnectionName {
    ConnectionName::parse(MAIN).unwrap()
}

/// Settings by which `uids` may issue, open, and come in ambient.
pub(super) fn settings(uids: &[u32], sessions: usize) -> Settings {
    settings_with(uids, &[Action::Issue, Action::Open, Action::Ambient], sessions)
}

/// Settings by which `uids` may do just this.
pub(super) fn settings_with(uids: &[u32], may: &[Action], sessions: usize) -> Settings {
    let rule = |uid: u32| Rule {
        name: format!("uid {uid}"),
        peer: Selector { uid: Some(Uid::from_raw(uid)), ..Selector::default() },
        connections: vec![Pattern::parse(MAIN).unwrap()],
        actions: may.iter().copied().collect(),
        redeemers: Vec::new(),
        limits: RuleLimits::default(),
    };
    let span = Duration::from_secs(3600);
    Settings {
        connections: BTreeMap::from([(name(), Arc::new(connection(MAIN)))]),
        policy: Policy::new(uids.iter().copied().map(rule).collect(), Vec::new(), None),
        handle_limits: HandleLimits { default_ttl: span, max_ttl: span, max_lifetime: span },
        limits: Limits {
            sessions,
            rate_per_second: 1000,
            queue_timeout: Duration::from_secs(1),
            handles: 1000,
        },
    }
}

pub(super) fn state(uids: &[u32], sessions: usize) -> State {
    State::new(settings(uids, sessions), Suspended::default())
}

pub(super) fn admitted(state: &State) -> Arc<Connection> {
    Arc::clone(&state.settings.connections[MAIN])
}

pub(super) fn credential() -> Arc<Credential> {
    let arena = Arena::map(BackendChoice::Auto, 64 * 1024).unwrap();
    let mut slot = arena.allocate(2).unwrap();
    slot.fill(|bytes| bytes.copy_from_slice(b"pw"));
    Arc::new(Credential::new("app".into(), slot))
}

pub(super) fn peer(uid: u32) -> Peer {
    Peer::dangerous_for_test(uid, uid, &[])
}

/// What a peer brings for a handle of its own.
pub(super) fn registered() -> Arc<Credential> {
    let arena = Arena::map(BackendChoice::Auto, 64 * 1024).unwrap();
    let mut slot = arena.allocate(2).unwrap();
    slot.fill(|bytes| bytes.copy_from_slice(b"pw"));
    let material = Material { username: "app".into(), secret: slot, form: SecretForm::Password };
    Arc::new(Credential::registered(material))
}

/// Puts a handle of `holder` into the table.
pub(super) fn issue(
    state: &mut State,
    holder: &Peer,
    now: Instant,
    ttl: Duration,
    uses: Option<u32>,
    max_sessions: Option<usize>,
) -> (HandleId, TokenHash) {
    let handle = Handle {
        id: HandleId::random().unwrap(),
        connection: name(),
        holder: holder.clone(),
        redeemer: None,
        subject: String::new(),
        purpose: String::new(),
        bind: Bind::None,
        registered: None,
        revealed: false,
        issued: now,
        issued_at: SystemTime::UNIX_EPOCH,
        ttl,
        expires: now + ttl,
        never_after: None,
        uses_left: uses,
        max_sessions,
        standing: Standing::Live,
    };
    let (id, token) = (handle.id, Token::random().unwrap().hash());
    state.handles.insert(token, Audited::dangerous_for_test(handle), 1000).unwrap();
    (id, token)
}
