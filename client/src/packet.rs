//! The packet sockets: requests and replies as single packets, and secrets beside them.
//!
//! Invariants: every request ends, at the latest after the client's timeout; a request that
//! nobody waits for any more disturbs no other, and leaves no handle behind.

mod link;

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use credbroker_proto::v1::packet_reply::Reply;
use credbroker_proto::v1::packet_request::Request;
use credbroker_proto::v1::revoke_handle_request::Handle as WhichHandle;
use credbroker_proto::{MAX_PACKET, v1};
use prost::Message as _;
use tokio::sync::{Mutex, oneshot};
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use zeroize::Zeroizing;

use self::link::{Answer, Call, Link};
use crate::background::Background;
use crate::connector::Connector;
use crate::handle::Origin;
use crate::request::span;
use crate::secret::Lent;
use crate::{
    ClientBuilder, Error, Handle, HandleInfo, Handoff, IssueRequest, OpenRequest, PutRequest,
    RegisterRequest, Revealed, Secret, Token,
};

/// A connection to `packet.sock`: the fast way to handles, and the only one for secrets; cheap
/// to clone, and all clones share it.
///
/// Requests of several tasks are sent without waiting for each other's replies, which come in
/// order: one that takes long keeps those behind it waiting. It connects again by itself, and
/// checks the server again, when the broker was restarted.
#[derive(Clone)]
pub struct PacketClient {
    inner: Arc<Inner>,
}

struct Inner {
    socket: Socket,
    runtime_dir: PathBuf,
    background: Background,
}

impl PacketClient {
    /// Connects with the defaults.
    ///
    /// # Errors
    /// Those of [`ClientBuilder::connect`].
    pub async fn connect() -> Result<Self, Error> {
        ClientBuilder::default().connect_packet().await
    }

    pub(crate) async fn over(
        connector: Connector,
        runtime_dir: PathBuf,
        limit: Duration,
    ) -> Result<Self, Error> {
        let socket = Socket::open(connector, limit).await?;
        Ok(Self { inner: Arc::new(Inner { socket, runtime_dir, background: Background::here() }) })
    }

    /// [`Client::issue`](crate::Client::issue) by packet.
    ///
    /// # Errors
    /// Those of [`Client::issue`](crate::Client::issue).
    pub async fn issue(&self, request: IssueRequest) -> Result<Handle, Error> {
        let request = Request::Issue(request.into_wire()?);
        let client = self.clone();
        // Made where the reply is read: if nobody waits any more, it is dropped, which revokes
        // it.
        let read = move |reply| {
            let Reply::Issued(issued) = reply else { return Err(unsuited()) };
            client.own(issued)
        };
        self.inner.socket.ask(request, None, without_descriptors(read)).await
    }

    /// Brings a password of one's own, for a connection that has none, and gives a handle on
    /// it. The broker keeps it in its locked memory for as long as the handle lives.
    ///
    /// # Errors
    /// Those of [`Client::issue`](crate::Client::issue).
    pub async fn register(
        &self,
        request: RegisterRequest,
        secret: Secret,
    ) -> Result<Handle, Error> {
        let request = Request::Register(request.into_wire()?);
        let client = self.clone();
        let read = move |reply| {
            let Reply::Registered(issued) = reply else { return Err(unsuited()) };
            client.own(issued)
        };
        self.inner.socket.ask(request, Some(secret.lend()), without_descriptors(read)).await
    }

    fn own(self, issued: v1::IssueHandleResponse) -> Result<Handle, Error> {
        let runtime_dir = self.inner.runtime_dir.clone();
        Handle::from_wire(Origin::Packet(self), issued, &runtime_dir)
    }

    /// [`Client::renew`](crate::Client::renew) by packet.
    ///
    /// # Errors
    /// Those of [`Client::issue`](crate::Client::issue).
    pub async fn renew(&self, token: &Token, ttl: Option<Duration>) -> Result<HandleInfo, Error> {
        let request = Request::Renew(v1::RenewHandleRequest {
            token: token.expose().to_owned(),
            ttl: ttl.map(span).transpose()?,
        });
        let read = |reply| {
            let Reply::Renewed(renewed) = reply else { return Err(unsuited()) };
            HandleInfo::from_wire(renewed.handle)
        };
        self.inner.socket.ask(request, None, without_descriptors(read)).await
    }

    /// [`Client::revoke_token`](crate::Client::revoke_token) by packet.
    ///
    /// # Errors
    /// Those of [`Client::issue`](crate::Client::issue).
    pub async fn revoke_token(&self, token: &Token) -> Result<u32, Error> {
        self.revoke(WhichHandle::Token(token.expose().to_owned())).await
    }

