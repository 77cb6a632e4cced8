//! The login machine: one message of the server further. Messages in, messages out; no socket.

#![forbid(unsafe_code)]

use super::prelude::Prelude;
use super::{LoginFault, SCRAM, Voice, codec, refusal};
use crate::credential::{ChannelBinding, LoginRules, Method};
use crate::door::postgres::scram::{
    Binding, Challenge, ClientFirst, MECHANISM, MECHANISM_PLUS, ScramFault, ServerProven,
    ServerSignature,
};
use crate::door::wire::{Reader, Writer};
use crate::upstream::NameProof;
use crate::upstream::end_point::Channel;

/// On what terms the broker logs in: what the configuration allows, and what the link is.
#[derive(Debug)]
pub(super) struct Terms<'a> {
    pub(super) rules: &'a LoginRules,
    /// What the link proved before.
    pub(super) name: NameProof,
    pub(super) voice: Voice,
    pub(super) channel: Channel,
}

#[derive(Debug)]
pub(super) enum State {
    Auth,
    Continue(ClientFirst, Bound),
    Final(ServerSignature, Bound),
    /// The password, or a hash of it, is sent: that was allowed, and proves nothing of the server.
    Sent(How),
    /// The server has proved that it knows the password.
    Ok(ServerProven, Bound),
    Prelude(Prelude, How),
}

/// What to do after a message.
#[derive(Debug)]
pub(super) enum Step {
    Wait(State),
    Send(State, Vec<u8>),
    Prove(Challenge, Bound),
    /// The server may have the password itself.
    Password,
    /// The server may have a hash of the password with this salt.
    Md5([u8; 4]),
    Done(Prelude, How),
}

/// Whether an exchange is bound to the TLS channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bound {
    ToChannel,
    No,
}

/// How a server let us in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    Scram(Bound),
    Md5,
    Password,
    /// By the link alone.
    Nothing,
}

/// One message further.
pub(super) fn advance(
    state: State,
    terms: &Terms<'_>,
    tag: u8,
    body: &[u8],
) -> Result<Step, LoginFault> {
    use LoginFault::Untrusted;
    match (tag, state) {
        (b'E', state) => Err(server_error(&state, terms, body)),
        (b'R', state) => authentication(state, terms, body),
        (b'Z', State::Prelude(mut prelude, how)) => {
            prelude.push(tag, body)?;
            Ok(Step::Done(prelude, how))
        }
        (b'K', State::Prelude(mut prelude, how)) => {
            prelude.take_in_key(body)?;
            Ok(Step::Wait(State::Prelude(prelude, how)))
        }
        (b'S' | b'N', State::Prelude(mut prelude, how)) => {
            prelude.push(tag, body)?;
            Ok(Step::Wait(State::Prelude(prelude, how)))
        }
        (_, State::Prelude(..)) => Err(out_of_place()),
        // Before the login is through a notice is noise, and nobody's to read.
        (b'N', state) => Ok(Step::Wait(state)),
        (
            _,
            State::Auth | State::Continue(..) | State::Final(..) | State::Sent(_) | State::Ok(..),
        ) => Err(Untrusted("it sent a message that has no place in a login")),
    }
}

fn out_of_place() -> LoginFault {
    LoginFault::Untrusted("it sent a message that has no place in a login")
}

