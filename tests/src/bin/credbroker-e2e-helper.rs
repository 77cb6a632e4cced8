//! Small programs that the tests need as processes of their own.
#![allow(clippy::print_stdout, reason = "the tests wait for what these programs print")]

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::{fs, hint};

use clap::Parser;
use credbroker_e2e::frontend::Frontend;
use credbroker_e2e::handles::{Handles, Refusal};
use credbroker_e2e::identity::{Identity, pass_descriptor};
use credbroker_e2e::packet::Packets;
use credbroker_e2e::postgres;
use credbroker_proto::v1::{Bind, IssueHandleRequest, Refused};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use rustix::process::{Signal, getpid, kill_process};

/// The first descriptor that systemd passes on, see `sd_listen_fds(3)`.
const LISTEN_FDS_START: i32 = 3;

#[derive(Parser)]
enum Role {
    /// Runs the PostgreSQL that the tests share, until nobody uses it.
    GuardPostgres,
    /// Keeps what comes from standard input in its heap until the input ends: the positive
    /// control of the memory scan.
    Hold,
    /// Asks a broker who one is and for a handle, over a connection to `broker.sock`, and prints
    /// the answers in one line.
    Ask {
        /// For a handle of which connection.
        connection: String,
        /// The socket to connect to. Without it, standard input is the connection.
        #[arg(long)]
        socket: Option<PathBuf>,
    },
    /// Issues a bound handle, opens a session with it, prints its token, and keeps all of it until
    /// standard input ends.
    HoldHandle {
        /// Of which connection.
        connection: String,
        /// `lifetime` or `process`.
        bind: String,
        /// `broker.sock`.
        socket: PathBuf,
        /// The socket of the door.
        door: PathBuf,
    },
    /// Connects, passes the connections over standard input, and ends when that ends.
    Lend {
        /// What to connect to, in this order.
        #[arg(required = true)]
        sockets: Vec<PathBuf>,
    },
    /// Connects again and again, sends what is no beginning of anything, and is killed with all
    /// of it open.
    Flood {
        /// How often to each socket.
        count: usize,
        /// What to connect to.
        sockets: Vec<PathBuf>,
    },
    /// Takes an authenticated socket, passes it on over its standard input, and stays until that
    /// ends.
    Take {
        /// The connection.
        connection: String,
        /// The packet socket.
        socket: PathBuf,
    },
    /// Passes listening sockets on as systemd does, and becomes COMMAND.
    Activate {
        /// `NAME=PATH` of a socket to listen on.
        #[arg(long = "socket", required = true)]
        sockets: Vec<String>,
        /// The gid that the sockets get.
        #[arg(long)]
        group: Option<u32>,
        /// What to become.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
}

fn main() -> ExitCode {
    let done = match Role::parse() {
        Role::GuardPostgres => postgres::guard(),
        Role::Hold => hold(),
        Role::Ask { connection, socket } => ask(&connection, socket.as_deref()),
        Role::HoldHandle { connection, bind, socket, door } => {
            hold_handle(&connection, &bind, &socket, &door)
        }
        Role::Lend { sockets } => lend(&sockets),
        Role::Take { connection, socket } => take(&connection, &socket),
        Role::Flood { count, sockets } => flood(count, &sockets),
        Role::Activate { sockets, group, command } => activate(&sockets, group, &command),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Reads one line, says that it has it, and keeps it until the input ends.
fn hold() -> io::Result<()> {
    let mut secret = String::new();
    io::stdin().read_line(&mut secret)?;
    println!("held");
    let mut rest = Vec::new();
    io::stdin().read_to_end(&mut rest)?;
    hint::black_box(&secret);
    Ok(())
}

fn ask(connection: &str, socket: Option<&Path>) -> io::Result<()> {
    let broker = match socket {
        Some(socket) => Handles::connect(&Identity::own(), socket)?,
        None => Handles::over(UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?))?,
    };
    let refused = |refusal: Refusal| refusal.reason;
    let who = broker.whoami().map_err(|refusal| io::Error::other(refusal.message))?;
    let issued = broker.issue(connection).map_or_else(refused, |_issued| "issued".to_owned());
    println!("uid={} pid={} issue={issued}", who.uid, who.pid.unwrap_or_default());
    Ok(())
}

fn hold_handle(connection: &str, bind: &str, socket: &Path, door: &Path) -> io::Result<()> {
    let bind = if bind == "process" { Bind::Process } else { Bind::Lifetime };
    let broker = Handles::connect(&Identity::own(), socket)?;
    let request = IssueHandleRequest {
        connection: connection.into(),
        bind: bind.into(),
        ..Default::default()
    };
    let issued = broker.issue_with(request);
    let token = issued.map_err(|refusal| io::Error::other(refusal.message))?.token;
    let session = Frontend::connect(&Identity::own(), door)?.login(connection, None, &token);
    let session = session.map_err(|error| io::Error::other(format!("{error:?}")))?;
    println!("{token}");
    io::stdin().read_to_end(&mut Vec::new())?;
    drop(session);
    Ok(())
}

fn take(connection: &str, socket: &Path) -> io::Result<()> {
    let packets = Packets::connect(&Identity::own(), socket)?;
    let refused = |refused: Refused| io::Error::other(refused.message);
    let token = packets.issue(connection).map_err(refused)?.token;
    let taken = packets.open(&token).map_err(refused)?;
    pass_descriptor(io::stdin(), taken.socket)?;
    io::stdin().read_to_end(&mut Vec::new()).map(drop)
}

fn lend(sockets: &[PathBuf]) -> io::Result<()> {
    for socket in sockets {
        pass_descriptor(io::stdin(), connect(socket)?)?;
    }
    io::stdin().read_to_end(&mut Vec::new()).map(drop)
}

fn connect(socket: &Path) -> io::Result<OwnedFd> {
    if socket.file_name().is_none_or(|name| name != credbroker_proto::PACKET_SOCKET) {
        return Ok(UnixStream::connect(socket)?.into());
    }
    let kind = SocketType::SEQPACKET;
    let packets = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    rustix::net::connect(&packets, &SocketAddrUnix::new(socket)?)?;
    Ok(packets)
}

fn flood(count: usize, sockets: &[PathBuf]) -> io::Result<()> {
    let mut open = Vec::new();
    for number in 0..count {
        for socket in sockets {
            let mut stream = UnixStream::connect(socket)?;
            let garbage: &[&[u8]] = &[
                b"",
                b"\0",
                b"PRI * HTTP/2.0\r\n",
                b"GET / HTTP/1.1\r\n\r\n",
                b"\xff\xff\xff\xff",
            ];
            // A broker that has hung up already does not read it.
            let _hung_up = garbage.get(number % 5).map(|bytes| stream.write_all(bytes));
            open.push(stream);
        }
    }
    kill_process(getpid(), Signal::KILL)?;
    Ok(())
}

/// Binds the sockets in order, so that they get the descriptors 3, 4, …, and execs. The
/// process id does not change, which is what LISTEN_PID is compared with.
fn activate(sockets: &[String], group: Option<u32>, command: &[String]) -> io::Result<()> {
    let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
    let mut listeners = Vec::new();
    let mut names = Vec::new();
    for (number, socket) in (LISTEN_FDS_START..).zip(sockets) {
        let (name, path) =
            socket.split_once('=').ok_or_else(|| wrong(format!("{socket}: not NAME=PATH")))?;
        let listener = listen(&PathBuf::from(path), group)?;
        if listener.as_raw_fd() != number {
            return Err(wrong(format!("descriptor {number} was taken before")));
        }
        fcntl_setfd(&listener, FdFlags::empty())?;
        names.push(name);
        listeners.push(listener);
    }
    let (program, arguments) =
        command.split_first().ok_or_else(|| wrong("no command".to_owned()))?;
    Err(Command::new(program)
        .args(arguments)
        .env("LISTEN_PID", std::process::id().to_string())
        .env("LISTEN_FDS", listeners.len().to_string())
        .env("LISTEN_FDNAMES", names.join(":"))
        .exec())
}

#[allow(clippy::disallowed_methods, reason = "this stands in for systemd, not for the broker")]
fn listen(path: &Path, group: Option<u32>) -> io::Result<OwnedFd> {
    let listener = match path.file_name() {
        Some(name) if name == credbroker_proto::PACKET_SOCKET => listen_packet(path)?,
        _ => UnixListener::bind(path)?.into(),
    };
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
    std::os::unix::fs::chown(path, None, group)?;
    Ok(listener)
}

fn listen_packet(path: &Path) -> io::Result<OwnedFd> {
    let kind = SocketType::SEQPACKET;
    let listener = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    rustix::net::bind(&listener, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&listener, 128)?;
    Ok(listener)
}
