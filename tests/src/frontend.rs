//! A PostgreSQL frontend of few words, which can also lie: it sends what it is told to.
//!
//! Message formats: PostgreSQL documentation, 55.7.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::identity::Identity;

const PROTOCOL_3_0: u32 = 0x0003_0000;
const CANCEL_REQUEST: u32 = 80_877_102;
const SSL_REQUEST: u32 = 80_877_103;
const GSSENC_REQUEST: u32 = 80_877_104;
/// Longer than any time limit of the broker's that the tests look at.
const READ_LIMIT: Duration = Duration::from_secs(30);

/// A connection to a door.
#[derive(Debug)]
pub struct Frontend {
    stream: UnixStream,
}

/// A message of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Its type byte.
    pub tag: u8,
    /// What follows the length.
    pub body: Vec<u8>,
}

/// An ErrorResponse or NoticeResponse, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerError {
    fields: BTreeMap<char, String>,
}

/// An authenticated session.
#[derive(Debug)]
pub struct Session {
    /// The connection, ready for queries.
    pub frontend: Frontend,
    /// ParameterStatus as sent.
    pub parameters: BTreeMap<String, String>,
    /// The body of BackendKeyData: process id and key.
    pub cancel_key: Vec<u8>,
}

/// Why there is no session.
#[derive(Debug)]
pub enum LoginError {
    /// The door said no.
    Refused(ServerError),
    /// The connection broke.
    Broken(io::Error),
}

impl LoginError {
    /// The door's refusal.
    ///
    /// # Panics
    /// When the connection broke instead.
    #[must_use]
    pub fn refusal(self) -> ServerError {
        match self {
            Self::Refused(error) => error,
            Self::Broken(error) => panic!("the connection broke without a refusal: {error}"),
        }
    }
}

impl From<io::Error> for LoginError {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

impl Frontend {
    /// Connects to the socket at `door` as `identity`.
    pub fn connect(identity: &Identity, door: &Path) -> io::Result<Self> {
        Self::over(identity.connect(door)?)
    }

    /// Speaks over a connection that somebody has made.
    pub fn over(stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(READ_LIMIT))?;
        stream.set_write_timeout(Some(READ_LIMIT))?;
        Ok(Self { stream })
    }

    /// The socket.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Sends a message with its type and its true length.
    pub fn send_message(&mut self, tag: u8, body: &[u8]) -> io::Result<()> {
        self.send(&message(tag, body))
    }

