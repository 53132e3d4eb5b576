//! From an operator's name and parameters to the operator.

use super::Extensions;
use super::op::{
    From, GrpcForm, MetadataSource, NameOrder, Op, Precision, Side, StateForm, TimePoint, TimeSource, What,
};
use super::plain::{address_without_port, plain};
use super::time::TimeFormat;
use super::value::query_parameters_text;
use crate::error::{ConfigError, ConfigResult};
use crate::header::{HeaderId, HeaderName};

/// What an operator takes behind its name.
#[derive(Clone, Copy, PartialEq)]
enum Takes {
    Nothing,
    /// Parameters must be there.
    Must,
    /// Parameters may be there.
    May,
}

fn check(
    name: &str,
    parameters: &str,
    length: Option<usize>,
    takes: Takes,
    with_length: bool,
) -> ConfigResult<()> {
    let complain = |what: &str| Err(ConfigError::new(format!("{name} {what}")));
    match takes {
        Takes::Nothing if !with_length && (!parameters.is_empty() || length.is_some()) => {
            complain("does not take any parameters or length")
        }
        Takes::Must if parameters.is_empty() => complain("requires parameters"),
        _ if length.is_some() && !with_length => complain("does not allow length to be specified."),
        _ => Ok(()),
    }
}

/// The operator of that name.
pub(super) fn command(
    name: &str,
    parameters: &str,
    length: Option<usize>,
    extensions: Extensions,
) -> ConfigResult<Op> {
    if let Some(what) = plain(name) {
        check(name, parameters, length, Takes::Nothing, false)?;
        return Ok(Op::new(what));
    }
    let (takes, with_length) = match name {
        "REQ" | "RESP" | "TRAILER" | "STREAM_INFO_REQ" | "QUERY_PARAM" | "ENVIRONMENT" => (Takes::Must, true),
        "DYNAMIC_METADATA" | "CLUSTER_METADATA" | "UPSTREAM_METADATA" | "METADATA" | "COALESCE" => {
            (Takes::Must, true)
        }
        "REQ_WITHOUT_QUERY" if extensions.req_without_query => (Takes::May, true),
        "PATH" | "FILTER_STATE" | "UPSTREAM_FILTER_STATE" => (Takes::May, true),
        "COMMON_DURATION" => (Takes::Must, false),
        "CEL" => return Err(ConfigError::unsupported("the formatter operator CEL")),
        _ => (Takes::May, false),
    };
    check(name, parameters, length, takes, with_length)?;
    let what = match name {
        "REQ" | "STREAM_INFO_REQ" => header(From::Request, parameters, false)?,
        "RESP" => header(From::Response, parameters, false)?,
        "TRAILER" => header(From::Trailers, parameters, false)?,
        "REQ_WITHOUT_QUERY" if extensions.req_without_query => header(From::Request, parameters, true)?,
        "COMMON_DURATION" => common_duration(parameters)?,
        "RESPONSE_CODE_DETAILS" => What::Details { allow_whitespace: parameters == "ALLOW_WHITESPACES" },
        "GRPC_STATUS" => What::GrpcStatus(match parameters {
            "" | "CAMEL_STRING" => GrpcForm::Camel,
            "SNAKE_STRING" => GrpcForm::Snake,
            "NUMBER" => GrpcForm::Number,
            other => {
                return Err(ConfigError::new(format!(
                    "GrpcStatusFormatter only supports CAMEL_STRING, SNAKE_STRING or NUMBER. Got: {other}"
                )));
            }
        }),
        "QUERY_PARAM" => What::QueryParameter(parameters.as_bytes().to_vec()),
        "QUERY_PARAMS" => match parameters {
            "" | "ORIG" | "DECODED" => What::Text(query_parameters_text),
            other => return Err(option_error("QUERY_PARAMS", other, "'ORIG'/'DECODED'")),
        },
        "PATH" => path(parameters)?,
        "REQUESTED_SERVER_NAME" => server_name(parameters)?,
        "ENVIRONMENT" => What::Constant(Some(std::env::var(parameters).unwrap_or_else(|_| "-".to_owned()))),
        "DYNAMIC_METADATA" => metadata(MetadataSource::Dynamic, parameters),
        "CLUSTER_METADATA" => metadata(MetadataSource::Cluster, parameters),
        "UPSTREAM_METADATA" => metadata(MetadataSource::UpstreamHost, parameters),
        "METADATA" => typed_metadata(parameters)?,
        "FILTER_STATE" => filter_state(parameters, false)?,
        "UPSTREAM_FILTER_STATE" => filter_state(parameters, true)?,
        "COALESCE" => coalesce(parameters, extensions)?,
        _ => match time(name, parameters)? {
            Some(what) => what,
            None => address_without_port(name, parameters)
                .ok_or_else(|| ConfigError::new(format!("Not supported field in StreamInfo: {name}")))?,
        },
    };
    Ok(Op { what, max: length })
}

