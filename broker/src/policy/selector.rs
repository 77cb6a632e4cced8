//! How a grant names peers and connections.

#![forbid(unsafe_code)]

use std::fmt;

use super::{Evidence, Missing};
use crate::peer::{Gid, Program, Uid, Unit};

/// Which peers a grant is for: all that is given must hold. Empty matches nobody.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    /// Effective uid.
    pub uid: Option<Uid>,
    /// Effective gid.
    pub gid: Option<Gid>,
    /// The effective gid or a supplementary group.
    pub group: Option<Gid>,
    /// The program, beside `uid` only.
    pub exe: Option<Program>,
    /// The system service, beside `uid` only.
    pub unit: Option<Unit>,
}

/// One thing that a peer may lack.
type Step = fn(&Selector, &dyn Evidence) -> Option<Missing>;

impl Selector {
    /// Whether the peer is one of them.
    #[must_use]
    pub fn matches(&self, seen: &dyn Evidence) -> bool {
        self.missing(seen).next().is_none()
    }

    /// The same, and if not, all that the peer lacks.
    ///
    /// # Errors
    /// What it lacks, at least one thing.
    pub fn check(&self, seen: &dyn Evidence) -> Result<(), Vec<Missing>> {
        let missing: Vec<_> = self.missing(seen).collect();
        if missing.is_empty() { Ok(()) } else { Err(missing) }
    }

    /// What the peer lacks, one after the other: what must be read of a process first is asked
    /// for last, and by [`Selector::matches`] only of those who lack nothing else.
    fn missing<'a>(&'a self, seen: &'a dyn Evidence) -> impl Iterator<Item = Missing> + 'a {
        const STEPS: [Step; 7] = [
            Selector::lacks_anybody,
            Selector::lacks_mapping,
            Selector::lacks_uid,
            Selector::lacks_gid,
            Selector::lacks_group,
            Selector::lacks_unit,
            Selector::lacks_exe,
        ];
        STEPS.into_iter().filter_map(move |step| step(self, seen))
    }

    fn lacks_anybody(&self, _: &dyn Evidence) -> Option<Missing> {
        (*self == Self::default()).then_some(Missing::Anybody)
    }

    fn lacks_mapping(&self, _: &dyn Evidence) -> Option<Missing> {
        let Self { uid, gid, group, .. } = self;
        let gids = [gid, group];
        let unmapped = uid.is_some_and(Uid::is_overflow)
            || gids.into_iter().flatten().any(|gid| gid.is_overflow());
        unmapped.then_some(Missing::Unmapped)
    }

    fn lacks_uid(&self, seen: &dyn Evidence) -> Option<Missing> {
        let (is, wants) = (seen.uid(), self.uid?);
        (is != wants).then_some(Missing::Uid { is, wants })
    }

    fn lacks_gid(&self, seen: &dyn Evidence) -> Option<Missing> {
        let (is, wants) = (seen.gid(), self.gid?);
        (is != Some(wants)).then_some(Missing::Gid { is, wants })
    }

    fn lacks_group(&self, seen: &dyn Evidence) -> Option<Missing> {
        let wants = self.group?;
        let is_in = seen.gid() == Some(wants) || seen.groups().contains(&wants);
        (!is_in).then_some(Missing::Group { wants })
    }

    fn lacks_unit(&self, seen: &dyn Evidence) -> Option<Missing> {
        let wants = self.unit.as_ref()?;
        let (is, unknown) = match seen.unit() {
            Ok(Some(is)) if is == wants => return None,
            Ok(is) => (is.cloned(), None),
            Err(why) => (None, Some(why)),
        };
        Some(Missing::Unit { is, wants: wants.clone(), unknown })
    }

    fn lacks_exe(&self, seen: &dyn Evidence) -> Option<Missing> {
        let wants = self.exe.as_ref()?;
        let unknown = match seen.runs(wants) {
            Ok(true) => return None,
            Ok(false) => None,
            Err(why) => Some(why),
        };
        Some(Missing::Exe { wants: wants.clone(), unknown })
    }

    /// Whether a process with this uid may turn out to be one of them. That it is one is decided
    /// when it connects.
    #[must_use]
    pub fn may_be(&self, uid: Uid) -> bool {
        !uid.is_overflow() && self.uid.is_none_or(|own| own == uid) && *self != Self::default()
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            self.uid.map(|uid| format!("uid {uid}")),
            self.gid.map(|gid| format!("gid {gid}")),
            self.group.map(|group| format!("group {group}")),
            self.exe.as_ref().map(|exe| format!("exe {exe}")),
            self.unit.as_ref().map(|unit| format!("unit {unit}")),
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
    use crate::peer::{Peer, Unknown};
    use crate::policy::Described;

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
            (
                Selector { uid: uid(10), unit: Unit::parse("app.service"), ..Default::default() },
                false,
            ),
        ];
        for (selector, expected) in table {
            assert_eq!(selector.matches(&peer), expected, "{selector}");
        }
    }

    #[test]
    fn ids_of_everybody_are_never_matched() {
        let peer = Peer::dangerous_for_test(65534, 65534, &[65534]);
        let (uid, gid) = (Some(Uid::from_raw(65534)), Some(Gid::from_raw(65534)));
        for selector in [
            Selector { uid, ..Default::default() },
            Selector { gid, ..Default::default() },
            Selector { group: gid, ..Default::default() },
        ] {
            assert_eq!(selector.check(&peer), Err(vec![Missing::Unmapped]), "{selector}");
            assert!(!selector.matches(&peer));
        }
    }

    #[test]
    fn what_is_missing_is_said() {
        let seen = Described {
            uid: Uid::from_raw(1000),
            gid: None,
            groups: vec![Gid::from_raw(30)],
            exe: Some("/bin/true".into()),
            unit: None,
        };
        let selector = Selector {
            uid: Some(Uid::from_raw(10001)),
            gid: Some(Gid::from_raw(20)),
            group: Some(Gid::from_raw(31)),
            exe: Some(Program::at("/bin/sh".into()).unwrap()),
            unit: Unit::parse("app.service"),
        };
        let said: Vec<_> =
            selector.check(&seen).unwrap_err().iter().map(ToString::to_string).collect();
        assert_eq!(
            said,
            [
                "uid is 1000, the grant wants 10001",
                "gid is not known: it was not given; the grant wants 20",
                "is not in group 31, which the grant wants",
                "unit is not known: it was not given; the grant wants app.service",
                "runs another program, the grant wants /bin/sh",
            ]
        );
        let elsewhere = Missing::Exe {
            wants: Program::at("/bin/sh".into()).unwrap(),
            unknown: Some(Unknown::OtherNamespace),
        };
        assert_eq!(
            elsewhere.to_string(),
            "exe is not known: the peer lives in another PID namespace; the grant wants /bin/sh"
        );
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