    /// The next message; `None` when the door closed the connection, cleanly or not.
    pub fn receive(&mut self) -> io::Result<Option<Message>> {
        let mut header = [0; 5];
        if let Err(error) = self.stream.read_exact(&mut header) {
            return if closed(&error) { Ok(None) } else { Err(error) };
        }
        let [tag, length @ ..] = header;
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        let mut body = vec![0; length.saturating_sub(4)];
        match self.stream.read_exact(&mut body) {
            Ok(()) => Ok(Some(Message { tag, body })),
            Err(error) if closed(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// One byte, as the answer to SSLRequest and GSSENCRequest is.
    pub fn receive_byte(&mut self) -> io::Result<u8> {
        let mut byte = [0];
        self.stream.read_exact(&mut byte)?;
        Ok(byte[0])
    }

    /// Everything up to the end of the connection.
    pub fn receive_rest(&mut self) -> io::Result<Vec<Message>> {
        let mut messages = Vec::new();
        while let Some(message) = self.receive()? {
            messages.push(message);
        }
        Ok(messages)
    }

    /// Logs in: `user` names the connection, `token` is the password if one is asked for.
    pub fn login(
        mut self,
        user: &str,
        database: Option<&str>,
        token: &str,
    ) -> Result<Session, LoginError> {
        let mut parameters = vec![("user", user)];
        parameters.extend(database.map(|database| ("database", database)));
        self.send(&startup(&parameters))?;
        self.authenticate(token)
    }

    /// What follows the startup message.
    pub fn authenticate(mut self, token: &str) -> Result<Session, LoginError> {
        let mut parameters = BTreeMap::new();
        let mut cancel_key = Vec::new();
        loop {
            let Some(message) = self.receive()? else {
                return Err(LoginError::Broken(io::ErrorKind::UnexpectedEof.into()));
            };
            match (message.tag, message.body.as_slice()) {
                (b'R', [0, 0, 0, 3]) => {
                    self.send_message(b'p', &[token.as_bytes(), b"\0"].concat())?;
                }
                (b'S', body) => {
                    let mut texts = texts(body);
                    parameters.extend(texts.next().zip(texts.next()));
                }
                (b'K', body) => cancel_key = body.to_vec(),
                (b'Z', _) => return Ok(Session { frontend: self, parameters, cancel_key }),
                (b'E', body) => return Err(LoginError::Refused(ServerError::parse(body))),
                _ => {}
            }
        }
    }
}

impl Session {
    /// Sends a simple query without waiting for its end.
    ///
    /// # Panics
    /// When the connection is broken.
    pub fn start_query(&mut self, sql: &str) {
        let body = [sql.as_bytes(), b"\0"].concat();
        self.frontend.send_message(b'Q', &body).expect("the session takes a query");
    }

    /// Reads until ReadyForQuery: the fields of all rows as text, or the error. `None` when
    /// the connection ended before either.
    ///
    /// # Panics
    /// When nothing comes for longer than half a minute.
    pub fn finish_query(&mut self) -> Option<Result<Vec<Vec<String>>, ServerError>> {
        let mut rows = Vec::new();
        let mut error = None;
        while let Some(message) = self.frontend.receive().expect("an answer comes in time") {
            match message.tag {
                b'D' => rows.push(row(&message.body)),
                b'E' => error = Some(ServerError::parse(&message.body)),
                b'Z' => return Some(error.map_or(Ok(rows), Err)),
                _ => {}
            }
        }
        error.map(Err)
    }

    /// Sends simple queries, all at once, while their answers are read: each must be one row of
    /// one field.
    ///
    /// # Panics
    /// When the connection ends, or a query fails.
    pub fn pipeline(&mut self, queries: &[String]) -> Vec<String> {
        let mut sender = self.frontend.stream.try_clone().expect("a descriptor");
        let bodies = queries.iter().map(|sql| message(b'Q', &[sql.as_bytes(), b"\0"].concat()));
        let bytes: Vec<u8> = bodies.flatten().collect();
        thread::scope(|scope| {
            scope.spawn(move || sender.write_all(&bytes).expect("the session takes queries"));
            let answer = |_| self.finish_query().expect("the session lives on").expect("a row");
            queries.iter().map(answer).map(|rows| rows[0][0].clone()).collect()
        })
    }

    /// Runs a simple query on a connection that may be at its end; `None` when it is.
    pub fn query_or_end(&mut self, sql: &str) -> Option<Result<Vec<Vec<String>>, ServerError>> {
        // What the socket does not take any more is the end too, and what was said before it stays.
        let _closed = self.frontend.send_message(b'Q', &[sql.as_bytes(), b"\0"].concat());
        self.finish_query()
    }

    /// Runs a simple query.
    ///
    /// # Panics
    /// When the connection ends.
    pub fn query(&mut self, sql: &str) -> Result<Vec<Vec<String>>, ServerError> {
        self.start_query(sql);
        self.finish_query().expect("the session lives on")
    }
}

impl ServerError {
    fn parse(body: &[u8]) -> Self {
        let fields = texts(body).filter_map(|field| {
            let mut characters = field.chars();
            Some((characters.next()?, characters.as_str().to_owned()))
        });
        Self { fields: fields.collect() }
    }

    /// The error of an `E` message.
    ///
    /// # Panics
    /// When it is another message.
    #[must_use]
    pub fn from_message(message: &Message) -> Self {
        assert_eq!(message.tag, b'E', "not an ErrorResponse: {message:?}");
        Self::parse(&message.body)
    }

    /// The SQLSTATE.
    #[must_use]
    pub fn sqlstate(&self) -> &str {
        self.fields.get(&'C').map_or("", String::as_str)
    }

    /// The broker's name of the reason, which drivers give to programs as the routine.
    #[must_use]
    pub fn reason(&self) -> &str {
        self.fields.get(&'R').map_or("", String::as_str)
    }

    /// The whole error as one text, with `ref=N` made equal, so that two refusals can be
    /// compared byte for byte.
    #[must_use]
    pub fn without_reference(&self) -> String {
        without_reference(&self.to_string())
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fields.iter().try_for_each(|(field, text)| write!(f, "[{field}]{text}"))
    }
}

/// `text` with the number of each `ref=N` replaced.
#[must_use]
pub fn without_reference(text: &str) -> String {
    let mut parts = text.split("ref=");
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        plain.push_str("ref=N");
        plain.push_str(part.trim_start_matches(|c: char| c.is_ascii_digit()));
    }
    plain
}

/// A startup message of protocol 3.0 with these parameters.
#[must_use]
pub fn startup(parameters: &[(&str, &str)]) -> Vec<u8> {
    startup_of(0, parameters)
}

/// The same for a client that asks for protocol 3.`minor`.
#[must_use]
pub fn startup_of(minor: u16, parameters: &[(&str, &str)]) -> Vec<u8> {
    let mut body = (PROTOCOL_3_0 + u32::from(minor)).to_be_bytes().to_vec();
    for (key, value) in parameters {
        body.extend_from_slice(&[key.as_bytes(), b"\0", value.as_bytes(), b"\0"].concat());
    }
    body.push(0);
    packet(&body)
}

/// SSLRequest.
#[must_use]
pub fn ssl_request() -> Vec<u8> {
    packet(&SSL_REQUEST.to_be_bytes())
}

/// GSSENCRequest.
#[must_use]
pub fn gssenc_request() -> Vec<u8> {
    packet(&GSSENC_REQUEST.to_be_bytes())
}

/// CancelRequest with the body of a BackendKeyData.
#[must_use]
pub fn cancel_request(cancel_key: &[u8]) -> Vec<u8> {
    packet(&[&CANCEL_REQUEST.to_be_bytes(), cancel_key].concat())
}

/// A message without a type, with its true length.
#[must_use]
pub fn packet(body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).expect("test messages are short");
    [&length.to_be_bytes(), body].concat()
}

/// A message with a type and its true length.
#[must_use]
pub fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    [&[tag], packet(body).as_slice()].concat()
}

/// The zero-terminated texts of a message.
fn texts(body: &[u8]) -> impl Iterator<Item = String> + '_ {
    body.split(|byte| *byte == 0).map(|text| String::from_utf8_lossy(text).into_owned())
}

fn row(body: &[u8]) -> Vec<String> {
    let mut rest = body.get(2..).unwrap_or_default();
    let mut fields = Vec::new();
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        // A negative length is NULL.
        let length = usize::try_from(i32::from_be_bytes(*length)).unwrap_or(0);
        let (field, after) = after.split_at_checked(length).unwrap_or((after, &[]));
        fields.push(String::from_utf8_lossy(field).into_owned());
        rest = after;
    }
    fields
}

fn closed(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_made_equal() {
        assert_eq!(without_reference("no (ref=81)"), "no (ref=N)");
        assert_eq!(without_reference("no"), "no");
        assert_eq!(without_reference("ref=1 ref=22x"), "ref=N ref=Nx");
    }

    #[test]
    fn a_startup_message_has_its_own_length() {
        let bytes = startup(&[("user", "main_db")]);
        assert_eq!(bytes.len(), 4 + 4 + 5 + 8 + 1);
        assert_eq!(bytes[..4], [0, 0, 0, 22]);
    }
}
