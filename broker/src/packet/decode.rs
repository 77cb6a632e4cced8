//! From the bytes of a packet to a request in the core's words: pure, whatever the bytes.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use credbroker_proto::v1::packet_request::Request as Message;
use credbroker_proto::v1::{self, revoke_handle_request};
use prost::Message as _;
use prost_types::Timestamp;

use crate::core::{IssueRequest, Named, PutRequest, RegisterRequest};
use crate::door::postgres::handoff::OpenRequest;
use crate::handle::{HandleId, TokenHash};
use crate::rpc::convert::{self, Bad};

/// 9999-12-31T23:59:59Z, where `google.protobuf.Timestamp` ends.
const LAST_SECOND: i64 = 253_402_300_799;

/// One packet, understood.
#[derive(Debug)]
pub(crate) struct Request {
    /// The caller's number for it.
    pub(crate) id: u64,
    pub(crate) verb: Verb,
}

/// What is asked.
#[derive(Debug)]
pub(crate) enum Verb {
    Issue(IssueRequest),
    Renew(Option<TokenHash>, Option<Duration>),
    Revoke(Named),
    Describe(Option<TokenHash>),
    Open(OpenRequest),
    Register(RegisterRequest),
    Reveal(Option<TokenHash>),
    Put(PutRequest),
}

/// What cannot be understood.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed {
    /// 0 when not even that could be read.
    pub(crate) id: u64,
    pub(crate) field: &'static str,
    pub(crate) must: &'static str,
}

/// Reads a packet.
///
/// # Errors
/// When it is no `PacketRequest`, or a field of it cannot be understood.
pub(crate) fn decode(packet: &[u8]) -> Result<Request, Malformed> {
    let request = v1::PacketRequest::decode(packet).map_err(|_malformed| Malformed {
        id: 0,
        field: "packet",
        must: "be one credbroker.v1.PacketRequest",
    })?;
    let id = request.id;
    let malformed = |Bad { field, must }| Malformed { id, field, must };
    let must = "be one that this broker knows";
    let asked = request.request.ok_or(Malformed { id, field: "request", must })?;
    verb(asked).map(|verb| Request { id, verb }).map_err(malformed)
}

fn verb(asked: Message) -> Result<Verb, Bad> {
    Ok(match asked {
        Message::Issue(issue) => Verb::Issue(convert::issue(issue)?),
        Message::Renew(v1::RenewHandleRequest { token, ttl }) => {
            Verb::Renew(TokenHash::of(&token), convert::span(ttl, "ttl")?)
        }
        Message::Revoke(revoke) => Verb::Revoke(match revoke.handle {
            Some(revoke_handle_request::Handle::Token(token)) => {
                Named::Token(TokenHash::of(&token))
            }
            Some(revoke_handle_request::Handle::Id(id)) => Named::Id(HandleId::parse(&id)),
            None => return Err(Bad { field: "handle", must: "be given, by token or id" }),
        }),
        Message::Describe(describe) => Verb::Describe(TokenHash::of(&describe.token)),
        Message::Open(open) => Verb::Open(self::open(open)?),
        Message::Register(given) => Verb::Register(register(given)?),
        Message::Reveal(reveal) => Verb::Reveal(TokenHash::of(&reveal.token)),
        Message::Put(given) => Verb::Put(put(given)?),
    })
}

fn open(given: v1::OpenRequest) -> Result<OpenRequest, Bad> {
    let parameters = given.startup.into_iter().map(|setting| (setting.name, setting.value));
    OpenRequest::new(TokenHash::of(&given.token), given.database, parameters.collect())
        .map_err(|(field, must)| Bad { field, must })
}

fn register(given: v1::RegisterRequest) -> Result<RegisterRequest, Bad> {
    let username = given.username;
    let issue = convert::issue(v1::IssueHandleRequest {
        connection: given.connection,
        ttl: given.ttl,
        max_uses: given.max_uses,
        max_sessions: given.max_sessions,
        redeemer: None,
        bind: given.bind,
        subject: given.subject,
        purpose: given.purpose,
    })?;
    Ok(RegisterRequest { username, issue })
}

