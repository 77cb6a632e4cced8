//! What a connection's configuration says about logging in: by which methods, bound to the
//! channel or not, and in what form the secret is.

#![forbid(unsafe_code)]

use std::fmt;

use serde::Deserialize;

/// How the broker logs in to a connection's server, and how not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LoginRules {
    /// `require_auth`: what the server may ask for. One that asks for anything else gets nothing.
    methods: Vec<Method>,
    /// `channel_binding`.
    pub(crate) binding: ChannelBinding,
}

/// A method of authentication, in the words of libpq's `require_auth`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(crate) enum Method {
    /// SCRAM-SHA-256, and SCRAM-SHA-256-PLUS: the server proves that it knows the password.
    #[serde(rename = "scram-sha-256")]
    Scram,
    /// A hash of the password, by which the server proves nothing.
    #[serde(rename = "md5")]
    Md5,
    /// The password itself.
    #[serde(rename = "password")]
    Password,
    /// Nothing is asked for: the link itself tells the server who we are.
    #[serde(rename = "none")]
    None,
}

/// Whether SCRAM is bound to the TLS channel; libpq's meaning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ChannelBinding {
    /// Whenever the server offers it.
    #[default]
    Prefer,
    /// A login without it is refused.
    Require,
    /// Never.
    Disable,
}

/// What the secret of a connection is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum SecretForm {
    /// A password.
    #[default]
    Password,
    /// `CLIENT_KEY:SERVER_KEY`, each 32 bytes in base64 (RFC 5802 §3): they log in by SCRAM, as
    /// long as the role keeps its salt, and the password cannot be had from them.
    ScramKeys,
}

impl LoginRules {
    /// `None` when `methods` is empty or names one twice.
    pub(crate) fn new(methods: Vec<Method>, binding: ChannelBinding) -> Option<Self> {
        let twice = methods
            .iter()
            .enumerate()
            .any(|(at, method)| methods.iter().skip(at + 1).any(|other| other == method));
        (!methods.is_empty() && !twice).then_some(Self { methods, binding })
    }

    pub(crate) fn allows(&self, method: Method) -> bool {
        self.methods.contains(&method)
    }

    pub(crate) fn methods(&self) -> &[Method] {
        &self.methods
    }
}

impl Default for LoginRules {
    fn default() -> Self {
        Self { methods: vec![Method::Scram], binding: ChannelBinding::Prefer }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Scram => "scram-sha-256",
            Self::Md5 => "md5",
            Self::Password => "password",
            Self::None => "none",
        })
    }
}

impl fmt::Display for ChannelBinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prefer => "prefer",
            Self::Require => "require",
            Self::Disable => "disable",
        })
    }
}

impl fmt::Display for SecretForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password => "password",
            Self::ScramKeys => "scram-keys",
        })
    }
}
