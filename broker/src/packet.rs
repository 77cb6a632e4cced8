//! The packet edge: SOCK_SEQPACKET, one request a packet, one reply back, in order; descriptors
//! ride along where the contract says so. It decodes, calls a verb of the core and encodes, as
//! the gRPC edge does, and decides nothing.
//!
//! A connection is one task that answers one request at a time: what a peer sends ahead waits in
//! the kernel's buffer, which is bounded, and the effects of its requests have the order of its
//! packets. Everybody's descriptors are foreign until a verb that takes one has been allowed:
//! only then is it looked at ([`memfd`]), and all are closed elsewhere ([`closing`]).

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use credbroker_proto::MAX_PACKET;
use credbroker_proto::v1::packet_reply::Reply;
use credbroker_proto::v1::{
    DescribeHandleResponse, IssueHandleResponse, OpenResponse, PacketReply, PutResponse,
    RenewHandleResponse, RevealResponse, RevokeHandleResponse,
};
use prost::Message as _;
use tokio::sync::Semaphore;
use tracing::debug;
use zeroize::Zeroize as _;

pub(crate) use self::closing::Closing;
use self::closing::NoRoom;
use self::decode::{Malformed, Request, Verb, decode};
use self::delivery::Deliveries;
use self::memfd::{Fault, Memfds};
use self::presence::Presence;
use self::socket::{Packet, Socket};
use crate::arena::Slot;
use crate::core::{Core, Issued, Refusal, Why};
use crate::door::postgres::Door;
use crate::door::postgres::handoff::{Delivery, Handed, NotHanded, OpenRequest};
use crate::lobby::Lobby;
use crate::peer::{Accepting, Peer, Uid};
use crate::rpc::{Audience, convert};

mod closing;
mod decode;
mod delivery;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod memfd;
mod presence;
mod refused;
mod socket;

/// Open connections over all peers of one socket.
const MAX_CONNECTIONS: usize = 512;
/// Connections that were not let in and wait for room to be closed.
const MAX_TURNED_AWAY: usize = 256;
/// Requests that a peer may have sent ahead and are still answered when the broker drains.
const ANSWERED_AT_DRAIN: usize = 16;
/// A reply's buffer is kept between requests up to this size.
const KEPT_BUFFER: usize = 4 * 1024;

/// What both sockets are served with. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Edge {
    core: Core,
    door: Door,
    closing: Closing,
    memfds: Memfds,
    turned_away: Arc<Semaphore>,
}

/// A packet, taken apart.
#[derive(Debug)]
struct Received {
    request: Result<Request, Malformed>,
    descriptors: Vec<OwnedFd>,
}

/// What goes back, and the one descriptor that may go with it.
type Answer = Result<(Reply, Rider), Refusal>;

/// What rides along with a reply.
#[derive(Debug)]
enum Rider {
    Nothing,
    Memfd(OwnedFd),
    /// The session is over if it does not arrive.
    Socket(Handed),
}

impl Rider {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Nothing => None,
            Self::Memfd(memfd) => Some(memfd.as_fd()),
            Self::Socket(handed) => Some(handed.socket.as_fd()),
        }
    }

    /// It has left; whether a socket arrives, shows later.
    fn sent(self) -> Option<Delivery> {
        match self {
            Self::Nothing | Self::Memfd(_) => None,
            Self::Socket(handed) => Some(handed.sent()),
        }
    }
}

/// One connection.
#[derive(Debug)]
struct Conversation {
    edge: Edge,
    peer: Peer,
    audience: Audience,
    /// Of who has sockets that were handed over here.
    presence: OnceLock<Presence>,
}

impl Edge {
    /// # Errors
    /// When there is no memfd to be had.
    pub(crate) fn start(core: Core, door: Door, closing: Closing) -> io::Result<Self> {
        Ok(Self {
            core,
            door,
            closing,
            memfds: Memfds::find()?,
            turned_away: Arc::new(Semaphore::new(MAX_TURNED_AWAY)),
        })
    }

    /// Serves one socket until its time is over.
    pub(crate) async fn serve(self, listener: Accepting, audience: Audience) {
        let lobby = Lobby::new(MAX_CONNECTIONS);
        loop {
            let (socket, peer) = tokio::select! {
                () = audience.over(&self.core) => return,
                accepted = listener.accept_packet(|socket| self.turn_away(None, socket)) => accepted,
            };
            let uid = peer.uid();
            let Some(place) = lobby.enter(uid) else {
                debug!(%uid, "closed a connection: too many are open");
                self.turn_away(Some(uid), socket);
                continue;
            };
            let socket = match Socket::new(socket) {
                Ok(socket) => socket,
                Err((socket, error)) => {
                    debug!(%uid, %error, "closed a connection: it cannot be served");
                    self.turn_away(Some(uid), socket);
                    continue;
                }
            };
            let presence = OnceLock::new();
            let talk = Conversation { edge: self.clone(), peer, audience, presence };
            self.core.tasks().spawn(async move {
                let _place = place;
                let mut deliveries = Deliveries::default();
                let ended = talk.run(&socket, &mut deliveries).await;
                if talk.audience == Audience::Workloads && talk.edge.core.is_draining() {
                    deliveries.arrived();
                }
                deliveries.conclude(&socket, &ended).await;
                if let Err(error) = ended {
                    debug!(%uid, %error, "a packet connection ended badly");
                }
                // It takes along whatever the peer still had in it. Until there is room the peer
                // keeps its place in the lobby.
                talk.edge.closing.close(Some(uid), vec![socket.into_descriptor()]).await;
            });
        }
    }

