//! `envoy.filters.http.buffer`: the request goes on when it is complete; a larger one is refused with 413.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use envoy_types::pb::envoy::extensions::filters::http::buffer::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use sampan_codec::{Body, BodyError, BodyStream, Frame};
use sampan_core::HeaderMap;
use sampan_core::error::{ConfigError, ConfigResult};
use sampan_core::header::HeaderId;
use std::task::{Context, Poll};

use crate::filter::{
    HttpFilter, HttpFilterContext, HttpFilterKind, LocalReply, Outcome, RouteConfig, State, Step, decode,
};
use crate::stream::Stream;

pub(super) const TYPE: &str = "envoy.extensions.filters.http.buffer.v3.Buffer";
pub(super) const ROUTE_TYPE: &str = "envoy.extensions.filters.http.buffer.v3.BufferPerRoute";

struct Buffer {
    max: usize,
    name: Box<str>,
}

/// On a route: another limit, or none.
struct PerRoute(Option<usize>);

fn limit(message: &pb::Buffer) -> ConfigResult<usize> {
    message
        .max_request_bytes
        .filter(|n| n.value > 0)
        .map(|n| n.value as usize)
        .ok_or_else(|| ConfigError::missing("max_request_bytes"))
}

pub(super) fn make(any: &Any, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    let max = limit(&decode(any)?)?;
    Ok(HttpFilterKind::Filter(Arc::new(Buffer { max, name: context.filter_name.into() })))
}

pub(super) fn make_route(any: &Any) -> ConfigResult<RouteConfig> {
    let message: pb::BufferPerRoute = decode(any)?;
    Ok(Arc::new(match &message.r#override {
        Some(pb::buffer_per_route::Override::Buffer(buffer)) => PerRoute(Some(limit(buffer)?)),
        Some(pb::buffer_per_route::Override::Disabled(_)) => PerRoute(None),
        None => return Err(ConfigError::missing("override")),
    }))
}

/// What was buffered.
struct Buffered {
    data: Option<Bytes>,
    trailers: Option<HeaderMap>,
}

impl BodyStream for Buffered {
    fn poll_frame(&mut self, _: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        let next = self.data.take().map(Frame::Data).or_else(|| self.trailers.take().map(Frame::Trailers));
        Poll::Ready(next.map(Ok))
    }

    fn is_end(&self) -> bool {
        self.data.is_none() && self.trailers.is_none()
    }
}

impl HttpFilter for Buffer {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, _state: &'a mut State) -> Step<'a> {
        if stream.body.is_end() || stream.upgrade.is_some() {
            return Step::Continue;
        }
        let max = match stream.route_config::<PerRoute>(&self.name).as_deref() {
            None => self.max,
            Some(PerRoute(Some(max))) => *max,
            Some(PerRoute(None)) => return Step::Continue,
        };
        Step::Wait(Box::pin(buffer(stream, max)))
    }
}

async fn buffer(stream: &mut Stream, max: usize) -> Outcome {
    let mut data = BytesMut::new();
    let mut trailers = None;
    loop {
        match stream.body.frame().await {
            None => break,
            Some(Ok(Frame::Data(more))) => {
                sampan_core::clock::tick();
                stream.timer.touch();
                if data.len() + more.len() > max {
                    stream.manager.stats.downstream_rq_too_large.inc();
                    let mut reply =
                        LocalReply::new(413, "request_payload_too_large").body("Payload Too Large");
                    reply.close = true;
                    return reply.outcome();
                }
                data.extend_from_slice(&more);
            }
            Some(Ok(Frame::Trailers(t))) => {
                trailers = Some(t);
                break;
            }
            Some(Err(BodyError::Protocol(e))) => {
                let mut reply = LocalReply::new(e.status, e.details).body("Bad Request");
                reply.close = true;
                return reply.outcome();
            }
            Some(Err(_)) => return Outcome::Reset,
        }
    }
    stream.info.last_downstream_rx = Some(std::time::Instant::now());
    stream.timer.request_done();
    if !stream.request.contains(HeaderId::CONTENT_LENGTH) {
        stream.request.append(HeaderId::CONTENT_LENGTH, data.len().to_string());
    }
    stream.body = Body::stream(Buffered { data: Some(data.freeze()).filter(|d| !d.is_empty()), trailers });
    Outcome::Continue
}
