//! Durations and times of protobuf's JSON mapping: `"1.500s"` and RFC 3339.

/// Protobuf's bound: about ten thousand years.
pub(crate) const MAX_DURATION_SECONDS: i64 = 315_576_000_000;

/// Digits after a period: up to nine, as nanoseconds. Without a period there are none.
fn fraction(text: &str) -> Option<(i32, &str)> {
    let Some(rest) = text.strip_prefix('.') else { return Some((0, text)) };
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    if digits == 0 || digits > 9 {
        return None;
    }
    let value: i32 = rest[..digits].parse().ok()?;
    Some((value * 10i32.pow(9 - digits as u32), &rest[digits..]))
}

/// Seconds and nanoseconds of `"-1.5s"`.
pub(crate) fn parse_duration(text: &str) -> Option<(i64, i32)> {
    let digits = text.bytes().take_while(|byte| byte.is_ascii_digit() || *byte == b'-').count();
    let (whole, rest) = text.split_at(digits);
    let seconds: i64 = whole.parse().ok()?;
    if !(-MAX_DURATION_SECONDS..=MAX_DURATION_SECONDS).contains(&seconds) {
        return None;
    }
    let (nanos, rest) = fraction(rest)?;
    (rest == "s").then_some((seconds, if whole.starts_with('-') { -nanos } else { nanos }))
}

/// Seconds since 1970 and nanoseconds of an RFC 3339 time.
pub(crate) fn parse_timestamp(text: &str) -> Option<(i64, i32)> {
    let number = |range: std::ops::Range<usize>| -> Option<i64> {
        let digits = text.get(range)?;
        digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())?
    };
    let separator = |at: usize, c: u8| (text.as_bytes().get(at) == Some(&c)).then_some(());
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    for (at, c) in [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':')] {
        separator(at, c)?;
    }
    if year == 0
        || !(1..=12).contains(&month)
        || !(1..=31).contains(&day)
        || hour > 23
        || minute > 59
        || second > 60
    {
        return None;
    }
    let (nanos, zone) = fraction(text.get(19..)?)?;
    let offset = match zone {
        "Z" => 0,
        _ => {
            let sign = if zone.starts_with('+') { 1 } else { -1 };
            let (hours, minutes) = zone.strip_prefix(['+', '-'])?.split_once(':')?;
            if hours.len() != 2 || minutes.len() != 2 {
                return None;
            }
            sign * (hours.parse::<u32>().ok()? * 3600 + minutes.parse::<u32>().ok()? * 60) as i64
        }
    };
    let seconds = days_from_civil(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second;
    Some((seconds - offset, nanos))
}

/// Days since 1970 in the proleptic Gregorian calendar, counted in years that begin in March.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = (shifted + 2) % 12 + 1;
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day_of_year - (153 * shifted + 2) / 5 + 1)
}

/// Nanoseconds with as many groups of three digits as they need.
fn put_fraction(out: &mut String, nanos: u32) {
    if nanos == 0 {
        return;
    }
    let digits = if nanos.is_multiple_of(1_000_000) {
        format!(".{:03}", nanos / 1_000_000)
    } else if nanos.is_multiple_of(1000) {
        format!(".{:06}", nanos / 1000)
    } else {
        format!(".{nanos:09}")
    };
    out.push_str(&digits);
}

/// The text of a duration.
pub(crate) fn format_duration(seconds: i64, nanos: i32) -> String {
    let mut out = String::new();
    if seconds < 0 || nanos < 0 {
        out.push('-');
    }
    out.push_str(&seconds.unsigned_abs().to_string());
    put_fraction(&mut out, nanos.unsigned_abs());
    out.push('s');
    out
}

/// The text of a time, in UTC.
pub(crate) fn format_timestamp(seconds: i64, nanos: i32) -> String {
    let (year, month, day) = civil_from_days(seconds.div_euclid(86_400));
    let of_day = seconds.rem_euclid(86_400);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    let mut out = format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
    put_fraction(&mut out, nanos.unsigned_abs());
    out.push('Z');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, parsed) in [
            ("0s", Some((0, 0))),
            ("1s", Some((1, 0))),
            ("0.250s", Some((0, 250_000_000))),
            ("-0.5s", Some((0, -500_000_000))),
            ("1.000000001s", Some((1, 1))),
            ("315576000000s", Some((MAX_DURATION_SECONDS, 0))),
            ("315576000001s", None),
            ("1", None),
            ("1ms", None),
            (".5s", None),
            ("1.s", None),
            ("1.0000000001s", None),
            ("--1s", None),
            ("", None),
            ("+1s", None),
        ] {
            assert_eq!(parse_duration(text), parsed, "{text}");
        }
        assert_eq!(format_duration(0, 250_000_000), "0.250s");
        assert_eq!(format_duration(-1, -500_000), "-1.000500s");
        assert_eq!(format_duration(3, 7), "3.000000007s");
        assert_eq!(format_duration(15, 0), "15s");
    }

    #[test]
    fn times() {
        for (text, seconds) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2000-02-29T12:00:00Z", 951_825_600),
            ("1999-12-31T23:59:59Z", 946_684_799),
            ("0001-01-01T00:00:00Z", -62_135_596_800),
            ("9999-12-31T23:59:59Z", 253_402_300_799),
        ] {
            assert_eq!(parse_timestamp(text), Some((seconds, 0)), "{text}");
            assert_eq!(format_timestamp(seconds, 0), text);
        }
        assert_eq!(parse_timestamp("2026-11-21T05:30:00.5+01:30"), Some((1_795_233_600, 500_000_000)));
        for bad in [
            "",
            "2026-13-01T00:00:00Z",
            "2026-01-01 00:00:00Z",
            "2026-01-01T00:00:00",
            "2026-01-01T00:00:00+1:00",
            "2026-01-01T00:00:00.Z",
        ] {
            assert_eq!(parse_timestamp(bad), None, "{bad}");
        }
    }
}