    /// Closes a connection that is not served, without ever waiting for it here.
    fn turn_away(&self, uid: Option<Uid>, socket: OwnedFd) {
        let Err(NoRoom(socket)) = self.closing.try_close(uid, socket) else { return };
        // Past this bound the peer's uid holds hundreds of descriptors that cannot be closed; to
        // keep more would be to run out of them.
        if let Ok(place) = Arc::clone(&self.turned_away).try_acquire_owned() {
            let closing = self.closing.clone();
            self.core.tasks().spawn(async move {
                closing.close(uid, vec![socket]).await;
                drop(place);
            });
        }
    }
}

impl Conversation {
    /// Answers requests until the peer ends its side, or the broker drains.
    async fn run(&self, socket: &Socket, deliveries: &mut Deliveries) -> io::Result<()> {
        let core = &self.edge.core;
        let draining = self.audience.over(core);
        tokio::pin!(draining);
        let (mut buffer, mut left) = (Vec::new(), ANSWERED_AT_DRAIN);
        while left > 0 {
            let received = tokio::select! {
                biased;
                received = socket.receive(take_apart) => received?,
                () = &mut draining => None,
            };
            let Some(Received { request, mut descriptors }) = received else { break };
            if self.audience == Audience::Workloads && core.is_draining() {
                left -= 1;
            }
            deliveries.look(socket);
            let sent = self.answer(socket, request, &mut descriptors, &mut buffer).await;
            if !descriptors.is_empty() {
                // Whose descriptors cannot be closed is not read from.
                self.edge.closing.close(Some(self.peer.uid()), descriptors).await;
            }
            if let Some(delivery) = sent? {
                deliveries.sent(delivery);
            }
        }
        Ok(())
    }

    async fn answer(
        &self,
        socket: &Socket,
        request: Result<Request, Malformed>,
        descriptors: &mut Vec<OwnedFd>,
        buffer: &mut Vec<u8>,
    ) -> io::Result<Option<Delivery>> {
        let id = match &request {
            Ok(request) => request.id,
            Err(malformed) => malformed.id,
        };
        let (reply, rider) = match self.perform(request, descriptors).await {
            Ok(answer) => answer,
            Err(refusal) => (Reply::Refused(refused::refused(&refusal)), Rider::Nothing),
        };
        buffer.clear();
        buffer.shrink_to(KEPT_BUFFER);
        let reply = PacketReply { id, reply: Some(reply) };
        reply.encode(buffer).map_err(io::Error::other)?;
        let sent = socket.send(buffer, rider.descriptor()).await;
        let sent = sent.map(|()| rider.sent());
        if matches!(reply.reply, Some(Reply::Issued(_) | Reply::Registered(_))) {
            // The only copy of a token is its holder's.
            buffer.zeroize();
        }
        sent
    }

    async fn perform(
        &self,
        request: Result<Request, Malformed>,
        descriptors: &mut Vec<OwnedFd>,
    ) -> Answer {
        let (core, peer) = (&self.edge.core, &self.peer);
        match self.audience {
            Audience::Workloads => {}
            Audience::Operators => drop(core.operator(peer)?),
        }
        let Request { verb, .. } =
            request.map_err(|Malformed { field, must, .. }| self.wrong(field, must))?;
        let reply = match verb {
            Verb::Issue(request) => {
                self.no_descriptor(descriptors)?;
                Reply::Issued(issued(core.issue(peer, request).await?))
            }
            Verb::Renew(token, ttl) => {
                self.no_descriptor(descriptors)?;
                let handle = Some(convert::handle(core.renew(peer, token, ttl).await?));
                Reply::Renewed(RenewHandleResponse { handle })
            }
            Verb::Revoke(named) => {
                self.no_descriptor(descriptors)?;
                let sessions_cut = convert::count(core.revoke(peer, named).await?);
                Reply::Revoked(RevokeHandleResponse { sessions_cut })
            }
            Verb::Describe(token) => {
                self.no_descriptor(descriptors)?;
                let handle = Some(convert::handle(core.describe(peer, token)?));
                Reply::Described(DescribeHandleResponse { handle })
            }
            Verb::Open(_) if self.audience == Audience::Operators => {
                return Err(core.refuse(peer, None, Why::AccessDenied));
            }
            Verb::Open(request) => {
                self.no_descriptor(descriptors)?;
                return self.open(request).await;
            }
            Verb::Register(request) => {
                let may = core.may_register(peer, request)?;
                let room = |len| core.room_for(peer, len);
                let secret = self.secret(descriptors, room).await?;
                Reply::Registered(issued(core.register(peer, may, secret).await?))
            }
            Verb::Reveal(token) => {
                self.no_descriptor(descriptors)?;
                return self.reveal(token).await;
            }
            Verb::Put(_) if self.audience == Audience::Workloads => {
                return Err(core.refuse(peer, None, Why::AccessDenied));
            }
            Verb::Put(request) => {
                let may = core.may_put(peer, request)?;
                let room = |len| core.room_for_operator(&may, len);
                let secret = self.secret(descriptors, room).await?;
                let stored = core.put(may, secret).await?;
                Reply::Stored(PutResponse {
                    version: stored.version,
                    persistent: stored.persistent,
                    sessions_to_cut: convert::count(stored.sessions_to_cut),
                })
            }
        };
        Ok((reply, Rider::Nothing))
    }

