//! One line of a log. There is one way to write a record, and a line that is written in another
//! way is none: a reader that takes the first of two equal keys and one that takes the last would
//! see two different records with one hash.

use std::collections::BTreeSet;
use std::fmt;

use data_encoding::HEXLOWER;
use ring::digest::{SHA256, digest};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use super::keys::{PublicKey, Signature};
use super::{Fault, Hash, MAX_LINE};

/// What verification needs of a record.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) seq: u64,
    pub(super) time: String,
    pub(super) broker: String,
    pub(super) prev: Hash,
    pub(super) hash: Hash,
    pub(super) said: Said,
}

/// What a record says about keys.
#[derive(Debug)]
pub(super) enum Said {
    Started { key: Option<PublicKey>, certificate: Option<Signature> },
    Checkpoint { key: PublicKey, certificate: Option<Signature>, signature: Signature },
    Other,
}

impl Line {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Fault> {
        if bytes.len() > MAX_LINE {
            return Err(Fault::TooLong);
        }
        // The hash first: of what was edited, nothing else is worth saying.
        let (body, hash) = hashed(bytes).ok_or(Fault::NotARecord)?;
        if digest(&SHA256, body).as_ref() != hash {
            return Err(Fault::Edited);
        }
        let text = std::str::from_utf8(bytes).map_err(|_not_text| Fault::NotARecord)?;
        Self::read(text, hash).ok_or(Fault::NotARecord)
    }

    fn read(text: &str, hash: Hash) -> Option<Self> {
        let Json::Object(record) = serde_json::from_str(text).ok()? else { return None };
        let [v, seq, time, broker, event, _outcome, .., prev, last] = record.as_slice() else {
            return None;
        };
        let (Json::Number(1), Json::Number(seq)) = (v.named("v")?, seq.named("seq")?) else {
            return None;
        };
        let time = time.named("time")?.text()?;
        let broker = broker.named("broker")?.text()?;
        let event = event.named("event")?.text()?;
        let prev = hex(prev.named("prev")?.text()?)?;
        last.named("hash")?;
        let detail = record.iter().find_map(|member| member.named("detail"));
        let of = |key: &str| match detail {
            Some(Json::Object(members)) => {
                members.iter().find_map(|member| member.named(key))?.text()
            }
            Some(_) | None => None,
        };
        let said = match event {
            "broker.started" => Said::Started {
                key: optional(of("key"))?,
                certificate: optional(of("certificate"))?,
            },
            "checkpoint" => {
                // A checkpoint signs its place and says nothing else: another text with the same
                // signature is not one.
                if text != checkpoint(*seq, time, broker, of, (&prev, &hash))? {
                    return None;
                }
                Said::Checkpoint {
                    key: hex(of("key")?)?,
                    certificate: optional(of("certificate"))?,
                    signature: hex(of("signature")?)?,
                }
            }
            _ => Said::Other,
        };
        Some(Self { seq: *seq, time: time.to_owned(), broker: broker.to_owned(), prev, hash, said })
    }
}

/// Splits `,"hash":"…"}` off.
fn hashed(line: &[u8]) -> Option<(&[u8], Hash)> {
    const BEFORE: &[u8] = b",\"hash\":\"";
    let digits = line.strip_suffix(b"\"}")?;
    let (rest, digits) = digits.split_at_checked(digits.len().checked_sub(64)?)?;
    let hash = HEXLOWER.decode(digits).ok()?;
    Some((rest.strip_suffix(BEFORE)?, hash.try_into().ok()?))
}

/// A checkpoint as it is written, without its newline.
fn checkpoint<'a>(
    seq: u64,
    time: &str,
    broker: &str,
    of: impl Fn(&str) -> Option<&'a str>,
    (prev, hash): (&Hash, &Hash),
) -> Option<String> {
    let json = |text: &str| serde_json::to_string(text).ok();
    let certificate = match of("certificate") {
        Some(certificate) => format!("\"certificate\":{},", json(certificate)?),
        None => String::new(),
    };
    Some(format!(
        "{{\"v\":1,\"seq\":{seq},\"time\":{},\"broker\":{},\"event\":\"checkpoint\",\
         \"outcome\":\"done\",\"detail\":{{{certificate}\"key\":{},\"signature\":{}}},\
         \"prev\":\"{}\",\"hash\":\"{}\"}}",
        json(time)?,
        json(broker)?,
        json(of("key")?)?,
        json(of("signature")?)?,
        HEXLOWER.encode(prev),
        HEXLOWER.encode(hash),
    ))
}

fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    HEXLOWER.decode(text.as_bytes()).ok()?.try_into().ok()
}

/// Absent is well; malformed is not.
#[expect(clippy::option_option, reason = "the outer one says whether it is well-formed")]
fn optional<const N: usize>(text: Option<&str>) -> Option<Option<[u8; N]>> {
    text.map_or(Some(None), |text| hex(text).map(Some))
}

/// JSON in which no object has a key twice. serde_json bounds the depth.
#[derive(Debug)]
enum Json {
    Number(u64),
    Text(String),
    Object(Vec<Member>),
    /// Nothing that verification looks into.
    Other,
}

#[derive(Debug)]
struct Member {
    key: String,
    value: Json,
}

impl Member {
    fn named(&self, key: &str) -> Option<&Json> {
        (self.key == key).then_some(&self.value)
    }
}

impl Json {
    fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            Self::Number(_) | Self::Object(_) | Self::Other => None,
        }
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Strict;

        impl<'de> Visitor<'de> for Strict {
            type Value = Json;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("JSON")
            }

            fn visit_u64<E>(self, number: u64) -> Result<Json, E> {
                Ok(Json::Number(number))
            }

            fn visit_i64<E>(self, _negative: i64) -> Result<Json, E> {
                Ok(Json::Other)
            }

            fn visit_f64<E>(self, _fraction: f64) -> Result<Json, E> {
                Ok(Json::Other)
            }

            fn visit_bool<E>(self, _truth: bool) -> Result<Json, E> {
                Ok(Json::Other)
            }

            fn visit_unit<E>(self) -> Result<Json, E> {
                Ok(Json::Other)
            }

            fn visit_str<E>(self, text: &str) -> Result<Json, E> {
                Ok(Json::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Json, A::Error> {
                while list.next_element::<Json>()?.is_some() {}
                Ok(Json::Other)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
                let (mut members, mut keys) = (Vec::new(), BTreeSet::new());
                while let Some((key, value)) = map.next_entry::<String, Json>()? {
                    if !keys.insert(key.clone()) {
                        return Err(A::Error::custom("a key stands twice"));
                    }
                    members.push(Member { key, value });
                }
                Ok(Json::Object(members))
            }
        }

        deserializer.deserialize_any(Strict)
    }
}
