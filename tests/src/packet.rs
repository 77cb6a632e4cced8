//! The packet sockets as any uid, with any bytes and any descriptors, without the client library:
//! what it does is the broker's.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use credbroker_proto::MAX_PACKET;
use credbroker_proto::v1::packet_reply::Reply;
use credbroker_proto::v1::packet_request::Request;
use credbroker_proto::v1::{
    DescribeHandleRequest, Handle, IssueHandleRequest, IssueHandleResponse, OpenRequest,
    OpenResponse, PacketReply, PacketRequest, PutRequest, PutResponse, Reason, Refused,
    RegisterRequest, RenewHandleRequest, RevealRequest, RevealResponse, RevokeHandleRequest,
    revoke_handle_request,
};
use prost::Message as _;
use rustix::cmsg_space;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg,
    sendmsg, socket_with,
};

use crate::frontend::{Frontend, Session};
use crate::identity::Identity;

/// SCM_MAX_FD of unix(7).
pub const MAX_DESCRIPTORS: usize = 253;
/// Longer than any time limit of the broker's that the tests look at.
const LIMIT: Duration = Duration::from_secs(30);

/// One connection to a packet socket.
#[derive(Debug)]
pub struct Packets {
    socket: OwnedFd,
}

/// A socket that was handed over.
#[derive(Debug)]
pub struct Taken {
    /// What was said of it.
    pub opened: OpenResponse,
    /// As it came: in non-blocking mode.
    pub socket: OwnedFd,
}

impl Taken {
    /// Speaks on it, whatever kind of socket it is.
    ///
    /// # Panics
    /// When it cannot be made to block.
    #[must_use]
    pub fn session(self) -> Session {
        rustix::io::ioctl_fionbio(&self.socket, false).expect("a socket");
        // Reads, writes and time limits are the same for every stream socket.
        let stream = UnixStream::from(self.socket);
        let frontend = Frontend::over(stream).expect("a socket");
        Session { frontend, parameters: BTreeMap::new(), cancel_key: key(&self.opened.prelude) }
    }
}

/// The body of BackendKeyData.
fn key(mut prelude: &[u8]) -> Vec<u8> {
    while let Some(([tag, length @ ..], _)) = prelude.split_first_chunk::<5>() {
        let length = usize::try_from(u32::from_be_bytes(*length)).expect("64 bits");
        let (message, rest) = prelude.split_at(1 + length);
        if *tag == b'K' {
            return message[5..].to_vec();
        }
        prelude = rest;
    }
    Vec::new()
}

/// A reply and what rode along.
#[derive(Debug)]
pub struct Received {
    /// The message.
    pub reply: PacketReply,
    /// Its descriptors.
    pub descriptors: Vec<OwnedFd>,
}

impl Packets {
    /// Connects to the socket at `path` as `identity`.
    ///
    /// # Errors
    /// When the socket does not take the connection.
    pub fn connect(identity: &Identity, path: &Path) -> io::Result<Self> {
        let address = SocketAddrUnix::new(path)?;
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        identity.act(|| connect(&socket, &address))??;
        set_socket_timeout(&socket, Timeout::Recv, Some(LIMIT))?;
        set_socket_timeout(&socket, Timeout::Send, Some(LIMIT))?;
        Ok(Self { socket })
    }

    /// Speaks on a socket that is connected already.
    ///
    /// # Panics
    /// When it is no socket.
    #[must_use]
    pub fn over(socket: OwnedFd) -> Self {
        set_socket_timeout(&socket, Timeout::Recv, Some(LIMIT)).expect("a socket");
        Self { socket }
    }

    /// The descriptor that comes with the next packet, whatever else is in it.
    ///
    /// # Panics
    /// When none comes.
    #[must_use]
    pub fn receive_descriptor(&self) -> OwnedFd {
        let mut bytes = [0; 64];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut data = [IoSliceMut::new(&mut bytes)];
        recvmsg(&self.socket, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC).expect("a packet");
        let passed = control.drain().find_map(|message| {
            let RecvAncillaryMessage::ScmRights(mut descriptors) = message else { return None };
            descriptors.next()
        });
        passed.expect("a descriptor")
    }

