//! One packet with at most one descriptor, over a SOCK_SEQPACKET socket (man unix(7)).

#![forbid(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::message::MAX_MESSAGE;

/// A packet as it came.
#[derive(Debug)]
pub(super) enum Received {
    /// The other side is gone.
    End,
    Packet {
        bytes: Vec<u8>,
        fd: Option<OwnedFd>,
    },
    /// Longer than any message, or with more descriptors than any message has. They are closed.
    Oversized,
}

/// Sends without waiting: a full buffer is an error.
pub(super) fn send(socket: impl AsFd, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.as_slice();
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)?;
    Ok(())
}

/// Receives without waiting; [`io::ErrorKind::WouldBlock`] when there is nothing yet.
pub(super) fn receive(socket: impl AsFd) -> io::Result<Received> {
    let mut bytes = [0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let got = match recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
        Ok(got) => got,
        Err(rustix::io::Errno::CONNRESET) => return Ok(Received::End),
        Err(errno) => return Err(errno.into()),
    };
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    if fds.len() > 1 || got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Ok(Received::Oversized);
    }
    if got.bytes == 0 {
        return Ok(Received::End);
    }
    let bytes = bytes.get(..got.bytes).unwrap_or_default().to_vec();
    Ok(Received::Packet { bytes, fd: fds.pop() })
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn a_packet_too_long_or_with_too_many_descriptors_is_told_apart() {
        let (ours, theirs) = pair();
        assert_eq!(receive(&ours).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        send(&theirs, &[7; MAX_MESSAGE + 1], None).unwrap();
        assert!(matches!(receive(&ours).unwrap(), Received::Oversized));

        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [ours.as_fd(); 3];
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(&theirs, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
        assert!(matches!(receive(&ours).unwrap(), Received::Oversized));

        send(&theirs, b"x", Some(theirs.as_fd())).unwrap();
        let Received::Packet { bytes, fd: Some(_fd) } = receive(&ours).unwrap() else { panic!() };
        assert_eq!(bytes, b"x");
        drop((theirs, _fd));
        assert!(matches!(receive(&ours).unwrap(), Received::End));
    }
}
