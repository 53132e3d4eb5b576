//! Certificates as URL-encoded PEM, made when somebody first asks: few configurations print them.

use std::fmt;
use std::ops::Deref;
use std::sync::OnceLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::matcher::percent_decoded;

/// URL-encoded PEM of one or more certificates; reads as a `str`.
#[derive(Debug, Clone, Default)]
pub struct UrlPem {
    der: Box<[Box<[u8]>]>,
    text: OnceLock<Box<str>>,
}

impl UrlPem {
    /// From the certificates' DER.
    pub fn new<'a>(der: impl IntoIterator<Item = &'a [u8]>) -> Self {
        Self { der: der.into_iter().map(Into::into).collect(), text: OnceLock::new() }
    }
}

impl UrlPem {
    /// Each certificate in PEM as it is written to files.
    pub fn plain(&self) -> Vec<String> {
        const END: &str = "-----END CERTIFICATE-----\n";
        let text = percent_decoded(self.as_bytes());
        String::from_utf8_lossy(&text).split_inclusive(END).map(str::to_owned).collect()
    }
}

impl From<&str> for UrlPem {
    /// From what is PEM and URL-encoded already.
    fn from(text: &str) -> Self {
        Self { der: Box::default(), text: OnceLock::from(Box::from(text)) }
    }
}

impl Deref for UrlPem {
    type Target = str;

    fn deref(&self) -> &str {
        self.text.get_or_init(|| self.der.iter().map(|der| encode(der)).collect::<String>().into())
    }
}

impl fmt::Display for UrlPem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self)
    }
}

fn encode(der: &[u8]) -> String {
    let base64 = STANDARD.encode(der);
    let mut out = String::with_capacity(base64.len() * 5 / 4 + 80);
    out.push_str("-----BEGIN%20CERTIFICATE-----%0A");
    for (i, c) in base64.chars().enumerate() {
        if i > 0 && i % 64 == 0 {
            out.push_str("%0A");
        }
        match c {
            '+' => out.push_str("%2B"),
            '/' => out.push_str("%2F"),
            '=' => out.push_str("%3D"),
            c => out.push(c),
        }
    }
    out.push_str("%0A-----END%20CERTIFICATE-----%0A");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_64_and_escapes() {
        let pem = UrlPem::new([[0xff_u8; 50].as_slice(), &[0xfb]]);
        assert_eq!(
            &*pem,
            format!(
                "-----BEGIN%20CERTIFICATE-----%0A{}%0A%2F%2F8%3D%0A-----END%20CERTIFICATE-----%0A\
                 -----BEGIN%20CERTIFICATE-----%0A%2Bw%3D%3D%0A-----END%20CERTIFICATE-----%0A",
                "%2F".repeat(64)
            )
        );
        let plain = pem.plain();
        assert_eq!(plain[1], "-----BEGIN CERTIFICATE-----\n+w==\n-----END CERTIFICATE-----\n");
        assert_eq!(plain.len(), 2);
        assert!(UrlPem::default().is_empty());
        assert_eq!(UrlPem::from("x").to_string(), "x");
    }
}
