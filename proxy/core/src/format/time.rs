//! Time formats of `%START_TIME(…)%` and its kin.
//!
//! A format is `strftime`'s with Abseil's extensions (`%E3S`, `%E*f`, `%E4Y`, `%Ez`, `%ET`) and Envoy's (`%s`,
//! `%3f`, `%*f`). What is not known stands as it is. All but the fraction of a second stays the same for a
//! second and is kept per thread.

use std::borrow::Cow;
use std::cell::RefCell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use jiff::fmt::strtime;
use jiff::tz::TimeZone;

use crate::error::{ConfigError, ConfigResult};

/// How many formats a thread keeps rendered.
const SLOTS: usize = 16;

/// As many digits as are needed.
const DYNAMIC: u8 = u8::MAX;

static NEXT_ID: AtomicU32 = AtomicU32::new(1);

/// A parsed time format.
#[derive(Debug)]
pub(super) struct TimeFormat {
    id: u32,
    pieces: Vec<TimePiece>,
    local: bool,
}

#[derive(Debug, PartialEq)]
enum TimePiece {
    /// Rendered once a second.
    Second(String),
    /// Digits of the nanoseconds; `dot` and nothing without digits for `%E*S`, at least one digit else.
    Fraction { digits: u8, dot: bool },
}

#[derive(Default)]
struct Slot {
    id: u32,
    second: i64,
    text: Vec<u8>,
    /// Where each [`TimePiece::Second`] ends in `text`.
    ends: Vec<usize>,
}

thread_local! {
    static CACHE: RefCell<[Slot; SLOTS]> = RefCell::new(std::array::from_fn(|_| Slot::default()));
}

impl TimeFormat {
    /// A format; empty is ISO 8601 with milliseconds.
    pub(super) fn parse(format: &str, local: bool) -> ConfigResult<Self> {
        let format = match (format, local) {
            ("", false) => "%Y-%m-%dT%H:%M:%E3SZ",
            ("", true) => "%Y-%m-%dT%H:%M:%E3S%z",
            (format, _) => format,
        };
        if has_newline(format) {
            return Err(ConfigError::new("Invalid header configuration. Format string contains newline."));
        }
        Ok(Self { id: NEXT_ID.fetch_add(1, Ordering::Relaxed), pieces: split(format), local })
    }

    /// Appends the time.
    pub(super) fn write(&self, time: SystemTime, out: &mut Vec<u8>) {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let second = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
        CACHE.with_borrow_mut(|slots| {
            let slot = &mut slots[self.id as usize % SLOTS];
            if slot.id != self.id || slot.second != second {
                self.render(second, slot);
            }
            let (mut from, mut next) = (0, 0);
            for piece in &self.pieces {
                match piece {
                    TimePiece::Second(_) => {
                        out.extend_from_slice(&slot.text[from..slot.ends[next]]);
                        from = slot.ends[next];
                        next += 1;
                    }
                    TimePiece::Fraction { digits, dot } => fraction(since.subsec_nanos(), *digits, *dot, out),
                }
            }
        });
    }

    fn render(&self, second: i64, slot: &mut Slot) {
        slot.id = self.id;
        slot.second = second;
        slot.text.clear();
        slot.ends.clear();
        let zone = if self.local { TimeZone::system() } else { TimeZone::UTC };
        let time = Timestamp::from_second(second).unwrap_or(Timestamp::UNIX_EPOCH).to_zoned(zone);
        for piece in &self.pieces {
            if let TimePiece::Second(format) = piece {
                match strtime::format(format, &time) {
                    Ok(text) => slot.text.extend_from_slice(text.as_bytes()),
                    Err(_) => slot.text.extend_from_slice(format.as_bytes()),
                }
                slot.ends.push(slot.text.len());
            }
        }
    }
}