    /// [`Client::revoke_id`](crate::Client::revoke_id) by packet.
    ///
    /// # Errors
    /// Those of [`Client::issue`](crate::Client::issue).
    pub async fn revoke_id(&self, id: &str) -> Result<u32, Error> {
        self.revoke(WhichHandle::Id(id.to_owned())).await
    }

    async fn revoke(&self, which: WhichHandle) -> Result<u32, Error> {
        let request = Request::Revoke(v1::RevokeHandleRequest { handle: Some(which) });
        let read = |reply| {
            let Reply::Revoked(revoked) = reply else { return Err(unsuited()) };
            Ok(revoked.sessions_cut)
        };
        self.inner.socket.ask(request, None, without_descriptors(read)).await
    }

    /// [`Client::describe`](crate::Client::describe) by packet.
    ///
    /// # Errors
    /// Those of [`Client::issue`](crate::Client::issue).
    pub async fn describe(&self, token: &Token) -> Result<HandleInfo, Error> {
        let request =
            Request::Describe(v1::DescribeHandleRequest { token: token.expose().to_owned() });
        let read = |reply| {
            let Reply::Described(described) = reply else { return Err(unsuited()) };
            HandleInfo::from_wire(described.handle)
        };
        self.inner.socket.ask(request, None, without_descriptors(read)).await
    }

    /// Takes the secret itself. Needs the action `reveal`; the holder only, once for a handle.
    ///
    /// # Errors
    /// Those of [`Client::issue`](crate::Client::issue).
    pub async fn reveal(&self, token: &Token) -> Result<Revealed, Error> {
        let request = Request::Reveal(v1::RevealRequest { token: token.expose().to_owned() });
        let read = |reply, mut descriptors: Vec<_>| {
            let Reply::Revealed(revealed) = reply else { return Err(unsuited()) };
            match descriptors.pop() {
                Some(memfd) if descriptors.is_empty() => Revealed::from_wire(revealed, memfd),
                _ => Err(Error::protocol("it must come with one descriptor")),
            }
        };
        self.inner.socket.ask(request, None, read).await
    }

    /// Takes an authenticated socket to the database that a handle is for. Needs the action
    /// `handoff`; see [`Stream::open`](crate::Stream::open) for whoever may not have it.
    ///
    /// # Errors
    /// Those of [`Client::issue`](crate::Client::issue);
    /// [`Reason::HandoffUnsupported`](crate::Reason::HandoffUnsupported) for a link that is
    /// protected by TLS; [`Error::Database`] with the server's own words. Where nobody waits any
    /// more, the session is ended.
    pub async fn open(&self, token: &Token, request: OpenRequest) -> Result<Handoff, Error> {
        let request = Request::Open(request.into_wire(token));
        let read = |reply, descriptors| {
            let Reply::Opened(opened) = reply else { return Err(unsuited()) };
            Handoff::from_wire(opened, descriptors)
        };
        self.inner.socket.ask(request, None, read).await
    }

    /// The absolute path of the broker's runtime directory, as this process sees it.
    #[must_use]
    pub fn runtime_dir(&self) -> &Path {
        &self.inner.runtime_dir
    }

    /// Ends all renewal in the background, waits until every dropped handle is revoked, or the
    /// attempt has timed out, and closes the connection. For all clones; requests still work
    /// afterwards.
    pub async fn close(&self) {
        self.background().close().await;
        self.inner.socket.close().await;
    }

    pub(crate) fn background(&self) -> &Background {
        &self.inner.background
    }
}

impl fmt::Debug for PacketClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PacketClient")
            .field("runtime_dir", &self.inner.runtime_dir)
            .field("timeout", &self.inner.socket.limit)
            .finish_non_exhaustive()
    }
}

/// A connection to `admin-packet.sock`, for operators: the way in for credentials; cheap to
/// clone, and all clones share it.
#[derive(Clone)]
pub struct AdminPacketClient {
    socket: Arc<Socket>,
}

/// A credential, stored.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stored {
    /// Its version; counts up from 1 with each change.
    pub version: u64,
    /// Whether it outlives the broker. If not, it is in the broker's memory only.
    pub persistent: bool,
    /// Sessions of the version before that are cut, now or after the grace.
    pub sessions_to_cut: u32,
}

impl AdminPacketClient {
    /// Connects with the defaults.
    ///
    /// # Errors
    /// Those of [`ClientBuilder::connect`].
    pub async fn connect() -> Result<Self, Error> {
        ClientBuilder::default().connect_admin_packet().await
    }

    pub(crate) async fn open(connector: Connector, limit: Duration) -> Result<Self, Error> {
        Ok(Self { socket: Arc::new(Socket::open(connector, limit).await?) })
    }

