//! Whether sockets that were handed over have arrived.
//!
//! That a packet was sent says nothing of whether it is read: the kernel keeps it for the peer, and
//! drops it with whatever rides along when the peer closes its end. A session of which nobody has
//! the socket ends here, and not only when the peer's process exits.
//!
//! unix(7) has no word for that a packet was read. SIOCOUTQ is zero when all were, and a peer that
//! closes its end with packets unread leaves ECONNRESET. So what is known is whether anything was
//! left unread, not what: then everything goes that was not seen to be read before.

#![forbid(unsafe_code)]

use std::io;

use super::socket::Socket;
use crate::door::postgres::handoff::Delivery;

/// The sockets on their way to one peer.
#[derive(Debug, Default)]
pub(super) struct Deliveries {
    unread: Vec<Delivery>,
}

impl Deliveries {
    /// A packet with one has been sent.
    pub(super) fn sent(&mut self, delivery: Delivery) {
        self.unread.push(delivery);
    }

    /// Looks whether they have arrived.
    pub(super) fn look(&mut self, socket: &Socket) {
        // Those of sessions that are over wait for nothing.
        self.unread.retain(|delivery| !delivery.is_moot());
        if !self.unread.is_empty() && socket.is_all_read() {
            self.arrived();
        }
    }

    /// The connection has ended, in this way. Ends the sessions whose sockets were left unread; a
    /// peer that has closed only its sending side is given time to read.
    pub(super) async fn conclude(&mut self, socket: &Socket, how: &io::Result<()>) {
        if self.unread.is_empty() {
            return;
        }
        let all_read = match how {
            Ok(()) => socket.are_all_read_at_last().await,
            Err(error) => error.kind() != io::ErrorKind::ConnectionReset && socket.is_all_read(),
        };
        if all_read {
            self.arrived();
        }
        // Dropped, each says to its session that nobody has it.
        self.unread.clear();
    }

    /// Nobody looks any more: the sessions end in another way.
    pub(super) fn arrived(&mut self) {
        self.unread.drain(..).for_each(Delivery::done);
    }
}
