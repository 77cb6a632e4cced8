//! Values, from PostgreSQL's binary wire format to JSON, without loss.
//!
//! A [`Codec`] exists only for a type that can be decoded exactly, and a column is sent for
//! only with one; so a type that is not known here is found before a statement runs, never
//! after. Lengths come from a server and are not trusted: every read is checked. Formats: the
//! `*_send` functions of PostgreSQL 15, `src/backend/utils/adt`.

mod json;
mod net;
mod numeric;
mod time;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Number, Value};

use super::params::to_text;

/// How the values of a column are decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Codec {
    /// A type of one value.
    Scalar(Scalar),
    /// An array, of any dimensions, of one.
    Array(Scalar),
}

/// The wire formats of single values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scalar {
    Bool,
    Bytea,
    Char,
    Int2,
    Int4,
    Int8,
    Oid,
    Float4,
    Float8,
    Numeric,
    /// Everything that is sent as its text.
    Text,
    Json,
    Jsonb,
    Uuid,
    Date,
    Time,
    TimeTz,
    Timestamp,
    TimestampTz,
    Interval,
    Inet,
    MacAddr,
    Bits,
    Void,
}

/// A value that is not what its type says: a fault of the server, or bytes that are not text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a value is not in the format of its type")]
pub(super) struct Malformed;

/// Object identifiers from `pg_type.dat`, with the names that results show.
const SCALARS: &[(u32, &str, Scalar)] = &[
    (16, "bool", Scalar::Bool),
    (17, "bytea", Scalar::Bytea),
    (18, "char", Scalar::Char),
    (19, "name", Scalar::Text),
    (20, "int8", Scalar::Int8),
    (21, "int2", Scalar::Int2),
    (23, "int4", Scalar::Int4),
    (25, "text", Scalar::Text),
    (26, "oid", Scalar::Oid),
    (114, "json", Scalar::Json),
    (142, "xml", Scalar::Text),
    (650, "cidr", Scalar::Inet),
    (700, "float4", Scalar::Float4),
    (701, "float8", Scalar::Float8),
    (705, "unknown", Scalar::Text),
    (774, "macaddr8", Scalar::MacAddr),
    (829, "macaddr", Scalar::MacAddr),
    (869, "inet", Scalar::Inet),
    (1042, "bpchar", Scalar::Text),
    (1043, "varchar", Scalar::Text),
    (1082, "date", Scalar::Date),
    (1083, "time", Scalar::Time),
    (1114, "timestamp", Scalar::Timestamp),
    (1184, "timestamptz", Scalar::TimestampTz),
    (1186, "interval", Scalar::Interval),
    (1266, "timetz", Scalar::TimeTz),
    (1560, "bit", Scalar::Bits),
    (1562, "varbit", Scalar::Bits),
    (1700, "numeric", Scalar::Numeric),
    (2278, "void", Scalar::Void),
    (2950, "uuid", Scalar::Uuid),
    (3802, "jsonb", Scalar::Jsonb),
];

/// The codec and the shown name of a built-in type.
pub(super) fn builtin(oid: u32) -> Option<(&'static str, Scalar)> {
    SCALARS.iter().find(|(known, ..)| *known == oid).map(|(_, name, scalar)| (*name, *scalar))
}

impl Codec {
    /// Decodes one value that is not NULL. Of an array whose text is longer than `most` bytes
    /// there may be a beginning only, and that is longer too.
    pub(super) fn decode(&self, bytes: &[u8], most: usize) -> Result<Value, Malformed> {
        match self {
            Self::Scalar(scalar) => scalar.decode(bytes),
            Self::Array(scalar) => array(*scalar, bytes, most),
        }
    }

    /// Whether a value may be more than eight times as long as on the wire.
    pub(super) fn may_grow(&self) -> bool {
        matches!(self, Self::Scalar(Scalar::Numeric) | Self::Array(Scalar::Numeric))
    }

    /// Whether a value may be cut and still be read as the beginning of the whole.
    pub(super) fn is_text(&self) -> bool {
        matches!(self, Self::Scalar(Scalar::Text))
    }
}