/// An Authentication message (55.7), whose body begins with its kind.
fn authentication(state: State, terms: &Terms<'_>, body: &[u8]) -> Result<Step, LoginFault> {
    use LoginFault::Untrusted;
    let malformed = || Untrusted("it sent a malformed Authentication message");
    let mut reader = Reader::new(body);
    let kind = reader.u32().map_err(|_malformed| malformed())?;
    match (kind, state) {
        (10, State::Auth) => {
            let binding = terms.binding(&reader)?;
            let bound =
                if matches!(binding, Binding::To(_)) { Bound::ToChannel } else { Bound::No };
            let mechanism = binding.mechanism();
            let first = ClientFirst::random(binding)?;
            let message = codec::sasl_initial_response(mechanism, &first.message());
            Ok(Step::Send(State::Continue(first, bound), message))
        }
        (11, State::Continue(first, bound)) => {
            Ok(Step::Prove(first.challenged(reader.rest())?, bound))
        }
        (12, State::Final(expected, bound)) => {
            let proven = expected.check(reader.rest()).map_err(|fault| terms.fault(fault))?;
            Ok(Step::Wait(State::Ok(proven, bound)))
        }
        (0, State::Ok(_proven, bound)) => {
            reader.end().map_err(|_malformed| malformed())?;
            Ok(Step::Wait(State::Prelude(Prelude::default(), How::Scram(bound))))
        }
        (0, State::Sent(how)) => {
            reader.end().map_err(|_malformed| malformed())?;
            Ok(Step::Wait(State::Prelude(Prelude::default(), how)))
        }
        (0, State::Auth) => {
            terms.permit(Method::None)?;
            reader.end().map_err(|_malformed| malformed())?;
            Ok(Step::Wait(State::Prelude(Prelude::default(), How::Nothing)))
        }
        (0, _) => Err(Untrusted(UNPROVEN)),
        (3, State::Auth) => {
            terms.permit(Method::Password)?;
            reader.end().map_err(|_malformed| malformed())?;
            Ok(Step::Password)
        }
        (5, State::Auth) => {
            terms.permit(Method::Md5)?;
            let salt = reader.array().map_err(|_malformed| malformed())?;
            reader.end().map_err(|_malformed| malformed())?;
            Ok(Step::Md5(salt))
        }
        (3, _) => Err(Untrusted(ASKS_PASSWORD)),
        (5, _) => Err(Untrusted(ASKS_MD5)),
        _ => Err(Untrusted("it asks for a kind of authentication that is not configured")),
    }
}

const UNPROVEN: &str = "it let us in without proving that it knows the password";
const ASKS_PASSWORD: &str = "it asks for the password itself";
const ASKS_MD5: &str = "it asks for an MD5 of the password";

impl Terms<'_> {
    /// Whether the server may have what it asks for. Checked here whatever the configuration was
    /// checked for: the password itself goes to a server that has proved its name, and no other.
    fn permit(&self, method: Method) -> Result<(), LoginFault> {
        let (refusal, is_safe) = match method {
            Method::Scram => ("it asks for SCRAM-SHA-256, which require_auth does not name", true),
            Method::Md5 => (ASKS_MD5, true),
            Method::Password => (ASKS_PASSWORD, self.name == NameProof::Verified),
            Method::None => (UNPROVEN, self.name == NameProof::Verified),
        };
        let is_bound = method == Method::Scram || self.rules.binding != ChannelBinding::Require;
        if self.rules.allows(method) && is_safe && is_bound {
            Ok(())
        } else {
            Err(LoginFault::Untrusted(refusal))
        }
    }

    fn fault(&self, fault: ScramFault) -> LoginFault {
        if fault == ScramFault::Refused {
            refusal(SCRAM.to_owned(), self.voice)
        } else {
            fault.into()
        }
    }

    /// What the exchange is bound to, by what AuthenticationSASL offers (libpq's rules).
    fn binding(&self, offer: &Reader<'_>) -> Result<Binding, LoginFault> {
        self.permit(Method::Scram)?;
        let offers = |name: &str| mechanisms(offer.clone()).any(|one| one == name.as_bytes());
        let (scram, plus) = (offers(MECHANISM), offers(MECHANISM_PLUS));
        match (&self.channel, self.rules.binding) {
            (Channel::Tls(Some(end_point)), ChannelBinding::Prefer | ChannelBinding::Require)
                if plus =>
            {
                Ok(Binding::To(end_point.clone()))
            }
            (Channel::Plain, _) if plus && !scram => Err(LoginFault::Untrusted(
                "it offers channel binding where there is no channel to bind to",
            )),
            (_, ChannelBinding::Require) => Err(LoginFault::Untrusted(
                "it does not offer SCRAM-SHA-256-PLUS, or its certificate gives nothing to bind to, and channel_binding is require",
            )),
            _ if !scram => Err(LoginFault::Untrusted("it does not offer SCRAM-SHA-256")),
            (Channel::Tls(Some(_)), ChannelBinding::Prefer) => Ok(Binding::NotOffered),
            (Channel::Tls(_) | Channel::Plain, _) => Ok(Binding::No),
        }
    }
}

