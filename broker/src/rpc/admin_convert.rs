//! Between the operators' messages and the words of the core.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::SystemTime;

use credbroker_proto::v1;
use futures_util::{Stream, StreamExt as _};
use prost_types::Timestamp;
use tonic::Status;

use super::convert::{Bad, count, span_of};
use crate::audit::{Followed, Seq};
use crate::core::{
    ConnectionView, Explained, HandleFilter, Question, Status as BrokerStatus, SuspendedNow, Who,
};
use crate::credential::CredentialView;
use crate::door::postgres::Validated;
use crate::handle::HandleId;
use crate::peer::{Gid, Uid, Unit};
use crate::policy::{Action, Described};
use crate::session::{Right, SessionView};

pub(super) fn connection(view: ConnectionView) -> v1::AdminConnection {
    v1::AdminConnection {
        name: view.connection.name.to_string(),
        r#type: crate::connection::Connection::KIND.to_owned(),
        target: view.connection.masked_target(),
        source: view.source,
        credential: view.credential.map(credential),
        suspended: view.suspended,
        sessions: count(view.sessions),
        handles: count(view.handles),
    }
}

fn credential(view: CredentialView) -> v1::Credential {
    v1::Credential {
        version: view.version,
        since: Some(Timestamp::from(view.since)),
        expires_at: view.expires_at.map(Timestamp::from),
        labels: view.labels.into_iter().collect(),
        persistent: view.persistent,
        breaker: view.breaker.map(|open| v1::Breaker {
            open_until: Some(Timestamp::from(open.open_until)),
            refusals: open.refusals,
        }),
    }
}

pub(super) fn validated(found: Validated) -> v1::ValidateConnectionResponse {
    v1::ValidateConnectionResponse {
        server_version: found.server_version,
        warnings: found.warnings,
        took: span_of(found.took),
        method: found.method.to_owned(),
    }
}

pub(super) fn suspended(done: SuspendedNow) -> v1::SuspendResponse {
    v1::SuspendResponse {
        handles_revoked: count(done.taken.handles),
        sessions_cut: count(done.taken.sessions),
        persistent: done.problem.is_none(),
        problem: done.problem.unwrap_or_default(),
    }
}

pub(super) fn filter(filter: v1::HandleFilter) -> Result<HandleFilter, Bad> {
    let v1::HandleFilter { connection, holder, subject, id, all } = filter;
    if !all && connection.is_none() && holder.is_none() && subject.is_none() && id.is_none() {
        return Err(Bad { field: "filter", must: "pick something, or say all" });
    }
    let id = match id {
        None => None,
        Some(text) => {
            let must = "be a handle's public name, hdl_…";
            Some(HandleId::parse(&text).ok_or(Bad { field: "filter.id", must })?)
        }
    };
    Ok(HandleFilter { connection, holder: holder.map(Uid::from_raw), subject, id })
}

pub(super) fn session(view: SessionView) -> v1::SessionInfo {
    let SessionView { id, owner, since, live } = view;
    let subject = match &owner.right {
        Right::Ambient => String::new(),
        Right::Handle { subject, .. } => subject.clone(),
    };
    v1::SessionInfo {
        id: id.to_string(),
        connection: owner.connection.name.to_string(),
        handle: owner.right.handle().map(|id| id.to_string()),
        uid: owner.peer.uid().as_raw(),
        pid: owner.peer.pid().and_then(|pid| u32::try_from(pid).ok()),
        since: Some(Timestamp::from(since)),
        live,
        credential_version: owner.credential_version,
        database: owner.database.as_str().to_owned(),
        subject,
        mode: owner.mode.name().to_owned(),
    }
}