    /// The connection's descriptor.
    #[must_use]
    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Sends bytes as they are, with descriptors.
    pub fn send_raw(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)), "they fit");
        }
        sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Sends a request.
    pub fn send(
        &self,
        id: u64,
        request: Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        self.send_raw(&PacketRequest { id, request: Some(request) }.encode_to_vec(), descriptors)
    }

    /// The next reply; `None` when the broker closed the connection.
    ///
    /// # Panics
    /// When what comes is no reply.
    pub fn receive(&self) -> io::Result<Option<Received>> {
        let mut bytes = vec![0; MAX_PACKET];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut data = [IoSliceMut::new(&mut bytes)];
        let received = match recvmsg(&self.socket, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC)
        {
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            received => received?,
        };
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                descriptors.extend(more);
            }
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        let reply = PacketReply::decode(&bytes[..received.bytes]).expect("a reply");
        Ok(Some(Received { reply, descriptors }))
    }

    /// Sends a request and gives what came of it.
    ///
    /// # Errors
    /// The refusal.
    ///
    /// # Panics
    /// When the connection breaks, or the answer is to another request.
    pub fn call(
        &self,
        request: Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>), Refused> {
        self.send(7, request, descriptors).expect("the broker reads");
        let received = self.receive().expect("a reply").expect("the connection stays open");
        let Received { reply: PacketReply { id, reply }, descriptors } = received;
        let reply = reply.expect("a reply says something");
        if let Reply::Refused(refused) = reply {
            assert!(descriptors.is_empty(), "nothing rides along with a refusal");
            return Err(refused);
        }
        assert_eq!(id, 7, "{reply:?}");
        Ok((reply, descriptors))
    }

    /// Issues a handle with the defaults of the broker.
    pub fn issue(&self, connection: &str) -> Result<IssueHandleResponse, Refused> {
        match self.call(issue(connection), &[])? {
            (Reply::Issued(issued), _) => Ok(issued),
            (other, _) => panic!("{other:?}"),
        }
    }

    /// Looks at a handle.
    pub fn describe(&self, token: &str) -> Result<Handle, Refused> {
        match self.call(describe(token), &[])? {
            (Reply::Described(described), _) => Ok(described.handle.expect("a handle")),
            (other, _) => panic!("{other:?}"),
        }
    }

    /// Moves the expiry of a handle.
    pub fn renew(&self, token: &str) -> Result<Handle, Refused> {
        let request = RenewHandleRequest { token: token.into(), ttl: None };
        match self.call(Request::Renew(request), &[])? {
            (Reply::Renewed(renewed), _) => Ok(renewed.handle.expect("a handle")),
            (other, _) => panic!("{other:?}"),
        }
    }

    /// Ends a handle; gives the number of sessions that were cut.
    pub fn revoke(&self, token: &str) -> Result<u32, Refused> {
        match self.call(revoke(token), &[])? {
            (Reply::Revoked(revoked), _) => Ok(revoked.sessions_cut),
            (other, _) => panic!("{other:?}"),
        }
    }

    /// Brings a password for a handle of one's own.
    pub fn register(
        &self,
        request: RegisterRequest,
        secret: &[BorrowedFd<'_>],
    ) -> Result<IssueHandleResponse, Refused> {
        match self.call(Request::Register(request), secret)? {
            (Reply::Registered(issued), _) => Ok(issued),
            (other, _) => panic!("{other:?}"),
        }
    }

    /// Stores a credential.
    pub fn put(
        &self,
        request: PutRequest,
        secret: &[BorrowedFd<'_>],
    ) -> Result<PutResponse, Refused> {
        match self.call(Request::Put(request), secret)? {
            (Reply::Stored(stored), _) => Ok(stored),
            (other, _) => panic!("{other:?}"),
        }
    }

    /// Takes an authenticated socket, in the form of a session whose server is at its other end.
    ///
    /// # Panics
    /// When the server refuses, or not exactly one descriptor comes with it.
    pub fn open(&self, token: &str) -> Result<Taken, Refused> {
        match self.call(open(token), &[])? {
            (Reply::Opened(opened), mut descriptors) => {
                assert_eq!(descriptors.len(), 1, "one socket: {opened:?}");
                Ok(Taken { opened, socket: descriptors.remove(0) })
            }
            (other, _) => panic!("{other:?}"),
        }
    }

    /// Takes the secret itself.
    ///
    /// # Panics
    /// When not exactly one descriptor comes with it.
    pub fn reveal(&self, token: &str) -> Result<(RevealResponse, File), Refused> {
        let request = RevealRequest { token: token.into() };
        match self.call(Request::Reveal(request), &[])? {
            (Reply::Revealed(revealed), mut descriptors) => {
                assert_eq!(descriptors.len(), 1, "one memfd");
                Ok((revealed, descriptors.remove(0).into()))
            }
            (other, _) => panic!("{other:?}"),
        }
    }
}

impl AsFd for Packets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A request for a handle.
#[must_use]
pub fn issue(connection: &str) -> Request {
    Request::Issue(IssueHandleRequest { connection: connection.into(), ..Default::default() })
}

/// A request for an authenticated socket.
#[must_use]
pub fn open(token: &str) -> Request {
    Request::Open(OpenRequest { token: token.into(), ..Default::default() })
}

/// A request to look at a handle.
#[must_use]
pub fn describe(token: &str) -> Request {
    Request::Describe(DescribeHandleRequest { token: token.into() })
}

/// A request to end a handle.
#[must_use]
pub fn revoke(token: &str) -> Request {
    let handle = Some(revoke_handle_request::Handle::Token(token.into()));
    Request::Revoke(RevokeHandleRequest { handle })
}

/// The reason of a refusal.
///
/// # Panics
/// When it has none.
#[must_use]
pub fn reason(refused: &Refused) -> Reason {
    Reason::try_from(refused.reason).expect("a reason of the contract")
}

/// A memfd that may be sealed, with this in it.
///
/// # Panics
/// When there is none to be had.
#[must_use]
pub fn memfd(content: &[u8]) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("secret", flags).expect("a memfd"));
    file.write_all_at(content, 0).expect("written");
    file
}
