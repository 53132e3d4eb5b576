//! Inputs of matcher trees that are about a connection: its ends, what listener filters found, the peer's certificate.
//!
//! What is not there satisfies no condition. Source: `envoy.extensions.matching.common_inputs.{network,ssl}.v3`.

use std::borrow::Cow;

use envoy_types::pb::envoy::extensions::matching::common_inputs::network::v3::FilterStateInput;
use envoy_types::pb::google::protobuf::Any;
use prost::Message as _;

use super::tree::{Datum, Input};
use crate::Address;
use crate::error::{AtField, ConfigError, ConfigResult};
use crate::stream_info::{CertInfo, ConnectionInfo};

/// One of them.
#[derive(Debug, PartialEq, Eq)]
pub enum ConnectionInput {
    /// `DestinationIPInput`
    DestinationIp,
    /// `DestinationPortInput`
    DestinationPort,
    /// `SourceIPInput`
    SourceIp,
    /// `SourcePortInput`
    SourcePort,
    /// `DirectSourceIPInput`
    DirectSourceIp,
    /// `SourceTypeInput`
    SourceType,
    /// `ServerNameInput`
    ServerName,
    /// `TransportProtocolInput`
    TransportProtocol,
    /// `ApplicationProtocolInput`
    ApplicationProtocol,
    /// `FilterStateInput`
    FilterState(Box<str>),
    /// `UriSanInput`
    UriSan,
    /// `DnsSanInput`
    DnsSan,
    /// `SubjectInput`
    Subject,
}

impl ConnectionInput {
    /// The input of a message; none for one of another kind.
    pub fn from_any(any: &Any) -> ConfigResult<Option<Self>> {
        let name = any.type_url.rsplit('/').next().unwrap_or_default();
        let Some(name) = name.strip_prefix("envoy.extensions.matching.common_inputs.") else {
            return Ok(None);
        };
        Ok(Some(match name {
            "network.v3.DestinationIPInput" => Self::DestinationIp,
            "network.v3.DestinationPortInput" => Self::DestinationPort,
            "network.v3.SourceIPInput" => Self::SourceIp,
            "network.v3.SourcePortInput" => Self::SourcePort,
            "network.v3.DirectSourceIPInput" => Self::DirectSourceIp,
            "network.v3.SourceTypeInput" => Self::SourceType,
            "network.v3.ServerNameInput" => Self::ServerName,
            "network.v3.TransportProtocolInput" => Self::TransportProtocol,
            "network.v3.ApplicationProtocolInput" => Self::ApplicationProtocol,
            "network.v3.FilterStateInput" => {
                let message = FilterStateInput::decode(&*any.value)
                    .map_err(|e| ConfigError::new(format!("malformed {}: {e}", any.type_url)));
                Self::FilterState(message.at("typed_config")?.key.into())
            }
            "ssl.v3.UriSanInput" => Self::UriSan,
            "ssl.v3.DnsSanInput" => Self::DnsSan,
            "ssl.v3.SubjectInput" => Self::Subject,
            _ => return Ok(None),
        }))
    }
}

impl Input<ConnectionInfo> for ConnectionInput {
    fn read<'d>(&'d self, connection: &'d ConnectionInfo) -> Datum<'d> {
        let peer = || connection.tls.as_ref().and_then(|tls| tls.peer.as_deref());
        match self {
            Self::DestinationIp => ip(&connection.local),
            Self::DestinationPort => port(&connection.local),
            Self::SourceIp => ip(&connection.remote),
            Self::SourcePort => port(&connection.remote),
            Self::DirectSourceIp => ip(&connection.direct_remote),
            Self::SourceType if connection.is_local() => Datum::Bytes(Cow::Borrowed(b"local")),
            Self::SourceType => Datum::Missing,
            Self::ServerName => text(connection.requested_server_name.as_deref()),
            Self::TransportProtocol => text(Some(connection.transport_protocol)),
            Self::ApplicationProtocol => match &connection.application_protocols[..] {
                [] => Datum::Missing,
                all => owned(format!("'{}'", all.join("','"))),
            },
            Self::FilterState(key) => connection
                .state(key)
                .and_then(|object| object.plain().map(|text| owned(text.into_owned())))
                .unwrap_or(Datum::Missing),
            Self::UriSan => joined(peer(), |peer| &peer.uri_sans),
            Self::DnsSan => joined(peer(), |peer| &peer.dns_sans),
            Self::Subject => text(peer().map(|peer| &*peer.subject)),
        }
    }
}

fn owned<'d>(text: String) -> Datum<'d> {
    Datum::Bytes(Cow::Owned(text.into_bytes()))
}

fn text(text: Option<&str>) -> Datum<'_> {
    match text {
        None | Some("") => Datum::Missing,
        Some(text) => Datum::Bytes(Cow::Borrowed(text.as_bytes())),
    }
}

fn ip<'d>(address: &Address) -> Datum<'d> {
    address.ip().map_or(Datum::Missing, |ip| owned(ip.to_string()))
}

fn port<'d>(address: &Address) -> Datum<'d> {
    address.port().map_or(Datum::Missing, |port| owned(port.to_string()))
}

fn joined<'d>(peer: Option<&CertInfo>, names: impl Fn(&CertInfo) -> &Vec<String>) -> Datum<'d> {
    match peer.map(names) {
        Some(names) if !names.is_empty() => owned(names.join(",")),
        _ => Datum::Missing,
    }
}
