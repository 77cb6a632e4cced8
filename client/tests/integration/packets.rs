//! The other side of a packet socket, played packet by packet.

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use credbroker_proto::v1;
use credbroker_proto::v1::packet_reply::Reply;
use credbroker_proto::v1::packet_request::Request;
use prost::Message as _;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, acceptfrom_with,
};
use tempfile::TempDir;

use crate::broker::{DEFAULT_TTL, PATIENCE};

/// The most descriptors that the kernel lets ride along.
pub(crate) const MOST_DESCRIPTORS: usize = 253;

/// Directories for a broker of packets alone.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("run")).unwrap();
        fs::create_dir(directory.path().join("run-admin")).unwrap();
        Self(directory)
    }

    pub(crate) fn runtime_dir(&self) -> PathBuf {
        self.0.path().join("run")
    }

    pub(crate) fn packet_socket(&self) -> PathBuf {
        self.runtime_dir().join(credbroker_proto::PACKET_SOCKET)
    }

    pub(crate) fn admin_packet_socket(&self) -> PathBuf {
        self.0.path().join("run-admin").join(credbroker_proto::ADMIN_PACKET_SOCKET)
    }
}

pub(crate) struct Listener(OwnedFd);

impl Listener {
    pub(crate) fn bind(socket: &Path) -> Self {
        Self::with_backlog(socket, 16)
    }

    pub(crate) fn with_backlog(socket: &Path, backlog: i32) -> Self {
        let fd = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        rustix::net::bind(&fd, &SocketAddrUnix::new(socket).unwrap()).unwrap();
        rustix::net::listen(&fd, backlog).unwrap();
        // On a listener it bounds accept.
        set_socket_timeout(&fd, Timeout::Recv, Some(PATIENCE)).unwrap();
        Self(fd)
    }

    /// Binds, and plays `script` in a thread of its own.
    pub(crate) fn play<T: Send + 'static>(
        socket: &Path,
        script: impl FnOnce(Self) -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let listener = Self::bind(socket);
        thread::spawn(move || script(listener))
    }

    pub(crate) fn accept(&self) -> Peer {
        let (fd, _address) = acceptfrom_with(&self.0, SocketFlags::CLOEXEC).unwrap();
        for direction in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&fd, direction, Some(PATIENCE)).unwrap();
        }
        Peer(fd)
    }
}

/// A client, connected.
pub(crate) struct Peer(OwnedFd);

impl Peer {
    /// The next request and what rode along; `None` when the client is gone.
    pub(crate) fn receive(&self) -> Option<(u64, Request, Vec<OwnedFd>)> {
        let mut bytes = vec![0; 2 * credbroker_proto::MAX_PACKET];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let got = rustix::net::recvmsg(&self.0, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC);
        let length = got.unwrap().bytes;
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                descriptors.extend(fds);
            }
        }
        if length == 0 {
            return None;
        }
        assert!(length <= credbroker_proto::MAX_PACKET, "{length}");
        let packet = v1::PacketRequest::decode(&bytes[..length]).unwrap();
        Some((packet.id, packet.request.unwrap(), descriptors))
    }

    /// [`Peer::receive`] of a request that nothing rides along with; gives its id.
    pub(crate) fn expect(&self, what: &str, wanted: impl Fn(&Request) -> bool) -> u64 {
        let (id, request, descriptors) = self.receive().unwrap();
        assert!(wanted(&request), "expected {what}: {request:?}");
        assert!(descriptors.is_empty());
        id
    }

    pub(crate) fn reply(&self, id: u64, reply: Reply) {
        self.reply_with(id, reply, &[]);
    }

    pub(crate) fn reply_with(&self, id: u64, reply: Reply, descriptors: &[BorrowedFd<'_>]) {
        let packet = v1::PacketReply { id, reply: Some(reply) };
        self.send(&packet.encode_to_vec(), descriptors);
    }

    pub(crate) fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        let flags = SendFlags::NOSIGNAL;
        let sent = rustix::net::sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, flags);
        assert_eq!(sent.unwrap(), bytes.len());
    }
}

/// Descriptors as `Peer::send` takes them.
pub(crate) fn borrow(descriptors: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    descriptors.iter().map(AsFd::as_fd).collect()
}

pub(crate) fn token(nth: u64) -> String {
    format!("cbh_{nth:A>43}")
}

pub(crate) fn handle_id(nth: u64) -> String {
    format!("hdl_{nth:a>16}")
}

pub(crate) fn handle(nth: u64) -> v1::Handle {
    let now = std::time::SystemTime::now();
    v1::Handle {
        id: handle_id(nth),
        connection: "main_db".into(),
        issued: Some(now.into()),
        expires: Some((now + DEFAULT_TTL).into()),
        ..Default::default()
    }
}

pub(crate) fn issued(nth: u64) -> v1::IssueHandleResponse {
    v1::IssueHandleResponse {
        handle: Some(handle(nth)),
        token: token(nth),
        endpoint: Some(v1::Endpoint {
            door: "postgres".into(),
            database: "mydb".into(),
            user: "main_db".into(),
        }),
    }
}

pub(crate) fn described(nth: u64) -> Reply {
    Reply::Described(v1::DescribeHandleResponse { handle: Some(handle(nth)) })
}

pub(crate) fn revoked() -> Reply {
    Reply::Revoked(v1::RevokeHandleResponse { sessions_cut: 2 })
}

pub(crate) fn refused(reason: v1::Reason) -> Reply {
    Reply::Refused(v1::Refused {
        reason: reason.into(),
        message: "as the test wants it".into(),
        r#ref: 81,
        ..Default::default()
    })
}
