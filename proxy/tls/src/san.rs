//! Subject alternative names: reading them from a certificate and matching them.
//!
//! A name with a NUL byte in it matches nothing and is shown nowhere (CVE-2026-47778: a reader that stops at the
//! NUL sees another name than the authority signed). DNS names follow Envoy's rules, which are those of RFC 6125:
//! one `*`, in the leftmost label only, for exactly one label (CVE-2020-15104).

use std::net::IpAddr;

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::SubjectAltNameMatcher;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::subject_alt_name_matcher::SanType;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use sampan_core::error::AtField;
use sampan_core::matcher::StringMatcher;
use sampan_core::{ConfigError, ConfigResult};
use x509_parser::asn1_rs::{Any, FromDer as _};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

use crate::cert_info::text;

/// What a name is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Dns,
    Uri,
    Email,
    Ip,
    /// An other name, with its OID.
    Other(String),
}

/// One name of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct San {
    pub(crate) kind: Kind,
    pub(crate) value: String,
}

/// The names of a certificate, without those that hold a NUL. An extension that does not parse has none.
pub(crate) fn sans(certificate: &X509Certificate<'_>) -> Vec<San> {
    let Ok(Some(extension)) = certificate.subject_alternative_name() else { return Vec::new() };
    extension.value.general_names.iter().filter_map(san).collect()
}

fn san(name: &GeneralName<'_>) -> Option<San> {
    let (kind, value) = match name {
        GeneralName::DNSName(v) => (Kind::Dns, (*v).to_owned()),
        GeneralName::URI(v) => (Kind::Uri, (*v).to_owned()),
        GeneralName::RFC822Name(v) => (Kind::Email, (*v).to_owned()),
        GeneralName::IPAddress(bytes) => {
            let ip = <[u8; 4]>::try_from(*bytes)
                .map(IpAddr::from)
                .or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from))
                .ok()?;
            (Kind::Ip, ip.to_string())
        }
        // The value is a string in an explicit tag; what is no string has no text to compare.
        GeneralName::OtherName(oid, tagged) => {
            let (_, outer) = Any::from_der(tagged).ok()?;
            let (_, inner) = Any::from_der(outer.data).ok()?;
            (Kind::Other(oid.to_id_string()), String::from_utf8(text(&inner)?).ok()?)
        }
        _ => return None,
    };
    (!value.contains('\0')).then_some(San { kind, value })
}

/// `SubjectAltNameMatcher`
#[derive(Debug)]
pub(crate) enum SanMatcher {
    /// An exact DNS matcher: wildcards of the certificate apply.
    Dns(String),
    /// Any other matcher on names of one kind.
    Text(Kind, StringMatcher),
}

impl SanMatcher {
    /// Which names it looks at.
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::Dns(_) => Kind::Dns,
            Self::Text(kind, _) => kind.clone(),
        }
    }

    pub(crate) fn from_proto(message: &SubjectAltNameMatcher) -> ConfigResult<Self> {
        let kind = match SanType::try_from(message.san_type) {
            Ok(SanType::Dns) => Kind::Dns,
            Ok(SanType::Uri) => Kind::Uri,
            Ok(SanType::Email) => Kind::Email,
            Ok(SanType::IpAddress) => Kind::Ip,
            Ok(SanType::OtherName) if is_oid(&message.oid) => Kind::Other(message.oid.clone()),
            Ok(SanType::OtherName) => {
                return Err(ConfigError::new("Failed to create string SAN matcher of type 5").at("oid"));
            }
            _ => {
                return Err(
                    ConfigError::new("value must not be in list [SAN_TYPE_UNSPECIFIED]").at("san_type")
                );
            }
        };
        let matcher = message.matcher.as_ref().ok_or_else(|| ConfigError::missing("matcher"))?;
        match (&matcher.match_pattern, &kind) {
            (Some(MatchPattern::Exact(name)), Kind::Dns) => Ok(Self::Dns(name.clone())),
            _ => Ok(Self::Text(kind, StringMatcher::from_proto(matcher).at("matcher")?)),
        }
    }

    pub(crate) fn matches(&self, san: &San) -> bool {
        match self {
            Self::Dns(name) => san.kind == Kind::Dns && dns_name_match(name, &san.value),
            Self::Text(kind, matcher) => san.kind == *kind && matcher.matches(&san.value),
        }
    }
}

/// A dotted OID.
fn is_oid(text: &str) -> bool {
    text.contains('.')
        && text.split('.').all(|arc| !arc.is_empty() && arc.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether one of the names is what the options of a connection ask for.
pub(crate) fn verify_list(sans: &[San], wanted: &[String]) -> bool {
    sans.iter().any(|san| {
        wanted.iter().any(|w| match san.kind {
            Kind::Dns => dns_name_match(w, &san.value),
            _ => *w == san.value,
        })
    })
}

/// Whether a DNS name is covered by a certificate's name, which may have a wildcard.
pub(crate) fn dns_name_match(name: &str, pattern: &str) -> bool {
    if name.eq_ignore_ascii_case(pattern) {
        return true;
    }
    let (Some((name_label, name_rest)), Some((label, rest))) =
        (name.split_once('.'), pattern.split_once('.'))
    else {
        return false;
    };
    label.contains('*')
        && !rest.contains('*')
        && !label.get(..4).is_some_and(|l| l.eq_ignore_ascii_case("xn--"))
        && name_rest.eq_ignore_ascii_case(rest)
        && label_match(&name_label.to_ascii_lowercase(), &label.to_ascii_lowercase())
}

fn label_match(label: &str, pattern: &str) -> bool {
    if pattern == "*" {
        return true;
    }
    match pattern.split_once('*') {
        Some((before, after)) if !after.contains('*') => {
            pattern.len() <= label.len() + 1 && label.starts_with(before) && label.ends_with(after)
        }
        _ => false,
    }
}
