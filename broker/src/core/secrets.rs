//! Secrets that come in or go out by request: registered by a peer for a handle of its own, put by
//! an operator for a connection, revealed to a holder.
//!
//! The first two have two steps. The first judges the request and gives evidence, so that no byte
//! of a secret is looked at for somebody who may not bring it.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::{Core, IssueRequest, Issued, Refusal, Verb, Why};
use crate::arena::Slot;
use crate::audit::{Event, Outcome, Record};
use crate::connection::Connection;
use crate::credential::Credential;
use crate::handle::{Handle, TokenHash};
use crate::peer::Peer;
use crate::policy::{Action, Grant};
use crate::source::{self, SourceFault};
use crate::sys;

/// A request to use one's own password, parsed.
#[derive(Debug)]
pub(crate) struct RegisterRequest {
    pub(crate) username: String,
    /// What the handle shall be.
    pub(crate) issue: IssueRequest,
}

/// Proof that a peer may register.
#[must_use]
#[derive(Debug)]
pub(crate) struct MayRegister {
    connection: Arc<Connection>,
    grant: Grant,
    request: RegisterRequest,
}

/// A request to store a credential, parsed.
#[derive(Debug)]
#[expect(dead_code, reason = "rotation is not here yet")]
pub(crate) struct PutRequest {
    pub(crate) connection: String,
    /// Absent: the secret is `username:password`.
    pub(crate) username: Option<String>,
    pub(crate) expires_at: Option<SystemTime>,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) grace: Option<Duration>,
}

/// Proof that a peer is an operator.
#[must_use]
#[derive(Debug)]
pub(crate) struct Operator(Peer);

/// Proof that an operator may store a credential.
#[must_use]
#[derive(Debug)]
pub(crate) struct MayPut {
    operator: Operator,
    connection: Arc<Connection>,
    request: PutRequest,
}

/// A credential is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) version: u64,
    /// Whether it outlives the broker.
    pub(crate) persistent: bool,
    pub(crate) sessions_to_cut: usize,
}

/// A secret on its way to its holder. That it is here at all has been audited.
#[must_use]
#[derive(Debug)]
pub(crate) struct Revealed(Arc<Credential>);

impl Revealed {
    pub(crate) fn username(&self) -> &str {
        self.0.username()
    }

    pub(crate) fn version(&self) -> u64 {
        self.0.version()
    }

    pub(crate) fn secret(&self) -> &Slot {
        self.0.password()
    }
}

impl Core {
    /// First step of registering: may this peer bring a password of its own here?
    pub(crate) fn may_register(
        &self,
        peer: &Peer,
        request: RegisterRequest,
    ) -> Result<MayRegister, Refusal> {
        let connection = self.connection(peer, &request.issue.connection)?;
        let name = &connection.name;
        let grant = self.grant(peer, Action::Register, name)?;
        self.check_words(peer, &connection, &request.issue)?;
        if !source::is_username(&request.username) {
            let must = "be text of 1 to 63 bytes without line breaks";
            let why = Why::InvalidRequest { field: "username", must };
            return Err(self.refuse(peer, Some(name), why));
        }
        if self.shared.credentials.of(name).is_some() {
            let must = "name a connection that has no credential of its own";
            let why = Why::InvalidRequest { field: "connection", must };
            return Err(self.refuse(peer, Some(name), why));
        }
        self.check_open_for_business(peer, name)?;
        self.check_rate(peer, &grant, Verb::Issue)?;
        self.check_alive(peer, name)?;
        Ok(MayRegister { connection, grant, request })
    }

    /// Second step: the secret is in the arena, and becomes the handle's own.
    pub(crate) async fn register(
        &self,
        peer: &Peer,
        may: MayRegister,
        secret: Slot,
    ) -> Result<Issued, Refusal> {
        let MayRegister { connection, grant, request } = may;
        let RegisterRequest { username, issue } = request;
        let whole = sys::leaving_no_residue(|| source::whole(secret));
        let secret = whole
            .map_err(|fault| self.refuse(peer, Some(&connection.name), secret_fault(&fault)))?;
        let credential = Arc::new(Credential::new(username, secret));
        self.issue_under(peer, connection, &grant, issue, Some(credential)).await
    }

    /// First step of putting: is this an operator, and is there such a connection?
    pub(crate) fn may_put(&self, peer: &Peer, request: PutRequest) -> Result<MayPut, Refusal> {
        let operator = self.operator(peer)?;
        let wrong = |field, must| self.refuse(peer, None, Why::InvalidRequest { field, must });
        let connection = self.shared.connections.get(request.connection.as_str());
        let connection =
            connection.ok_or_else(|| wrong("connection", "name a configured connection"))?;
        if request.username.as_deref().is_some_and(|name| !source::is_username(name)) {
            return Err(wrong("username", "be text of 1 to 63 bytes without line breaks"));
        }
        Ok(MayPut { operator, connection: Arc::clone(connection), request })
    }

