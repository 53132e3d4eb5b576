//! The facts of a certificate as Envoy prints them.
//!
//! Names follow RFC 2253 the way OpenSSL writes it: last attribute first, short attribute names, `\` before special
//! characters, bytes outside ASCII as `\XX`, attributes without a short name as their OID with `#` and the
//! value's DER in hex.

use std::fmt::Write as _;

use aws_lc_rs::digest;
use rustls::pki_types::CertificateDer;
use sampan_core::format::hex;
use sampan_core::stream_info::{CertInfo, UrlPem};
use x509_parser::asn1_rs::{Any, BmpString, FromDer as _, Tag, UniversalString};
use x509_parser::certificate::X509Certificate;
use x509_parser::x509::{AttributeTypeAndValue, X509Name};

use crate::san::{self, Kind};

/// A parsed certificate; `None` where the bytes are none.
pub(crate) fn parse(der: &[u8]) -> Option<X509Certificate<'_>> {
    X509Certificate::from_der(der).ok().map(|(_, certificate)| certificate)
}

/// The facts of a certificate; of one that does not parse only the digests.
pub(crate) fn cert_info(der: &CertificateDer<'_>) -> CertInfo {
    let mut info = CertInfo {
        sha256: hex(digest::digest(&digest::SHA256, der).as_ref()),
        sha1: hex(digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, der).as_ref()),
        pem: UrlPem::new([der.as_ref()]),
        ..CertInfo::default()
    };
    let Some(certificate) = parse(der) else { return info };
    info.subject = rfc2253(certificate.subject());
    info.issuer = rfc2253(certificate.issuer());
    info.serial = serial(certificate.raw_serial());
    info.not_before = certificate.validity().not_before.timestamp();
    info.not_after = certificate.validity().not_after.timestamp();
    for san in san::sans(&certificate) {
        match san.kind {
            Kind::Dns => info.dns_sans.push(san.value),
            Kind::Uri => info.uri_sans.push(san.value),
            Kind::Email => info.email_sans.push(san.value),
            Kind::Ip => info.ip_sans.push(san.value),
            Kind::Other(_) => info.othername_sans.push(san.value),
        }
    }
    info
}

/// The number without leading zero bytes; `0` for zero.
fn serial(raw: &[u8]) -> String {
    match raw.iter().position(|b| *b != 0) {
        Some(start) => hex(&raw[start..]),
        None => "0".to_owned(),
    }
}

fn rfc2253(name: &X509Name<'_>) -> String {
    let mut out = String::new();
    let rdns: Vec<_> = name.iter_rdn().collect();
    for (i, rdn) in rdns.iter().rev().enumerate() {
        if i > 0 {
            out.push(',');
        }
        let attributes: Vec<_> = rdn.iter().collect();
        for (j, attribute) in attributes.iter().rev().enumerate() {
            if j > 0 {
                out.push('+');
            }
            write_attribute(attribute, &mut out);
        }
    }
    out
}

fn short_name(oid: &str) -> Option<&'static str> {
    Some(match oid {
        "2.5.4.3" => "CN",
        "2.5.4.4" => "SN",
        "2.5.4.5" => "serialNumber",
        "2.5.4.6" => "C",
        "2.5.4.7" => "L",
        "2.5.4.8" => "ST",
        "2.5.4.9" => "street",
        "2.5.4.10" => "O",
        "2.5.4.11" => "OU",
        "2.5.4.12" => "title",
        "2.5.4.13" => "description",
        "2.5.4.17" => "postalCode",
        "2.5.4.41" => "name",
        "2.5.4.42" => "GN",
        "2.5.4.43" => "initials",
        "2.5.4.44" => "generationQualifier",
        "2.5.4.46" => "dnQualifier",
        "2.5.4.65" => "pseudonym",
        "1.2.840.113549.1.9.1" => "emailAddress",
        "1.2.840.113549.1.9.2" => "unstructuredName",
        "0.9.2342.19200300.100.1.1" => "UID",
        "0.9.2342.19200300.100.1.25" => "DC",
        _ => return None,
    })
}

fn write_attribute(attribute: &AttributeTypeAndValue<'_>, out: &mut String) {
    let oid = attribute.attr_type().to_id_string();
    let value = attribute.attr_value();
    match short_name(&oid).and_then(|name| Some((name, text(value)?))) {
        Some((name, text)) => {
            out.push_str(name);
            out.push('=');
            escape(&text, out);
        }
        None => {
            out.push_str(short_name(&oid).unwrap_or(&oid));
            out.push_str("=#");
            out.push_str(&hex(&der_of(value)).to_ascii_uppercase());
        }
    }
}

/// The text of a string type as UTF-8; `None` for what is no string.
pub(crate) fn text(value: &Any<'_>) -> Option<Vec<u8>> {
    Some(match value.tag() {
        Tag::Utf8String | Tag::PrintableString | Tag::Ia5String | Tag::NumericString | Tag::VisibleString => {
            value.data.to_vec()
        }
        // One byte per character: Latin-1, as OpenSSL reads it.
        Tag::T61String => value.data.iter().map(|b| char::from(*b)).collect::<String>().into_bytes(),
        Tag::BmpString => BmpString::try_from(value.clone()).ok()?.string().into_bytes(),
        Tag::UniversalString => UniversalString::try_from(value.clone()).ok()?.string().into_bytes(),
        _ => return None,
    })
}

fn der_of(value: &Any<'_>) -> Vec<u8> {
    use x509_parser::asn1_rs::ToDer as _;
    value.to_der_vec().unwrap_or_default()
}

fn escape(text: &[u8], out: &mut String) {
    let last = text.len().saturating_sub(1);
    for (i, &byte) in text.iter().enumerate() {
        let special = matches!(byte, b',' | b'+' | b'"' | b'\\' | b'<' | b'>' | b';')
            || (i == 0 && matches!(byte, b'#' | b' '))
            || (i == last && byte == b' ');
        if special {
            out.push('\\');
            out.push(char::from(byte));
        } else if (0x20..0x7f).contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "\\{byte:02X}");
        }
    }
}
