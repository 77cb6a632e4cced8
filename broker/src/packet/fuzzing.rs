//! Packets for the fuzzer.

#![forbid(unsafe_code)]

use credbroker_proto::v1;
use prost::Message as _;

use super::decode::{Malformed, decode};

/// What decodes means the same when it is written in the usual way. That is the shortest but for
/// numbers of 32 bits that are negative once they are cut to that: in five bytes, written in ten.
#[must_use]
pub fn packet(bytes: &[u8]) -> bool {
    let decoded = decode(bytes);
    let Ok(message) = v1::PacketRequest::decode(bytes) else {
        let unread = decoded.err().map(|Malformed { id, field, .. }| (id, field));
        assert_eq!(unread, Some((0, "packet")), "what is no message was decoded");
        return false;
    };
    let short = message.encode_to_vec();
    assert!(short.len() <= 2 * bytes.len(), "{} bytes became {}", bytes.len(), short.len());
    let again = decode(&short);
    let understood = decoded.is_ok();
    match &decoded {
        Ok(request) => assert_eq!(request.id, message.id),
        Err(malformed) => assert_eq!(malformed.id, message.id),
    }
    // Tokens are hashed and hidden: of them only that they are or are not.
    assert_eq!(format!("{decoded:?}"), format!("{again:?}"));
    understood
}
