//! `require_auth`, `channel_binding` and `credential`: what a connection's login may be, where that
//! can be judged without asking the server.

#![forbid(unsafe_code)]

use super::ConfigError;
use super::parse::At;
use crate::connection::{Check, Hosts, Tls};
use crate::credential::{ChannelBinding, LoginRules, Method, SecretForm};

/// What the configuration says of the link to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LinkRules {
    has_tls: bool,
    /// Whether a server that is not the right one fails before the login.
    proves_server: bool,
}

pub(super) fn link(hosts: &Hosts, tls: &Tls) -> LinkRules {
    match (hosts, tls) {
        (Hosts::Unix { server, .. }, _) => {
            LinkRules { has_tls: false, proves_server: server.is_some() }
        }
        // With Tls::Optional there may be a channel, but nobody can rely on it.
        (Hosts::Tcp(_), Tls::Disable | Tls::Optional { .. }) => {
            LinkRules { has_tls: false, proves_server: false }
        }
        (Hosts::Tcp(_), Tls::Required { check, .. }) => {
            LinkRules { has_tls: true, proves_server: *check == Check::ChainAndName }
        }
    }
}

pub(super) fn rules(
    methods: Option<Vec<Method>>,
    binding: ChannelBinding,
    form: SecretForm,
    link: LinkRules,
    at: &At<'_>,
) -> Result<LoginRules, ConfigError> {
    let methods = methods.unwrap_or_else(|| vec![Method::Scram]);
    let rules = LoginRules::new(methods, binding).ok_or_else(|| {
        at.below("require_auth")
            .wrong("must name each method once: \"scram-sha-256\", \"md5\", \"password\", \"none\"")
    })?;
    let wrong = |why: &str| Err(at.below("require_auth").wrong(why));
    if rules.allows(Method::Password) && !link.proves_server {
        return wrong(
            "\"password\" sends the password to whoever asks: it needs tls.mode = \"verify-full\", or peer_user on a Unix socket",
        );
    }
    if rules.allows(Method::None) && !link.proves_server {
        return wrong(
            "\"none\" believes any server: it needs tls.mode = \"verify-full\", or peer_user on a Unix socket",
        );
    }
    if form == SecretForm::ScramKeys
        && let Some(method) = rules.methods().iter().find(|method| **method != Method::Scram)
    {
        return wrong(&format!(
            "{:?} needs a password, and credential = \"scram-keys\" has none: leave \"scram-sha-256\" alone",
            method.to_string()
        ));
    }
    if binding == ChannelBinding::Require {
        let at = at.below("channel_binding");
        if !link.has_tls {
            return Err(at.wrong("\"require\" needs TLS: there is no channel to bind to"));
        }
        if let Some(method) = rules.methods().iter().find(|method| **method != Method::Scram) {
            return Err(at.wrong(format!(
                "\"require\" leaves \"scram-sha-256\" only: take {:?} out of require_auth",
                method.to_string()
            )));
        }
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const PLAIN: LinkRules = LinkRules { has_tls: false, proves_server: false };
    const TLS: LinkRules = LinkRules { has_tls: true, proves_server: true };

    fn judge(
        methods: &[Method],
        binding: ChannelBinding,
        form: SecretForm,
        link: LinkRules,
    ) -> Result<(), String> {
        let at = At::new(Path::new("broker.toml"), "connections.x");
        let judged = rules(Some(methods.to_vec()), binding, form, link, &at);
        judged.map(drop).map_err(|error| error.to_string())
    }

    #[test]
    fn a_socket_proves_its_server_by_the_user_who_must_have_it() {
        let link = |server| link(&Hosts::Unix { sockets: Vec::new(), server }, &Tls::Disable);
        assert_eq!(link(None), PLAIN);
        let proven = link(Some(crate::peer::Uid::from_raw(26)));
        assert_eq!(proven, LinkRules { has_tls: false, proves_server: true });
        for method in [Method::Password, Method::None] {
            let prefer = ChannelBinding::Prefer;
            assert_eq!(judge(&[method], prefer, SecretForm::Password, proven), Ok(()));
        }
    }

    #[test]
    fn what_is_sent_to_whoever_asks_needs_a_proven_server() {
        use ChannelBinding::Prefer;
        use SecretForm::Password;
        for method in [Method::Password, Method::None] {
            let both = [Method::Scram, method];
            assert_eq!(judge(&both, Prefer, Password, TLS), Ok(()));
            let refused = judge(&both, Prefer, Password, PLAIN).unwrap_err();
            assert!(
                refused.contains("verify-full") && refused.contains("require_auth"),
                "{refused}"
            );
        }
        assert_eq!(judge(&[Method::Md5], Prefer, Password, PLAIN), Ok(()), "it was named");
        assert!(judge(&[], Prefer, Password, TLS).is_err());
        assert!(judge(&[Method::Md5, Method::Md5], Prefer, Password, TLS).is_err());
    }

    #[test]
    fn keys_log_in_by_scram_only() {
        use ChannelBinding::Prefer;
        use SecretForm::ScramKeys;
        assert_eq!(judge(&[Method::Scram], Prefer, ScramKeys, PLAIN), Ok(()));
        for method in [Method::Md5, Method::Password, Method::None] {
            let refused = judge(&[Method::Scram, method], Prefer, ScramKeys, TLS).unwrap_err();
            assert!(refused.contains("scram-keys"), "{refused}");
        }
    }

    #[test]
    fn a_required_binding_needs_a_channel_and_scram() {
        use ChannelBinding::Require;
        use SecretForm::Password;
        assert_eq!(judge(&[Method::Scram], Require, Password, TLS), Ok(()));
        let refused = judge(&[Method::Scram], Require, Password, PLAIN).unwrap_err();
        assert!(refused.contains("channel_binding"), "{refused}");
        let refused = judge(&[Method::Scram, Method::Md5], Require, Password, TLS).unwrap_err();
        assert!(refused.contains("md5"), "{refused}");
    }
}
