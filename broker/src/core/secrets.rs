//! Secrets that come in or go out by request: registered by a peer for a handle of its own, put by
//! an operator for a connection, revealed to a holder; and what a new version of one ends.
//!
//! Each has two steps. The first judges the request and gives evidence that alone lends room in
//! the arena, so that no byte of a secret is looked at for somebody who may not bring it.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::{Asked, Core, IssueRequest, Issued, Refusal, Verb, Why};
use crate::arena::Slot;
use crate::audit::{Audited, Event, Outcome, Record};
use crate::connection::{Connection, ConnectionName};
use crate::credential::Credential;
use crate::handle::{Bind, Handle, HandleId, TokenHash};
use crate::metrics;
use crate::peer::Peer;
use crate::policy::{Action, Grant, Operator};
use crate::session::{Cut, CutReason};
use crate::source::{self, SourceFault};

/// Labels of a credential, and bytes of each key and value.
const MAX_LABELS: usize = 16;
const MAX_LABEL: usize = 64;

/// A request to use one's own password, parsed.
#[derive(Debug)]
pub(crate) struct RegisterRequest {
    pub(crate) username: String,
    /// What the handle shall be.
    pub(crate) issue: IssueRequest,
}

/// Proof that a peer may register; lends room for the secret.
#[must_use]
#[derive(Debug)]
pub(crate) struct MayRegister {
    connection: Arc<Connection>,
    grant: Grant,
    request: RegisterRequest,
}

/// A request to store a credential, parsed.
#[derive(Debug)]
pub(crate) struct PutRequest {
    pub(crate) connection: String,
    /// Absent: as the source is configured.
    pub(crate) username: Option<String>,
    pub(crate) expires_at: Option<SystemTime>,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) grace: Option<Duration>,
}

/// Proof that an operator may store a credential; lends room for it.
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
        self.0.secret()
    }
}

impl Core {
    /// First step of registering: may this peer bring a password of its own here?
    pub(crate) fn may_register(
        &self,
        peer: &Peer,
        request: RegisterRequest,
    ) -> Result<MayRegister, Refusal> {
        let connection = self.connection(peer, Action::Register, &request.issue.connection)?;
        let name = &connection.name;
        let grant = self.grant(peer, Action::Register, name)?;
        self.check_words(peer, &connection, &request.issue)?;
        if !source::is_username(&request.username) {
            let must = "be text of 1 to 63 bytes without line breaks";
            let why = Why::InvalidRequest { field: "username", must };
            return Err(self.refuse(peer, Some(name), why));
        }
        if !connection.takes_registrations {
            let must = "name a connection that has no credential of its own";
            let why = Why::InvalidRequest { field: "connection", must };
            return Err(self.refuse(peer, Some(name), why));
        }
        self.check_open_for_business(peer, name)?;
        self.check_rate(peer, &grant, Verb::Register)?;
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
        let timed = self.shared.metrics.begin(metrics::Verb::Register);
        let MayRegister { connection, grant, request } = may;
        let RegisterRequest { username, issue } = request;
        let name = &connection.name;
        let material = self.shared.credentials.material(name, Some(username), &secret);
        let material =
            material.map_err(|fault| self.refuse(peer, Some(name), secret_fault(&fault)))?;
        // What was brought, with its newline if it had one, is wiped here.
        drop(secret);
        let credential = Arc::new(Credential::registered(material));
        let issued = self.issue_under(peer, &connection, &grant, issue, Some(credential)).await?;
        timed.done();
        Ok(issued)
    }

    /// First step of putting: is this an operator, and is there such a connection?
    pub(crate) fn may_put(&self, peer: &Peer, request: PutRequest) -> Result<MayPut, Refusal> {
        let operator = self.operator(peer)?;
        let connection = self.configured(&operator, &request.connection)?;
        let wrong = |field, must| {
            Err(self.refuse(peer, Some(&connection.name), Why::InvalidRequest { field, must }))
        };
        if request.username.as_deref().is_some_and(|name| !source::is_username(name)) {
            return wrong("username", "be text of 1 to 63 bytes without line breaks");
        }
        let word = |text: &str| {
            text.len() <= MAX_LABEL && text.bytes().all(|byte| (0x20..0x7f).contains(&byte))
        };
        if request.labels.len() > MAX_LABELS
            || !request
                .labels
                .iter()
                .all(|(key, value)| !key.is_empty() && word(key) && word(value))
        {
            return wrong("labels", "be at most 16, of at most 64 printable ASCII characters each");
        }
        if request.expires_at.is_some_and(|at| at <= SystemTime::now()) {
            return wrong("expires_at", "lie in the future");
        }
        if !self.shared.credentials.takes_put(&connection.name) {
            return wrong(
                "connection",
                "name one with secret = { store = true }: another source would take back what is put",
            );
        }
        Ok(MayPut { operator, connection, request })
    }

