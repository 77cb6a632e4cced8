//! One grant of the configuration.

#![forbid(unsafe_code)]

use std::fmt;
use std::ops::BitOr;
use std::time::Duration;

use serde::Deserialize;

use super::{Grant, Pattern, Selector};
use crate::connection::ConnectionName;

/// What a grant can allow: the words of the key `may`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// See name, type and masked target. Implied by every other action.
    List,
    /// Get handles.
    Issue,
    /// Open sessions with a handle.
    Open,
    /// Open sessions with no handle.
    Ambient,
    /// Receive an authenticated socket itself.
    Handoff,
    /// Bring a user name and a password of one's own for a connection that has none.
    Register,
    /// Receive the secret itself.
    Reveal,
}

impl Action {
    /// In the order in which they are shown.
    pub(crate) const ALL: [Self; 7] = [
        Self::List,
        Self::Issue,
        Self::Open,
        Self::Ambient,
        Self::Handoff,
        Self::Register,
        Self::Reveal,
    ];

    /// The word of the key `may`.
    pub(crate) fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|action| action.to_string() == word)
    }

    const fn bit(self) -> u8 {
        match self {
            Self::List => 1,
            Self::Issue => 2,
            Self::Open => 4,
            Self::Ambient => 8,
            Self::Handoff => 16,
            Self::Register => 32,
            Self::Reveal => 64,
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::List => "list",
            Self::Issue => "issue",
            Self::Open => "open",
            Self::Ambient => "ambient",
            Self::Handoff => "handoff",
            Self::Register => "register",
            Self::Reveal => "reveal",
        })
    }
}

/// A set of actions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Actions(u8);

impl Actions {
    /// Whether the set allows `action`: any action implies `list`.
    #[must_use]
    pub fn contains(self, action: Action) -> bool {
        self.0 & action.bit() != 0 || (action == Action::List && self.0 != 0)
    }

    /// The actions of the set, `list` first.
    pub fn iter(self) -> impl Iterator<Item = Action> {
        Action::ALL.into_iter().filter(move |action| self.contains(*action))
    }

    /// Whether nothing is allowed.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl FromIterator<Action> for Actions {
    fn from_iter<I: IntoIterator<Item = Action>>(actions: I) -> Self {
        Self(actions.into_iter().fold(0, |bits, action| bits | action.bit()))
    }
}

impl BitOr for Actions {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// A grant, as configured.
#[derive(Debug, PartialEq, Eq)]
pub struct Rule {
    /// For logs, audit records and `whoami`.
    pub name: String,
    /// Whom it is for.
    pub peer: Selector,
    /// Which connections it covers.
    pub connections: Vec<Pattern>,
    /// What it allows.
    pub actions: Actions,
    /// Peers other than the holder for whom a handle may be issued.
    pub redeemers: Vec<Selector>,
    /// Limits that replace the broker's.
    pub limits: RuleLimits,
}

/// Limits of one grant; `None` is the broker's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RuleLimits {
    /// Longest life of one issue or renewal.
    pub max_ttl: Option<Duration>,
    /// Sessions at once, for each uid and connection.
    pub max_sessions: Option<usize>,
    /// Requests a second, for each uid and connection.
    pub rate_per_second: Option<u32>,
}

impl Rule {
    pub(super) fn covers(&self, connection: &str) -> bool {
        self.connections.iter().any(|pattern| pattern.matches(connection))
    }

    pub(super) fn grant(&self, action: Action, connection: &ConnectionName) -> Grant {
        Grant {
            rule: self.name.clone(),
            action,
            connection: connection.clone(),
            limits: self.limits,
        }
    }
}
