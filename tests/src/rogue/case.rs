//! A case: how far a server plays along, what it says then, and what must come of it.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::scram::{Proven, sasl_final};
use super::{Greeting, Script, ServerTls, Verifier, Wire};
use crate::frontend::message;

/// How the broker is told to reach a rogue.
#[derive(Debug, Clone)]
pub struct Mode {
    /// `verify-full`, `unix`.
    pub name: &'static str,
    /// Keys of the connection, below its name.
    pub keys: Vec<(&'static str, toml::Value)>,
    /// Over a Unix socket.
    pub unix: bool,
    /// Whether the broker begins with SSLRequest.
    pub asks_tls: bool,
    /// Whether the broker is told which authority the rogue's certificate is of.
    pub authority: bool,
    /// Whether the rogue's usual certificate proves its name.
    pub verified: bool,
    /// The rogue's usual certificate.
    pub tls: Option<ServerTls>,
}

/// A step of a login that an honest server has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The connection is accepted, and nothing is read.
    Connected,
    /// SSLRequest has been read.
    TlsAsked,
    /// It was answered with `S`.
    TlsAgreed,
    /// The startup message has been read.
    Started,
    /// The client's first SCRAM message has been read.
    Asked,
    /// The client's proof has been read.
    Proof,
    /// The server has shown that it knows the password.
    Signed,
    /// AuthenticationOk has been sent.
    Ok,
}

impl Phase {
    /// All of them, in the order of a login.
    pub const ALL: [Self; 8] = [
        Self::Connected,
        Self::TlsAsked,
        Self::TlsAgreed,
        Self::Started,
        Self::Asked,
        Self::Proof,
        Self::Signed,
        Self::Ok,
    ];

    /// Whether it is there without TLS.
    #[must_use]
    pub fn is_plain(self) -> bool {
        !matches!(self, Self::TlsAsked | Self::TlsAgreed)
    }
}

/// What a script knows when it is its turn.
#[derive(Debug, Default)]
pub struct Seen {
    /// The client's nonce.
    pub nonce: String,
    /// An honest signature, once there is a proof.
    pub signature: String,
}

/// What is said in the end.
pub type Say = Arc<dyn Fn(&Seen) -> Vec<u8> + Send + Sync>;

/// What comes after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Then {
    /// The broker is to hang up by itself, at once.
    Hold,
    /// Nothing more is said. The broker's clock ends it.
    Silence,
    /// The broker answers, and the server closes.
    Answer,
    /// The server closes.
    Close,
    /// The server resets.
    Reset,
    /// These bytes, one every 100 ms.
    Drip(Vec<u8>),
    /// These bytes, again and again. The broker must have enough of it.
    Flood(Vec<u8>),
}

/// What the client must be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// UPSTREAM_UNTRUSTED.
    Untrusted,
    /// UPSTREAM_REFUSED.
    Refused,
    /// UPSTREAM_UNREACHABLE.
    Unreachable,
    /// The server's own words where it has proved its name, else UPSTREAM_UNREACHABLE.
    ItsWordsIfNamed,
    /// The server's own words.
    ItsWords,
}

/// One thing that a rogue does.
#[derive(Clone)]
pub struct Case {
    /// What it is.
    pub name: String,
    /// Up to here it is honest.
    pub until: Phase,
    /// What it says then.
    pub say: Say,
    /// And then.
    pub then: Then,
    /// What must come of it.
    pub expected: Expected,
    /// A certificate other than the usual one.
    pub tls: Option<ServerTls>,
    /// The modes in which that certificate ends it: nothing is sent through TLS.
    pub nothing_in: &'static [&'static str],
}

impl Case {
    /// Whether it ends by the broker's clock.
    #[must_use]
    pub fn is_slow(&self) -> bool {
        matches!(self.then, Then::Silence | Then::Drip(_) | Then::Flood(_))
    }

    /// As a script, of a server that knows the password where the case needs that.
    #[must_use]
    pub fn script(&self, verifier: &Verifier, asks_tls: bool) -> Script {
        let (case, verifier) = (self.clone(), verifier.clone());
        Arc::new(move |wire| case.play(wire, &verifier, asks_tls))
    }

    fn play(&self, wire: &mut Wire, verifier: &Verifier, asks_tls: bool) -> io::Result<()> {
        let mut seen = Seen::default();
        let mut first = None;
        let mut proven: Option<Proven> = None;
        for phase in Phase::ALL.into_iter().filter(|phase| asks_tls || phase.is_plain()) {
            if phase > self.until {
                break;
            }
            match phase {
                Phase::Connected => {}
                Phase::TlsAsked => wire.tls_asked()?,
                Phase::TlsAgreed => wire.send(b"S")?,
                Phase::Started => {
                    if asks_tls {
                        wire.start_tls()?;
                    }
                    if wire.started()? == Greeting::Cancel {
                        return Ok(());
                    }
                }
                Phase::Asked => {
                    let asked = verifier.ask(wire, &["SCRAM-SHA-256"])?;
                    seen.nonce.clone_from(&asked.nonce);
                    first = Some(asked);
                }
                Phase::Proof => {
                    if let Some(first) = &first {
                        let given = verifier.challenge(
                            wire,
                            first,
                            &verifier.server_first(&first.nonce),
                        )?;
                        seen.signature = verifier.signature(&given);
                        proven = Some(given);
                    }
                }
                Phase::Signed => {
                    if let Some(proven) = &proven {
                        wire.send(&sasl_final(&verifier.signature(proven)))?;
                    }
                }
                Phase::Ok => wire.send(&message(b'R', &[0; 4]))?,
            }
        }
        wire.send(&(self.say)(&seen))?;
        match &self.then {
            Then::Hold | Then::Silence => wire.hold(),
            Then::Answer => wire.receive().map(|_answer| ()),
            Then::Close => Ok(()),
            Then::Reset => wire.reset(),
            Then::Drip(bytes) => wire.drip(bytes.iter().copied()),
            Then::Flood(bytes) => wire.flood(bytes),
        }
    }
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Case").field("name", &self.name).finish_non_exhaustive()
    }
}
