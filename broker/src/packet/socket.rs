//! One accepted SOCK_SEQPACKET connection: a packet in, with whatever rides along; a packet out.
//!
//! A zero-length packet and the end of the stream look alike to recvmsg(2); here they do not.

#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use credbroker_proto::MAX_PACKET;
use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use crate::sys;

/// SCM_MAX_FD of unix(7): no packet carries more descriptors.
const MAX_DESCRIPTORS: usize = 253;
/// Room for all of them, and for the credentials that a service manager may have switched on.
const CONTROL: usize = cmsg_space!(ScmRights(MAX_DESCRIPTORS), ScmCredentials(1));
/// How long a peer may leave its replies unread.
const UNREAD_FOR: Duration = Duration::from_secs(10);

thread_local! {
    /// Packets are received and decoded without a pause, so that a thread needs one buffer, and
    /// an idle connection none.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; MAX_PACKET].into_boxed_slice());
}

/// A connection. Not for dropping: what waits in it may block the closer, so see
/// [`Socket::into_descriptor`].
#[derive(Debug)]
pub(super) struct Socket {
    /// Readable only: a registration for both directions is woken whenever the peer reads.
    fd: AsyncFd<OwnedFd>,
}

/// What recvmsg(2) gave, before anybody has looked at it.
#[derive(Debug)]
pub(super) struct Packet<'a> {
    pub(super) bytes: &'a [u8],
    /// The packet was longer than [`MAX_PACKET`].
    pub(super) cut_short: bool,
    /// Descriptors, or other control messages, found no room.
    pub(super) control_lost: bool,
    /// Whatever rode along, asked for or not.
    pub(super) descriptors: Vec<OwnedFd>,
}

impl Socket {
    /// Registers a connection with the runtime; gives it back when that cannot be done.
    pub(super) fn new(fd: OwnedFd) -> Result<Self, (OwnedFd, io::Error)> {
        sys::register(fd, Interest::READABLE).map(|fd| Self { fd })
    }

    /// Waits for a packet and lends it to `decode`. `None` at the end of the stream.
    ///
    /// # Errors
    /// When the connection is broken.
    pub(super) async fn receive<R>(
        &self,
        mut decode: impl FnMut(Packet<'_>) -> R,
    ) -> io::Result<Option<R>> {
        loop {
            let mut ready = self.fd.readable().await?;
            // Err: it was taken for readable and is not.
            if let Ok(received) = ready.try_io(|fd| receive_now(fd.get_ref().as_fd(), &mut decode))
            {
                return received;
            }
        }
    }

    /// Sends one packet, with a descriptor if one is given.
    ///
    /// # Errors
    /// When the connection is broken, or the peer has not read its replies for too long.
    pub(super) async fn send(
        &self,
        bytes: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let socket = self.fd.get_ref().as_fd();
        match send_now(socket, bytes, descriptor) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            sent => return sent,
        }
        let second = self.fd.get_ref().try_clone()?;
        let writable =
            sys::register(second, Interest::WRITABLE).map_err(|(_second, error)| error)?;
        let sent = timeout(UNREAD_FOR, async {
            loop {
                let mut ready = writable.writable().await?;
                if let Ok(sent) = ready.try_io(|_| send_now(socket, bytes, descriptor)) {
                    return sent;
                }
            }
        });
        sent.await.unwrap_or_else(|_late| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Whether the peer has read all that was sent. `false` too when it cannot any more.
    pub(super) fn is_all_read(&self) -> bool {
        // In this order: a peer that closes its end first leaves the error, and then drops what it
        // has not read.
        let socket = self.fd.get_ref().as_fd();
        sys::unread_by_peer(socket).is_ok_and(|unread| unread == 0)
            && !is_in(socket, PollFlags::ERR)
    }

    /// The same, once the peer has had time to read.
    pub(super) async fn are_all_read_at_last(&self) -> bool {
        let Ok(second) = self.fd.get_ref().try_clone() else { return self.is_all_read() };
        let Ok(writable) = sys::register(second, Interest::WRITABLE) else {
            return self.is_all_read();
        };
        let read = timeout(UNREAD_FOR, async {
            loop {
                if self.is_all_read() {
                    return true;
                }
                // Nobody reads there any more; what was just read is seen now.
                if is_in(writable.get_ref().as_fd(), PollFlags::HUP) {
                    return self.is_all_read();
                }
                // The kernel tells whenever a packet is read.
                match writable.writable().await {
                    Ok(mut ready) => ready.clear_ready(),
                    Err(_shut_down) => return false,
                }
            }
        });
        read.await.unwrap_or(false)
    }

    /// The descriptor, to be closed where that may take its time.
    pub(super) fn into_descriptor(self) -> OwnedFd {
        self.fd.into_inner()
    }
}

fn receive_now<R>(
    socket: BorrowedFd<'_>,
    decode: &mut impl FnMut(Packet<'_>) -> R,
) -> io::Result<Option<R>> {
    SCRATCH.with_borrow_mut(|scratch| {
        let mut space = [MaybeUninit::uninit(); CONTROL];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut data = [IoSliceMut::new(scratch)];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received =
            rustix::io::retry_on_intr(|| recvmsg(socket, &mut data, &mut control, flags))?;
        // Before anything else: what is left in the buffer would be closed here.
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                descriptors.extend(more);
            }
        }
        let control_lost = received.flags.contains(ReturnFlags::CTRUNC);
        if received.bytes == 0 && descriptors.is_empty() && !control_lost && is_at_end(socket) {
            return Ok(None);
        }
        let packet = Packet {
            bytes: scratch.get(..received.bytes).unwrap_or_default(),
            cut_short: received.flags.contains(ReturnFlags::TRUNC),
            control_lost,
            descriptors,
        };
        let decoded = decode(packet);
        // A token stood there, perhaps, and the next packet may be long in coming.
        scratch.iter_mut().take(received.bytes).for_each(|byte| *byte = 0);
        Ok(Some(decoded))
    })
}

/// Whether nothing more can come. Empty packets that a peer sends just before it closes its side
/// are taken for the end too: nothing tells them apart.
fn is_at_end(socket: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let closed = !matches!(poll(&mut fds, Some(&now)), Ok(0));
    closed && ioctl_fionread(socket).is_ok_and(|waiting| waiting == 0)
}

/// Whether a socket is in this state at this moment (poll(2)).
fn is_in(socket: BorrowedFd<'_>, state: PollFlags) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(socket, state)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok() && fds.iter().any(|fd| fd.revents().intersects(state))
}

fn send_now(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let one = descriptor.map(|descriptor| [descriptor]);
    if let Some(one) = &one
        && !control.push(SendAncillaryMessage::ScmRights(one))
    {
        return Err(Errno::NOBUFS.into());
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    rustix::io::retry_on_intr(|| sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, Socket) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (peer, ours) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        (peer, Socket::new(ours).unwrap())
    }

    fn send(peer: &OwnedFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); CONTROL];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        sendmsg(peer, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
    }

