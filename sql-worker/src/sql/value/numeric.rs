//! numeric: exact decimal text, as `numeric_out` writes it.
//!
//! On the wire: number of base-10000 digits, weight of the first (10000^weight), sign, display
//! scale, digits; each 16 bits. A double would lose digits, so there is none on the way.

use super::{Malformed, take};

const POSITIVE: u16 = 0x0000;
const NEGATIVE: u16 = 0x4000;
const NAN: u16 = 0xC000;
const INFINITY: u16 = 0xD000;
const NEGATIVE_INFINITY: u16 = 0xF000;

/// The decimal text of a numeric, with as many fraction digits as its display scale.
pub(super) fn text(bytes: &[u8]) -> Result<String, Malformed> {
    let (count, rest) = take::<2>(bytes)?;
    let (weight, rest) = take::<2>(rest)?;
    let (sign, rest) = take::<2>(rest)?;
    let (scale, mut rest) = take::<2>(rest)?;
    let mut text = String::new();
    match u16::from_be_bytes(sign) {
        POSITIVE => {}
        NEGATIVE => text.push('-'),
        NAN => return Ok("NaN".to_owned()),
        INFINITY => return Ok("Infinity".to_owned()),
        NEGATIVE_INFINITY => return Ok("-Infinity".to_owned()),
        _ => return Err(Malformed),
    }
    let mut digits = Vec::new();
    for _ in 0..u16::from_be_bytes(count) {
        let (digit, tail) = take::<2>(rest)?;
        digits.push(u16::from_be_bytes(digit));
        rest = tail;
    }
    if !rest.is_empty() || digits.iter().any(|digit| *digit > 9999) {
        return Err(Malformed);
    }
    let weight = i32::from(i16::from_be_bytes(weight));
    let digit = |position: i32| {
        usize::try_from(position).ok().and_then(|at| digits.get(at)).copied().unwrap_or(0)
    };
    let mut integer: String = (0..=weight).map(|at| format!("{:04}", digit(at))).collect();
    let significant = integer.trim_start_matches('0').len();
    integer.drain(..integer.len() - significant);
    text.push_str(if integer.is_empty() { "0" } else { &integer });

    let scale = usize::from(u16::from_be_bytes(scale));
    if scale > 0 {
        let first = weight + 1;
        let groups = i32::try_from(scale.div_ceil(4)).map_err(|_range| Malformed)?;
        let fraction: String =
            (first..first + groups).map(|at| format!("{:04}", digit(at))).collect();
        text.push('.');
        text.push_str(fraction.get(..scale).ok_or(Malformed)?);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(weight: i16, sign: u16, scale: u16, digits: &[u16]) -> Vec<u8> {
        let mut bytes = u16::try_from(digits.len()).unwrap().to_be_bytes().to_vec();
        bytes.extend(weight.to_be_bytes());
        bytes.extend(sign.to_be_bytes());
        bytes.extend(scale.to_be_bytes());
        bytes.extend(digits.iter().flat_map(|digit| digit.to_be_bytes()));
        bytes
    }

    #[test]
    fn every_scale_and_sign() {
        let cases = [
            (wire(0, POSITIVE, 0, &[]), "0"),
            (wire(0, POSITIVE, 2, &[]), "0.00"),
            (wire(0, POSITIVE, 2, &[1, 1000]), "1.10"),
            (wire(0, NEGATIVE, 1, &[1, 5000]), "-1.5"),
            (wire(1, POSITIVE, 0, &[1]), "10000"),
            (wire(1, POSITIVE, 4, &[1, 2345, 6789]), "12345.6789"),
            (wire(-1, POSITIVE, 4, &[1]), "0.0001"),
            (wire(-2, POSITIVE, 8, &[1]), "0.00000001"),
            (wire(-3, NEGATIVE, 10, &[1200]), "-0.0000000012"),
            (wire(0, POSITIVE, 7, &[1]), "1.0000000"),
            (wire(2, POSITIVE, 0, &[9, 0, 9]), "900000009"),
            (wire(0, NAN, 0, &[]), "NaN"),
            (wire(0, INFINITY, 0, &[]), "Infinity"),
            (wire(0, NEGATIVE_INFINITY, 0, &[]), "-Infinity"),
        ];
        for (bytes, expected) in cases {
            assert_eq!(text(&bytes).unwrap(), expected);
        }
        let huge = text(&wire(32767, POSITIVE, 16383, &[1])).unwrap();
        assert_eq!(huge.len(), 32767 * 4 + 1 + 1 + 16383);
        // A negative weight beyond what the scale shows.
        assert_eq!(text(&wire(i16::MIN, POSITIVE, 3, &[1])).unwrap(), "0.000");
    }

    #[test]
    fn what_is_no_numeric_is_refused() {
        for bytes in [
            wire(0, 0x1234, 0, &[]),
            wire(0, POSITIVE, 0, &[10_000]),
            [wire(0, POSITIVE, 0, &[1]), vec![0]].concat(),
            vec![0, 1, 0, 0, 0, 0, 0, 0],
            vec![],
        ] {
            assert_eq!(text(&bytes), Err(Malformed));
        }
    }
}
