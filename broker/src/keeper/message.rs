//! What broker and keeper say to each other, one message a packet. Pure; every message has one
//! form and a fixed length, and what is not one is nothing.

#![forbid(unsafe_code)]

use crate::harden::{Dropped, Enforced, Sandbox};

/// Longest message in bytes; a longer packet is none.
pub(crate) const MAX_MESSAGE: usize = 9;

/// What the broker can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// Run the command of this number; with one descriptor, the socket for the answers. There is
    /// no way to say which program that is.
    Run(u32),
    /// Hold sockets for what comes over the one descriptor: the next two, and nothing else.
    Channel,
    /// Hold the socket that is the one descriptor, under this number, until it is dropped or the
    /// broker ends.
    Hold(u64),
    /// Close what is held under this number, if anything is.
    Drop(u64),
}

/// What the keeper answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// Sandboxed, and listening. The only one that is not an answer to a request.
    Ready(Sandbox),
    /// The program runs; with one descriptor, the end of its standard output to read from.
    Started,
    /// The program is gone, and its process group with it.
    Ended(Fate),
    /// It could not be started: the error number.
    Failed(i32),
    /// No command has this number.
    Unknown,
    /// As many programs run as may.
    Busy,
    /// The socket of this number is held.
    Held(u64),
    /// It is not: as many are held as may be.
    Full(u64),
    /// Nothing is held under this number.
    Dropped(u64),
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// With this status.
    Exited(i32),
    /// By this signal, which the keeper did not send.
    Killed(i32),
    /// By the keeper, when its time was over.
    TimedOut,
}

const RUN: u8 = b'R';
const CHANNEL: u8 = b'C';
const HOLD: u8 = b'H';
const DROP: u8 = b'D';
const READY: u8 = b'K';
const STARTED: u8 = b'S';
const EXITED: u8 = b'E';
const KILLED: u8 = b'G';
const TIMED_OUT: u8 = b'T';
const FAILED: u8 = b'F';
const UNKNOWN: u8 = b'U';
const BUSY: u8 = b'B';
const HELD: u8 = b'h';
const FULL: u8 = b'f';
const DROPPED: u8 = b'd';

impl Request {
    pub(crate) fn encode(self) -> Vec<u8> {
        match self {
            Self::Run(number) => numbered(RUN, number.to_le_bytes()),
            Self::Channel => vec![CHANNEL],
            Self::Hold(id) => numbered(HOLD, id.to_le_bytes()),
            Self::Drop(id) => numbered(DROP, id.to_le_bytes()),
        }
    }

    /// `None` for what is not a request.
    pub(crate) fn decode(packet: &[u8]) -> Option<Self> {
        match *packet {
            [RUN, a, b, c, d] => Some(Self::Run(u32::from_le_bytes([a, b, c, d]))),
            [CHANNEL] => Some(Self::Channel),
            [HOLD, ref id @ ..] => Some(Self::Hold(number(id)?)),
            [DROP, ref id @ ..] => Some(Self::Drop(number(id)?)),
            _ => None,
        }
    }
}

impl Reply {
    pub(crate) fn encode(self) -> Vec<u8> {
        match self {
            Self::Ready(Sandbox { landlock, seccomp, capabilities }) => {
                let landlock = match landlock {
                    Enforced::Not => 0,
                    Enforced::Partially => 1,
                    Enforced::Fully => 2,
                };
                vec![READY, landlock, u8::from(seccomp), u8::from(capabilities == Dropped::Dropped)]
            }
            Self::Started => vec![STARTED],
            Self::Ended(Fate::Exited(status)) => numbered(EXITED, status.to_le_bytes()),
            Self::Ended(Fate::Killed(signal)) => numbered(KILLED, signal.to_le_bytes()),
            Self::Ended(Fate::TimedOut) => vec![TIMED_OUT],
            Self::Failed(errno) => numbered(FAILED, errno.to_le_bytes()),
            Self::Unknown => vec![UNKNOWN],
            Self::Busy => vec![BUSY],
            Self::Held(id) => numbered(HELD, id.to_le_bytes()),
            Self::Full(id) => numbered(FULL, id.to_le_bytes()),
            Self::Dropped(id) => numbered(DROPPED, id.to_le_bytes()),
        }
    }

