//! Who is at the other end of a connection over loopback.
//!
//! TCP has no `SO_PEERCRED`. But both ends of a loopback connection are in the tables of one
//! kernel, and these tell the uid that owns each socket (man proc_pid_net(5), `net/tcp`). A
//! browser behind `ssh -L` is the `sshd` of whoever logged in.
//!
//! Invariant: a [`Visitor`] is a connection whose other end belonged to the uid that was asked
//! for, while it was open. Who is not found is nobody.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read as _, Seek as _};
use std::net::{IpAddr, SocketAddr};

use tokio::net::TcpStream;

/// `TCP_ESTABLISHED`. In the later states the table has uid 0 for a socket without an owner.
const ESTABLISHED: &str = "01";
/// What is read of a table at most, in bytes: some 400 000 sockets.
const MAX_TABLE: u64 = 64 << 20;
/// `overflowuid`: a uid that this namespace has no number for (man user_namespaces(7)).
const UNMAPPED: u32 = 65_534;

/// The kernel's tables of TCP sockets, opened while files can be opened.
pub(super) struct Tables {
    v4: File,
    /// Absent where the kernel has no IPv6.
    v6: Option<File>,
}

/// A connection of the one who may open the page.
pub(super) struct Visitor(TcpStream);

/// Why there is no [`Visitor`].
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stranger {
    /// The socket belongs to this uid.
    Other(u32),
    /// The kernel tells no owner: closed already, or not of this network namespace.
    Unknown,
}

impl Tables {
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self { v4: File::open("/proc/net/tcp")?, v6: File::open("/proc/net/tcp6").ok() })
    }

    /// Asks for the owner of the other end of `stream`.
    pub(super) fn admit(
        &self,
        stream: TcpStream,
        opened_by: u32,
    ) -> Result<Visitor, (Stranger, TcpStream)> {
        let owner = || {
            let (theirs, ours) = (stream.peer_addr()?, stream.local_addr()?);
            self.owner(theirs, ours)
        };
        match owner() {
            Ok(Some(uid)) if uid == opened_by && uid != UNMAPPED => Ok(Visitor(stream)),
            Ok(Some(uid)) => Err((Stranger::Other(uid), stream)),
            Ok(None) | Err(_) => Err((Stranger::Unknown, stream)),
        }
    }

    fn owner(&self, theirs: SocketAddr, ours: SocketAddr) -> io::Result<Option<u32>> {
        if theirs.is_ipv4()
            && let Some(uid) = owner_in(&self.v4, &spell(theirs), &spell(ours))?
        {
            return Ok(Some(uid));
        }
        // An IPv6 socket can connect to an IPv4 address, and is in the other table then.
        let Some(v6) = &self.v6 else { return Ok(None) };
        owner_in(v6, &spell(mapped(theirs)), &spell(mapped(ours)))
    }
}

impl Visitor {
    pub(super) fn into_stream(self) -> TcpStream {
        self.0
    }
}

/// Reads a table from its beginning.
fn owner_in(mut table: &File, local: &str, remote: &str) -> io::Result<Option<u32>> {
    table.rewind()?;
    let mut rows = BufReader::new(table.take(MAX_TABLE));
    let mut row = String::new();
    while rows.read_line(&mut row)? > 0 {
        if let Some(uid) = owner_of(&row, local, remote) {
            return Ok(Some(uid));
        }
        row.clear();
    }
    Ok(None)
}

/// `sl local remote st queues timer retransmits uid …`
fn owner_of(row: &str, local: &str, remote: &str) -> Option<u32> {
    let mut fields = row.split_ascii_whitespace().skip(1);
    let wanted = [local, remote, ESTABLISHED];
    if wanted.iter().any(|wanted| fields.next() != Some(wanted)) {
        return None;
    }
    fields.nth(3)?.parse().ok()
}

/// As the tables have it: words of 32 bits in the byte order of the machine, then the port.
fn spell(address: SocketAddr) -> String {
    let octets = match address.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let (words, _) = octets.as_chunks::<4>();
    let words = words.iter().map(|word| format!("{:08X}", u32::from_ne_bytes(*word)));
    format!("{}:{:04X}", words.collect::<String>(), address.port())
}

fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream as Blocking};

    use rustix::process::getuid;

    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn addresses_are_spelled_as_the_kernel_does() {
        assert_eq!(spell("127.0.0.1:8080".parse().unwrap()), "0100007F:1F90");
        let six = "00000000000000000000000001000000:0050";
        assert_eq!(spell("[::1]:80".parse().unwrap()), six);
        let both = mapped("127.0.0.1:80".parse().unwrap());
        assert_eq!(spell(both), "0000000000000000FFFF00000100007F:0050");
    }

    #[test]
    fn only_an_established_socket_has_an_owner() {
        let (local, remote) = ("0100007F:8D20", "0100007F:1F90");
        let row = |state: &str| {
            format!(
                "  12: {local} {remote} {state} 00000000:00000000 00:00000000 00000000  1000 \
                 0 43211 1 0000000000000000 20 4 30 10 -1\n"
            )
        };
        assert_eq!(owner_of(&row("01"), local, remote), Some(1000));
        assert_eq!(owner_of(&row("01"), remote, local), None, "our own end");
        for state in ["04", "05", "06", "08", "0A"] {
            assert_eq!(owner_of(&row(state), local, remote), None, "{state}");
        }
        assert_eq!(owner_of("", local, remote), None);
    }

    #[test]
    fn the_kernel_tells_the_owner_of_a_socket_while_it_is_open() {
        let tables = Tables::open().unwrap();
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(host) else { continue };
            let client = Blocking::connect(listener.local_addr().unwrap()).unwrap();
            let (server, theirs) = listener.accept().unwrap();
            let ours = server.local_addr().unwrap();
            let owner = || tables.owner(theirs, ours).unwrap();
            assert_eq!(owner(), Some(getuid().as_raw()), "{host}");
            assert_eq!(owner(), Some(getuid().as_raw()), "{host}, read again");
            drop(client);
            assert_eq!(owner(), None, "{host}");
        }
    }
}