    /// Second step: the secret is in the arena, and becomes the connection's next version.
    pub(crate) async fn put(&self, may: MayPut, secret: Slot) -> Result<Stored, Refusal> {
        let timed = self.shared.metrics.begin(metrics::Verb::Put);
        let MayPut { operator, connection, request } = may;
        let (peer, name) = (operator.peer(), &connection.name);
        let PutRequest { username, expires_at, labels, grace, .. } = request;
        let material = self.shared.credentials.material(name, username, &secret);
        let material =
            material.map_err(|fault| self.refuse(peer, Some(name), secret_fault(&fault)))?;
        drop(secret);
        let record = Record::new(Event::SecretPut, Outcome::Allowed)
            .peer(peer)
            .connection(name)
            .db_user(material.username());
        let audited = self.shared.audit.before(&record, material).await;
        let material =
            audited.map_err(|unavailable| self.unaudited(peer, Some(name), &unavailable))?;
        let version = self.shared.credentials.put(name, material.into_inner(), expires_at, labels);
        let (sessions_to_cut, cuts) = self.end_older(name, version, grace);
        self.wait_until_dead(cuts).await;
        timed.done();
        Ok(Stored { version, persistent: false, sessions_to_cut })
    }

    /// Shows a secret to the holder of a handle: under a grant of its own, once, and after the
    /// record of it stands.
    pub(crate) async fn reveal(
        &self,
        peer: &Peer,
        token: Option<TokenHash>,
    ) -> Result<Revealed, Refusal> {
        let timed = self.shared.metrics.begin(metrics::Verb::Reveal);
        let holder = |handle: &Handle| {
            handle.holder.uid() == peer.uid()
                && (handle.bind != Bind::Process || handle.holder.same_process(peer))
        };
        let (id, name) =
            self.look_up(peer, token, holder, |handle| (handle.id, handle.connection.clone()))?;
        let grant = self.grant(peer, Action::Reveal, &name)?;
        self.check_open_for_business(peer, &name)?;
        self.check_rate(peer, &grant, Verb::Reveal)?;
        self.check_alive(peer, &name)?;
        let credential = self
            .spend_reveal(peer, id, &grant)
            .map_err(|why| self.refuse(peer, Some(&name), why))?;
        let record = Record::new(Event::SecretRevealed, Outcome::Allowed)
            .peer(peer)
            .grant(&grant)
            .handle(id)
            .db_user(credential.username());
        let audited: Result<Audited<Arc<Credential>>, _> =
            self.shared.audit.before(&record, credential).await;
        match audited {
            Ok(credential) => {
                // What was taken away while the record was written is not shown any more.
                let still = self.state().may_reveal(peer, id, &grant, Instant::now());
                still.map_err(|why| self.refuse(peer, Some(&name), why))?;
                timed.done();
                Ok(Revealed(credential.into_inner()))
            }
            Err(unavailable) => {
                if let Some(handle) = self.state().handles.get_mut(id) {
                    handle.revealed = false;
                }
                Err(self.unaudited(peer, Some(&name), &unavailable))
            }
        }
    }

    /// Once for each handle: the mark is what grants.
    fn spend_reveal(
        &self,
        peer: &Peer,
        id: HandleId,
        grant: &Grant,
    ) -> Result<Arc<Credential>, Why> {
        let name = grant.connection();
        let mut state = self.state();
        state.may_reveal(peer, id, grant, Instant::now())?;
        let handle = state.handles.get_mut(id).ok_or(Why::HandleInvalid)?;
        if handle.revealed {
            return Err(Why::HandleInvalid);
        }
        let own = || self.shared.credentials.of(name);
        let credential = handle.registered.clone().or_else(own);
        let credential = credential.ok_or_else(|| Why::NoCredential(name.clone()))?;
        handle.revealed = true;
        Ok(credential)
    }

    /// Room in the arena for what a peer brings: its share of it, and no more.
    pub(crate) fn room_for(&self, peer: &Peer, len: usize) -> Result<Slot, Refusal> {
        let room = self.shared.credentials.room_for(peer.uid(), len);
        room.map_err(|_full| self.refuse(peer, None, Why::limit("locked memory")))
    }

    /// Room in the arena for what an operator brings.
    pub(crate) fn room_for_operator(&self, may: &MayPut, len: usize) -> Result<Slot, Refusal> {
        let room = self.shared.credentials.room(len);
        room.map_err(|_full| self.refuse(may.operator.peer(), None, Why::limit("locked memory")))
    }