    /// `None` for what is not a reply.
    pub(crate) fn decode(packet: &[u8]) -> Option<Self> {
        Some(match *packet {
            [READY, landlock, seccomp @ (0 | 1), capabilities @ (0 | 1)] => Self::Ready(Sandbox {
                landlock: match landlock {
                    0 => Enforced::Not,
                    1 => Enforced::Partially,
                    2 => Enforced::Fully,
                    _ => return None,
                },
                seccomp: seccomp == 1,
                capabilities: if capabilities == 1 { Dropped::Dropped } else { Dropped::None },
            }),
            [STARTED] => Self::Started,
            [EXITED, a, b, c, d] => Self::Ended(Fate::Exited(i32::from_le_bytes([a, b, c, d]))),
            [KILLED, a, b, c, d] => Self::Ended(Fate::Killed(i32::from_le_bytes([a, b, c, d]))),
            [TIMED_OUT] => Self::Ended(Fate::TimedOut),
            [FAILED, a, b, c, d] => Self::Failed(i32::from_le_bytes([a, b, c, d])),
            [UNKNOWN] => Self::Unknown,
            [BUSY] => Self::Busy,
            [HELD, ref id @ ..] => Self::Held(number(id)?),
            [FULL, ref id @ ..] => Self::Full(number(id)?),
            [DROPPED, ref id @ ..] => Self::Dropped(number(id)?),
            _ => return None,
        })
    }
}

fn number(bytes: &[u8]) -> Option<u64> {
    bytes.try_into().ok().map(u64::from_le_bytes)
}

fn numbered<const N: usize>(kind: u8, number: [u8; N]) -> Vec<u8> {
    let mut message = vec![kind];
    message.extend_from_slice(&number);
    message
}

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing {
    use super::{MAX_MESSAGE, Reply, Request};

    /// No message has two forms, and none is longer than the longest.
    #[must_use]
    pub fn keeper(bytes: &[u8]) -> bool {
        let request = Request::decode(bytes).map(Request::encode);
        let reply = Reply::decode(bytes).map(Reply::encode);
        assert!(request.is_none() || reply.is_none(), "it is a request and a reply");
        let known = request.or(reply);
        assert!(known.iter().all(|known| known == bytes && known.len() <= MAX_MESSAGE));
        known.is_some()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever decodes is what encodes to it: no message has two forms.
        #[test]
        fn one_form_each(packet in prop::collection::vec(any::<u8>(), 0..12)) {
            if let Some(request) = Request::decode(&packet) {
                prop_assert_eq!(request.encode(), packet.clone());
            }
            if let Some(reply) = Reply::decode(&packet) {
                prop_assert_eq!(reply.encode(), packet);
            }
        }

        #[test]
        fn round_trip(number in any::<u32>(), status in any::<i32>(), id in any::<u64>()) {
            let requests =
                [Request::Run(number), Request::Channel, Request::Hold(id), Request::Drop(id)];
            for request in requests {
                prop_assert!(request.encode().len() <= MAX_MESSAGE);
                prop_assert_eq!(Request::decode(&request.encode()), Some(request));
            }
            for reply in [
                Reply::Started,
                Reply::Ended(Fate::Exited(status)),
                Reply::Ended(Fate::Killed(status)),
                Reply::Ended(Fate::TimedOut),
                Reply::Failed(status),
                Reply::Unknown,
                Reply::Busy,
                Reply::Held(id),
                Reply::Full(id),
                Reply::Dropped(id),
            ] {
                let packet = reply.encode();
                prop_assert!(packet.len() <= MAX_MESSAGE);
                prop_assert_eq!(Reply::decode(&packet), Some(reply));
            }
        }
    }

    #[test]
    fn the_sandbox_comes_back_as_it_was() {
        for landlock in [Enforced::Not, Enforced::Partially, Enforced::Fully] {
            for (seccomp, capabilities) in [(true, Dropped::None), (false, Dropped::Dropped)] {
                let ready = Reply::Ready(Sandbox { landlock, seccomp, capabilities });
                assert_eq!(Reply::decode(&ready.encode()), Some(ready));
            }
        }
        assert_eq!(Reply::decode(&[READY, 3, 1, 1]), None);
        assert_eq!(Reply::decode(&[READY, 2, 2, 1]), None);
    }
}
