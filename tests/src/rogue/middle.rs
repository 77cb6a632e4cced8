//! A man in the middle: a server that logs the broker in to the real one, word for word, and
//! writes everything down.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::{Greeting, Script, Wire};
use crate::frontend::packet;
use crate::postgres::Server;

/// Longest message of a login.
const LONGEST: usize = 64 << 10;
const PATIENCE: Duration = Duration::from_secs(20);

/// What passed a man in the middle in both directions, up to the end of the login.
#[derive(Debug, Default)]
pub struct Middle {
    heard: Mutex<Vec<Heard>>,
}

/// A message that passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heard {
    /// Whether the real server said it.
    pub from_server: bool,
    /// Its type; 0 for the startup message.
    pub tag: u8,
    /// What follows the length.
    pub body: Vec<u8>,
}

impl Middle {
    /// Nothing heard yet.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// What has passed until now.
    #[must_use]
    pub fn heard(&self) -> Vec<Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, from_server: bool, tag: u8, body: &[u8]) {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.push(Heard { from_server, tag, body: body.into() });
    }

    /// A script that passes a login on to `server`, over its Unix socket, and then answers
    /// queries with what the server answers.
    #[must_use]
    pub fn script(self: &Arc<Self>, server: &Server) -> Script {
        let (middle, upstream) = (Arc::clone(self), socket_of(server));
        Arc::new(move |wire| middle.pass_on(wire, &upstream))
    }

    fn pass_on(&self, wire: &mut Wire, upstream: &PathBuf) -> io::Result<()> {
        let Greeting::Startup(startup) = wire.greet()? else { return Ok(()) };
        self.note(false, 0, &startup);
        let mut server = UnixStream::connect(upstream)?;
        server.set_read_timeout(Some(PATIENCE))?;
        server.write_all(&packet(&startup))?;
        loop {
            let (tag, body) = receive(&mut server)?;
            self.note(true, tag, &body);
            wire.send(&crate::frontend::message(tag, &body))?;
            let asks = tag == b'R' && matches!(body.get(..4), Some([0, 0, 0, 10 | 11]));
            if asks || tag == b'Z' {
                let (tag, body) = wire.receive()?;
                self.note(false, tag, &body);
                server.write_all(&crate::frontend::message(tag, &body))?;
            }
        }
    }
}

/// Says to a real server what was heard from the broker, in the hope of being let in: everything
/// that the broker said, each when the server waits for it. Gives what the server answers.
///
/// # Errors
/// When the server is not there.
pub fn replay(server: &Server, heard: &[Heard]) -> io::Result<Vec<Heard>> {
    let mut stream = UnixStream::connect(socket_of(server))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answers = Vec::new();
    for said in heard.iter().filter(|heard| !heard.from_server) {
        let bytes = match said.tag {
            0 => packet(&said.body),
            tag => crate::frontend::message(tag, &said.body),
        };
        if stream.write_all(&bytes).is_err() {
            break;
        }
        let Ok((tag, body)) = receive(&mut stream) else { break };
        answers.push(Heard { from_server: true, tag, body });
    }
    // What else it says before it hangs up, or falls silent.
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    while let Ok((tag, body)) = receive(&mut stream) {
        answers.push(Heard { from_server: true, tag, body });
    }
    Ok(answers)
}

fn receive(stream: &mut UnixStream) -> io::Result<(u8, Vec<u8>)> {
    let mut header = [0; 5];
    stream.read_exact(&mut header)?;
    let [tag, length @ ..] = header;
    let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
    if !(4..=LONGEST).contains(&length) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut body = vec![0; length - 4];
    stream.read_exact(&mut body)?;
    Ok((tag, body))
}

fn socket_of(server: &Server) -> PathBuf {
    server.socket_dir.join(format!(".s.PGSQL.{}", server.port))
}
