//! The one flow by which a client comes in through a door, whatever it speaks.
//!
//! Identity is there before the first byte (the `Peer`). Then, in this order and no other:
//! admission by policy → the handle's token → [`Core::open`] (handle, limits, registry, audit) →
//! the server, with the credential that only an [`Opening`] lends → [`Opening::commit`] → the
//! one message that tells the client it is in, which takes the permit that only commit makes.
//! A cut that lands anywhere in between ends the login.

#![forbid(unsafe_code)]

use std::io;

use crate::connection::Connection;
use crate::core::{Admitted, Core, Opening, Permit, Refusal, Session, Why};
use crate::handle::TokenHash;
use crate::peer::Peer;
use crate::session::{KeyLength, Lifeline};

/// What a client asks for in its own protocol's words.
#[derive(Debug)]
pub(crate) struct Asked<'a> {
    /// What it asks for.
    pub(crate) connection: Wanted<'a>,
    /// The database, as typed.
    pub(crate) database: Option<&'a str>,
}

/// How a client says which connection it wants.
#[derive(Debug)]
pub(crate) enum Wanted<'a> {
    /// By its name, as typed.
    Named(&'a str),
    /// As the socket itself, by the handle that leads to it; `None` when what was shown has not
    /// the form of a token.
    HandedOver(Option<TokenHash>),
}

/// Why a login through the server failed.
#[derive(Debug)]
pub(crate) enum UpstreamFault {
    /// A refusal in the broker's words, and the word for the audit record.
    Ours { reason: &'static str, why: Why },
    /// The proven server's own words, for the client.
    Theirs(Vec<u8>),
    /// The client went away meanwhile.
    Abandoned,
}

/// A protocol, as far as the flow needs to know.
pub(crate) trait Protocol: Send {
    /// An authenticated link to the server.
    type Upstream: Send;

    /// What the client asked for.
    fn asked(&self) -> Asked<'_>;

    /// What must be refused in the request itself, now that it is known what it is for.
    fn objection(&self, connection: &Connection) -> Option<Why>;

    /// Asks for the handle's token. `None` when the client sends something else.
    fn ask_token(&mut self) -> impl Future<Output = io::Result<Option<TokenHash>>> + Send;

    /// Logs in to the server with the opening's credential.
    fn log_in(
        &mut self,
        opening: &Opening,
    ) -> impl Future<Output = Result<Self::Upstream, UpstreamFault>> + Send;

    /// What a cut takes hold of.
    fn lifeline(&self, upstream: &Self::Upstream) -> io::Result<Lifeline>;

    /// How long the secret is that the client cancels with.
    fn key_length(&self) -> KeyLength;

    /// Tells the client that it is in. The permit is spent.
    fn welcome(
        &mut self,
        permit: Permit,
        session: &Session,
        upstream: &mut Self::Upstream,
    ) -> impl Future<Output = io::Result<()>> + Send;

    /// Tells the client that it is not, and why.
    fn refuse(&mut self, refusal: &Refusal) -> impl Future<Output = ()> + Send;

    /// Passes on the server's own words.
    fn pass_on(&mut self, error: &[u8]) -> impl Future<Output = ()> + Send;
}

/// Leads a client in. `None` when it was refused, which it has been told, or has gone away.
pub(crate) async fn login<P: Protocol>(
    core: &Core,
    peer: &Peer,
    client: &mut P,
) -> Option<(Session, P::Upstream)> {
    let opening = match open(core, peer, client).await {
        Ok(opening) => opening?,
        Err(refusal) => {
            client.refuse(&refusal).await;
            return None;
        }
    };

    let answer = tokio::select! {
        biased;
        reason = opening.cut() => Err(reason),
        answer = client.log_in(&opening) => Ok(answer),
    };
    let mut upstream = match answer {
        Ok(Ok(upstream)) => upstream,
        Ok(Err(UpstreamFault::Theirs(error))) => {
            opening.end("server_error");
            client.pass_on(&error).await;
            return None;
        }
        Ok(Err(UpstreamFault::Abandoned)) => {
            opening.end("client_gone");
            return None;
        }
        Ok(Err(UpstreamFault::Ours { reason, why })) => {
            let refusal = opening.fail(reason, why);
            client.refuse(&refusal).await;
            return None;
        }
        Err(reason) => {
            let refusal = opening.fail_cut(reason);
            client.refuse(&refusal).await;
            return None;
        }
    };

    let committed = match client.lifeline(&upstream) {
        Ok(lifeline) => opening.commit(lifeline, client.key_length()),
        Err(_out_of_descriptors) => {
            Err(opening.fail("internal", Why::Internal("no descriptor left")))
        }
    };
    match committed {
        Ok((session, permit)) => {
            let welcomed = tokio::select! {
                biased;
                // A client that does not read must not keep a session that was cut. Nothing of its
                // was relayed yet, so the server is idle: it ends with the link, and need not be
                // asked to stop.
                _ = session.cut() => return None,
                welcomed = client.welcome(permit, &session, &mut upstream) => welcomed,
            };
            welcomed.ok().map(|()| (session, upstream))
        }
        Err(refusal) => {
            client.refuse(&refusal).await;
            None
        }
    }
}

/// Admission, token, opening. `Ok(None)` when the client has gone away.
async fn open<P: Protocol>(
    core: &Core,
    peer: &Peer,
    client: &mut P,
) -> Result<Option<Opening>, Refusal> {
    let admission = match client.asked().connection {
        Wanted::Named(name) => core.admit(peer, name)?,
        Wanted::HandedOver(token) => core.admit_handoff(peer, token)?,
    };
    if let Some(why) = client.objection(&admission.connection) {
        return Err(core.refuse(peer, Some(&admission.connection.name), why));
    }
    let token = match &admission.asks {
        Admitted::Ambient => None,
        Admitted::WithHandle | Admitted::ToHandOff => match client.ask_token().await {
            Ok(token) => token,
            Err(_gone) => return Ok(None),
        },
    };
    let Asked { database, .. } = client.asked();
    core.open(peer, admission, token, database).await.map(Some)
}
