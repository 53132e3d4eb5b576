//! `envoy.filters.http.buffer`: the request goes on when it is complete; a larger one is refused with 413.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use envoy_types::pb::envoy::extensions::filters::http::buffer::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use futures_util::FutureExt;
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

/// What was buffered, and what comes behind it.
pub(super) struct Buffered {
    pub(super) data: Option<Bytes>,
    pub(super) trailers: Option<HeaderMap>,
    pub(super) rest: Body,
}

impl BodyStream for Buffered {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        match self.data.take().map(Frame::Data).or_else(|| self.trailers.take().map(Frame::Trailers)) {
            Some(next) => Poll::Ready(Some(Ok(next))),
            None => self.rest.poll_frame(cx),
        }
    }

    fn is_end(&self) -> bool {
        self.data.is_none() && self.trailers.is_none() && self.rest.is_end()
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
    match read_ahead(stream, max, false).await {
        Ok(data) => {
            if !stream.request.contains(HeaderId::CONTENT_LENGTH) {
                stream.request.append(HeaderId::CONTENT_LENGTH, data.len().to_string());
            }
            Outcome::Continue
        }
        Err(outcome) => outcome,
    }
}

/// Takes what has come of a body that nobody will read: where that is all of it, the connection can serve on.
pub(crate) fn discard_ready(stream: &mut Stream) {
    let mut received = 0;
    while received < stream.buffer_limit() {
        match stream.body.frame().now_or_never() {
            Some(Some(Ok(Frame::Data(data)))) => {
                received += data.len();
                stream.timer.set_received(received as u64);
            }
            Some(Some(Ok(Frame::Trailers(_))) | None) => {
                stream.body = Body::Empty;
                break;
            }
            Some(Some(Err(_))) | None => break,
        }
    }
}

/// What a request of too much body ends with.
pub(super) fn too_large(stream: &Stream) -> Outcome {
    stream.manager.stats.downstream_rq_too_large.inc();
    let mut reply = LocalReply::new(413, "request_payload_too_large").body("Payload Too Large");
    reply.close = true;
    reply.outcome()
}

/// What a request whose body breaks off ends with.
pub(super) fn broken(stream: &mut Stream, error: &BodyError) -> Outcome {
    LocalReply::to_broken_body(error, &mut stream.info).map_or(Outcome::Reset, LocalReply::outcome)
}

/// Reads a request's body before it goes on; it stays the stream's. One of more than `max` bytes is refused, or where
/// a part is enough no more is read than what has come by then.
pub(super) async fn read_ahead(stream: &mut Stream, max: usize, partial: bool) -> Result<Bytes, Outcome> {
    let limit = if partial { stream.buffer_limit() } else { max };
    let mut data = BytesMut::new();
    let mut trailers = None;
    let mut complete = true;
    loop {
        match stream.body.frame().await {
            None => break,
            Some(Ok(Frame::Data(more))) => {
                sampan_core::clock::tick();
                stream.timer.touch();
                stream.timer.set_received((data.len() + more.len()) as u64);
                let full = partial && data.len() + more.len() >= max;
                if !full && data.len() + more.len() > limit {
                    return Err(too_large(stream));
                }
                data.extend_from_slice(&more);
                if full {
                    complete = stream.body.is_end();
                    break;
                }
            }
            Some(Ok(Frame::Trailers(t))) => {
                trailers = Some(t);
                break;
            }
            Some(Err(error)) => return Err(broken(stream, &error)),
        }
    }
    let rest = if complete {
        stream.info.last_downstream_rx = Some(std::time::Instant::now());
        stream.timer.request_done();
        Body::Empty
    } else {
        std::mem::take(&mut stream.body)
    };
    let data = data.freeze();
    let first = Some(data.clone()).filter(|data| !data.is_empty());
    stream.body = Body::stream(Buffered { data: first, trailers, rest });
    Ok(data)
}