impl Scalar {
    /// The name of a type that has this format.
    fn name(self) -> &'static str {
        SCALARS.iter().find(|(.., scalar)| *scalar == self).map_or("text", |(_, name, _)| name)
    }

    fn decode(self, bytes: &[u8]) -> Result<Value, Malformed> {
        Ok(match self {
            Self::Bool => match bytes {
                [flag] => (*flag != 0).into(),
                _ => return Err(Malformed),
            },
            Self::Bytea => BASE64.encode(bytes).into(),
            Self::Char => char_type(bytes)?.into(),
            Self::Int2 => i16::from_be_bytes(fixed(bytes)?).into(),
            Self::Int4 => i32::from_be_bytes(fixed(bytes)?).into(),
            Self::Int8 => i64::from_be_bytes(fixed(bytes)?).to_string().into(),
            Self::Oid => u32::from_be_bytes(fixed(bytes)?).into(),
            Self::Float4 => float4(f32::from_be_bytes(fixed(bytes)?)),
            Self::Float8 => float8(f64::from_be_bytes(fixed(bytes)?)),
            Self::Numeric => numeric::text(bytes)?.into(),
            Self::Text => text(bytes)?.into(),
            Self::Json => json::value(text(bytes)?),
            Self::Jsonb => match bytes.split_first() {
                Some((1, json)) => json::value(text(json)?),
                _ => return Err(Malformed),
            },
            Self::Uuid => uuid(fixed(bytes)?).into(),
            Self::Date => time::date(i32::from_be_bytes(fixed(bytes)?)).into(),
            Self::Time => time::time(i64::from_be_bytes(fixed(bytes)?)).into(),
            Self::TimeTz => {
                let (micros, zone) = take::<8>(bytes)?;
                time::time_tz(i64::from_be_bytes(micros), i32::from_be_bytes(fixed(zone)?)).into()
            }
            Self::Timestamp => time::timestamp(i64::from_be_bytes(fixed(bytes)?), "").into(),
            Self::TimestampTz => time::timestamp(i64::from_be_bytes(fixed(bytes)?), "Z").into(),
            Self::Interval => {
                let (micros, rest) = take::<8>(bytes)?;
                let (days, months) = take::<4>(rest)?;
                time::interval(
                    i32::from_be_bytes(fixed(months)?),
                    i32::from_be_bytes(days),
                    i64::from_be_bytes(micros),
                )
                .into()
            }
            Self::Inet => net::inet(bytes)?.into(),
            Self::MacAddr => net::mac(bytes).into(),
            Self::Bits => bits(bytes)?.into(),
            Self::Void => "".into(),
        })
    }
}

/// Takes `N` bytes off the front.
fn take<const N: usize>(bytes: &[u8]) -> Result<([u8; N], &[u8]), Malformed> {
    bytes.split_first_chunk::<N>().map(|(head, rest)| (*head, rest)).ok_or(Malformed)
}

/// Exactly `N` bytes.
fn fixed<const N: usize>(bytes: &[u8]) -> Result<[u8; N], Malformed> {
    bytes.try_into().map_err(|_size| Malformed)
}

fn text(bytes: &[u8]) -> Result<&str, Malformed> {
    std::str::from_utf8(bytes).map_err(|_invalid| Malformed)
}

/// The one-byte type `"char"`, as `charout` writes it.
fn char_type(bytes: &[u8]) -> Result<String, Malformed> {
    match bytes {
        [0] => Ok(String::new()),
        [byte] if byte.is_ascii() => Ok(char::from(*byte).to_string()),
        [byte] => Ok(format!("\\{byte:03o}")),
        _ => Err(Malformed),
    }
}

/// JSON has no NaN and no infinity: they are strings, spelt as PostgreSQL spells them.
fn float8(value: f64) -> Value {
    Number::from_f64(value).map_or_else(
        || {
            Value::from(if value.is_nan() {
                "NaN"
            } else if value > 0.0 {
                "Infinity"
            } else {
                "-Infinity"
            })
        },
        Value::Number,
    )
}

/// By way of the shortest text: widening 0.1 directly gives 0.10000000149011612.
fn float4(value: f32) -> Value {
    float8(value.to_string().parse().unwrap_or_else(|_unreachable| f64::from(value)))
}