pub(super) fn status(status: BrokerStatus) -> v1::GetStatusResponse {
    let fact = |(name, value): (&str, String)| v1::Fact { name: name.to_owned(), value };
    let bytes = |bytes: usize| u64::try_from(bytes).unwrap_or(u64::MAX);
    v1::GetStatusResponse {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        started: Some(Timestamp::from(status.started)),
        posture: status.posture.into_iter().map(fact).collect(),
        warnings: status.warnings,
        connections: count(status.connections),
        handles: count(status.handles),
        sessions: count(status.sessions),
        suspended: status.suspended,
        audit_head: Some(v1::AuditHead {
            seq: status.audit_head.seq,
            hash: status.audit_head.hash,
            signed_to: status.audit_head.signed_to,
        }),
        audit_writable: status.audit_writable,
        arena: Some(v1::ArenaUse {
            capacity: bytes(status.arena.capacity),
            own: bytes(status.arena.own),
            registered: bytes(status.arena.registered),
        }),
        configured: Some(Timestamp::from(status.configured)),
        last_reload_problem: status.last_reload_problem.unwrap_or_default(),
    }
}

pub(super) fn tail(
    lines: impl Stream<Item = Followed> + Send,
) -> impl Stream<Item = Result<v1::TailAuditResponse, Status>> + Send {
    lines.map(|Followed { line, skipped }| {
        Ok(v1::TailAuditResponse { line: line.as_ref().to_owned(), skipped })
    })
}

pub(super) fn question(request: v1::ExplainAccessRequest) -> Result<Question, Bad> {
    use v1::explain_access_request::Who;
    let v1::ExplainAccessRequest { who, action, connection } = request;
    match who {
        Some(Who::Ref(seq)) => Ok(Question::Refusal(Seq(seq))),
        Some(Who::Peer(peer)) => {
            let must = "be one of list, issue, open, ambient, handoff, register, reveal";
            let action = Action::parse(&action).ok_or(Bad { field: "action", must })?;
            let v1::PeerDescription { uid, gid, groups, exe, unit } = peer;
            let peer = Described {
                uid: Uid::from_raw(uid),
                gid: gid.map(Gid::from_raw),
                groups: groups.into_iter().map(Gid::from_raw).collect(),
                exe: exe.map(PathBuf::from),
                unit: unit.map(|unit| unit_of(&unit)).transpose()?,
            };
            Ok(Question::Peer { peer, action, connection })
        }
        None => Err(Bad { field: "who", must: "be a ref or a peer" }),
    }
}

fn unit_of(text: &str) -> Result<Unit, Bad> {
    let must = "be the name of a system service: NAME.service";
    Unit::parse(text).ok_or(Bad { field: "peer.unit", must })
}

fn description(who: &Who) -> v1::PeerDescription {
    let evidence = who.evidence();
    let exe = match who {
        Who::Described(described) => described.exe.as_deref(),
        // The kernel told a file, and not its path.
        Who::Peer(_) => None,
    };
    v1::PeerDescription {
        uid: evidence.uid().as_raw(),
        gid: evidence.gid().map(Gid::as_raw),
        groups: evidence.groups().iter().copied().map(Gid::as_raw).collect(),
        exe: exe.map(|path| path.display().to_string()),
        unit: evidence.unit().ok().flatten().map(ToString::to_string),
    }
}

pub(super) fn explained(explained: Explained) -> v1::ExplainAccessResponse {
    let Explained { who, asked, refused, explanation, advice } = explained;
    let (reason, at): (String, Option<SystemTime>) = match refused {
        Some((reason, at)) => (reason, Some(at)),
        None => (String::new(), None),
    };
    let allowed = explanation.as_ref().and_then(|explanation| explanation.allowed.as_ref());
    let grant = allowed.cloned();
    let considered = explanation.map(|explanation| explanation.considered).unwrap_or_default();
    v1::ExplainAccessResponse {
        allowed: grant.is_some(),
        grant: grant.unwrap_or_default(),
        reason,
        peer: Some(description(&who)),
        action: asked.action.map(|action| action.to_string()).unwrap_or_default(),
        connection: asked.connection.map(|name| name.to_string()).unwrap_or_default(),
        considered: considered
            .into_iter()
            .map(|considered| v1::Considered {
                grant: considered.grant,
                missing: considered.missing,
            })
            .collect(),
        advice,
        at: at.map(Timestamp::from),
    }
}
