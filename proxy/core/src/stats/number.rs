//! Floating-point numbers as Envoy writes them: C's `%g`, the shortest form, and the shortest of both notations.

/// `%.Ng` of C: N significant digits, no trailing zeros, scientific where the exponent is below -4 or at least N.
pub fn general(value: f64, digits: usize) -> String {
    if let Some(special) = special(value) {
        return special.into();
    }
    let (mantissa, exponent) = parts(&format!("{:.*e}", digits.max(1) - 1, value));
    let digits_limit = digits.max(1) as i32;
    lay_out(&mantissa, exponent, exponent < -4 || exponent >= digits_limit)
}

/// The shortest digits that read back as the same number; scientific from `1e16`.
pub fn shortest(value: f64) -> String {
    if let Some(special) = special(value) {
        return special.into();
    }
    let (mantissa, exponent) = parts(&format!("{value:e}"));
    lay_out(&mantissa, exponent, !(-4..16).contains(&exponent))
}

/// The shortest digits in whichever notation is shorter, as in Envoy's streamed JSON (`300000` is `3e+05`).
pub fn streamed(value: f64) -> String {
    if special(value).is_some() {
        return "null".into();
    }
    let (mantissa, exponent) = parts(&format!("{value:e}"));
    let (fixed, scientific) = (lay_out(&mantissa, exponent, false), lay_out(&mantissa, exponent, true));
    if scientific.len() < fixed.len() { scientific } else { fixed }
}

fn special(value: f64) -> Option<&'static str> {
    match value {
        v if v.is_nan() => Some("nan"),
        f64::INFINITY => Some("inf"),
        f64::NEG_INFINITY => Some("-inf"),
        _ => None,
    }
}

/// `-1.250e2` to (`-125`, 2), without trailing zeros.
fn parts(scientific: &str) -> (String, i32) {
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((scientific, "0"));
    let mut digits: String = mantissa.chars().filter(|c| *c != '.').collect();
    while digits.len() > 1 && digits.ends_with('0') && digits != "-0" {
        digits.pop();
    }
    (digits, exponent.parse().unwrap_or(0))
}

fn lay_out(mantissa: &str, exponent: i32, scientific: bool) -> String {
    let (sign, digits) = mantissa.strip_prefix('-').map_or(("", mantissa), |d| ("-", d));
    if scientific {
        let (first, rest) = digits.split_at(1);
        let dot = if rest.is_empty() { "" } else { "." };
        let exponent_sign = if exponent < 0 { '-' } else { '+' };
        return format!("{sign}{first}{dot}{rest}e{exponent_sign}{:02}", exponent.abs());
    }
    if exponent < 0 {
        return format!("{sign}0.{}{digits}", "0".repeat((-exponent - 1) as usize));
    }
    let whole = exponent as usize + 1;
    if digits.len() <= whole {
        format!("{sign}{digits}{}", "0".repeat(whole - digits.len()))
    } else {
        format!("{sign}{}.{}", &digits[..whole], &digits[whole..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_c_writes_them() {
        assert_eq!(general(1_800_000.0, 6), "1.8e+06");
        assert_eq!(general(600_000.0, 6), "600000");
        assert_eq!(general(0.5, 6), "0.5");
        assert_eq!(general(0.0, 6), "0");
        assert_eq!(general(1.0 / 3.0, 6), "0.333333");
        assert_eq!(general(0.00001, 6), "1e-05");
        assert_eq!(general(10.144_927_536_231_883, 32), "10.14492753623188292522172559984");
        assert_eq!(general(3_600_000.0, 32), "3600000");
        assert_eq!(general(f64::NAN, 32), "nan");
    }

    #[test]
    fn as_envoys_json_writes_them() {
        let cases =
            [(300_000.0, "3e+05"), (600_000.0, "6e+05"), (1_800_000.0, "1800000"), (10_000.0, "10000")];
        for (value, text) in cases {
            assert_eq!(streamed(value), text);
        }
        assert_eq!(streamed(0.5), "0.5");
        assert_eq!(streamed(99.9), "99.9");
        assert_eq!(streamed(f64::NAN), "null");
        assert_eq!(shortest(1.0333333333333334), "1.0333333333333334");
        assert_eq!(shortest(33.5), "33.5");
        assert_eq!(shortest(0.0), "0");
    }
}