fn put(given: v1::PutRequest) -> Result<PutRequest, Bad> {
    let expires_at = given.expires_at.map(moment).transpose()?;
    Ok(PutRequest {
        connection: given.connection,
        username: (!given.username.is_empty()).then_some(given.username),
        expires_at,
        labels: BTreeMap::from_iter(given.labels),
        grace: convert::span(given.grace, "grace")?,
    })
}

fn moment(given: Timestamp) -> Result<SystemTime, Bad> {
    const OUTSIDE: Bad = Bad { field: "expires_at", must: "lie between the years 1970 and 9999" };
    if !(0..=LAST_SECOND).contains(&given.seconds) {
        return Err(OUTSIDE);
    }
    SystemTime::try_from(given).map_err(|_out_of_range| OUTSIDE)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(id: u64, request: Message) -> Vec<u8> {
        v1::PacketRequest { id, request: Some(request) }.encode_to_vec()
    }

    #[test]
    fn a_request_comes_out_as_it_went_in() {
        let issue = v1::IssueHandleRequest { connection: "main_db".into(), ..Default::default() };
        let request = decode(&encoded(7, Message::Issue(issue))).unwrap();
        assert_eq!(request.id, 7);
        assert!(matches!(request.verb, Verb::Issue(issue) if issue.connection == "main_db"));
    }

    #[test]
    fn what_cannot_be_read_has_no_number_and_what_cannot_be_understood_has() {
        let malformed = |packet: &[u8]| {
            let Malformed { id, field, .. } = decode(packet).unwrap_err();
            (id, field)
        };
        assert_eq!(malformed(b""), (0, "request"));
        assert_eq!(malformed(&[0xff; 32]), (0, "packet"));
        // A verb of the future: field 15, an empty message.
        assert_eq!(malformed(&[0x08, 9, 0x7a, 0]), (9, "request"));
        let revoke = Message::Revoke(v1::RevokeHandleRequest { handle: None });
        assert_eq!(malformed(&encoded(3, revoke)), (3, "handle"));
        let ttl = Some(prost_types::Duration { seconds: -1, nanos: 0 });
        let renew = v1::RenewHandleRequest { token: String::new(), ttl };
        assert_eq!(malformed(&encoded(4, Message::Renew(renew))), (4, "ttl"));
        let bind = v1::RegisterRequest { bind: 99, ..Default::default() };
        assert_eq!(malformed(&encoded(5, Message::Register(bind))), (5, "bind"));
    }

    #[test]
    fn moments_are_bounded_and_an_empty_name_is_none() {
        let put = |seconds, username: &str| {
            let expires_at = Some(Timestamp { seconds, nanos: 0 });
            let put =
                v1::PutRequest { username: username.into(), expires_at, ..Default::default() };
            match decode(&encoded(1, Message::Put(put))) {
                Ok(Request { verb: Verb::Put(put), .. }) => Ok(put.username),
                Ok(request) => panic!("{request:?}"),
                Err(malformed) => Err(malformed.field),
            }
        };
        assert_eq!(put(0, "app"), Ok(Some("app".into())));
        assert_eq!(put(0, ""), Ok(None));
        for outside in [i64::MAX, i64::MIN, -1, LAST_SECOND + 1] {
            assert_eq!(put(outside, "app"), Err("expires_at"));
        }
    }

    #[test]
    fn nothing_of_a_token_is_printable() {
        let token = format!("cbh_{}", "A".repeat(43));
        let describe = Message::Describe(v1::DescribeHandleRequest { token });
        let printed = format!("{:?}", decode(&encoded(1, describe)).unwrap());
        assert!(!printed.contains("AAAA"), "{printed}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_answer(packet in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode(&packet);
        }

        /// Near misses: a good packet with some bytes changed.
        #[test]
        fn nearly_good_bytes_are_an_answer(
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)
        ) {
            let given = v1::PutRequest {
                connection: "main_db".into(),
                username: "app".into(),
                expires_at: Some(Timestamp { seconds: 1, nanos: 1 }),
                labels: [("team".to_owned(), "billing".to_owned())].into_iter().collect(),
                grace: Some(prost_types::Duration { seconds: 1, nanos: 1 }),
            };
            let mut packet = encoded(1, Message::Put(given));
            for (place, byte) in changes {
                let place = place.index(packet.len());
                packet[place] = byte;
            }
            let _ = decode(&packet);
        }
    }
}