fn header(from: From, parameters: &str, strip_query: bool) -> ConfigResult<What> {
    let mut names = parameters.split('?');
    let (name, alternative) = (names.next().unwrap_or_default(), names.next().unwrap_or_default());
    if names.next().is_some() {
        return Err(ConfigError::new(format!(
            "More than 1 alternative header specified in token: {parameters}"
        )));
    }
    let valid = |name: &str| {
        let bare = name.strip_prefix(':').unwrap_or(name);
        (name.is_empty() || !bare.is_empty())
            && bare.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
    };
    if !valid(name) || !valid(alternative) {
        return Err(ConfigError::new(
            "Invalid header configuration. Format string contains invalid characters.",
        ));
    }
    // A request's `host` is its `:authority`, under either name.
    let named = |name: &str| match (from, HeaderName::new(name)) {
        (From::Request, HeaderName::Known(HeaderId::HOST)) => HeaderId::AUTHORITY.into(),
        (_, name) => name,
    };
    let alternative = (!alternative.is_empty()).then(|| named(alternative));
    Ok(What::Header { from, name: named(name), alternative, strip_query })
}

fn option_error(name: &str, option: &str, allowed: &str) -> ConfigError {
    ConfigError::new(format!("Invalid {name} option: '{option}', only {allowed} are allowed"))
}

fn path(parameters: &str) -> ConfigResult<What> {
    let (query, which) = parameters.split_once(':').unwrap_or((parameters, ""));
    let query = match query {
        "" | "WQ" => true,
        "NQ" => false,
        other => return Err(option_error("PATH", other, "'WQ'/'NQ'")),
    };
    let (original, current) = match which {
        "" | "ORIG_OR_PATH" => (true, true),
        "ORIG" => (true, false),
        "PATH" => (false, true),
        other => return Err(option_error("PATH", other, "'ORIG'/'PATH'/'ORIG_OR_PATH'")),
    };
    Ok(What::Path { query, original, current })
}

fn server_name(parameters: &str) -> ConfigResult<What> {
    let (order, which) = parameters.split_once(':').unwrap_or((parameters, ""));
    let order = match order {
        "" | "SNI_ONLY" => NameOrder::SniOnly,
        "SNI_FIRST" => NameOrder::SniFirst,
        "HOST_FIRST" => NameOrder::HostFirst,
        other => {
            return Err(option_error("REQUESTED_SERVER_NAME", other, "'SNI_ONLY'/'SNI_FIRST'/'HOST_FIRST'"));
        }
    };
    let (original, current) = match which {
        "" | "ORIG_OR_HOST" => (true, true),
        "ORIG" => (true, false),
        "HOST" => (false, true),
        other => return Err(option_error("REQUESTED_SERVER_NAME", other, "'ORIG'/'HOST'/'ORIG_OR_HOST'")),
    };
    Ok(What::ServerName { order, original, current })
}

fn time_point(name: &str) -> TimePoint {
    match name {
        "DS_CX_BEG" => TimePoint::DownstreamConnectBegin,
        "DS_HS_END" => TimePoint::DownstreamHandshakeEnd,
        "DS_RX_BEG" => TimePoint::DownstreamRxBegin,
        "DS_RX_HDR_END" => TimePoint::DownstreamRxHeadersEnd,
        "DS_RX_END" => TimePoint::DownstreamRxEnd,
        "US_CX_BEG" => TimePoint::UpstreamConnectBegin,
        "US_CX_END" => TimePoint::UpstreamConnectEnd,
        "US_HS_END" => TimePoint::UpstreamHandshakeEnd,
        "US_TX_BEG" => TimePoint::UpstreamTxBegin,
        "US_TX_END" => TimePoint::UpstreamTxEnd,
        "US_RX_BEG" => TimePoint::UpstreamRxBegin,
        "US_RX_BODY_BEG" => TimePoint::UpstreamRxBodyBegin,
        "US_RX_END" => TimePoint::UpstreamRxEnd,
        "DS_TX_BEG" => TimePoint::DownstreamTxBegin,
        "DS_TX_END" => TimePoint::DownstreamTxEnd,
        // `DS_CX_END` and `DS_HS_BEG` are not measured; any other name is one that a filter might set, none does.
        _ => TimePoint::Never,
    }
}

fn common_duration(parameters: &str) -> ConfigResult<What> {
    let parts: Vec<_> = parameters.split(':').collect();
    let (begin, end, precision) = match parts[..] {
        [begin, end] => (begin, end, "ms"),
        [begin, end, precision] => (begin, end, precision),
        _ => {
            return Err(ConfigError::new(format!("Invalid common duration configuration: {parameters}.")));
        }
    };
    let precision = match precision {
        "ms" => Precision::Millis,
        "us" => Precision::Micros,
        "ns" => Precision::Nanos,
        other => return Err(ConfigError::new(format!("Invalid common duration precision: {other}."))),
    };
    Ok(What::Duration(time_point(begin), time_point(end), precision))
}

