//! The few messages of the PostgreSQL protocol that a login is made of (documentation, 55.7).
//! Bytes in, values out; every length has a bound. After the login only frames are counted.

#![forbid(unsafe_code)]

use crate::door::wire::{Malformed, Reader, Writer};
use crate::session::{ClientKey, KeyLength};

/// MAX_STARTUP_PACKET_LENGTH of the server.
pub(super) const MAX_STARTUP: usize = 10_000;
const MIN_STARTUP: usize = 8;
/// Longest password message taken: a token has 47 bytes.
pub(super) const MAX_PASSWORD: usize = 1024;

const SSL_REQUEST: u32 = 80_877_103;
const GSSENC_REQUEST: u32 = 80_877_104;
const CANCEL_REQUEST: u32 = 80_877_102;
const VERSION_3_0: u32 = 196_608;
const MAJOR_3: u32 = 3;
/// Longest secret of a cancel key (55.7, BackendKeyData).
const MAX_SECRET: usize = 256;

/// What a client may send first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum First {
    /// SSLRequest or GSSENCRequest: answered `N`.
    Encryption,
    Cancel(ClientKey),
    Startup(Startup),
}

/// A parameter of a startup message: its name, and its value as bytes, because in what encoding
/// that is nobody has said yet.
pub(crate) type Parameter = (String, Vec<u8>);

/// A startup message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Startup {
    pub(super) user: String,
    pub(super) database: Option<String>,
    pub(super) replication: Option<String>,
    /// The rest, in order, as sent.
    pub(super) parameters: Vec<Parameter>,
    /// Protocol options (`_pq_.…`), of which none is known here.
    pub(super) options: Vec<String>,
    /// The minor version asked for.
    pub(super) minor: u32,
}

/// What is spoken with a client. 3.2 differs from 3.0 in the length of cancel keys alone, which
/// are made here, so it does not matter what the server speaks; and there is no 3.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    V3_0,
    V3_2,
}

/// Why a first message is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadStartup {
    Length,
    Version,
    Malformed,
    NoUser,
}

/// The length that a client announces, itself included, if it can be true.
pub(super) fn startup_len(announced: [u8; 4]) -> Result<usize, BadStartup> {
    let len =
        usize::try_from(u32::from_be_bytes(announced)).map_err(|_too_long| BadStartup::Length)?;
    if (MIN_STARTUP..=MAX_STARTUP).contains(&len) { Ok(len) } else { Err(BadStartup::Length) }
}

/// The body of a first message, behind its length.
pub(super) fn first(body: &[u8]) -> Result<First, BadStartup> {
    let mut reader = Reader::new(body);
    match reader.u32()? {
        SSL_REQUEST | GSSENC_REQUEST => {
            reader.end()?;
            Ok(First::Encryption)
        }
        CANCEL_REQUEST => {
            let pid = reader.u32()?;
            let secret = reader.rest();
            if !(1..=MAX_SECRET).contains(&secret.len()) {
                return Err(BadStartup::Malformed);
            }
            Ok(First::Cancel(ClientKey { pid, secret: secret.into() }))
        }
        version if version >> 16 == MAJOR_3 => {
            startup(reader, version & 0xffff).map(First::Startup)
        }
        _ => Err(BadStartup::Version),
    }
}

fn startup(mut reader: Reader<'_>, minor: u32) -> Result<Startup, BadStartup> {
    let mut user = None;
    let mut startup = Startup {
        user: String::new(),
        database: None,
        replication: None,
        parameters: Vec::new(),
        options: Vec::new(),
        minor,
    };
    loop {
        let name = reader.c_str()?;
        if name.is_empty() {
            break;
        }
        let value = reader.c_bytes()?;
        match name {
            "user" => user = Some(text(value)?),
            // libpq sends no empty database; to the server it means the same as none.
            "database" => startup.database = Some(text(value)?).filter(|name| !name.is_empty()),
            "replication" => startup.replication = Some(text(value)?),
            option if option.starts_with("_pq_.") => startup.options.push(option.to_owned()),
            name => startup.parameters.push((name.to_owned(), value.to_vec())),
        }
    }
    reader.end()?;
    startup.user = user.filter(|user| !user.is_empty()).ok_or(BadStartup::NoUser)?;
    Ok(startup)
}

