//! Inputs of matcher trees that are about a request: its headers and query, its response's headers, the filter state, and
//! what there is of its connection ([`ConnectionInput`]).
//!
//! Source: `envoy.type.matcher.v3.Http…MatchInput`, `envoy.extensions.matching.common_inputs`.

use std::borrow::Cow;

use envoy_types::pb::envoy::extensions::matching::common_inputs::network::v3::FilterStateInput;
use envoy_types::pb::envoy::r#type::matcher::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use envoy_types::pb::xds::core::v3::TypedExtensionConfig;
use prost::Message;

use super::connection::ConnectionInput;
use super::query::decoded_query_parameter;
use super::tree::{Datum, Input};
use crate::error::{AtField, ConfigError, ConfigResult};
use crate::header::{HeaderId, HeaderMap, HeaderName};
use crate::stream_info::StreamInfo;

/// What is known of a request.
#[derive(Clone, Copy)]
pub struct RequestFacts<'a> {
    /// Its head, once that is there.
    pub request: Option<&'a HeaderMap>,
    /// Its response's head, once that is there.
    pub response: Option<&'a HeaderMap>,
    /// All else.
    pub info: &'a StreamInfo,
}

/// One input.
#[derive(Debug, PartialEq, Eq)]
pub enum RequestInput {
    /// `HttpRequestHeaderMatchInput`
    Header(HeaderName),
    /// `HttpResponseHeaderMatchInput`
    ResponseHeader(HeaderName),
    /// `HttpResponseStatusCodeMatchInput`
    Status,
    /// `HttpResponseStatusCodeClassMatchInput`: `2xx`.
    StatusClass,
    /// `HttpRequestQueryParamMatchInput`
    Query(Box<str>),
    /// `FilterStateInput`
    FilterState(Box<str>),
    /// Of the connection.
    Connection(ConnectionInput),
}

impl RequestInput {
    /// From an extension; one of another kind is refused by name.
    pub fn from_proto(config: &TypedExtensionConfig) -> ConfigResult<Self> {
        let any = config.typed_config.as_ref().ok_or_else(|| ConfigError::missing("typed_config"))?;
        Self::from_any(any).at("typed_config")
    }

    fn from_any(any: &Any) -> ConfigResult<Self> {
        Ok(match any.type_url.rsplit('/').next().unwrap_or_default() {
            "envoy.type.matcher.v3.HttpRequestHeaderMatchInput" => {
                let name = HeaderName::new(&decode::<pb::HttpRequestHeaderMatchInput>(any)?.header_name);
                // A request's `host` is its `:authority`, under either name.
                let host = name.id() == HeaderId::HOST;
                Self::Header(if host { HeaderId::AUTHORITY.into() } else { name })
            }
            "envoy.type.matcher.v3.HttpResponseHeaderMatchInput" => {
                let message: pb::HttpResponseHeaderMatchInput = decode(any)?;
                Self::ResponseHeader(HeaderName::new(&message.header_name))
            }
            "envoy.type.matcher.v3.HttpResponseStatusCodeMatchInput" => Self::Status,
            "envoy.type.matcher.v3.HttpResponseStatusCodeClassMatchInput" => Self::StatusClass,
            "envoy.type.matcher.v3.HttpRequestQueryParamMatchInput" => {
                Self::Query(decode::<pb::HttpRequestQueryParamMatchInput>(any)?.query_param.into())
            }
            "envoy.extensions.matching.common_inputs.network.v3.FilterStateInput" => {
                Self::FilterState(decode::<FilterStateInput>(any)?.key.into())
            }
            _ => Self::Connection(ConnectionInput::from_any(any)?.ok_or_else(|| {
                ConfigError::unsupported(format_args!("the matching input {:?}", any.type_url))
            })?),
        })
    }
}

fn decode<M: Message + Default>(any: &Any) -> ConfigResult<M> {
    M::decode(&*any.value).map_err(|e| ConfigError::new(format!("malformed {}: {e}", any.type_url)))
}

fn class(status: &[u8]) -> Option<&'static [u8]> {
    const CLASSES: [&[u8]; 5] = [b"1xx", b"2xx", b"3xx", b"4xx", b"5xx"];
    CLASSES.into_iter().find(|class| class.first() == status.first())
}

fn header<'d>(headers: Option<&'d HeaderMap>, name: &'d HeaderName) -> Datum<'d> {
    match headers {
        None => Datum::Pending,
        Some(headers) => headers.joined(name).map_or(Datum::Missing, Datum::Bytes),
    }
}

impl Input<RequestFacts<'_>> for RequestInput {
    fn read<'d>(&'d self, facts: &'d RequestFacts<'_>) -> Datum<'d> {
        match self {
            Self::Header(name) => header(facts.request, name),
            Self::ResponseHeader(name) => header(facts.response, name),
            Self::Status | Self::StatusClass => {
                let Some(response) = facts.response else { return Datum::Pending };
                let status = response.get(HeaderId::STATUS);
                match (self, status) {
                    (_, None) => Datum::Missing,
                    (Self::Status, Some(status)) => Datum::Bytes(status.into()),
                    (_, Some(status)) => class(status).map_or(Datum::Missing, |c| Datum::Bytes(c.into())),
                }
            }
            Self::Query(name) => match facts.request {
                None => Datum::Pending,
                Some(headers) => headers
                    .get(HeaderId::PATH)
                    .and_then(|path| decoded_query_parameter(path, name.as_bytes()))
                    .map_or(Datum::Missing, Datum::Bytes),
            },
            Self::FilterState(key) => {
                let text = facts.info.state(key).and_then(|object| object.plain().map(Cow::into_owned));
                text.map_or(Datum::Missing, |text| Datum::Bytes(Cow::Owned(text.into_bytes())))
            }
            Self::Connection(input) => input.read(&facts.info.connection),
        }
    }
}