fn fraction(nanos: u32, digits: u8, dot: bool, out: &mut Vec<u8>) {
    let mut text = [b'0'; 9];
    let mut rest = nanos;
    for place in text.iter_mut().rev() {
        *place = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    let mut len = usize::from(digits);
    if digits == DYNAMIC {
        len = text.iter().rposition(|d| *d != b'0').map_or(0, |last| last + 1);
    }
    if dot {
        if len > 0 {
            out.push(b'.');
        }
    } else {
        len = len.max(1);
    }
    out.extend_from_slice(&text[..len]);
}

/// Whether the format asks for a line feed (`%n` with any flags): the text may become a header.
fn has_newline(format: &str) -> bool {
    let bytes = format.as_bytes();
    bytes.iter().enumerate().filter(|(_, b)| **b == b'%').any(|(at, _)| {
        let mut rest = &bytes[at + 1..];
        while let [b'-' | b'_' | b'0' | b'^' | b'#', tail @ ..] = rest {
            rest = tail;
        }
        while let [b'1'..=b'9', tail @ ..] = rest {
            rest = tail;
        }
        if let [b'E' | b'O', tail @ ..] = rest {
            rest = tail;
        }
        rest.first() == Some(&b'n')
    })
}

/// What of a specifier to hand on; `None`: it is none, the percent sign stands for itself.
fn simple(specifier: char) -> Option<&'static str> {
    Some(match specifier {
        'a' => "%a",
        'A' => "%A",
        'b' | 'h' => "%b",
        'B' => "%B",
        'c' => "%a %b %e %H:%M:%S %Y",
        'C' => "%C",
        'd' => "%d",
        'D' | 'x' => "%m/%d/%y",
        'e' => "%e",
        'F' => "%Y-%m-%d",
        'g' => "%g",
        'G' => "%G",
        'H' => "%H",
        'I' => "%I",
        'j' => "%j",
        'k' => "%k",
        'l' => "%l",
        'm' => "%m",
        'M' => "%M",
        'p' => "%p",
        'P' => "%P",
        'r' => "%I:%M:%S %p",
        'R' => "%H:%M",
        's' => "%s",
        'S' => "%S",
        't' => "\t",
        'T' | 'X' => "%H:%M:%S",
        'u' => "%u",
        'U' => "%U",
        'V' => "%V",
        'w' => "%w",
        'W' => "%W",
        'y' => "%y",
        'Y' => "%Y",
        'z' => "%z",
        'Z' => "%Z",
        '%' => "%%",
        _ => return None,
    })
}

fn digits_of(digit: u8) -> Option<u8> {
    match digit {
        b'*' => Some(DYNAMIC),
        b'1'..=b'9' => Some(digit - b'0'),
        _ => None,
    }
}

fn split(format: &str) -> Vec<TimePiece> {
    let mut pieces = Vec::new();
    let mut text = String::new();
    let mut rest = format;
    while let Some(c) = rest.chars().next() {
        if c != '%' {
            text.push(c);
            rest = &rest[c.len_utf8()..];
            continue;
        }
        let (fraction, replacement, used) = specifier(rest);
        text.push_str(&replacement);
        rest = &rest[used..];
        if let Some(piece) = fraction {
            if !text.is_empty() {
                pieces.push(TimePiece::Second(std::mem::take(&mut text)));
            }
            pieces.push(piece);
        }
    }
    if !text.is_empty() {
        pieces.push(TimePiece::Second(text));
    }
    pieces
}

/// The specifier at the head of `rest`: a fraction, the text before it, how many bytes it was.
fn specifier(rest: &str) -> (Option<TimePiece>, Cow<'static, str>, usize) {
    let fraction = |digits, dot| Some(TimePiece::Fraction { digits, dot });
    match *rest.as_bytes() {
        [_, b'f', ..] => return (fraction(9, false), "".into(), 2),
        [_, digit, b'f', ..] => {
            if let Some(digits) = digits_of(digit) {
                return (fraction(digits, false), "".into(), 3);
            }
        }
        [_, b'E', b'4', b'Y', ..] => return (None, "%Y".into(), 4),
        [_, b'E', b'*', b'z', ..] => return (None, "%::z".into(), 4),
        [_, b'E', b'0', b'S', ..] => return (None, "%S".into(), 4),
        [_, b'E', b'z', ..] => return (None, "%:z".into(), 3),
        [_, b'E', b'T', ..] => return (None, "T".into(), 3),
        [_, b'E', digit, b'S', ..] => {
            if let Some(digits) = digits_of(digit) {
                return (fraction(digits, true), "%S".into(), 4);
            }
        }
        [_, b'E', digit, b'f', ..] => {
            if let Some(digits) = digits_of(digit) {
                return (fraction(digits, false), "".into(), 4);
            }
        }
        _ => {}
    }
    match rest.chars().nth(1).and_then(simple) {
        Some(replacement) => (None, replacement.into(), 2),
        None => padded(rest).map_or((None, "%%".into(), 1), |(text, used)| (None, text.into(), used)),
    }
}

