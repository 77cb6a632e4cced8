//! Passwords as tool arguments: refused, unless the worker was started to take them.
//!
//! What a model is given to pass on has already leaked, to its transcript at least. It is not left
//! behind here as well, taken or refused: buffers that stay are wiped as they are read from, and
//! whatever is freed, in a parser too, by the allocator of the program.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, Visitor};
use zeroize::Zeroizing;

use crate::broker::{Login, Secret};
use crate::config::InlineSecrets;
use crate::error::{Code, Failure};

/// Bytes of a password that a broker takes.
const MAX_SECRET: usize = 16 << 10;
/// Bytes of a user name; PostgreSQL cuts longer ones (NAMEDATALEN).
const MAX_USERNAME: usize = 63;

/// A password that came in a call: at most 16 KiB of UTF-8, wiped on drop.
pub(super) struct InlineSecret(Zeroizing<String>);

/// The login that a call brings, if it brings one.
///
/// # Errors
/// `UNSUPPORTED` when it brings any of it and that is not `allowed`, in words that say what to do
/// instead and repeat nothing; `INVALID_REQUEST` for half a login.
pub(super) fn inline_secret(
    allowed: InlineSecrets,
    username: Option<String>,
    password: Option<InlineSecret>,
) -> Result<Option<Login>, Failure> {
    match (allowed, username, password) {
        (_, None, None) => Ok(None),
        (InlineSecrets::Refused, _, _) => Err(refused()),
        (InlineSecrets::Allowed, Some(username), Some(InlineSecret(mut password))) => {
            if !(1..=MAX_USERNAME).contains(&username.len()) {
                return Err(Failure::invalid("username must have 1 to 63 bytes"));
            }
            // Moved, so that there is no other copy than the one that is wiped.
            let password = std::mem::take(&mut *password).into_bytes();
            let secret = Secret::from_bytes(password).map_err(|_empty_or_no_memory| {
                Failure::invalid("password must have 1 to 16384 bytes")
            })?;
            Ok(Some(Login { username, secret }))
        }
        (InlineSecrets::Allowed, _, _) => {
            Err(Failure::invalid("username and password are given both, or neither"))
        }
    }
}

/// What to say of a password inside of a connection string: nobody could wipe it there.
pub(super) fn in_a_text(allowed: InlineSecrets) -> Failure {
    match allowed {
        InlineSecrets::Refused => refused(),
        InlineSecrets::Allowed => {
            Failure::invalid("a password is not taken as part of connection_string")
                .with_hint("give username and password as arguments of their own")
        }
    }
}

fn refused() -> Failure {
    Failure::new(
        Code::Unsupported,
        "usernames and passwords are not taken here, because they would pass through the model; \
         nothing was stored",
    )
    .with_hint(
        "a person runs `credbroker put NAME`, or `credbroker entry NAME` for a page in the \
         browser, on the host; then call this again without them. A password that was sent here \
         should be changed",
    )
}

impl fmt::Debug for InlineSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InlineSecret([REDACTED])")
    }
}

impl<'de> Deserialize<'de> for InlineSecret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = InlineSecret;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a password of at most 16384 bytes")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<InlineSecret, E> {
                self.visit_string(text.to_owned())
            }
            fn visit_string<E: Error>(self, text: String) -> Result<InlineSecret, E> {
                let text = Zeroizing::new(text);
                if text.len() > MAX_SECRET {
                    return Err(E::custom("too long"));
                }
                Ok(InlineSecret(text))
            }
        }
        deserializer.deserialize_string(Text)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn secret(text: &str) -> Option<InlineSecret> {
        Some(serde_json::from_value(json!(text)).unwrap())
    }

    fn text(failure: &Failure) -> String {
        failure.to_json().to_string()
    }

    #[test]
    fn without_the_flag_any_part_of_a_login_is_refused_with_the_alternatives() {
        let user = || Some("hunter2".to_owned());
        for (username, password) in
            [(user(), None), (None, secret("hunter2")), (user(), secret("hunter2"))]
        {
            let failure = inline_secret(InlineSecrets::Refused, username, password).unwrap_err();
            let text = text(&failure);
            assert_eq!(failure.code(), Code::Unsupported);
            assert!(text.contains("credbroker put NAME") && text.contains("credbroker entry NAME"));
            assert!(!text.contains("hunter2"), "{text}");
        }
    }

    #[test]
    fn none_is_none_in_both_modes() {
        for allowed in [InlineSecrets::Refused, InlineSecrets::Allowed] {
            assert!(inline_secret(allowed, None, None).unwrap().is_none());
        }
    }

    #[test]
    fn with_the_flag_a_whole_login_is_taken() {
        let allowed = InlineSecrets::Allowed;
        let user = |name: &str| Some(name.to_owned());
        let login = inline_secret(allowed, user("app"), secret("hunter2")).unwrap().unwrap();
        assert_eq!(login.username, "app");
        for (username, password) in [
            (user("app"), None),
            (None, secret("hunter2")),
            (user(""), secret("hunter2")),
            (user(&"x".repeat(64)), secret("hunter2")),
            (user("app"), secret("")),
        ] {
            let failure = inline_secret(allowed, username, password).unwrap_err();
            assert_eq!(failure.code(), Code::InvalidRequest);
            assert!(!text(&failure).contains("hunter2"));
        }
    }

    #[test]
    fn it_is_bounded_and_never_printed() {
        let long = json!("x".repeat(MAX_SECRET + 1));
        serde_json::from_value::<InlineSecret>(long).unwrap_err();
        serde_json::from_value::<InlineSecret>(json!({"hunter2": 1})).unwrap_err();
        let printed = format!("{:?}", secret("hunter2").unwrap());
        assert_eq!(printed, "InlineSecret([REDACTED])");
    }
}
