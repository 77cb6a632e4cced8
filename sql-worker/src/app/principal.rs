//! Who calls, as the transport attests it.
//!
//! Invariant: a transport makes a [`Principal`] from what the kernel says, or from a bearer
//! that was checked; nothing inside a message can name one.

/// `DEFAULT_OVERFLOWUID` of the kernel.
const OVERFLOW_UID: u32 = 65534;

/// With what the one on standard streams begins.
const STDIO: &str = "stdio:";

/// Who calls; also the subject of the handles made for them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Principal(String);

impl Principal {
    /// Whoever started this process and holds its standard input.
    #[must_use]
    pub fn stdio() -> Self {
        Self(format!("{STDIO}uid={}", rustix::process::getuid().as_raw()))
    }

    /// Whether there may be others in the same worker.
    pub(super) fn shares(&self) -> bool {
        !self.0.starts_with(STDIO)
    }

    /// The user who connected to a Unix socket, by SO_PEERCRED (unix(7)). `None` for the uid
    /// that stands for everybody whom this user namespace does not map: it is nobody.
    #[must_use]
    pub fn unix(uid: u32) -> Option<Self> {
        let overflow = std::fs::read_to_string("/proc/sys/kernel/overflowuid");
        let here = overflow.ok().and_then(|text| text.trim().parse().ok());
        (uid != OVERFLOW_UID && Some(uid) != here).then(|| Self(format!("unix:uid={uid}")))
    }

    /// The holder of a bearer token that the configuration calls `name`.
    #[must_use]
    pub fn http(name: &Name) -> Self {
        Self(format!("http:{}", name.0))
    }

    /// The name, as brokers get it.
    #[must_use]
    pub fn subject(&self) -> &str {
        &self.0
    }
}

/// What the configuration calls a principal: 1 to 64 of `[A-Za-z0-9._-]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(String);

impl Name {
    /// `None` when it is not one.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let valid = (1..=64).contains(&text.len()) && text.bytes().all(allowed);
        valid.then(|| Self(text.to_owned()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_no_principal() {
        assert_eq!(Principal::unix(OVERFLOW_UID), None);
        assert_eq!(Principal::unix(1000).unwrap().subject(), "unix:uid=1000");
    }

    #[test]
    fn transports_do_not_share_principals() {
        let uid = rustix::process::getuid().as_raw();
        let name = Name::parse(&format!("uid={uid}").replace('=', "-")).unwrap();
        let unix = Principal::unix(uid).unwrap();
        assert_ne!(Principal::stdio(), unix);
        assert_ne!(Principal::http(&name), unix);
    }

    #[test]
    fn a_name_can_not_look_like_anything_else() {
        for text in ["", "a b", "unix:uid=0", "a\n", "ä", &"x".repeat(65)] {
            assert_eq!(Name::parse(text), None, "{text:?}");
        }
        assert_eq!(Name::parse("alice-2.x_").unwrap().as_str(), "alice-2.x_");
    }
}
