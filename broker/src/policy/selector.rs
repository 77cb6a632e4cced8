//! How a grant names peers and connections.

#![forbid(unsafe_code)]

use std::fmt;

use crate::peer::{Gid, Peer, Uid};

/// Which peers a grant is for: all that is given must hold. Empty matches nobody.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    /// Effective uid.
    pub uid: Option<Uid>,
    /// Effective gid.
    pub gid: Option<Gid>,
    /// The effective gid or a supplementary group.
    pub group: Option<Gid>,
}

impl Selector {
    /// Whether `peer` is one of them.
    #[must_use]
    pub fn matches(&self, peer: &Peer) -> bool {
        let Self { uid, gid, group } = self;
        let something = uid.is_some() || gid.is_some() || group.is_some();
        something
            && uid.is_none_or(|uid| uid == peer.uid())
            && gid.is_none_or(|gid| gid == peer.gid())
            && group.is_none_or(|group| group == peer.gid() || peer.groups().contains(&group))
    }

    /// Whether a process with this uid may turn out to be one of them. That it is one is decided
    /// when it connects.
    #[must_use]
    pub fn may_be(&self, uid: Uid) -> bool {
        uid != Uid::OVERFLOW && self.uid.is_none_or(|own| own == uid) && *self != Self::default()
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            self.uid.map(|uid| format!("uid {uid}")),
            self.gid.map(|gid| format!("gid {gid}")),
            self.group.map(|group| format!("group {group}")),
        ];
        f.write_str(&parts.into_iter().flatten().collect::<Vec<_>>().join(", "))
    }
}

/// A name, or the beginning of one followed by `*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    stem: String,
    open: bool,
}

impl Pattern {
    /// `None` when `*` stands anywhere but at the end, or `text` is empty.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (stem, open) = match text.strip_suffix('*') {
            Some(stem) => (stem, true),
            None => (text, false),
        };
        let good = !text.is_empty() && !stem.contains('*') && !stem.contains('\0');
        good.then(|| Self { stem: stem.to_owned(), open })
    }

    /// Whether `name` is meant.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        if self.open { name.starts_with(&self.stem) } else { name == self.stem }
    }

    /// The name, if the pattern means just one.
    #[must_use]
    pub fn single(&self) -> Option<&str> {
        (!self.open).then_some(&*self.stem)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.stem, if self.open { "*" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors() {
        let peer = Peer::dangerous_for_test(10, 20, &[30, 31]);
        let (uid, gid) = (|n| Some(Uid::from_raw(n)), |n| Some(Gid::from_raw(n)));
        let table = [
            (Selector::default(), false),
            (Selector { uid: uid(10), ..Default::default() }, true),
            (Selector { uid: uid(11), ..Default::default() }, false),
            (Selector { gid: gid(20), ..Default::default() }, true),
            (Selector { gid: gid(30), ..Default::default() }, false),
            (Selector { group: gid(20), ..Default::default() }, true),
            (Selector { group: gid(31), ..Default::default() }, true),
            (Selector { uid: uid(10), group: gid(32), ..Default::default() }, false),
        ];
        for (selector, expected) in table {
            assert_eq!(selector.matches(&peer), expected, "{selector}");
        }
    }

    #[test]
    fn patterns() {
        let matches = |pattern, name| Pattern::parse(pattern).unwrap().matches(name);
        assert!(matches("main_db", "main_db"));
        assert!(!matches("main_db", "main_db2"));
        assert!(matches("analytics-*", "analytics-eu"));
        assert!(!matches("analytics-*", "analytics"));
        assert!(matches("*", "anything"));
        for bad in ["", "a*b", "**", "a\0"] {
            assert!(Pattern::parse(bad).is_none(), "{bad}");
        }
    }
}
