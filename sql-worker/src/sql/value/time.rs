//! Dates, times and intervals: RFC 3339, and ISO 8601 where RFC 3339 cannot say it.
//!
//! Years outside 0 to 9999 get a sign and at least four digits (ISO 8601 expanded years; year
//! 0000 is 1 BC). `infinity` and `-infinity` stay words. What PostgreSQL keeps without a zone
//! is written without one.

const MICROS_PER_SECOND: i64 = 1_000_000;
const MICROS_PER_DAY: i64 = 86_400 * MICROS_PER_SECOND;
/// Days from 0000-03-01, proleptic Gregorian, to PostgreSQL's epoch, 2000-01-01.
const EPOCH: i64 = 730_425;

/// Days since 2000-01-01.
pub(super) fn date(days: i32) -> String {
    match days {
        i32::MAX => "infinity".to_owned(),
        i32::MIN => "-infinity".to_owned(),
        _ => civil(days.into()),
    }
}

/// Microseconds since 2000-01-01 00:00:00; `zone` is appended to what is a time.
pub(super) fn timestamp(micros: i64, zone: &str) -> String {
    match micros {
        i64::MAX => "infinity".to_owned(),
        i64::MIN => "-infinity".to_owned(),
        _ => {
            let day = civil(micros.div_euclid(MICROS_PER_DAY));
            format!("{day}T{}{zone}", time(micros.rem_euclid(MICROS_PER_DAY)))
        }
    }
}

/// Microseconds since midnight; 24:00:00 is a time of its own in PostgreSQL.
pub(super) fn time(micros: i64) -> String {
    let seconds = micros.div_euclid(MICROS_PER_SECOND);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let fraction = fraction(micros.rem_euclid(MICROS_PER_SECOND));
    format!("{hour:02}:{minute:02}:{second:02}{fraction}")
}

/// `zone` is in seconds west of Greenwich, as on the wire.
pub(super) fn time_tz(micros: i64, zone: i32) -> String {
    let sign = if zone > 0 { '-' } else { '+' };
    let west = zone.unsigned_abs();
    let (hour, minute, second) = (west / 3600, west / 60 % 60, west % 60);
    let seconds = if second == 0 { String::new() } else { format!(":{second:02}") };
    format!("{}{sign}{hour:02}:{minute:02}{seconds}", time(micros))
}

/// ISO 8601 with a sign on each part, as `IntervalStyle = iso_8601` writes it.
pub(super) fn interval(months: i32, days: i32, micros: i64) -> String {
    match (months, days, micros) {
        (i32::MAX, i32::MAX, i64::MAX) => return "infinity".to_owned(),
        (i32::MIN, i32::MIN, i64::MIN) => return "-infinity".to_owned(),
        (0, 0, 0) => return "PT0S".to_owned(),
        _ => {}
    }
    let mut text = "P".to_owned();
    let mut part = |amount: i64, unit: &str| {
        if amount != 0 {
            text.push_str(&format!("{amount}{unit}"));
        }
    };
    part((months / 12).into(), "Y");
    part((months % 12).into(), "M");
    part(days.into(), "D");
    if micros != 0 {
        text.push('T');
        let sign = if micros < 0 { "-" } else { "" };
        let micros = micros.unsigned_abs();
        let (seconds, fraction_micros) = (micros / 1_000_000, micros % 1_000_000);
        for (amount, unit) in [(seconds / 3600, "H"), (seconds / 60 % 60, "M")] {
            if amount != 0 {
                text.push_str(&format!("{sign}{amount}{unit}"));
            }
        }
        let fraction = fraction(fraction_micros);
        if seconds % 60 != 0 || !fraction.is_empty() {
            text.push_str(&format!("{sign}{}{fraction}S", seconds % 60));
        }
    }
    text
}

fn fraction(micros: impl std::fmt::Display) -> String {
    let digits = format!("{micros:06}");
    match digits.trim_end_matches('0') {
        "" => String::new(),
        digits => format!(".{digits}"),
    }
}

/// The date of a day counted from 2000-01-01, by Howard Hinnant's `civil_from_days`.
fn civil(days: i64) -> String {
    let days = days + EPOCH;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let year = match year {
        0..=9999 => format!("{year:04}"),
        _ => format!("{year:+05}"),
    };
    format!("{year}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let cases = [
            (0, "2000-01-01"),
            (-1, "1999-12-31"),
            (59, "2000-02-29"),
            (8825, "2024-02-29"),
            (-730_486, "-0001-12-31"),
            (-730_485, "0000-01-01"),
            (2_921_939, "9999-12-31"),
            (2_921_940, "+10000-01-01"),
            (-2_451_545, "-4713-11-24"),
            (i32::MAX, "infinity"),
            (i32::MIN, "-infinity"),
        ];
        for (days, expected) in cases {
            assert_eq!(date(days), expected, "{days}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(time(0), "00:00:00");
        assert_eq!(time(MICROS_PER_DAY), "24:00:00");
        assert_eq!(time(1), "00:00:00.000001");
        assert_eq!(time_tz(45_296_500_000, -7200), "12:34:56.5+02:00");
        assert_eq!(time_tz(0, 18_000), "00:00:00-05:00");
        assert_eq!(time_tz(0, -1_172), "00:00:00+00:19:32");
        assert_eq!(timestamp(-1, "Z"), "1999-12-31T23:59:59.999999Z");
        assert_eq!(timestamp(0, ""), "2000-01-01T00:00:00");
        assert_eq!(timestamp(i64::MAX, "Z"), "infinity");
        assert_eq!(timestamp(i64::MIN, "Z"), "-infinity");
    }

    #[test]
    fn intervals() {
        let cases = [
            ((0, 0, 0), "PT0S"),
            ((14, 3, 14_706_700_000), "P1Y2M3DT4H5M6.7S"),
            ((-14, 3, -14_706_000_000), "P-1Y-2M3DT-4H-5M-6S"),
            ((0, 0, -500_000), "PT-0.5S"),
            ((0, 0, 3_600_000_000), "PT1H"),
            ((0, 1, 0), "P1D"),
            ((i32::MAX, i32::MAX, i64::MAX), "infinity"),
        ];
        for ((months, days, micros), expected) in cases {
            assert_eq!(interval(months, days, micros), expected);
        }
    }
}