/// What the broker reads itself.
fn text(value: &[u8]) -> Result<String, BadStartup> {
    std::str::from_utf8(value).map(str::to_owned).map_err(|_not_text| BadStartup::Malformed)
}

impl Startup {
    /// The newest version that both sides speak.
    pub(super) fn version(&self) -> Version {
        if self.minor < Version::V3_2.minor() { Version::V3_0 } else { Version::V3_2 }
    }

    /// Whether the client asked for more than that and must be told so.
    pub(super) fn must_negotiate(&self) -> bool {
        self.minor != self.version().minor() || !self.options.is_empty()
    }
}

impl Version {
    const fn minor(self) -> u32 {
        match self {
            Self::V3_0 => 0,
            Self::V3_2 => 2,
        }
    }

    pub(super) const fn key_length(self) -> KeyLength {
        match self {
            Self::V3_0 => KeyLength::Short,
            Self::V3_2 => KeyLength::Long,
        }
    }
}

impl From<Malformed> for BadStartup {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

/// The text of a PasswordMessage's body.
pub(super) fn password(body: &[u8]) -> Result<&str, Malformed> {
    let mut reader = Reader::new(body);
    let text = reader.c_str()?;
    reader.end()?;
    Ok(text)
}

/// NegotiateProtocolVersion: what is spoken, and the options that mean nothing here.
pub(super) fn negotiate(version: Version, options: &[String]) -> Vec<u8> {
    let count = u32::try_from(options.len()).unwrap_or(u32::MAX);
    let message = Writer::tagged(b'v').u32(VERSION_3_0 + version.minor()).u32(count);
    options.iter().fold(message, |message, option| message.c_str(option)).finish()
}

pub(super) fn ask_cleartext_password() -> Vec<u8> {
    Writer::tagged(b'R').u32(3).finish()
}

pub(super) fn authentication_ok() -> Vec<u8> {
    Writer::tagged(b'R').u32(0).finish()
}

pub(super) fn backend_key_data(key: &ClientKey) -> Vec<u8> {
    Writer::tagged(b'K').u32(key.pid).bytes(&key.secret).finish()
}

/// A fatal ErrorResponse of the broker's own. `reason` stands in the field `R` (routine), which
/// drivers give to programs apart from the message: several reasons share a SQLSTATE.
pub(super) fn fatal(sqlstate: &str, message: &str, reason: &str, hint: Option<&str>) -> Vec<u8> {
    let mut error = Writer::tagged(b'E').bytes(b"S").c_str("FATAL").bytes(b"V").c_str("FATAL");
    error = error.bytes(b"C").c_str(sqlstate).bytes(b"M").c_str(message);
    if let Some(hint) = hint {
        error = error.bytes(b"H").c_str(hint);
    }
    error.bytes(b"R").c_str(reason).bytes(b"\0").finish()
}

/// The startup message of the broker's own login.
pub(super) fn startup_message<'a>(
    user: &str,
    database: &str,
    parameters: impl IntoIterator<Item = (&'a str, &'a [u8])>,
) -> Vec<u8> {
    let message = Writer::untagged()
        .u32(VERSION_3_0)
        .c_str("user")
        .c_str(user)
        .c_str("database")
        .c_str(database);
    let message = parameters
        .into_iter()
        .fold(message, |message, (name, value)| message.c_str(name).c_bytes(value));
    message.bytes(b"\0").finish()
}

pub(super) fn sasl_initial_response(mechanism: &str, response: &[u8]) -> Vec<u8> {
    let len = u32::try_from(response.len()).unwrap_or(u32::MAX);
    Writer::tagged(b'p').c_str(mechanism).u32(len).bytes(response).finish()
}

pub(super) fn sasl_response(response: &[u8]) -> Vec<u8> {
    Writer::tagged(b'p').bytes(response).finish()
}

pub(super) fn query(sql: &str) -> Vec<u8> {
    Writer::tagged(b'Q').c_str(sql).finish()
}

pub(super) fn cancel_request(pid: u32, secret: &[u8]) -> Vec<u8> {
    Writer::untagged().u32(CANCEL_REQUEST).u32(pid).bytes(secret).finish()
}

/// The SQLSTATE of an ErrorResponse's body.
pub(super) fn sqlstate(body: &[u8]) -> Option<[u8; 5]> {
    let mut reader = Reader::new(body);
    loop {
        match reader.array::<1>().ok()? {
            [0] => return None,
            [b'C'] => return reader.c_bytes().ok()?.try_into().ok(),
            _ => reader.c_bytes().ok().map(drop)?,
        }
    }
}