    /// A connection's source gave another credential: says so, and ends what logged in before.
    pub(crate) fn rotated(&self, name: &ConnectionName, version: u64) {
        let record = Record::new(Event::SecretRotated, Outcome::Done)
            .connection(name)
            .detail("version", version);
        self.shared.audit.always(&record);
        let _fired = self.end_older(name, version, None);
    }

    /// Ends the sessions of older versions, now or when `grace` is over. Gives how many there are,
    /// and those that were cut now.
    fn end_older(
        &self,
        name: &ConnectionName,
        version: u64,
        grace: Option<Duration>,
    ) -> (usize, Vec<Arc<Cut>>) {
        self.tell_rotated(name, version);
        self.drop_spares(CutReason::Rotated, version, |other| other == name);
        let (count, grace) = {
            let state = self.state();
            let configured = state.settings.connections.get(name).map(|c| c.rotation_grace);
            (state.count_older(name, version), grace.or(configured).unwrap_or_default())
        };
        if grace.is_zero() {
            let cuts = self.cut_older(name, version);
            return (cuts.len(), cuts);
        }
        let (core, name) = (self.clone(), name.clone());
        self.shared.tasks.spawn(async move {
            tokio::select! {
                () = tokio::time::sleep(grace) => drop(core.cut_older(&name, version)),
                () = core.shared.stopped.cancelled() => {}
            }
        });
        (count, Vec::new())
    }

    fn cut_older(&self, name: &ConnectionName, version: u64) -> Vec<Arc<Cut>> {
        let cuts = self.state().rotate(name, version);
        self.fire(&cuts);
        cuts
    }

    /// Forgets a credential and ends what is open on it, those that came in by registration
    /// excepted.
    pub(crate) async fn delete_credential(
        &self,
        operator: &Operator,
        name: &str,
    ) -> Result<usize, Refusal> {
        let timed = self.shared.metrics.begin(metrics::Verb::Delete);
        let connection = self.configured(operator, name)?;
        let name = &connection.name;
        if !self.shared.credentials.delete(name) {
            let why = Why::InvalidRequest { field: "connection", must: "have a credential" };
            return Err(self.refuse(operator.peer(), Some(name), why));
        }
        let record =
            Record::new(Event::SecretDeleted, Outcome::Done).peer(operator.peer()).connection(name);
        self.shared.audit.always(&record);
        self.drop_spares(CutReason::Rotated, u64::MAX, |other| other == name);
        let cuts = self.cut_older(name, u64::MAX);
        let count = cuts.len();
        self.wait_until_dead(cuts).await;
        timed.done();
        Ok(count)
    }

    /// The proof that a peer is an operator, or its denial, audited.
    pub(crate) fn operator(&self, peer: &Peer) -> Result<Operator, Refusal> {
        let settings = self.settings();
        let operator = settings.policy.operator(peer).ok_or_else(|| {
            let denial = settings.policy.no_operator(peer);
            self.deny(peer, Asked { action: None, connection: None }, &denial)
        })?;
        if peer.is_alive() { Ok(operator) } else { Err(self.refuse(peer, None, Why::PeerExited)) }
    }

    /// A connection that an operator names. To an operator the truth is told.
    pub(super) fn configured(
        &self,
        operator: &Operator,
        name: &str,
    ) -> Result<Arc<Connection>, Refusal> {
        let found = self.settings().connections.get(name).cloned();
        found.ok_or_else(|| {
            let must = "name a configured connection";
            self.refuse(operator.peer(), None, Why::InvalidRequest { field: "connection", must })
        })
    }
}

/// What was wrong with a secret that somebody brought, in words for them.
fn secret_fault(fault: &SourceFault) -> Why {
    let must = match fault {
        SourceFault::ArenaFull(_) => return Why::limit("locked memory"),
        SourceFault::TooLong => "be at most 16 KiB",
        SourceFault::Empty => "not be empty",
        SourceFault::NulByte => "hold no NUL byte",
        SourceFault::NoKeys => "be CLIENT_KEY:SERVER_KEY, each 32 bytes in base64",
        SourceFault::NoUsername | SourceFault::BadUsername => {
            "be of the form username:password where no username is given"
        }
        SourceFault::File { .. }
        | SourceFault::Untrusted { .. }
        | SourceFault::NoVariable { .. }
        | SourceFault::NoSystemd { .. }
        | SourceFault::Changing
        | SourceFault::Exec(_)
        | SourceFault::PrivateKey { .. }
        | SourceFault::RestartRequired(_)
        | SourceFault::BrokenOff => "be readable",
    };
    Why::InvalidRequest { field: "secret", must }
}
