//! A socket that the broker handed over, as a stream that drivers can log in on.
//!
//! The session on it is authenticated already. [`Handoff`] answers a driver's startup message from
//! what the server said at the login, and is the raw socket from then on: neither the broker nor
//! this library stands between driver and server.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use credbroker_proto::v1::OpenResponse;
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, Shutdown, SocketType, shutdown};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use crate::{Error, Handle, PacketClient, Reason};

/// MAX_STARTUP_PACKET_LENGTH of the server.
const MAX_STARTUP: usize = 10_000;
/// PostgreSQL protocol 55.7.
const SSL_REQUEST: u32 = 80_877_103;
const GSSENC_REQUEST: u32 = 80_877_104;
const MAJOR_3: u32 = 3;

/// A request for an authenticated socket.
#[derive(Clone, Debug, Default)]
pub struct OpenRequest {
    database: Option<String>,
    startup: Vec<(String, String)>,
}

impl OpenRequest {
    /// To the connection's own database, with the server's settings.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Another database that the connection allows.
    #[must_use]
    pub fn database(mut self, database: impl Into<String>) -> Self {
        self.database = Some(database.into());
        self
    }

    /// A setting for the session, as in a startup message: `application_name`, `options`, …. What
    /// the driver itself says at its startup is not sent, for the login is over by then.
    #[must_use]
    pub fn parameter(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.startup.push((name.into(), value.into()));
        self
    }

    pub(crate) fn into_wire(self, token: &crate::Token) -> credbroker_proto::v1::OpenRequest {
        let setting = |(name, value)| credbroker_proto::v1::StartupParameter { name, value };
        credbroker_proto::v1::OpenRequest {
            token: token.expose().to_owned(),
            database: self.database.unwrap_or_default(),
            startup: self.startup.into_iter().map(setting).collect(),
        }
    }
}

/// An authenticated session with the server. A driver logs in on it as on a fresh connection, with
/// any user and without encryption, and has the session that was opened.
///
/// Dropping it ends the session: it shuts the socket down, also for whoever has it by another
/// descriptor. The session ends, too, with the process that opened it, and whenever the broker takes
/// it away; then the stream is at its end.
pub struct Handoff {
    socket: Socket,
    stage: Stage,
    session: String,
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

enum Stage {
    /// The driver has not said everything yet, and has not read every answer.
    Startup(Startup),
    /// Nothing stands in between.
    Raw,
}

struct Startup {
    prelude: Vec<u8>,
    /// The message that is being written.
    heard: Vec<u8>,
    answer: Vec<u8>,
    read: usize,
    greeted: bool,
    reader: Option<Waker>,
}

impl Handoff {
    pub(crate) fn from_wire(
        opened: OpenResponse,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Self, Error> {
        if !opened.server_error.is_empty() {
            return Err(Error::database(&opened.server_error));
        }
        let mut descriptors = descriptors.into_iter();
        let (Some(socket), None) = (descriptors.next(), descriptors.next()) else {
            return Err(Error::protocol("it must come with one descriptor"));
        };
        let socket = Socket::new(socket)
            .map_err(|_error| Error::protocol("its descriptor is no connected stream socket"))?;
        let OpenResponse { prelude, session, .. } = opened;
        let stage = Stage::Startup(Startup {
            prelude,
            heard: Vec::new(),
            answer: Vec::new(),
            read: 0,
            greeted: false,
            reader: None,
        });
        Ok(Self { socket, stage, session })
    }

    /// The public name of the session, as the broker's audit log has it.
    #[must_use]
    pub fn session(&self) -> &str {
        &self.session
    }
}

impl Socket {
    fn new(socket: OwnedFd) -> io::Result<Self> {
        if socket_type(&socket)? != SocketType::STREAM {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match socket_domain(&socket)? {
            AddressFamily::UNIX => {
                let stream = std::os::unix::net::UnixStream::from(socket);
                stream.set_nonblocking(true)?;
                UnixStream::from_std(stream).map(Self::Unix)
            }
            AddressFamily::INET | AddressFamily::INET6 => {
                let stream = std::net::TcpStream::from(socket);
                stream.set_nonblocking(true)?;
                TcpStream::from_std(stream).map(Self::Tcp)
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

impl AsFd for Handoff {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(stream) => stream.as_fd(),
            Socket::Unix(stream) => stream.as_fd(),
        }
    }
}

impl Drop for Handoff {
    fn drop(&mut self) {
        // The broker has the socket too, so that closing it would end nothing.
        let _over = shutdown(&*self, Shutdown::Both);
    }
}

impl fmt::Debug for Handoff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handoff").field("session", &self.session).finish_non_exhaustive()
    }
}

impl Startup {
    /// Takes bytes of the driver's, up to the end of its startup message. 0 when that is over.
    fn hear(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut taken = 0;
        for byte in bytes {
            if self.greeted {
                break;
            }
            self.heard.push(*byte);
            taken += 1;
            self.understand()?;
        }
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
        Ok(taken)
    }