    /// Stores a credential.
    ///
    /// # Errors
    /// Those of [`Client::issue`](crate::Client::issue). After [`Error::Timeout`] and
    /// [`Error::Disconnected`] it may be stored: the version that
    /// [`AdminClient::connection`](crate::AdminClient::connection) tells shows it.
    pub async fn put(&self, request: PutRequest, secret: Secret) -> Result<Stored, Error> {
        let request = Request::Put(request.into_wire()?);
        let read = |reply| {
            let Reply::Stored(stored) = reply else { return Err(unsuited()) };
            Ok(Stored {
                version: stored.version,
                persistent: stored.persistent,
                sessions_to_cut: stored.sessions_to_cut,
            })
        };
        self.socket.ask(request, Some(secret.lend()), without_descriptors(read)).await
    }
}

impl fmt::Debug for AdminPacketClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdminPacketClient")
            .field("timeout", &self.socket.limit)
            .finish_non_exhaustive()
    }
}

/// Asks over whatever link there is, and makes one when there is none.
struct Socket {
    connector: Connector,
    limit: Duration,
    link: Mutex<Option<Linked>>,
    readers: TaskTracker,
    next_id: AtomicU64,
}

/// The reader, which has the link too, ends when this is dropped.
struct Linked {
    link: Arc<Link>,
    _stop: DropGuard,
}

impl Socket {
    async fn open(connector: Connector, limit: Duration) -> Result<Self, Error> {
        let socket = Self {
            connector,
            limit,
            link: Mutex::new(None),
            readers: TaskTracker::new(),
            next_id: AtomicU64::new(1),
        };
        let linked = timeout(limit, socket.link()).await;
        linked.unwrap_or(Err(Error::Timeout { after: limit }))?;
        Ok(socket)
    }

    /// Sends `request` and lets `read` make something of its reply, where the reply is read;
    /// what it made is dropped when nobody waits any more.
    async fn ask<T: Send + 'static>(
        &self,
        request: Request,
        secret: Option<Lent>,
        read: impl FnOnce(Reply, Vec<OwnedFd>) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let bytes = encode(id, request)?;
        let (give, answer) = oneshot::channel();
        let deliver = Box::new(move |answer: Result<Answer, Error>| {
            let granted = answer.and_then(|answer| match answer.reply {
                Some(Reply::Refused(refused)) => Err(Error::from_refused(&refused)),
                Some(reply) => read(reply, answer.descriptors),
                None => Err(unsuited()),
            });
            let _unwanted = give.send(granted);
        });
        let work = async {
            self.send(Call { id, bytes, secret, deliver }).await?;
            // Without an answer it only goes when the runtime is shut down.
            answer.await.unwrap_or(Err(Error::Disconnected))
        };
        timeout(self.limit, work).await.unwrap_or(Err(Error::Timeout { after: self.limit }))
    }

    async fn send(&self, call: Call) -> Result<(), Error> {
        // A link may turn out to be dead only when it is used; then nothing was sent.
        let link = self.link().await?;
        let Err(call) = link.send(call).await else { return Ok(()) };
        self.link.lock().await.take_if(|linked| Arc::ptr_eq(&linked.link, &link));
        self.link().await?.send(call).await.map_err(|_unsent| Error::Disconnected)
    }

    async fn link(&self) -> Result<Arc<Link>, Error> {
        let mut linked = self.link.lock().await;
        if let Some(Linked { link, .. }) = &*linked
            && link.is_open()
        {
            return Ok(Arc::clone(link));
        }
        let link = Link::new(self.connector.connect_packets().await?.into_inner());
        let stop = CancellationToken::new();
        self.readers.spawn(Arc::clone(&link).read(stop.clone()));
        *linked = Some(Linked { link: Arc::clone(&link), _stop: stop.drop_guard() });
        Ok(link)
    }

    async fn close(&self) {
        self.link.lock().await.take();
        self.readers.close();
        self.readers.wait().await;
    }
}

/// Nothing but the reply is expected; whatever else came is closed with this.
fn without_descriptors<T>(
    read: impl FnOnce(Reply) -> Result<T, Error> + Send + 'static,
) -> impl FnOnce(Reply, Vec<OwnedFd>) -> Result<T, Error> + Send + 'static {
    move |reply, descriptors| {
        // Read nevertheless: a handle that came in such company must be ended.
        let result = read(reply);
        if descriptors.is_empty() {
            result
        } else {
            Err(Error::protocol("it came with descriptors that nobody asked for"))
        }
    }
}

fn unsuited() -> Error {
    Error::protocol("it does not answer what was asked")
}

fn encode(id: u64, request: Request) -> Result<Zeroizing<Vec<u8>>, Error> {
    let packet = v1::PacketRequest { id, request: Some(request) };
    if packet.encoded_len() > MAX_PACKET {
        return Err(Error::Configuration {
            message: format!("a request of more than {MAX_PACKET} bytes cannot be sent"),
        });
    }
    Ok(Zeroizing::new(packet.encode_to_vec()))
}
