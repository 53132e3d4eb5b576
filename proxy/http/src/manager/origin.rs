//! `original_ip_detection_extensions`: who the client is where the peer is not it. The first that finds an address
//! is heard; one that must find one refuses the request.

use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::extensions::http::original_ip_detection::{custom_header, xff};
use sampan_core::Address;
use sampan_core::address::literal;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};
use sampan_core::matcher::CidrSet;
use sampan_core::stream_info::ConnectionInfo;

use super::request::{append_xff, last_from_xff};
use crate::filter::{LocalReply, decode, message_name};

/// More addresses than this are not read.
const MAX_ADDRESSES: usize = 20;

/// One extension.
#[derive(Debug, Clone)]
pub enum Detector {
    /// `xff_num_trusted_hops`
    Hops {
        /// How many addresses from the right are passed over.
        skip: u32,
        /// `skip_xff_append` is off.
        append: bool,
    },
    /// `xff_trusted_cidrs`
    Trusted {
        /// Proxies that are believed.
        ranges: CidrSet,
        /// See `Hops`.
        append: bool,
    },
    /// `custom_header`
    Header {
        /// The header that holds the address.
        name: HeaderName,
        /// `allow_extension_to_set_address_as_trusted`
        trusted: bool,
        /// `reject_with_status`
        reject: Option<u16>,
    },
}

/// An address, and whether it may make the request an internal one.
pub type Origin = Option<(Address, bool)>;

impl Detector {
    /// From the field.
    pub fn list(messages: &[TypedExtensionConfig]) -> ConfigResult<Vec<Self>> {
        let one = |(i, m)| Self::from_proto(m).at_index("original_ip_detection_extensions", i);
        messages.iter().enumerate().map(one).collect()
    }

    fn from_proto(message: &TypedExtensionConfig) -> ConfigResult<Self> {
        let any = message.typed_config.clone().unwrap_or_default();
        match message_name(&any) {
            "envoy.extensions.http.original_ip_detection.xff.v3.XffConfig" => {
                let config: xff::v3::XffConfig = decode(&any)?;
                let append = config.skip_xff_append.is_some_and(|s| !s.value);
                let Some(trusted) = &config.xff_trusted_cidrs else {
                    return Ok(Self::Hops { skip: config.xff_num_trusted_hops, append });
                };
                if config.xff_num_trusted_hops > 0 {
                    return Err(ConfigError::new(
                        "Cannot set both xff_num_trusted_hops and xff_trusted_cidrs",
                    ));
                }
                let ranges = CidrSet::from_proto(&trusted.cidrs).at("xff_trusted_cidrs.cidrs")?;
                // Without ranges there is nothing to tell by: Envoy takes the last address then.
                if ranges.is_empty() {
                    return Ok(Self::Hops { skip: 0, append });
                }
                Ok(Self::Trusted { ranges, append })
            }
            "envoy.extensions.http.original_ip_detection.custom_header.v3.CustomHeaderConfig" => {
                let config: custom_header::v3::CustomHeaderConfig = decode(&any)?;
                let status = |code: i32| if (400..=511).contains(&code) { code as u16 } else { 403 };
                Ok(Self::Header {
                    name: HeaderName::new(&config.header_name),
                    trusted: config.allow_extension_to_set_address_as_trusted,
                    reject: config.reject_with_status.map(|s| status(s.code)),
                })
            }
            _ => Err(ConfigError::unsupported(format!(
                "original IP detection extension '{}' ({})",
                message.name, any.type_url
            ))),
        }
    }

    /// Asks one after the other.
    pub fn detect(
        all: &[Self],
        headers: &mut HeaderMap,
        connection: &ConnectionInfo,
    ) -> Result<Origin, LocalReply> {
        for one in all {
            let (found, append) = match one {
                Self::Hops { skip, append } => {
                    let found = last_from_xff(headers, *skip);
                    (found.map(|(address, single)| (address, single && *skip == 0)), *append)
                }
                Self::Trusted { ranges, append } => match connection.remote.ip() {
                    Some(ip) if ranges.contains(ip) => (last_untrusted(headers, ranges), *append),
                    _ => (None, true),
                },
                Self::Header { name, trusted, reject } => {
                    let value = headers.get_name(name).and_then(|v| std::str::from_utf8(v).ok());
                    let ip = value.and_then(|v| literal(v, 0));
                    if let (None, Some(status)) = (ip, reject) {
                        return Err(LocalReply::new(*status, "rejecting_because_detection_failed"));
                    }
                    (ip.map(|ip| (Address::Ip(ip), *trusted)), false)
                }
            };
            if append {
                append_xff(headers, connection);
            }
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }
}

/// The last address of `x-forwarded-for` that is no trusted proxy's; the first of all where all are trusted.
fn last_untrusted(headers: &HeaderMap, trusted: &CidrSet) -> Origin {
    let value = headers.joined(&HeaderName::Known(HeaderId::X_FORWARDED_FOR))?;
    let value = std::str::from_utf8(&value).ok()?;
    let count = value.split(',').count();
    if count > MAX_ADDRESSES {
        return None;
    }
    let mut last = None;
    for part in value.rsplit(',') {
        let ip = literal(part.trim(), 0)?;
        last = Some((Address::Ip(ip), count == 1));
        if !trusted.contains(ip.ip()) {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trusted_proxies_are_passed_over() {
        let range = sampan_core::matcher::CidrRange::new("9.0.0.0", 8).unwrap();
        let trusted = CidrSet::new([range]);
        let find = |xff: &str| {
            let mut headers = HeaderMap::new();
            headers.append(HeaderId::X_FORWARDED_FOR, xff);
            last_untrusted(&headers, &trusted).map(|(a, single)| (a.ip().unwrap().to_string(), single))
        };
        assert_eq!(find("7.7.7.7, 8.8.8.8, 9.9.9.9"), Some(("8.8.8.8".into(), false)));
        assert_eq!(find("9.1.1.1, 9.9.9.9"), Some(("9.1.1.1".into(), false)));
        assert_eq!(find("10.1.1.1"), Some(("10.1.1.1".into(), true)));
        assert_eq!(find("bad, 9.9.9.9"), None);
        assert_eq!(find(&["9.1.1.1"; 21].join(",")), None);
    }
}