/// `%-d`, `%5Y`, `%^a`, `%Od`: a specifier with flags, a width or a modifier that means nothing in the C locale.
fn padded(rest: &str) -> Option<(String, usize)> {
    let body = &rest[1..];
    let flags = body.bytes().take_while(|b| matches!(b, b'-' | b'_' | b'0' | b'^' | b'#')).count();
    let width = body[flags..].bytes().take_while(u8::is_ascii_digit).count();
    let modifier = usize::from(body[flags + width..].starts_with('O'));
    let specifier = simple(body[flags + width + modifier..].chars().next()?)?;
    let used = 2 + flags + width + modifier;
    // Wider than any number: not worth the blanks.
    if width > 2 {
        return None;
    }
    // What is made of several specifiers is not padded.
    let text = match specifier.len() {
        2 => format!("%{}{}", &body[..flags + width], &specifier[1..]),
        _ => specifier.to_owned(),
    };
    Some((text, used))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn format(format: &str, millis: u64) -> String {
        let parsed = TimeFormat::parse(format, false).unwrap();
        let mut out = Vec::new();
        parsed.write(UNIX_EPOCH + Duration::from_millis(millis), &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn as_envoy_prints_them() {
        // The second half was printed by Envoy 1.40 for the same moment.
        assert_eq!(format("", 1_795_236_416_478), "2026-11-21T04:46:56.478Z");
        assert_eq!(
            format("%s.%3f|%6f|%9f|%f|%*f|%E3S|%Y-%m-%dT%H:%M:%S%z %Z %a %b %e %j", 1_795_236_416_478),
            "1795236416.478|478000|478000000|478000000|478|56.478|2026-11-21T04:46:56+0000 UTC Sat Nov 21 325"
        );
        assert_eq!(
            format(
                "%E4Y|%Ez|%ET|%U|%c|%k|%l|%p|%D|%F|%T|%R|%u|%w|%C|%y|%h|%x|%X|%G|%g|%V|%W|%r|%I|%A|%B|%q|%E0S|%E|%",
                1_795_236_634_000
            ),
            "2026|+00:00|T|46|Sat Nov 21 04:50:34 2026| 4| 4|AM|11/21/26|2026-11-21|04:50:34|04:50|6|6|20|26|Nov\
             |11/21/26|04:50:34|2026|26|47|46|04:50:34 AM|04|Saturday|November|%q|34|%E|%"
        );
    }

    #[test]
    fn flags_and_widths() {
        assert_eq!(format("%-d|%5Y|%%|%Od|%^a", 1_795_236_416_478), "21|02026|%|21|SAT");
        assert_eq!(format("%-d|%_d|%-", 1_793_664_000_000), "3| 3|%-");
    }

    #[test]
    fn fractions_without_digits() {
        assert_eq!(format("%*f %E*S %1f", 1000), "0 01 0");
        assert_eq!(format("%E*S", 1500), "01.5");
    }

    #[test]
    fn a_new_second_is_rendered_anew() {
        let parsed = TimeFormat::parse("%S.%3f", false).unwrap();
        let mut out = Vec::new();
        for millis in [1001, 1999, 2000] {
            parsed.write(UNIX_EPOCH + Duration::from_millis(millis), &mut out);
            out.push(b' ');
        }
        assert_eq!(String::from_utf8(out).unwrap(), "01.001 01.999 02.000 ");
    }

    #[test]
    fn line_feeds_are_refused() {
        for format in ["%n", "a%-5n", "%En", "%Y%0^n"] {
            assert!(TimeFormat::parse(format, false).is_err(), "{format}");
        }
        assert!(TimeFormat::parse("%Y n", false).is_ok());
    }
}
