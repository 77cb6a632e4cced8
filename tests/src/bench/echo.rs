//! The least that a packet server can do: a blocking thread, one recv(2) and one send(2) a
//! request; or the same as a task.

use std::fs;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, accept, bind, listen, recv, send, sendmsg, socket_with,
};
use tokio::runtime::Builder;
use tokio_seqpacket::UnixSeqpacket;

use super::rig::{Helper, ascii};
use crate::identity::Identity;
use crate::packet::Packets;
use crate::wait;

/// An echo in a process of its own, and a connection to it.
#[derive(Debug)]
pub(super) struct Echo {
    pub(super) packets: Packets,
    _process: Helper,
}

impl Echo {
    /// One whose replies are `reply` bytes long, and of this kind: `plain`, with a `descriptor`, or
    /// by a `task`.
    pub(super) fn start(path: &Path, reply: usize, kind: &str) -> Self {
        let process = Helper::start(&["serve-echo", ascii(path), &reply.to_string(), kind]);
        let packets =
            wait::until(Duration::from_secs(10), || Packets::connect(&Identity::own(), path).ok());
        Self { packets: packets.expect("the echo listens"), _process: process }
    }
}

/// Serves one client with replies of `reply` bytes; with `descriptor` one rides along.
///
/// # Panics
/// When the socket cannot be had.
pub fn serve(path: &Path, reply: usize, descriptor: bool) {
    let listener = listener(path, SocketType::SEQPACKET);
    let socket = accept(&listener).expect("the client");
    let (mut buffer, reply) = (vec![0_u8; 65536], vec![7_u8; reply]);
    let passed = [listener.as_fd()];
    loop {
        match recv(&socket, &mut buffer[..], RecvFlags::empty()) {
            Ok((_, 1..)) => {}
            Ok(_) | Err(_) => return,
        }
        let sent = if descriptor {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(
                control.push(SendAncillaryMessage::ScmRights(&passed)),
                "there is room for one"
            );
            sendmsg(&socket, &[IoSlice::new(&reply)], &mut control, SendFlags::NOSIGNAL)
        } else {
            send(&socket, &reply, SendFlags::NOSIGNAL)
        };
        if sent.is_err() {
            return;
        }
    }
}

/// The same by a task on the broker's runtime, without descriptors.
///
/// # Panics
/// When the socket cannot be had.
pub fn serve_by_task(path: &Path, reply: usize) {
    let listener = listener(path, SocketType::SEQPACKET);
    let socket = accept(&listener).expect("the client");
    let runtime = Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let task = runtime.spawn(async move {
        let socket = UnixSeqpacket::try_from(socket).expect("registered");
        let (mut buffer, reply) = (vec![0_u8; 65536], vec![7_u8; reply]);
        while socket.recv(&mut buffer).await.is_ok_and(|packet| packet.bytes_read() > 0) {
            socket.send(&reply).await.expect("sent");
        }
    });
    runtime.block_on(task).expect("it does not panic");
}

/// A listening socket that everybody may connect to.
pub(super) fn listener(path: &Path, kind: SocketType) -> OwnedFd {
    let listener = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None);
    let listener = listener.expect("a socket");
    bind(&listener, &SocketAddrUnix::new(path).expect("a short path")).expect("bound");
    fs::set_permissions(path, fs::Permissions::from_mode(0o777)).expect("chmod");
    listen(&listener, 128).expect("listening");
    listener
}
