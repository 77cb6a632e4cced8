//! What clients and servers say, for the fuzzer.

#![forbid(unsafe_code)]

use super::backend::lets_in;
use super::codec::{self, BadStartup, First, Frames, Startup};
use crate::door::wire::Writer;
use crate::handle::TokenHash;

/// A first message that is understood is the same when it is written again; nothing in it is
/// longer than it was; and frames are counted alike however the stream is cut.
#[must_use]
pub fn startup(bytes: &[u8]) -> bool {
    let (cut, stream) = bytes.split_first().unwrap_or((&1, &[]));
    counted(stream, usize::from(*cut));
    if let Ok(text) = codec::password(stream) {
        assert_eq!(text.len() + 1, stream.len());
        let _ = TokenHash::of(text);
    }
    let _ = codec::sqlstate(stream);

    let Some((announced, body)) = bytes.split_first_chunk() else { return false };
    match codec::startup_len(*announced) {
        Ok(len) => assert!((8..=codec::MAX_STARTUP).contains(&len)),
        Err(why) => assert_eq!(why, BadStartup::Length),
    }
    let Ok(first) = codec::first(body) else { return false };
    if let First::Startup(startup) = first {
        let said = |text: &str| assert!(!text.contains('\0') && text.len() < body.len());
        said(&startup.user);
        assert!(!startup.user.is_empty());
        startup.parameters.iter().for_each(|(name, value)| {
            said(name);
            assert!(!value.contains(&0) && value.len() < body.len());
        });
        let _ = codec::negotiate(startup.version(), &startup.options);
        assert_eq!(codec::first(&written(&startup)), Ok(First::Startup(startup)));
    }
    true
}

/// The body of a startup message that says the same.
fn written(startup: &Startup) -> Vec<u8> {
    let Startup { user, database, replication, parameters, options, minor } = startup;
    let message = Writer::untagged().u32(3 << 16 | minor).c_str("user").c_str(user);
    let options = options.iter().map(|option| (option.as_str(), &b""[..]));
    let parameters = parameters.iter().map(|(name, value)| (name.as_str(), value.as_slice()));
    let others = [("database", database), ("replication", replication)];
    let others =
        others.into_iter().filter_map(|(name, value)| Some((name, value.as_deref()?.as_bytes())));
    let message = others
        .chain(options)
        .chain(parameters)
        .fold(message, |message, (name, value)| message.c_str(name).c_bytes(value));
    message.bytes(b"\0").finish().split_off(4)
}

fn counted(stream: &[u8], cut: usize) {
    let (mut whole, mut at_once) = (Frames::default(), Vec::new());
    whole.advance(stream, |tag| at_once.push(tag));
    let (mut parts, mut by_parts) = (Frames::default(), Vec::new());
    for part in stream.chunks(cut.max(1)) {
        parts.advance(part, |tag| by_parts.push(tag));
    }
    assert_eq!(at_once, by_parts);
    assert_eq!(whole.at_boundary(), parts.at_boundary());
    assert!(at_once.len() <= stream.len() / 5);
}

/// No server that does not know the password gets further than the challenge, whatever it says;
/// and one that has proved itself fills no more memory than it may.
#[must_use]
pub fn backend(bytes: &[u8]) -> bool {
    let (from, stream) = bytes.split_first().unwrap_or((&0, &[]));
    lets_in(*from, stream)
}
