//! The keeper's second dups of sockets that were handed over, on a thread of their own: a program
//! that is slow to start holds up nobody's end.
//!
//! The end of the channel is the end of the broker, however it came. Then every socket is shut
//! down, for whoever has it.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt::set_socket_linger;
use rustix::net::{Shutdown, shutdown};
use rustix::process::{Resource, getrlimit};

use super::message::{Reply, Request};
use super::packet::{Received, receive, send};

/// Sockets held at once, wherever descriptors are plentiful.
const MOST: usize = 65_536;

/// Holds what comes over `channel` until its other end is closed.
pub(super) fn serve(channel: &OwnedFd) {
    let most = room();
    let mut held: HashMap<u64, OwnedFd> = HashMap::new();
    while let Some((request, socket)) = next(channel) {
        let answer = match (request, socket) {
            (Request::Hold(id), Some(_)) if held.len() >= most => Reply::Full(id),
            (Request::Hold(id), Some(socket)) => {
                held.insert(id, socket);
                Reply::Held(id)
            }
            (Request::Drop(id), None) => {
                held.remove(&id);
                Reply::Dropped(id)
            }
            (
                Request::Hold(_) | Request::Drop(_) | Request::Run(_) | Request::Channel,
                Some(_) | None,
            ) => break,
        };
        // The broker waits for each answer, so there is always room for it.
        if send(channel, &answer.encode(), None).is_err() {
            break;
        }
    }
    // All of them first: closing may take longer.
    held.values().for_each(end);
}

/// Ends a socket for everybody who has it, and lets no close of it wait.
fn end(socket: impl AsFd) {
    // Fails only when the other side was faster.
    let _ = shutdown(&socket, Shutdown::Both);
    let _ = set_socket_linger(&socket, Some(Duration::ZERO));
}

/// The next request; `None` at the end, and after what no broker says.
fn next(channel: &OwnedFd) -> Option<(Request, Option<OwnedFd>)> {
    loop {
        let mut fds = [PollFd::new(channel, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return None,
        }
        match receive(channel) {
            Ok(Received::Packet { bytes, fd }) => return Some((Request::decode(&bytes)?, fd)),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Ok(Received::End | Received::Oversized) | Err(_) => return None,
        }
    }
}

/// Half of the descriptors that this process may have: the rest is for its programs.
fn room() -> usize {
    let limit = getrlimit(Resource::Nofile).current.and_then(|limit| usize::try_from(limit).ok());
    limit.map_or(MOST, |limit| limit / 2).min(MOST)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;
    use std::thread;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn channel() -> (OwnedFd, thread::JoinHandle<()>) {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        (ours, thread::spawn(move || serve(&theirs)))
    }

    fn ask(channel: &OwnedFd, request: Request, socket: Option<&OwnedFd>) -> Option<Reply> {
        send(channel, &request.encode(), socket.map(AsFd::as_fd)).unwrap();
        poll(&mut [PollFd::new(channel, PollFlags::IN)], None).unwrap();
        match receive(channel).unwrap() {
            Received::Packet { bytes, fd: None } => Reply::decode(&bytes),
            Received::Packet { .. } | Received::End | Received::Oversized => None,
        }
    }

    fn pair() -> (UnixStream, OwnedFd) {
        let (server, ours) = UnixStream::pair().unwrap();
        server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        (server, ours.into())
    }

    #[test]
    fn the_end_of_the_channel_ends_what_is_held_and_nothing_else() {
        let (channel, thread) = channel();
        let (mut held, ours) = pair();
        let (mut dropped, other) = pair();
        assert_eq!(ask(&channel, Request::Hold(1), Some(&ours)), Some(Reply::Held(1)));
        assert_eq!(ask(&channel, Request::Hold(2), Some(&other)), Some(Reply::Held(2)));
        assert_eq!(ask(&channel, Request::Drop(2), None), Some(Reply::Dropped(2)));
        drop(channel);
        thread.join().unwrap();
        // Both have an owner here, and only one was shut down.
        assert_eq!(held.read(&mut [0]).unwrap(), 0);
        dropped.set_nonblocking(true).unwrap();
        let alive = dropped.read(&mut [0]).unwrap_err();
        assert_eq!(alive.kind(), std::io::ErrorKind::WouldBlock);
        drop((ours, other));
    }

    #[test]
    fn what_no_broker_says_ends_everything() {
        for (wrong, with) in [(Request::Run(0), false), (Request::Hold(3), false)] {
            let (channel, thread) = channel();
            let (mut held, ours) = pair();
            assert_eq!(ask(&channel, Request::Hold(1), Some(&ours)), Some(Reply::Held(1)));
            send(&channel, &wrong.encode(), with.then_some(channel.as_fd())).unwrap();
            thread.join().unwrap();
            assert_eq!(held.read(&mut [0]).unwrap(), 0, "{wrong:?}");
        }
    }
}