    #[tokio::test]
    async fn an_empty_packet_is_not_the_end() {
        let (peer, socket) = pair();
        for packet in [b"".as_slice(), b"a", b"", b"bc"] {
            send(&peer, packet, &[]);
        }
        shutdown(&peer, Shutdown::Write).unwrap();
        let mut lengths = Vec::new();
        while let Some(length) = socket.receive(|packet| packet.bytes.len()).await.unwrap() {
            lengths.push(length);
        }
        assert_eq!(lengths, [0, 1, 0, 2]);
    }

    #[tokio::test]
    async fn every_descriptor_finds_room_and_closes_at_exec() {
        let (peer, socket) = pair();
        let file = tempfile::tempfile().unwrap();
        let all = [file.as_fd(); MAX_DESCRIPTORS];
        send(&peer, b"", &all);
        send(&peer, b"x", &all[..3]);
        let take = |packet: Packet<'_>| (packet.control_lost, packet.descriptors);
        let (lost, descriptors) = socket.receive(take).await.unwrap().unwrap();
        assert_eq!((lost, descriptors.len()), (false, MAX_DESCRIPTORS));
        for descriptor in &descriptors {
            let flags = rustix::io::fcntl_getfd(descriptor).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        }
        let (lost, descriptors) = socket.receive(take).await.unwrap().unwrap();
        assert_eq!((lost, descriptors.len()), (false, 3));
    }

    #[tokio::test]
    async fn a_long_packet_is_cut_short_and_says_so() {
        let (peer, socket) = pair();
        send(&peer, &vec![7; MAX_PACKET], &[]);
        send(&peer, &vec![7; MAX_PACKET + 1], &[]);
        let take = |packet: Packet<'_>| (packet.bytes.len(), packet.cut_short);
        assert_eq!(socket.receive(take).await.unwrap(), Some((MAX_PACKET, false)));
        assert_eq!(socket.receive(take).await.unwrap(), Some((MAX_PACKET, true)));
    }

    #[tokio::test]
    async fn a_reply_carries_a_descriptor() {
        let (peer, ours) = pair();
        let theirs = Socket::new(peer).unwrap();
        let file = tempfile::tempfile().unwrap();
        ours.send(b"reply", Some(file.as_fd())).await.unwrap();
        let got = theirs
            .receive(|packet| (packet.bytes.to_vec(), packet.descriptors.len()))
            .await
            .unwrap();
        assert_eq!(got, Some((b"reply".to_vec(), 1)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_does_not_read_is_given_up() {
        let (_peer, socket) = pair();
        let error = loop {
            if let Err(error) = socket.send(&[0; 1024], None).await {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