/// Follows the frames of one direction by their headers alone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Frames {
    header: [u8; 5],
    have: usize,
    body_left: usize,
    lost: bool,
}

impl Frames {
    const HEADER: usize = 5;

    /// Takes the next bytes of the stream; `complete` hears the type of each message that ends
    /// in them.
    pub(crate) fn advance(&mut self, mut bytes: &[u8], mut complete: impl FnMut(u8)) {
        while !bytes.is_empty() && !self.lost {
            if self.body_left > 0 {
                let (_, rest) = bytes.split_at_checked(self.body_left).unwrap_or((bytes, &[]));
                self.body_left -= bytes.len() - rest.len();
                bytes = rest;
            } else {
                let wanted = Self::HEADER - self.have;
                let (part, rest) = bytes.split_at_checked(wanted).unwrap_or((bytes, &[]));
                for (place, byte) in self.header.iter_mut().skip(self.have).zip(part) {
                    *place = *byte;
                }
                self.have += part.len();
                bytes = rest;
                if self.have < Self::HEADER {
                    return;
                }
                let [_, length @ ..] = self.header;
                match usize::try_from(u32::from_be_bytes(length))
                    .ok()
                    .and_then(|length| length.checked_sub(4))
                {
                    Some(body) => self.body_left = body,
                    None => self.lost = true,
                }
            }
            if self.have == Self::HEADER && self.body_left == 0 && !self.lost {
                let [tag, ..] = self.header;
                self.have = 0;
                complete(tag);
            }
        }
    }

