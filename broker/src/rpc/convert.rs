//! Between the messages of the contract and the words of the core.

#![forbid(unsafe_code)]

use std::time::{Duration, SystemTime};

use credbroker_proto::v1;
use prost_types::Timestamp;

use crate::config::Config;
use crate::connection::Connection;
use crate::core::{Core, HandleNews, HandleView, IssueRequest, Viewed};
use crate::handle::{Bind, LONGEST_SPAN};
use crate::peer::{Gid, Peer, Uid};

/// A field that cannot be understood.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Bad {
    pub(crate) field: &'static str,
    pub(crate) must: &'static str,
}

pub(crate) fn issue(request: v1::IssueHandleRequest) -> Result<IssueRequest, Bad> {
    let bind = match v1::Bind::try_from(request.bind) {
        Ok(v1::Bind::Unspecified | v1::Bind::None) => Bind::None,
        Ok(v1::Bind::Lifetime) => Bind::Lifetime,
        Ok(v1::Bind::Process) => Bind::Process,
        Err(_unknown) => {
            let must = "be one that this broker knows: none, lifetime or process";
            return Err(Bad { field: "bind", must });
        }
    };
    Ok(IssueRequest {
        connection: request.connection,
        ttl: span(request.ttl, "ttl")?,
        max_uses: request.max_uses,
        max_sessions: request.max_sessions,
        redeemer: request.redeemer.map(Uid::from_raw),
        bind,
        subject: request.subject,
        purpose: request.purpose,
    })
}

pub(crate) fn span(
    span: Option<prost_types::Duration>,
    field: &'static str,
) -> Result<Option<Duration>, Bad> {
    let Some(span) = span else { return Ok(None) };
    let parsed =
        Duration::try_from(span).map_err(|_negative| Bad { field, must: "not be negative" })?;
    if parsed > LONGEST_SPAN {
        Err(Bad { field, must: "be at most a year" })
    } else {
        Ok(Some(parsed))
    }
}

pub(crate) fn handle(view: HandleView) -> v1::Handle {
    v1::Handle {
        id: view.id.to_string(),
        connection: view.connection.to_string(),
        holder: view.holder.as_raw(),
        redeemer: view.redeemer.map(Uid::as_raw),
        issued: timestamp(view.issued),
        expires: timestamp(view.expires),
        never_after: view.never_after.and_then(timestamp),
        uses_left: view.uses_left,
        subject: view.subject,
        purpose: view.purpose,
        sessions: count(view.sessions),
        bind: match view.bind {
            Bind::None => v1::Bind::None,
            Bind::Lifetime => v1::Bind::Lifetime,
            Bind::Process => v1::Bind::Process,
        }
        .into(),
    }
}

pub(crate) fn connection(viewed: Viewed) -> v1::Connection {
    let Viewed { connection, actions, has_credential } = viewed;
    v1::Connection {
        name: connection.name.to_string(),
        r#type: Connection::KIND.to_owned(),
        target: connection.masked_target(),
        may: actions.iter().map(|action| action.to_string()).collect(),
        has_credential,
        endpoint: Some(endpoint(&connection)),
    }
}

pub(crate) fn endpoint(connection: &Connection) -> v1::Endpoint {
    v1::Endpoint {
        door: Config::POSTGRES_DOOR.to_owned(),
        database: connection.database.clone(),
        user: connection.name.to_string(),
    }
}

pub(super) fn event(news: HandleNews) -> v1::HandleEvent {
    use v1::handle_event::Event;
    let event = match news {
        HandleNews::Expiring(at) => Event::Expiring(v1::HandleExpiring { expires: timestamp(at) }),
        HandleNews::Rotated(version) => {
            Event::Rotated(v1::HandleRotated { credential_version: version })
        }
        HandleNews::Ended(reason) => {
            Event::Ended(v1::HandleEnded { reason: reason.name().to_owned() })
        }
    };
    v1::HandleEvent { event: Some(event) }
}

pub(super) fn whoami(core: &Core, peer: &Peer) -> v1::WhoAmIResponse {
    core.asked_who();
    let settings = core.settings();
    v1::WhoAmIResponse {
        uid: peer.uid().as_raw(),
        gid: peer.gid().as_raw(),
        groups: peer.groups().iter().copied().map(Gid::as_raw).collect(),
        pid: peer.pid().and_then(|pid| u32::try_from(pid).ok()),
        grants: settings.policy.grants_of(peer),
        operator: settings.policy.is_operator(peer),
        warnings: core.warnings_for(peer),
        broker_version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

pub(super) fn span_of(span: Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(span).ok()
}

pub(crate) fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn timestamp(moment: SystemTime) -> Option<Timestamp> {
    Some(Timestamp::from(moment))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_bounded() {
        let seconds = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
        assert_eq!(span(None, "ttl"), Ok(None));
        assert_eq!(span(seconds(60), "ttl"), Ok(Some(Duration::from_secs(60))));
        assert!(span(seconds(-1), "ttl").is_err());
        assert!(span(seconds(i64::MAX), "ttl").is_err());
    }

    #[test]
    fn an_unknown_bind_is_refused() {
        let request = v1::IssueHandleRequest { bind: 4, ..Default::default() };
        assert_eq!(issue(request).unwrap_err().field, "bind");
    }
}