    /// Moves what is in the one memfd that came along into the arena.
    async fn secret(
        &self,
        descriptors: &mut Vec<OwnedFd>,
        room: impl FnOnce(usize) -> Result<Slot, Refusal>,
    ) -> Result<Slot, Refusal> {
        let (core, peer) = (&self.edge.core, &self.peer);
        let faulty = |fault: Fault| core.refuse(peer, None, fault.why());
        let incoming = self.edge.memfds.check(descriptors).map_err(faulty)?;
        let slot = match room(incoming.room()) {
            Ok(slot) => slot,
            Err(refusal) => {
                descriptors.push(incoming.into_descriptor());
                return Err(refusal);
            }
        };
        let read = move || (incoming.read(slot), incoming.into_descriptor());
        match tokio::task::spawn_blocking(read).await {
            Ok((read, descriptor)) => {
                descriptors.push(descriptor);
                read.map_err(faulty)
            }
            Err(_ended) => Err(core.refuse(peer, None, Why::Internal("reading a memfd ended"))),
        }
    }

    async fn open(&self, request: OpenRequest) -> Answer {
        let (core, peer) = (&self.edge.core, &self.peer);
        let presence = match self.presence.get() {
            Some(presence) => presence,
            None => {
                let presence = Presence::of(peer, core.tasks());
                let presence = presence
                    .ok_or_else(|| core.refuse(peer, None, Why::limit("watched processes")))?;
                self.presence.get_or_init(|| presence)
            }
        };
        match self.edge.door.hand_off(peer, request, presence.departed()).await {
            Ok(handed) => {
                let response = OpenResponse {
                    prelude: handed.prelude.clone(),
                    session: handed.session.to_string(),
                    server_error: Vec::new(),
                };
                Ok((Reply::Opened(response), Rider::Socket(handed)))
            }
            Err(NotHanded::Refused(refusal)) => Err(refusal),
            Err(NotHanded::Theirs(server_error)) => {
                let response = OpenResponse { server_error, ..OpenResponse::default() };
                Ok((Reply::Opened(response), Rider::Nothing))
            }
        }
    }

    async fn reveal(&self, token: Option<crate::handle::TokenHash>) -> Answer {
        let (core, peer) = (&self.edge.core, &self.peer);
        let revealed = core.reveal(peer, token).await?;
        let secret = revealed.secret();
        let memfd = memfd::give(secret).map_err(|error| {
            debug!(%error, "no memfd for a secret");
            core.refuse(peer, None, Why::Internal("no memfd for the secret"))
        })?;
        let response = RevealResponse {
            username: revealed.username().to_owned(),
            length: convert::count(secret.len()),
            credential_version: revealed.version(),
        };
        Ok((Reply::Revealed(response), Rider::Memfd(memfd)))
    }

    fn no_descriptor(&self, descriptors: &[OwnedFd]) -> Result<(), Refusal> {
        if descriptors.is_empty() {
            Ok(())
        } else {
            Err(self.wrong("descriptor", "not come with this request"))
        }
    }

    fn wrong(&self, field: &'static str, must: &'static str) -> Refusal {
        self.edge.core.refuse(&self.peer, None, Why::InvalidRequest { field, must })
    }
}

/// Decodes a packet. One that lost some of what was sent is no request, whatever the rest says.
fn take_apart(packet: Packet<'_>) -> Received {
    const LOST: &str = "all be received: send at most 253, and only where one is asked for";
    const { assert!(MAX_PACKET == 64 * 1024, "the message below says so") };
    let Packet { bytes, cut_short, control_lost, descriptors } = packet;
    let request = match (cut_short, decode(bytes)) {
        (true, _) => Err(Malformed { id: 0, field: "packet", must: "be at most 65536 bytes" }),
        (false, Ok(Request { id, .. })) if control_lost => {
            Err(Malformed { id, field: "descriptor", must: LOST })
        }
        (false, decoded) => decoded,
    };
    Received { request, descriptors }
}

fn issued(issued: Issued) -> IssueHandleResponse {
    IssueHandleResponse {
        handle: Some(convert::handle(issued.handle)),
        token: issued.token.into_public(),
        endpoint: Some(convert::endpoint(&issued.connection)),
    }
}
