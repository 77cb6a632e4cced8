//! The floor under every relay in user space: one thread, one epoll instance, one recv(2) and
//! one send(2) a message, and nothing else. It knows no peer, no right and no end of one.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, epoll, poll};

use super::echo::listener;

const BUFFER: usize = 64 * 1024;
const LISTENER: u64 = u64::MAX;

/// Carries bytes between who connects to `listen` and `upstream`, for ever.
///
/// # Panics
/// When a socket cannot be had.
pub fn serve(listen: &Path, upstream: &Path) {
    let door = listener(listen, rustix::net::SocketType::STREAM);
    let watch = epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll instance");
    let flags = epoll::EventFlags::IN;
    let add = |socket: &dyn std::os::fd::AsFd, number: u64| {
        epoll::add(&watch, socket, epoll::EventData::new_u64(number), flags).expect("watched");
    };
    add(&door, LISTENER);
    // Two after another belong together.
    let mut sockets: Vec<Option<UnixStream>> = Vec::new();
    let mut buffer = vec![0; BUFFER];
    let mut events = Vec::with_capacity(64);
    loop {
        let spare = rustix::buffer::spare_capacity(&mut events);
        let _count = epoll::wait(&watch, spare, None).expect("epoll works");
        for event in events.drain(..) {
            if event.data.u64() == LISTENER {
                let client = UnixStream::from(rustix::net::accept(&door).expect("a client"));
                let Ok(server) = UnixStream::connect(upstream) else { continue };
                for socket in [client, server] {
                    socket.set_nonblocking(true).expect("a socket");
                    add(&socket, sockets.len() as u64);
                    sockets.push(Some(socket));
                }
                continue;
            }
            let from = usize::try_from(event.data.u64()).expect("an index");
            let (Some(reader), Some(writer)) = (&sockets[from], &sockets[from ^ 1]) else {
                continue;
            };
            if !carry(reader, writer, &mut buffer) {
                let _gone = writer.shutdown(Shutdown::Both);
                (sockets[from], sockets[from ^ 1]) = (None, None);
            }
        }
    }
}

/// Carries one buffer. `false`: it was the last.
fn carry(mut reader: &UnixStream, mut writer: &UnixStream, buffer: &mut [u8]) -> bool {
    let count = match reader.read(buffer) {
        Ok(0) => return false,
        Ok(count) => count,
        Err(error) => return error.kind() == std::io::ErrorKind::WouldBlock,
    };
    let mut rest = &buffer[..count];
    while !rest.is_empty() {
        match writer.write(rest) {
            Ok(count) => rest = &rest[count..],
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                // It has nobody else to serve in any measurement.
                let mut room = [PollFd::new(writer, PollFlags::OUT)];
                let _ready = poll(&mut room, None);
            }
            Err(_) => return false,
        }
    }
    true
}