/// The names in AuthenticationSASL; an empty one ends them.
fn mechanisms(mut reader: Reader<'_>) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || reader.c_bytes().ok().filter(|name| !name.is_empty()))
}

fn server_error(state: &State, terms: &Terms<'_>, body: &[u8]) -> LoginFault {
    let sqlstate = codec::sqlstate(body).filter(|code| code.iter().all(u8::is_ascii_alphanumeric));
    let sqlstate = sqlstate
        .map_or_else(|| "none".to_owned(), |code| String::from_utf8_lossy(&code).into_owned());
    let proven = match state {
        State::Ok(..) | State::Prelude(..) => true,
        State::Auth | State::Continue(..) | State::Final(..) | State::Sent(_) => {
            terms.name == NameProof::Verified
        }
    };
    // How PostgreSQL words that the certificate which we saw is not its own.
    if sqlstate == "28000" && matches!(state, State::Final(_, Bound::ToChannel)) {
        return LoginFault::Untrusted(
            "it sees another TLS channel than we do: somebody stands between",
        );
    }
    // Class 28: the credential, not the request, is at fault, and that is the operator's matter.
    if sqlstate.starts_with("28") && !matches!(state, State::Prelude(..)) {
        let voice = if proven { Voice::Servers } else { terms.voice };
        return refusal(sqlstate, voice);
    }
    if proven {
        let message = Writer::tagged(b'E').bytes(body).finish();
        LoginFault::Server { sqlstate, message }
    } else {
        LoginFault::Unproven(sqlstate)
    }
}

/// Runs the machine over a server's messages for the fuzzer. `from` chooses where it begins (at the
/// beginning, where it asked for a challenge, where the server has proved itself, where a hash of
/// the password is sent) and on what terms: any method or the default ones, with a verified name
/// or without, with a channel to bind to or without. Whether it went on to the end, or to where
/// only the password leads further.
#[cfg(any(test, fuzzing))]
pub(in super::super) fn lets_in(from: u8, mut stream: &[u8]) -> bool {
    use super::messages::{HEADER, MAX_MESSAGE};
    use crate::upstream::end_point::EndPoint;
    let all = [Method::Scram, Method::Md5, Method::Password, Method::None];
    let bit = |bit: u8| from & (1 << bit) != 0;
    let binding = match (bit(5), bit(6)) {
        (false, _) => ChannelBinding::Prefer,
        (true, false) => ChannelBinding::Disable,
        (true, true) => ChannelBinding::Require,
    };
    let methods = if bit(2) { all.to_vec() } else { vec![Method::Scram] };
    let Some(rules) = LoginRules::new(methods, binding) else { return false };
    let name = if bit(3) { NameProof::Verified } else { NameProof::None };
    let end_point = EndPoint::dangerous_for_test(&[7; 32]);
    let channel = if bit(4) { Channel::Tls(Some(end_point)) } else { Channel::Plain };
    let voice = if bit(3) { Voice::Servers } else { Voice::Anybodys };
    let terms = Terms { rules: &rules, name, voice, channel };
    let mut state = match from % 4 {
        0 => State::Auth,
        1 => State::Continue(ClientFirst::with_nonce("fuzz".to_owned(), Binding::No), Bound::No),
        2 => State::Prelude(Prelude::default(), How::Nothing),
        _ => State::Sent(How::Md5),
    };
    let begun_proven = from % 4 >= 2;
    let trusting = rules.allows(Method::None)
        && name == NameProof::Verified
        && binding != ChannelBinding::Require;
    while let Some(([tag, length @ ..], rest)) = stream.split_first_chunk::<HEADER>() {
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        let Some(length) = length.checked_sub(4).filter(|length| *length <= MAX_MESSAGE) else {
            return false;
        };
        let Some((body, rest)) = rest.split_at_checked(length) else { return false };
        stream = rest;
        state = match advance(state, &terms, *tag, body) {
            Ok(Step::Wait(next) | Step::Send(next, _)) => next,
            // Only who knows the password comes by.
            Ok(Step::Prove(..)) => return true,
            Ok(Step::Password) => {
                assert!(rules.allows(Method::Password) && name == NameProof::Verified);
                assert!(binding != ChannelBinding::Require, "it sent what is not bound");
                return true;
            }
            Ok(Step::Md5(_)) => {
                assert!(rules.allows(Method::Md5) && binding != ChannelBinding::Require);
                return true;
            }
            Ok(Step::Done(prelude, _)) => {
                assert!(begun_proven || trusting, "it let a server in that has proved nothing");
                let key = crate::session::ClientKey { pid: 9, secret: [9; 4].into() };
                let told = prelude.for_client(&key);
                let most = 2 * (super::prelude::MAX_PRELUDE + HEADER) + 64;
                assert!(told.len() <= most, "{} bytes", told.len());
                return true;
            }
            Err(fault) => {
                let proven = matches!(fault, LoginFault::Server { .. });
                assert!(
                    begun_proven || name == NameProof::Verified || !proven,
                    "it believed an error: {fault}"
                );
                return false;
            }
        };
        let proven = matches!(state, State::Ok(..) | State::Prelude(..));
        assert!(
            begun_proven || trusting || !proven,
            "it believed a server that has proved nothing"
        );
    }
    false
}