    fn understand(&mut self) -> io::Result<()> {
        let wrong = |what| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        let Some((length, rest)) = self.heard.split_first_chunk() else { return Ok(()) };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if !(8..=MAX_STARTUP).contains(&length) {
            return wrong("the startup message must have 8 to 10000 bytes");
        }
        let (Some(code), true) = (rest.first_chunk(), self.heard.len() == length) else {
            return Ok(());
        };
        match u32::from_be_bytes(*code) {
            SSL_REQUEST | GSSENC_REQUEST => self.answer.push(b'N'),
            version if version >> 16 == MAJOR_3 => {
                self.answer.append(&mut self.prelude);
                self.greeted = true;
            }
            _ => return wrong("the first message is not a startup message of protocol 3"),
        }
        self.heard.clear();
        Ok(())
    }

    /// Gives what is to be read. Whether anything was.
    fn tell(&mut self, buf: &mut ReadBuf<'_>) -> bool {
        let rest = self.answer.get(self.read..).unwrap_or_default();
        let some = rest.get(..buf.remaining()).unwrap_or(rest);
        buf.put_slice(some);
        self.read += some.len();
        !some.is_empty()
    }

    fn is_over(&self) -> bool {
        self.greeted && self.read == self.answer.len()
    }
}

impl AsyncRead for Handoff {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Stage::Startup(startup) = &mut this.stage {
            if startup.tell(buf) || buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            if !startup.is_over() {
                startup.reader = Some(context.waker().clone());
                return Poll::Pending;
            }
            this.stage = Stage::Raw;
        }
        match &mut this.socket {
            Socket::Tcp(stream) => Pin::new(stream).poll_read(context, buf),
            Socket::Unix(stream) => Pin::new(stream).poll_read(context, buf),
        }
    }
}

impl AsyncWrite for Handoff {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if let Stage::Startup(startup) = &mut this.stage
            && !startup.greeted
        {
            return Poll::Ready(startup.hear(bytes));
        }
        match &mut this.socket {
            Socket::Tcp(stream) => Pin::new(stream).poll_write(context, bytes),
            Socket::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().socket {
            Socket::Tcp(stream) => Pin::new(stream).poll_flush(context),
            Socket::Unix(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().socket {
            Socket::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Socket::Unix(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

/// A way to the database for a driver: the socket itself where that may be had, else the door.
/// A driver that logs in with the handle's user, its token as the password and no encryption
/// needs not know which it is.
#[derive(Debug)]
#[non_exhaustive]
pub enum Stream {
    /// The server's own socket.
    Handoff(Handoff),
    /// A connection to the broker's door, which asks for the token.
    Door(UnixStream),
}

impl Stream {
    /// Opens the way that a handle gives. The door is taken where the socket cannot be had: the
    /// link is protected by TLS, or the caller has no grant for `handoff`.
    ///
    /// ```no_run
    /// use credbroker_client::{IssueRequest, OpenRequest, PacketClient, Stream};
    ///
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// let broker = PacketClient::connect().await?;
    /// let handle = broker.issue(IssueRequest::new("main_db")).await?;
    /// let stream = Stream::open(&broker, &handle, OpenRequest::new()).await?;
    /// // tokio_postgres::Config::new().user("main_db").password(handle.token().expose())
    /// //     .ssl_mode(SslMode::Disable).connect_raw(stream, NoTls).await?;
    /// # drop(stream);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`PacketClient::open`], but for the two above; [`Error::Connect`] when nobody is
    /// at the door.
    pub async fn open(
        broker: &PacketClient,
        handle: &Handle,
        request: OpenRequest,
    ) -> Result<Self, Error> {
        match broker.open(handle.token(), request).await {
            Ok(handoff) => Ok(Self::Handoff(handoff)),
            Err(error) if is_for_the_door(&error) => {
                let socket = handle.endpoint().door.join(".s.PGSQL.5432");
                Self::through_the_door(&socket).await
            }
            Err(error) => Err(error),
        }
    }

    async fn through_the_door(socket: &Path) -> Result<Self, Error> {
        let stream = UnixStream::connect(socket).await.map_err(|source| Error::Connect {
            socket: socket.to_owned(),
            source: source.into(),
        })?;
        Ok(Self::Door(stream))
    }
}

fn is_for_the_door(error: &Error) -> bool {
    error.reason().is_some_and(|reason| {
        [Reason::HandoffUnsupported, Reason::AccessDenied, Reason::Unsupported].contains(&reason)
    })
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Handoff(stream) => Pin::new(stream).poll_read(context, buf),
            Self::Door(stream) => Pin::new(stream).poll_read(context, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Handoff(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Door(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Handoff(stream) => Pin::new(stream).poll_flush(context),
            Self::Door(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Handoff(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Door(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const PRELUDE: &[u8] = b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I";
    const STARTUP: &[u8] = b"\0\0\0\x10\0\x03\0\0user\0x\0\0";

    fn handoff() -> (std::os::unix::net::UnixStream, Handoff) {
        let (server, ours) = std::os::unix::net::UnixStream::pair().unwrap();
        let opened = OpenResponse {
            prelude: PRELUDE.to_vec(),
            session: "ses_1".to_owned(),
            ..OpenResponse::default()
        };
        (server, Handoff::from_wire(opened, vec![ours.into()]).unwrap())
    }

    #[tokio::test]
    async fn a_startup_is_answered_and_then_it_is_the_socket() {
        let (mut server, mut client) = handoff();
        client.write_all(&[0, 0, 0, 8, 4, 210, 22, 47]).await.unwrap();
        assert_eq!(client.read_u8().await.unwrap(), b'N');
        // In pieces, with what a hasty driver sends behind it.
        for piece in STARTUP.chunks(3) {
            client.write_all(piece).await.unwrap();
        }
        client.write_all(b"query").await.unwrap();
        let mut prelude = vec![0; PRELUDE.len()];
        client.read_exact(&mut prelude).await.unwrap();
        assert_eq!(prelude, PRELUDE);
        let mut query = [0; 5];
        server.read_exact(&mut query).unwrap();
        assert_eq!(&query, b"query", "nothing of the startup went to the server");
        std::io::Write::write_all(&mut server, b"row").unwrap();
        let mut row = [0; 3];
        client.read_exact(&mut row).await.unwrap();
        assert_eq!(&row, b"row");
        // Also where somebody else still has the socket.
        let dup = client.as_fd().try_clone_to_owned().unwrap();
        drop(client);
        assert_eq!(server.read(&mut [0]).unwrap(), 0);
        drop(dup);
    }

    #[tokio::test]
    async fn what_is_no_startup_is_an_error_and_bounded() {
        let wrong: [&[u8]; 3] = [&[0, 0, 0, 7], &[0, 0, 0x27, 0x11], &[0, 0, 0, 8, 4, 210, 22, 46]];
        for wrong in wrong {
            let (_server, mut client) = handoff();
            let error = client.write_all(wrong).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{wrong:?}");
        }
    }

    #[tokio::test]
    async fn a_reply_without_a_socket_is_none() {
        let file = std::fs::File::open("/dev/null").unwrap();
        for descriptors in [vec![], vec![OwnedFd::from(file)]] {
            let error = Handoff::from_wire(OpenResponse::default(), descriptors).unwrap_err();
            assert!(matches!(error, Error::Protocol { .. }), "{error}");
        }
        let server_error = b"E\0\0\0\x15SFATAL\0C3D000\0Mno\0\0".to_vec();
        let opened = OpenResponse { server_error, ..OpenResponse::default() };
        let error = Handoff::from_wire(opened, vec![]).unwrap_err();
        assert_eq!(error.to_string(), "the database refused: no (3D000)");
    }
}
