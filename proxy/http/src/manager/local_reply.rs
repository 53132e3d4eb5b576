//! Local replies: `local_reply_config`'s mappers and format, then the response.

use std::borrow::Cow;
use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as pb;
use sampan_codec::Body;
use sampan_core::access_log::AccessLogFilter;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::format::{FormatContext, Formatter, read_source};
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_listener::FactoryContext;

use crate::filter::{LocalReply, Response};
use crate::route::HeaderMutations;
use crate::stream::Stream;

/// The model of `LocalReplyConfig`.
#[derive(Default)]
pub struct LocalReplyConfig {
    mappers: Vec<Mapper>,
    format: Option<BodyFormat>,
}

struct Mapper {
    filter: AccessLogFilter,
    status: Option<u16>,
    body: Option<Arc<str>>,
    format: Option<BodyFormat>,
    headers: HeaderMutations,
}

struct BodyFormat {
    formatter: Formatter,
    content_type: Box<str>,
}

impl BodyFormat {
    fn from_proto(
        message: &envoy_types::pb::envoy::config::core::v3::SubstitutionFormatString,
    ) -> ConfigResult<Self> {
        let formatter = Formatter::from_proto(message)?;
        let default = if formatter.is_json() { "application/json" } else { "text/plain" };
        let content_type = if message.content_type.is_empty() { default } else { &message.content_type };
        Ok(Self { content_type: content_type.into(), formatter })
    }
}

impl LocalReplyConfig {
    /// Parses the message.
    pub fn from_proto(
        message: Option<&pb::LocalReplyConfig>,
        context: &FactoryContext,
    ) -> ConfigResult<Self> {
        let Some(message) = message else { return Ok(Self::default()) };
        let mut mappers = Vec::new();
        for (i, mapper) in message.mappers.iter().enumerate() {
            mappers.push(Mapper::from_proto(mapper, context).at_index("mappers", i)?);
        }
        let format =
            message.body_format.as_ref().map(BodyFormat::from_proto).transpose().at("body_format")?;
        Ok(Self { mappers, format })
    }

    /// The response that a reply becomes.
    pub fn respond(&self, mut reply: LocalReply, stream: &mut Stream) -> Response {
        let mut headers = HeaderMap::with_capacity(256, 12);
        headers.append(HeaderId::STATUS, reply.status.to_string());
        for (name, value) in &reply.headers {
            headers.append_name(name, value);
        }
        if let Some(selected) = stream.route.as_ref().filter(|route| route.decorates(&reply)) {
            // The route's mutations come first, when the response has no code yet that they could print.
            selected.finalize_response(&stream.request, &mut headers, &stream.info);
            let tells = reply.by_router && selected.virtual_host().attempt_count_in_response;
            if tells && stream.info.attempts > 0 {
                headers.set(HeaderId::X_ENVOY_ATTEMPT_COUNT, stream.info.attempts.to_string());
            }
        }
        stream.info.response_code = reply.status;
        let mut format = self.format.as_ref();
        let mapper = self.mappers.iter().find(|mapper| {
            mapper.filter.passes(&FormatContext {
                request: Some(&stream.request),
                response: Some(&headers),
                ..FormatContext::new(&stream.info)
            })
        });
        if let Some(mapper) = mapper {
            if let Some(body) = &mapper.body {
                reply.body = Cow::Owned(body.to_string());
            }
            mapper.headers.apply_to_response(&mut headers, &stream.request, &stream.info);
            if let Some(status) = mapper.status {
                reply.status = status;
                stream.info.response_code = status;
                headers.set(HeaderId::STATUS, status.to_string());
            }
            format = mapper.format.as_ref().or(format);
        }
        let mut content_type = "text/plain";
        let mut body = reply.body.into_owned().into_bytes();
        if let Some(format) = format {
            let mut out = Vec::new();
            format.formatter.write(
                &FormatContext {
                    request: Some(&stream.request),
                    response: Some(&headers),
                    local_reply_body: &body,
                    ..FormatContext::new(&stream.info)
                },
                &mut out,
            );
            body = out;
            content_type = &format.content_type;
        }
        if stream.grpc {
            return grpc(reply.status, reply.grpc_status, &body, headers);
        }
        if !body.is_empty() {
            headers.set(HeaderId::CONTENT_LENGTH, body.len().to_string());
            if !headers.contains(HeaderId::CONTENT_TYPE) {
                headers.set(HeaderId::CONTENT_TYPE, content_type);
            }
        } else if !matches!(reply.status, 100..=199 | 204 | 304) {
            headers.remove(HeaderId::CONTENT_TYPE);
        }
        Response { status: reply.status, headers, body: Body::full(body), tunnel: false, local: true }
    }
}

/// gRPC clients get a trailers-only response of status 200.
fn grpc(status: u16, grpc_status: Option<u32>, body: &[u8], mut headers: HeaderMap) -> Response {
    let code = grpc_status.unwrap_or(match status {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    });
    headers.set(HeaderId::STATUS, "200");
    headers.set(HeaderId::CONTENT_TYPE, "application/grpc");
    headers.set(HeaderId::GRPC_STATUS, code.to_string());
    if !body.is_empty() {
        headers.set(HeaderId::GRPC_MESSAGE, percent_encode(body));
    }
    headers.remove(HeaderId::CONTENT_LENGTH);
    Response { status: 200, headers, body: Body::Empty, tunnel: false, local: true }
}

/// `grpc-message` is percent-encoded outside printable ASCII.
fn percent_encode(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    for c in text {
        match c {
            b'%' => out.extend_from_slice(b"%25"),
            b' '..=b'~' => out.push(*c),
            c => out.extend_from_slice(format!("%{c:02X}").as_bytes()),
        }
    }
    out
}

impl Mapper {
    fn from_proto(message: &pb::ResponseMapper, context: &FactoryContext) -> ConfigResult<Self> {
        let filter = message.filter.as_ref().ok_or_else(|| ConfigError::missing("filter"))?;
        Ok(Self {
            filter: AccessLogFilter::from_proto(filter, &context.server.runtime).at("filter")?,
            status: message.status_code.map(|s| s.value as u16),
            body: message.body.as_ref().map(read_source).transpose().at("body")?.map(Into::into),
            format: message
                .body_format_override
                .as_ref()
                .map(BodyFormat::from_proto)
                .transpose()
                .at("body_format_override")?,
            headers: HeaderMutations::new(&message.headers_to_add, &[], "local reply")?,
        })
    }
}