fn metadata(from: MetadataSource, parameters: &str) -> What {
    let mut parts = parameters.split(':').map(str::to_owned);
    let filter = parts.next().unwrap_or_default();
    What::Metadata { from, filter, path: parts.collect() }
}

fn typed_metadata(parameters: &str) -> ConfigResult<What> {
    let (kind, rest) = parameters.split_once(':').unwrap_or((parameters, ""));
    let from = match kind {
        "DYNAMIC" => MetadataSource::Dynamic,
        "CLUSTER" => MetadataSource::Cluster,
        "ROUTE" => MetadataSource::Route,
        "UPSTREAM_HOST" => MetadataSource::UpstreamHost,
        "LISTENER" => MetadataSource::Listener,
        "VIRTUAL_HOST" => MetadataSource::VirtualHost,
        other => return Err(ConfigError::new(format!("{other} is not supported type of metadata"))),
    };
    Ok(metadata(from, rest))
}

fn filter_state(parameters: &str, upstream: bool) -> ConfigResult<What> {
    let mut parts = parameters.splitn(3, ':');
    let key = parts.next().unwrap_or_default().to_owned();
    let kind = parts.next().unwrap_or_default();
    let field = parts.next().unwrap_or_default();
    if key.is_empty() {
        return Err(ConfigError::new("Invalid filter state configuration, key cannot be empty."));
    }
    let form = match kind {
        "" | "TYPED" => StateForm::Typed,
        "PLAIN" => StateForm::Plain,
        "FIELD" => StateForm::Field(field.to_owned()),
        _ => {
            return Err(ConfigError::new(
                "Invalid filter state serialize type, only support PLAIN/TYPED/FIELD.",
            ));
        }
    };
    if matches!(form, StateForm::Field(_)) == field.is_empty() {
        return Err(ConfigError::new(
            "Invalid filter state serialize type, FIELD should be used with the field name.",
        ));
    }
    Ok(What::FilterState { upstream, key, form })
}

/// `%COALESCE({"operators": ["NAME", {"command": "NAME", "param": "…", "max_length": n}]})%`: the first value.
fn coalesce(parameters: &str, extensions: Extensions) -> ConfigResult<What> {
    let json: serde_json::Value = serde_json::from_str(parameters)
        .map_err(|e| ConfigError::new(format!("COALESCE: failed to parse JSON configuration: {e}")))?;
    let list = json
        .get("operators")
        .ok_or_else(|| ConfigError::new("COALESCE: JSON configuration must contain 'operators' array"))?;
    let list = list
        .as_array()
        .ok_or_else(|| ConfigError::new(format!("COALESCE: 'operators' must be an array: {list}")))?;
    if list.is_empty() {
        return Err(ConfigError::new("COALESCE: 'operators' array must not be empty"));
    }
    let mut ops = Vec::with_capacity(list.len());
    for (i, entry) in list.iter().enumerate() {
        let fail =
            |why: String| ConfigError::new(format!("COALESCE: failed to parse operator at index {i}: {why}"));
        let (name, parameter, length) = match entry {
            serde_json::Value::String(name) => (name.as_str(), "", None),
            serde_json::Value::Object(map) => {
                let name = map.get("command").and_then(serde_json::Value::as_str);
                let name = name.ok_or_else(|| fail("operator object must have 'command' field".into()))?;
                let parameter = map.get("param").and_then(serde_json::Value::as_str).unwrap_or_default();
                let length = map.get("max_length").and_then(serde_json::Value::as_u64);
                (name, parameter, length.and_then(|l| usize::try_from(l).ok()))
            }
            _ => {
                let why = "operator entry must be either a string (command name) or an object with \
                           'command' field";
                return Err(fail(why.into()));
            }
        };
        if name == "COALESCE" {
            return Err(fail("COALESCE cannot be nested".into()));
        }
        ops.push(command(name, parameter, length, extensions).map_err(|e| fail(e.reason().to_owned()))?);
    }
    Ok(What::FirstOf(ops))
}

fn time(name: &str, format: &str) -> ConfigResult<Option<What>> {
    let (source, local) = match name {
        "START_TIME" => (TimeSource::Start, false),
        "START_TIME_LOCAL" => (TimeSource::Start, true),
        "EMIT_TIME" => (TimeSource::Emit, false),
        "EMIT_TIME_LOCAL" => (TimeSource::Emit, true),
        "DOWNSTREAM_PEER_CERT_V_START" => (TimeSource::CertBegin(Side::Downstream), false),
        "DOWNSTREAM_PEER_CERT_V_END" => (TimeSource::CertEnd(Side::Downstream), false),
        "UPSTREAM_PEER_CERT_V_START" => (TimeSource::CertBegin(Side::Upstream), false),
        "UPSTREAM_PEER_CERT_V_END" => (TimeSource::CertEnd(Side::Upstream), false),
        _ => return Ok(None),
    };
    Ok(Some(What::Time(source, TimeFormat::parse(format, local)?)))
}