#[cfg(test)]
mod tests {
    use super::super::messages::MAX_MESSAGE;
    use super::*;
    use crate::credential::Verdict;
    use crate::upstream::Remote;
    use crate::upstream::end_point::EndPoint;

    fn auth(kind: u32, rest: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes(), rest].concat()
    }

    fn terms(rules: &LoginRules, name: NameProof) -> Terms<'_> {
        Terms { rules, name, voice: Voice::Anybodys, channel: Channel::Plain }
    }

    fn default_step(
        state: State,
        name: NameProof,
        tag: u8,
        body: &[u8],
    ) -> Result<Step, LoginFault> {
        advance(state, &terms(&LoginRules::default(), name), tag, body)
    }

    fn untrusted(state: State, tag: u8, body: &[u8]) -> &'static str {
        match default_step(state, NameProof::None, tag, body) {
            Err(LoginFault::Untrusted(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    fn first() -> ClientFirst {
        ClientFirst::random(Binding::No).unwrap()
    }

    fn in_prelude() -> State {
        State::Prelude(Prelude::default(), How::Scram(Bound::No))
    }

    #[test]
    fn the_password_is_never_sent_because_a_server_asks() {
        assert!(untrusted(State::Auth, b'R', &auth(3, b"")).contains("the password itself"));
        assert!(untrusted(State::Auth, b'R', &auth(5, b"salt")).contains("MD5"));
        for kind in [2, 6, 7, 8, 9, 13] {
            let _ = untrusted(State::Auth, b'R', &auth(kind, b""));
        }
    }

    #[test]
    fn a_server_must_prove_itself_before_it_lets_us_in() {
        assert!(untrusted(State::Auth, b'R', &auth(0, b"")).contains("without proving"));
        assert!(
            untrusted(State::Continue(first(), Bound::No), b'R', &auth(0, b""))
                .contains("without proving")
        );
        let _ = untrusted(State::Auth, b'R', &auth(10, b"PLAIN\0\0"));
        let _ = untrusted(State::Auth, b'R', &auth(12, b"v="));
        let _ = untrusted(State::Sent(How::Md5), b'R', &auth(10, b"SCRAM-SHA-256\0\0"));
    }

    #[test]
    fn messages_out_of_place_end_the_login() {
        for tag in [b'Z', b'K', b'S', b'T', b'D', b'C', b'v', 0] {
            let _ = untrusted(State::Auth, tag, b"");
            let _ = untrusted(State::Sent(How::Password), tag, b"");
        }
        let _ = untrusted(in_prelude(), b'T', b"");
        let _ = untrusted(in_prelude(), b'K', b"\0\0\0\x01abc");
    }

    #[test]
    fn that_the_secret_is_wrong_is_believed_of_the_server_alone() {
        let rules = LoginRules::default();
        let verdict = |state, voice, code| {
            let terms = Terms { voice, ..terms(&rules, NameProof::None) };
            let error = codec::fatal(code, "no", "", None);
            match advance(state, &terms, b'E', &error[5..]) {
                Err(LoginFault::Refused { verdict, .. }) => verdict,
                other => panic!("{other:?}"),
            }
        };
        let sent = || State::Sent(How::Md5);
        for state in [|| State::Auth, sent] {
            assert_eq!(verdict(state(), Voice::Servers, "28P01"), Verdict::Wrong);
            assert_eq!(verdict(state(), Voice::Anybodys, "28P01"), Verdict::Hearsay);
            assert_eq!(verdict(state(), Voice::Servers, "28000"), Verdict::Elsewhere);
            assert_eq!(verdict(state(), Voice::Anybodys, "28000"), Verdict::Elsewhere);
        }
        let unix = Remote::unix_for_test(std::path::Path::new("/run/postgresql/.s.PGSQL.5432"));
        let loopback = Remote::tcp_for_test(([127, 0, 0, 1], 5432).into());
        assert_eq!(Voice::over(NameProof::None, &unix), Voice::Servers);
        assert_eq!(Voice::over(NameProof::None, &loopback), Voice::Anybodys);
        assert_eq!(Voice::over(NameProof::Verified, &loopback), Voice::Servers);
    }

    #[test]
    fn errors_are_relayed_only_from_a_proven_server() {
        let error = codec::fatal("3D000", "database \"x\" does not exist", "", None);
        let body = &error[5..];
        let fault = |state, name| default_step(state, name, b'E', body).unwrap_err();
        assert!(matches!(fault(State::Auth, NameProof::None), LoginFault::Unproven(_)));
        assert!(matches!(fault(State::Auth, NameProof::Verified), LoginFault::Server { .. }));
        let LoginFault::Server { message, sqlstate } = fault(in_prelude(), NameProof::None) else {
            panic!("it has proved itself by SCRAM")
        };
        assert_eq!((message, sqlstate.as_str()), (error, "3D000"));
        let refused =
            codec::fatal("28P01", "password authentication failed for user \"app\"", "", None);
        let fault =
            default_step(State::Auth, NameProof::Verified, b'E', &refused[5..]).unwrap_err();
        assert!(matches!(fault, LoginFault::Refused { .. }), "{fault}");
    }

    #[test]
    fn the_prelude_is_bounded_and_carries_our_key() {
        let mut prelude = Prelude::default();
        prelude.push(b'S', b"a\0b\0").unwrap();
        let state = State::Prelude(prelude, How::Nothing);
        let Ok(Step::Wait(state)) =
            default_step(state, NameProof::None, b'K', b"\0\0\0\x07\x01\x02\x03\x04")
        else {
            panic!()
        };
        let Ok(Step::Done(prelude, How::Nothing)) =
            default_step(state, NameProof::None, b'Z', b"I")
        else {
            panic!()
        };
        let ours = crate::session::ClientKey { pid: 9, secret: [9; 4].into() };
        let bytes = prelude.for_client(&ours);
        assert_eq!(bytes, b"R\0\0\0\x08\0\0\0\0S\0\0\0\x08a\0b\0K\0\0\0\x0c\0\0\0\x09\x09\x09\x09\x09Z\0\0\0\x05I");

        let mut endless = Prelude::default();
        let notice = vec![b'x'; MAX_MESSAGE];
        let pushed = (0..100).map_while(|_| endless.push(b'N', &notice).ok()).count();
        assert!(pushed < 100);
    }

    fn all(binding: ChannelBinding) -> LoginRules {
        let methods = vec![Method::Scram, Method::Md5, Method::Password, Method::None];
        LoginRules::new(methods, binding).unwrap()
    }

    #[test]
    fn what_is_named_is_given_and_the_password_only_to_a_proven_server() {
        let rules = all(ChannelBinding::Prefer);
        let ask = |name, kind, rest: &[u8]| {
            advance(State::Auth, &terms(&rules, name), b'R', &auth(kind, rest))
        };
        for name in [NameProof::None, NameProof::Verified] {
            assert!(matches!(ask(name, 5, b"salt"), Ok(Step::Md5(salt)) if salt == *b"salt"));
            for bad in [&b"sal"[..], b"salty"] {
                assert!(matches!(ask(name, 5, bad), Err(LoginFault::Untrusted(_))));
            }
        }
        assert!(matches!(ask(NameProof::Verified, 3, b""), Ok(Step::Password)));
        let let_in = ask(NameProof::Verified, 0, b"");
        assert!(matches!(let_in, Ok(Step::Wait(State::Prelude(_, How::Nothing)))));
        for kind in [0, 3] {
            let refused = ask(NameProof::None, kind, b"");
            assert!(matches!(refused, Err(LoginFault::Untrusted(_))), "{refused:?}");
        }
    }

    #[test]
    fn a_required_binding_lets_nothing_else_through() {
        let rules = all(ChannelBinding::Require);
        let tls = || Channel::Tls(Some(EndPoint::dangerous_for_test(&[1; 32])));
        let ask = |channel, kind, rest: &[u8]| {
            let terms =
                Terms { voice: Voice::Servers, channel, ..terms(&rules, NameProof::Verified) };
            advance(State::Auth, &terms, b'R', &auth(kind, rest))
        };
        for (kind, rest) in [(0, &b""[..]), (3, b""), (5, b"salt"), (10, b"SCRAM-SHA-256\0\0")] {
            let refused = ask(tls(), kind, rest);
            assert!(matches!(refused, Err(LoginFault::Untrusted(_))), "{kind}: {refused:?}");
        }
        let plus = b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0";
        for channel in [Channel::Plain, Channel::Tls(None)] {
            assert!(matches!(ask(channel, 10, plus), Err(LoginFault::Untrusted(_))));
        }
        let bound = ask(tls(), 10, plus);
        assert!(matches!(bound, Ok(Step::Send(State::Continue(_, Bound::ToChannel), _))));
    }

    #[test]
    fn the_header_says_what_the_channel_is() {
        let sent = |binding, channel, offer: &[u8]| {
            let rules = LoginRules::new(vec![Method::Scram], binding).unwrap();
            let terms =
                Terms { voice: Voice::Servers, channel, ..terms(&rules, NameProof::Verified) };
            match advance(State::Auth, &terms, b'R', &auth(10, offer)) {
                Ok(Step::Send(_, message)) => String::from_utf8_lossy(&message).into_owned(),
                other => panic!("{other:?}"),
            }
        };
        use ChannelBinding::{Disable, Prefer};
        let tls = || Channel::Tls(Some(EndPoint::dangerous_for_test(&[1; 32])));
        let (both, scram) = (&b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0"[..], b"SCRAM-SHA-256\0\0");
        assert!(sent(Prefer, tls(), both).contains("SCRAM-SHA-256-PLUS\0"));
        assert!(sent(Prefer, tls(), both).contains("p=tls-server-end-point,,n=,r="));
        assert!(sent(Prefer, tls(), scram).contains("y,,n=,r="));
        assert!(sent(Disable, tls(), both).contains("n,,n=,r="));
        assert!(sent(Prefer, Channel::Tls(None), both).contains("n,,n=,r="));
        assert!(sent(Prefer, Channel::Plain, both).contains("n,,n=,r="));
    }

    #[test]
    fn a_server_that_sees_another_channel_is_not_believed() {
        let error = codec::fatal("28000", "SCRAM channel binding check failed", "", None);
        let challenge = first();
        let server_first = format!("r={}x,s=c2FsdA==,i=4096", challenge.nonce());
        let arena = crate::arena::Arena::map(crate::arena::BackendChoice::Auto, 64 * 1024).unwrap();
        let mut slot = arena.allocate(1).unwrap();
        slot.fill(|place| place.fill(b'x'));
        let credential = crate::credential::Credential::new("app".into(), slot);
        let proof = challenge.challenged(server_first.as_bytes()).unwrap().prove(&credential);
        let state = State::Final(proof.unwrap().expected, Bound::ToChannel);
        let fault = default_step(state, NameProof::Verified, b'E', &error[5..]).unwrap_err();
        assert!(matches!(fault, LoginFault::Untrusted(why) if why.contains("between")));
    }
}
