//! A case: how far a server plays along, what it says then, and what must come of it.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::cases::{self, ask};
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
    /// Whether a case is played on a connection that begins with SSLRequest.
    pub asks_tls: bool,
    /// Whether there are two ways to it, and on which of them it is bad.
    pub choice: Choice,
    /// The mechanisms that the rogue offers where it is honest.
    pub offers: &'static [&'static str],
    /// Whether the broker is told which authority the rogue's certificate is of.
    pub authority: bool,
    /// Whether the rogue's usual certificate proves its name.
    pub verified: bool,
    /// The rogue's usual certificate.
    pub tls: Option<ServerTls>,
}

/// Whether the TLS mode leaves a choice: `prefer` and `allow` do, and then a rogue may choose on
/// which of two connections it is bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// There is one way and one connection.
    None,
    /// It is bad in the way that is tried first. In the other it asks for the password.
    First,
    /// It does not take the way that is tried first, and is bad in the other.
    Second,
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
    /// The same, of a server that may take us in another way.
    NoEntry,
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

    /// What must come of it in a mode, and of how many connections.
    #[must_use]
    pub fn outcome(&self, mode: &Mode) -> (Expected, usize) {
        let in_tls = mode.asks_tls && self.until < Phase::Started;
        // Nobody waits twice for a server that says nothing.
        let turns = self.expected == Expected::NoEntry || (in_tls && !self.is_slow());
        match mode.choice {
            Choice::None => (self.expected, 1),
            Choice::First if turns => (Expected::Untrusted, 2),
            Choice::First => (self.expected, 1),
            // What it said to the first is what can be mended.
            Choice::Second if in_tls => (Expected::NoEntry, 2),
            Choice::Second => (self.expected, 2),
        }
    }

    /// As a script, of a server that knows the password where the case needs that.
    #[must_use]
    pub fn script(&self, verifier: &Verifier, mode: &Mode) -> Script {
        let (case, verifier, mode) = (self.clone(), verifier.clone(), mode.clone());
        Arc::new(move |wire| match (mode.choice, wire.number()) {
            (Choice::First, 2..) => {
                wire.greet()?;
                wire.send(&ask(3))?;
                wire.hold()
            }
            (Choice::Second, 1) => {
                if mode.asks_tls {
                    wire.started()?;
                    wire.send(&cases::said(b"28000"))?;
                } else {
                    wire.tls_asked()?;
                    wire.send(b"N")?;
                }
                wire.hold()
            }
            (Choice::None | Choice::First | Choice::Second, _) => case.play(wire, &verifier, &mode),
        })
    }

    fn play(&self, wire: &mut Wire, verifier: &Verifier, mode: &Mode) -> io::Result<()> {
        let asks_tls = mode.asks_tls;
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
                    let asked = verifier.ask(wire, mode.offers)?;
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