    /// Whether the stream stands between two messages.
    pub(crate) fn at_boundary(&self) -> bool {
        self.have == 0 && !self.lost
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn startup_body(version: u32, text: &[u8]) -> Vec<u8> {
        let mut body = version.to_be_bytes().to_vec();
        body.extend_from_slice(text);
        body
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        for bad in [0, 3, 4, 7, 10_001, 0x7fff_ffff, 0xffff_ffff_u32] {
            assert_eq!(startup_len(bad.to_be_bytes()), Err(BadStartup::Length), "{bad}");
        }
        assert_eq!(startup_len(8_u32.to_be_bytes()), Ok(8));
        assert_eq!(startup_len(10_000_u32.to_be_bytes()), Ok(10_000));
    }

    #[test]
    fn a_startup_message() {
        let text = b"user\0main_db\0database\0mydb\0application_name\0psql\0_pq_.x\x001\0\0";
        let Ok(First::Startup(startup)) = first(&startup_body(VERSION_3_0, text)) else { panic!() };
        assert_eq!(startup.user, "main_db");
        assert_eq!(startup.database.as_deref(), Some("mydb"));
        assert_eq!(startup.parameters, [("application_name".to_owned(), b"psql".to_vec())]);
        assert_eq!(startup.options, ["_pq_.x"]);
        assert!(startup.must_negotiate());
    }

    #[test]
    fn values_are_bytes_and_what_the_broker_reads_is_text() {
        let latin_1 = b"user\0main_db\0application_name\0caf\xe9\0\0";
        let Ok(First::Startup(startup)) = first(&startup_body(VERSION_3_0, latin_1)) else {
            panic!()
        };
        assert_eq!(startup.parameters, [("application_name".to_owned(), b"caf\xe9".to_vec())]);
        for bad in [
            &b"user\0caf\xe9\0\0"[..],
            b"user\0x\0database\0caf\xe9\0\0",
            b"user\0x\0replication\0caf\xe9\0\0",
            b"user\0x\0caf\xe9\0x\0\0",
        ] {
            let refused = first(&startup_body(VERSION_3_0, bad));
            assert_eq!(refused, Err(BadStartup::Malformed), "{bad:?}");
        }
    }

    #[test]
    fn grease_is_negotiated_not_refused() {
        let Ok(First::Startup(startup)) = first(&startup_body(0x0003_270f, b"user\0x\0\0")) else {
            panic!()
        };
        assert!(startup.must_negotiate());
        assert_eq!(
            negotiate(startup.version(), &["_pq_.a".into()]),
            b"v\0\0\0\x13\0\x03\0\x02\0\0\0\x01_pq_.a\0"
        );
    }

    #[test]
    fn the_version_is_the_newest_that_both_speak() {
        let asked = |minor: u32| {
            let Ok(First::Startup(startup)) =
                first(&startup_body(VERSION_3_0 + minor, b"user\0x\0\0"))
            else {
                panic!()
            };
            (startup.version(), startup.must_negotiate())
        };
        assert_eq!(asked(0), (Version::V3_0, false));
        assert_eq!(asked(1), (Version::V3_0, true));
        assert_eq!(asked(2), (Version::V3_2, false));
        assert_eq!(asked(3), (Version::V3_2, true));
    }

    #[test]
    fn cancel_keys_of_any_length_that_there_is() {
        let cancel = |secret: &[u8]| {
            let body = [&CANCEL_REQUEST.to_be_bytes()[..], b"\0\0\0\x07", secret].concat();
            first(&body)
        };
        for length in [1, 4, 32, 256] {
            let secret = vec![b's'; length];
            let key = ClientKey { pid: 7, secret: secret.clone().into() };
            assert_eq!(cancel(&secret), Ok(First::Cancel(key)));
        }
        for length in [0, 257] {
            assert_eq!(cancel(&vec![b's'; length]), Err(BadStartup::Malformed));
        }
    }

    #[test]
    fn bad_startups() {
        let cases: &[(u32, &[u8], BadStartup)] = &[
            (VERSION_3_0, b"", BadStartup::Malformed),
            (VERSION_3_0, b"\0", BadStartup::NoUser),
            (VERSION_3_0, b"user\0\0\0", BadStartup::NoUser),
            (VERSION_3_0, b"user\0x\0", BadStartup::Malformed),
            (VERSION_3_0, b"user\0x\0\0trailing", BadStartup::Malformed),
            (VERSION_3_0, b"user\0\xff\0\0", BadStartup::Malformed),
            (0x0002_0000, b"user\0x\0\0", BadStartup::Version),
            (0x1603_0100, b"", BadStartup::Version),
            (SSL_REQUEST, b"early plaintext", BadStartup::Malformed),
            (CANCEL_REQUEST, b"\0\0\0\x01", BadStartup::Malformed),
        ];
        for (version, text, expected) in cases {
            assert_eq!(
                first(&startup_body(*version, text)),
                Err(*expected),
                "{version:x} {text:?}"
            );
        }
    }

    #[test]
    fn passwords() {
        assert_eq!(password(b"token\0"), Ok("token"));
        assert_eq!(password(b"token"), Err(Malformed));
        assert_eq!(password(b"to\0ken\0"), Err(Malformed));
    }

    #[test]
    fn the_sqlstate_of_an_error() {
        let error = fatal("28P01", "no", "HANDLE_INVALID", None);
        assert_eq!(sqlstate(&error[5..]), Some(*b"28P01"));
        for bad in [&b""[..], b"\0", b"Clonger\0", b"C28P01", b"M"] {
            assert_eq!(sqlstate(bad), None, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_first_message_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = first(&bytes);
            let _ = password(&bytes);
            let _ = sqlstate(&bytes);
            Frames::default().advance(&bytes, |_| {});
        }

        /// However a stream is cut into pieces, the same messages are seen.
        #[test]
        fn frames_do_not_depend_on_the_cuts(
            bodies in proptest::collection::vec(0_usize..50, 1..20),
            cuts in proptest::collection::vec(1_usize..30, 1..40),
        ) {
            let stream: Vec<u8> = bodies
                .iter()
                .flat_map(|len| Writer::tagged(b'D').bytes(&vec![b'x'; *len]).finish())
                .collect();
            let (mut frames, mut seen, mut rest) = (Frames::default(), 0, &stream[..]);
            for cut in cuts.iter().cycle() {
                let (piece, after) = rest.split_at((*cut).min(rest.len()));
                frames.advance(piece, |tag| { assert_eq!(tag, b'D'); seen += 1 });
                rest = after;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(seen, bodies.len());
            prop_assert!(frames.at_boundary());
        }
    }

    #[test]
    fn a_length_that_cannot_be_is_never_a_boundary_again() {
        let mut frames = Frames::default();
        frames.advance(b"D\0\0\0\x03", |_| panic!("no message ends here"));
        assert!(!frames.at_boundary());
    }
}