    /// Second step: the secret is in the arena, and becomes the connection's next version.
    pub(crate) async fn put(&self, may: MayPut, secret: Slot) -> Result<Stored, Refusal> {
        let MayPut { operator: Operator(peer), connection, request } = may;
        let name = &connection.name;
        let parsed = sys::leaving_no_residue(|| match request.username {
            Some(username) => source::whole(secret).map(|secret| (username, secret)),
            None => self.shared.credentials.split(&secret),
        });
        let (username, secret) =
            parsed.map_err(|fault| self.refuse(&peer, Some(name), secret_fault(&fault)))?;
        let record = Record::new(Event::SecretPut, Outcome::Allowed)
            .peer(&peer)
            .connection(name)
            .db_user(&username);
        let audited = self.shared.audit.before(&record, Credential::new(username, secret)).await;
        let credential = audited
            .map_err(|_unavailable| self.refuse(&peer, Some(name), Why::AuditUnavailable))?;
        let version = self.shared.credentials.put(name, credential.into_inner());
        Ok(Stored { version, persistent: false, sessions_to_cut: 0 })
    }

    /// Shows a secret to the holder of a handle: under a grant of its own, once, and after the
    /// record of it stands.
    pub(crate) async fn reveal(
        &self,
        peer: &Peer,
        token: Option<TokenHash>,
    ) -> Result<Revealed, Refusal> {
        let holder = |handle: &Handle| handle.holder.uid() == peer.uid();
        let (id, connection) = self
            .look_up(peer, token, holder, |handle| (handle.id, Arc::clone(&handle.connection)))?;
        let name = &connection.name;
        let grant = self.grant(peer, Action::Reveal, name)?;
        self.check_open_for_business(peer, name)?;
        self.check_rate(peer, &grant, Verb::Issue)?;
        self.check_alive(peer, name)?;
        let spent = {
            let mut state = self.state();
            state.handles.get_mut(id).filter(|handle| !handle.revealed).map(|handle| {
                handle.revealed = true;
                handle.registered.clone()
            })
        };
        let credential = match spent {
            None => return Err(self.refuse(peer, Some(name), Why::HandleInvalid)),
            Some(registered) => registered.or_else(|| self.shared.credentials.of(name)),
        };
        let Some(credential) = credential else {
            let why = Why::Internal("the connection has no credential");
            return Err(self.refuse(peer, Some(name), why));
        };
        let record = Record::new(Event::SecretRevealed, Outcome::Allowed)
            .peer(peer)
            .grant(&grant)
            .handle(id)
            .db_user(credential.username());
        match self.shared.audit.before(&record, credential).await {
            Ok(credential) => Ok(Revealed(credential.into_inner())),
            Err(_unavailable) => {
                if let Some(handle) = self.state().handles.get_mut(id) {
                    handle.revealed = false;
                }
                Err(self.refuse(peer, Some(name), Why::AuditUnavailable))
            }
        }
    }

    /// Room in the arena for what a peer brings.
    pub(crate) fn room_for(&self, peer: &Peer, len: usize) -> Result<Slot, Refusal> {
        let room = self.shared.credentials.room(len);
        room.map_err(|_full| self.refuse(peer, None, Why::LimitReached("locked memory")))
    }

    /// Room in the arena for what an operator brings.
    pub(crate) fn room_for_operator(&self, may: &MayPut, len: usize) -> Result<Slot, Refusal> {
        self.room_for(&may.operator.0, len)
    }

    /// The proof that a peer is an operator, or its denial, audited.
    pub(crate) fn operator(&self, peer: &Peer) -> Result<Operator, Refusal> {
        if !self.shared.policy.is_operator(peer) {
            let denial = self.shared.policy.unknown_connection(peer);
            return Err(self.deny(peer, None, &denial));
        }
        if peer.is_alive() {
            Ok(Operator(peer.clone()))
        } else {
            Err(self.refuse(peer, None, Why::PeerExited))
        }
    }
}

/// What was wrong with a secret that somebody brought, in words for them.
fn secret_fault(fault: &SourceFault) -> Why {
    let must = match fault {
        SourceFault::ArenaFull(_) => return Why::LimitReached("locked memory"),
        SourceFault::TooLong => "be at most 16 KiB",
        SourceFault::Empty => "not be empty",
        SourceFault::NulByte => "hold no NUL byte",
        SourceFault::NoUsername | SourceFault::BadUsername => {
            "be of the form username:password where no username is given"
        }
        SourceFault::File { .. }
        | SourceFault::Untrusted { .. }
        | SourceFault::NoVariable { .. } => "be readable",
    };
    Why::InvalidRequest { field: "secret", must }
}
