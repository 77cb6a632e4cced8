//! Handles: short-lived, revocable rights of a peer to use one connection.

#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use data_encoding::{BASE32_NOPAD, Specification};
use ring::rand::{SecureRandom as _, SystemRandom};

pub(crate) use self::expiry::{Expiry, ExpiryQueue};
pub(crate) use self::table::{HandleFault, REMEMBERED, Standing, Table};
pub(crate) use self::token::{Token, TokenHash};
use crate::connection::Connection;
use crate::credential::Credential;
use crate::peer::{Peer, Uid};

mod expiry;
mod table;
mod token;

/// No span that a person or a request gives is longer: it would be a mistake, and the timer wheel
/// holds no more than two years.
pub(crate) const LONGEST_SPAN: Duration = Duration::from_secs(365 * 24 * 3600);
/// Nor is a handle's life shorter: to ask for many of no use would be to fill the table.
pub(crate) const SHORTEST_LIFE: Duration = Duration::from_secs(1);

/// The public name of a handle: `hdl_` and 16 characters of lower-case base32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct HandleId([u8; 10]);

/// The kernel gave no random bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoRandomness;

impl HandleId {
    const PREFIX: &str = "hdl_";

    pub(crate) fn random() -> Result<Self, NoRandomness> {
        random().map(Self)
    }

    /// `None` when `text` is not a handle's name.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let encoded = text.strip_prefix(Self::PREFIX).filter(|rest| rest.len() == 16)?;
        let bytes = base32().decode(encoded.as_bytes()).ok()?;
        bytes.try_into().ok().map(Self)
    }
}

impl fmt::Display for HandleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::PREFIX)?;
        f.write_str(&BASE32_NOPAD.encode(&self.0).to_ascii_lowercase())
    }
}

/// How a handle is tied to the process that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bind {
    /// Not at all.
    None,
    /// Dies with that process.
    Lifetime,
}

/// A handle, live or lately expired.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) id: HandleId,
    pub(crate) connection: Arc<Connection>,
    pub(crate) holder: Peer,
    pub(crate) redeemer: Option<Uid>,
    pub(crate) subject: String,
    pub(crate) purpose: String,
    pub(crate) bind: Bind,
    pub(crate) issued: Instant,
    pub(crate) issued_at: SystemTime,
    /// Life of one issue or renewal.
    pub(crate) ttl: Duration,
    pub(crate) expires: Instant,
    /// No renewal moves `expires` past this.
    pub(crate) never_after: Option<Instant>,
    pub(crate) uses_left: Option<u32>,
    pub(crate) max_sessions: Option<usize>,
    /// What its holder brought; it belongs to this handle alone and goes with it.
    pub(crate) registered: Option<Arc<Credential>>,
    /// Whether its secret was shown: once.
    pub(crate) revealed: bool,
    pub(crate) standing: Standing,
}

impl Handle {
    /// Whether `uid` opens sessions with this handle: the redeemer if one was named, else the
    /// holder's uid.
    pub(crate) fn is_redeemable_by(&self, uid: Uid) -> bool {
        self.redeemer.unwrap_or_else(|| self.holder.uid()) == uid
    }

    /// Whether `uid` may know that this handle exists.
    pub(crate) fn concerns(&self, uid: Uid) -> bool {
        self.holder.uid() == uid || self.redeemer == Some(uid)
    }

    /// Whether it dies with its holder's process.
    pub(crate) fn is_bound(&self) -> bool {
        self.bind == Bind::Lifetime
    }

    /// Moves the expiry to `ttl` from `now`, no further than `never_after`.
    pub(crate) fn extend(&mut self, now: Instant, ttl: Duration) {
        let wanted = now + ttl;
        self.expires = self.never_after.map_or(wanted, |bound| bound.min(wanted));
    }

    /// A monotonic moment of this handle's life on the wall clock it was issued by.
    pub(crate) fn wall(&self, moment: Instant) -> SystemTime {
        self.issued_at + moment.saturating_duration_since(self.issued)
    }
}

fn random<const N: usize>() -> Result<[u8; N], NoRandomness> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_unspecified| NoRandomness)?;
    Ok(bytes)
}

/// RFC 4648 base32 without padding, reading lower case.
fn base32() -> data_encoding::Encoding {
    let mut specification = Specification::new();
    specification.symbols.push_str("abcdefghijklmnopqrstuvwxyz234567");
    specification.encoding().unwrap_or(BASE32_NOPAD)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_come_back_and_others_do_not() {
        let id = HandleId::random().unwrap();
        let text = id.to_string();
        assert_eq!(text.len(), 20);
        assert_eq!(HandleId::parse(&text), Some(id));
        for bad in [
            "",
            "hdl_",
            "hdl_short",
            &text.to_uppercase(),
            &format!("{text}a"),
            &text.replace("hdl_", "cbh_"),
        ] {
            assert_eq!(HandleId::parse(bad), None, "{bad}");
        }
    }
}