fn uuid(bytes: [u8; 16]) -> String {
    let hex = format!("{:032x}", u128::from_be_bytes(bytes));
    let mut parts = Vec::with_capacity(5);
    let mut rest = hex.as_str();
    for len in [8, 4, 4, 4, 12] {
        let (part, tail) = rest.split_at_checked(len).unwrap_or((rest, ""));
        parts.push(part);
        rest = tail;
    }
    parts.join("-")
}

fn bits(bytes: &[u8]) -> Result<String, Malformed> {
    let (len, data) = take::<4>(bytes)?;
    let len = usize::try_from(i32::from_be_bytes(len)).map_err(|_negative| Malformed)?;
    if len.div_ceil(8) != data.len() {
        return Err(Malformed);
    }
    let bit = |byte: &u8, at: u8| if byte & (0x80 >> at) == 0 { '0' } else { '1' };
    Ok(data.iter().flat_map(|byte| (0..8).map(move |at| bit(byte, at))).take(len).collect())
}

/// An array as nested JSON arrays; as PostgreSQL's literal, `[0:1]={…}`, where a lower bound is
/// not 1.
///
/// A few bytes of a numeric are a hundred thousand digits, so no more than `most` bytes of text are
/// made, and one element.
fn array(scalar: Scalar, bytes: &[u8], most: usize) -> Result<Value, Malformed> {
    let (dimensions, rest) = take::<4>(bytes)?;
    let (_has_null, rest) = take::<4>(rest)?;
    let (_element_oid, mut rest) = take::<4>(rest)?;
    // 6 is MAXDIM in PostgreSQL; it bounds the recursion below.
    let dimensions = match i32::from_be_bytes(dimensions) {
        count @ 0..=6 => count,
        _ => return Err(Malformed),
    };
    let mut lengths = Vec::new();
    let (mut bounds, mut usual) = (String::new(), true);
    for _ in 0..dimensions {
        let (length, tail) = take::<4>(rest)?;
        let (lower_bound, tail) = take::<4>(tail)?;
        let lower_bound = i64::from(i32::from_be_bytes(lower_bound));
        let length = u32::try_from(i32::from_be_bytes(length)).map_err(|_negative| Malformed)?;
        // An empty array has no dimensions. One with a length of zero would let the others
        // claim any amount of work for no bytes at all.
        if length == 0 {
            return Err(Malformed);
        }
        lengths.push(length);
        usual &= lower_bound == 1;
        bounds.push_str(&format!("[{lower_bound}:{}]", lower_bound + i64::from(length) - 1));
        rest = tail;
    }
    if lengths.is_empty() {
        return Ok(Value::Array(Vec::new()));
    }
    let mut elements = Elements { scalar, rest, room: Some(most) };
    let value = elements.dimension(&lengths)?;
    if elements.room.is_some() && !elements.rest.is_empty() {
        return Err(Malformed);
    }
    if usual {
        return Ok(value);
    }
    let literal = to_text(&value, &format!("{}[]", scalar.name()), 0);
    let literal = literal.ok().flatten().ok_or(Malformed)?;
    Ok(format!("{bounds}={literal}").into())
}

/// The elements of an array that are still to be read.
struct Elements<'a> {
    scalar: Scalar,
    rest: &'a [u8],
    /// Bytes of text that may still be made; `None` once there is no more.
    room: Option<usize>,
}

impl Elements<'_> {
    fn dimension(&mut self, lengths: &[u32]) -> Result<Value, Malformed> {
        let Some((length, inner)) = lengths.split_first() else {
            return self.element();
        };
        // Not reserved ahead: a length is only a claim until its elements are there.
        let mut items = Vec::new();
        for _ in 0..*length {
            items.push(self.dimension(inner)?);
            if self.room.is_none() {
                break;
            }
        }
        Ok(Value::Array(items))
    }

    fn element(&mut self) -> Result<Value, Malformed> {
        let (size, tail) = take::<4>(self.rest)?;
        let size = i32::from_be_bytes(size);
        let value = if size == -1 {
            self.rest = tail;
            Value::Null
        } else {
            let size = usize::try_from(size).map_err(|_negative| Malformed)?;
            let (element, tail) = tail.split_at_checked(size).ok_or(Malformed)?;
            self.rest = tail;
            self.scalar.decode(element)?
        };
        // Never more than there is of it in a text.
        let length = value.as_str().map_or(1, |text| text.len().max(1));
        self.room = self.room.and_then(|room| room.checked_sub(length));
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn check(scalar: Scalar, bytes: &[u8], expected: &Value) {
        assert_eq!(scalar.decode(bytes).as_ref(), Ok(expected), "{scalar:?} {bytes:?}");
    }

    #[test]
    fn scalars() {
        check(Scalar::Bool, &[1], &json!(true));
        check(Scalar::Int2, &(-2_i16).to_be_bytes(), &json!(-2));
        check(Scalar::Int8, &i64::MIN.to_be_bytes(), &json!("-9223372036854775808"));
        check(Scalar::Oid, &u32::MAX.to_be_bytes(), &json!(4_294_967_295_u32));
        check(Scalar::Float4, &0.1_f32.to_be_bytes(), &json!(0.1));
        check(Scalar::Float4, &f32::MAX.to_be_bytes(), &json!(3.402_823_5e38));
        check(Scalar::Float8, &f64::NAN.to_be_bytes(), &json!("NaN"));
        check(Scalar::Float8, &f64::NEG_INFINITY.to_be_bytes(), &json!("-Infinity"));
        check(Scalar::Float8, &f64::INFINITY.to_be_bytes(), &json!("Infinity"));
        check(Scalar::Bytea, &[0xde, 0xad], &json!("3q0="));
        check(Scalar::Char, b"r", &json!("r"));
        check(Scalar::Char, &[0], &json!(""));
        check(Scalar::Char, &[0xff], &json!("\\377"));
        check(Scalar::Jsonb, b"\x01{\"a\": [1, null]}", &json!({"a": [1, null]}));
        check(Scalar::Bits, &[0, 0, 0, 10, 0b1010_0000, 0b1100_0000], &json!("1010000011"));
        check(
            Scalar::Uuid,
            &0x1234_5678_9abc_def0_0fed_cba9_8765_4321_u128.to_be_bytes(),
            &json!("12345678-9abc-def0-0fed-cba987654321"),
        );
    }

    #[test]
    fn arrays_nest_and_hold_nulls() {
        let mut bytes = Vec::new();
        for word in [2, 1, 23, 2, 1, 2, 1] {
            bytes.extend(i32::to_be_bytes(word));
        }
        for element in [Some(1), None, Some(3), Some(-4)] {
            match element {
                None => bytes.extend((-1_i32).to_be_bytes()),
                Some(value) => {
                    bytes.extend(4_i32.to_be_bytes());
                    bytes.extend(i32::to_be_bytes(value));
                }
            }
        }
        assert_eq!(Codec::Array(Scalar::Int4).decode(&bytes, 99), Ok(json!([[1, null], [3, -4]])));
        let empty: Vec<u8> = [0, 0, 23].into_iter().flat_map(i32::to_be_bytes).collect();
        assert_eq!(Codec::Array(Scalar::Int4).decode(&empty, 99), Ok(json!([])));
    }

    #[test]
    fn lower_bounds_are_kept() {
        let mut bytes: Vec<u8> = [1, 0, 17, 2, -1].into_iter().flat_map(i32::to_be_bytes).collect();
        for element in [&[0xde_u8, 0xad][..], &[]] {
            bytes.extend(i32::try_from(element.len()).unwrap().to_be_bytes());
            bytes.extend(element);
        }
        let expected = json!(r#"[-1:0]={"\\xdead","\\x"}"#);
        assert_eq!(Codec::Array(Scalar::Bytea).decode(&bytes, 99), Ok(expected));
    }

    #[test]
    fn an_array_that_claims_too_much_is_malformed_at_once() {
        let claims = [6, 0, 23, i32::MAX, 1, i32::MAX, 1, i32::MAX, 1, 0, 1, 0, 1, 0, 1];
        let bytes: Vec<u8> = claims.into_iter().flat_map(i32::to_be_bytes).collect();
        let huge_empty = Codec::Array(Scalar::Int4).decode(bytes.get(..36).unwrap(), 99);
        assert_eq!(huge_empty, Err(Malformed));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            for (_, _, scalar) in SCALARS {
                let _ = scalar.decode(&bytes);
                let _ = Codec::Array(*scalar).decode(&bytes, 9);
            }
        }
    }
}
